"""SQLite files: made in one step, and checked before a library opens them, which may wait for minutes."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

SQLITE = "sqlite:///"
"""Beginning of the URL of a SQLite file."""
LOCK_SECONDS = 3
"""Time in seconds for which another process may hold the lock of a file."""
_UNIT = 512
"""Every whole SQLite file is a multiple of this many bytes."""
_REPLACE = "put a copy of it in its place, or begin anew in another folder"
_REASONS = {
    "SQLITE_BUSY": f"has been locked by another process for {LOCK_SECONDS} seconds; end that process",
    "SQLITE_CORRUPT": f"is cut short or damaged; {_REPLACE}",
    "SQLITE_FULL": "is on a full disk; free some space",
    "SQLITE_NOTADB": f"is no SQLite file; {_REPLACE}",
}
"""SQLite's name of an error -> what is wrong with the file, and the remedy."""


def url_of(file: Path) -> str:
    """URL of a SQLite file, quoted where SQLAlchemy would read the plain path as another."""
    from sqlalchemy import URL, make_url

    path = str(file.absolute())
    plain = SQLITE + path
    return plain if make_url(plain).database == path else URL.create("sqlite", database=path).render_as_string()


def file_of(url: str) -> Path | None:
    """The file of a URL; None if the database is another or in memory. The inverse of `url_of`."""
    from sqlalchemy import make_url

    if not url.startswith("sqlite"):
        return None
    database = make_url(url).database
    return Path(database) if database and database != ":memory:" else None


def problem(file: Path) -> str | None:
    """Return why a SQLite file cannot be read and written, and the remedy; None if it can, or does not exist."""
    reason = _reason(file) if os.path.lexists(file) else None
    return reason and f"{file} {reason}"


def _reason(file: Path) -> str | None:
    if not file.is_file():
        return f"is {'a folder' if file.is_dir() else 'no file'}; move it away, or begin anew in another folder"
    folder, user = file.parent, os.getuid()
    if not (os.access(file, os.R_OK | os.W_OK) and os.access(folder, os.W_OK | os.X_OK)):  # SQLite adds a journal
        return f"and its folder must be writable for user {user}; make them so, or begin anew in another folder"
    size = file.stat().st_size
    if not size:
        return "is empty; put a copy of it in its place, or delete it to begin anew"
    if size > _UNIT and size % _UNIT:
        return _REASONS["SQLITE_CORRUPT"]
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")  # reads the header and takes the lock to write, but writes nothing
            database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        return _REASONS.get(getattr(error, "sqlite_errorname", ""), f"cannot be opened ({error}); {_REPLACE}")
    return None


def make(file: Path, make_tables: Callable[[str], None]) -> None:
    """Make a missing file in one step: a process killed halfway would leave an unusable one.

    Args:
        file: path of the file; nothing happens if it exists.
        make_tables: receives the URL of a draft, and makes the tables there.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid4()}.draft")
    try:
        make_tables(url_of(draft))
        with suppress(FileExistsError):  # another process was faster
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)
