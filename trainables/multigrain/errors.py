"""The errors that a user can put right."""

from collections.abc import Sequence

SHOWN = 20
"""Lines of a list that are shown; of the others, the number is."""


def shortened(lines: Sequence[str]) -> list[str]:
    """The first `SHOWN` lines, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"and {more} more of the kind"] if more > 0 else [*lines]


class DataError(ValueError):
    """The images on disk cannot be used; `problems` says why, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(shortened(problems)))
        self.problems = problems
