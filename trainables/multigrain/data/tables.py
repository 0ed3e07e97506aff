"""CSV files: their rows with line numbers, and hints on what other programs write instead."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from multigrain.errors import DataError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""Characters that other programs put between cells in place of commas."""


def read_rows(file: Path, columns: Sequence[str], what: str = "list") -> list[tuple[int, list[str]]]:
    """Return the rows that are not blank, the header first, each with the number of its line.

    Args:
        file: the CSV file.
        columns: names that the header can have, for messages.
        what: word for the file in messages.
    Raises:
        DataError: the file cannot be read as such.
    """
    if not file.is_file():
        raise DataError([f"the {what} must exist, but there is no file {file}"])
    found: list[tuple[int, list[str]]] = []
    line = 1
    try:
        text = decoded(file, what)
        if match := re.match(r'\s*"?sep=(.)"?\s*$', text, re.MULTILINE):
            got = f"a {what} must begin with its columns, but does with {match[0].strip()!r}, a line for Excel"
            raise DataError([f"{file}, line 1: {got}; delete it, and separate cells by commas"])
        _check_separator(file, text, columns)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for cells in reader:
            if cells:
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        rule = f"rows must be comma-separated values, but this one is not ({error}); check its quotes"
        raise DataError([f"{file}, line {line}: {rule}"]) from error
    if not found:
        raise DataError([f"{file}, line 1: a {what} must begin with its columns ({', '.join(columns)}), but is empty"])
    return found


def _check_separator(file: Path, text: str, columns: Sequence[str]) -> None:
    """Raise DataError if names of columns in the first line that is not blank are separated by something else."""
    lines = (numbered for numbered in enumerate(text.splitlines(), 1) if numbered[1].strip())
    line, header = next(lines, (1, ""))
    for separator, name in SEPARATORS.items():
        words = {word.strip(' "').casefold() for cell in header.split(",") for word in cell.split(separator)}
        if separator in header and words & {*columns}:
            got = f"cells must be separated by commas, but are by {name}"
            raise DataError([f"{file}, line {line}: {got}; save it as CSV with commas"])


def decoded(file: Path, what: str, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark. Raises DataError if it is not UTF-8.

    With `errors="surrogateescape"`, bytes that are not UTF-8 are read as `os.fsdecode` does.
    """
    content = file.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise DataError([f"{file}, line 1: a {what} must be UTF-8, but is UTF-16; save it as `CSV UTF-8`"])
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        rule = f"a {what} must be UTF-8, but is not ({error.reason}); save it as `CSV UTF-8`"
        raise DataError([f"{file}, line {line}: {rule}"]) from error
