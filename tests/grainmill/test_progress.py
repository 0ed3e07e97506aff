import io

import pytest

from grainmill import progress
from grainmill.cli import console

NAMES = [
    ("[/b].jpg", "[/b].jpg"),
    ("[v2] [red]x", "[v2] [red]x"),
    (":smile:.jpg", ":smile:.jpg"),
    ("é 日本 👍.jpg", "é 日本 👍.jpg"),
    ("a\x1b[31mred", r"a\x1b[31mred"),
    ("bell\x07 back\x08 return\r", r"bell\x07 back\x08 return\r"),
    ("\x9b31m \x7f", r"\x9b31m \x7f"),
    ("\u202egpj.exe", r"\u202egpj.exe"),
    ("byte \udcff", r"byte \udcff"),
]


@pytest.fixture
def shown(monkeypatch):
    """Text that the consoles have shown so far."""
    file = io.StringIO()
    for one in (progress.out, progress.err):
        monkeypatch.setattr(one, "_file", file)
        monkeypatch.setattr(one, "_width", 80)
    return file.getvalue


@pytest.mark.parametrize(("name", "expected"), NAMES)
@pytest.mark.parametrize("say", [console.say, console.complain, progress.note(quiet=False)])
def test_a_name_is_shown_as_it_is_and_never_obeyed(say, name, expected, shown):
    say(name)
    assert shown() == expected + "\n"


@pytest.mark.parametrize(("name", "expected"), [*NAMES, ("two\nlines", r"two\nlines")])
def test_a_cell_of_a_table_is_one_line_as_it_is(name, expected, shown):
    console.print_table(("a", "b"), [(name, "x")])
    row = shown().splitlines()[3]
    assert row[1:].split("│")[0].strip() == expected


def test_lines_of_a_text_stay(shown):
    console.say("one\n  two" + "x" * 100)
    assert shown() == "one\n  two" + "x" * 100 + "\n"
