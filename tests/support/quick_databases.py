"""Makes the databases of Optuna and MLflow in this process quick to open and to write."""

import sqlalchemy
from alembic.script import ScriptDirectory

_read = ScriptDirectory.from_config
_migrations = {}


def _read_once(config):
    """Keep the migrations of a folder: to read them takes longer than all the rest of opening a database."""
    folder = config.get_main_option("script_location")
    if folder not in _migrations:
        _migrations[folder] = _read(config)
    return _migrations[folder]


def _do_not_sync(connection, _):
    """Let SQLite not wait for the disk: only a loss of power could tell the difference."""
    if "sqlite" in type(connection).__module__:
        connection.execute("PRAGMA synchronous=OFF")


def install():
    """Make databases quick until the process ends."""
    ScriptDirectory.from_config = _read_once
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_sync)
