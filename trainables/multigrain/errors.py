"""Error for data that a user can fix."""

from collections.abc import Sequence

SHOWN = 20
"""Number of problems that a message shows; of the others, it gives the number."""


def shortened(lines: Sequence[str]) -> list[str]:
    """Return the first `SHOWN` lines, and the number of the others."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"and {more} more of the kind"] if more > 0 else [*lines]


class DataError(ValueError):
    """The images cannot be used; `problems` says why, one sentence each."""

    def __init__(self, problems: list[str] | str) -> None:
        # torch makes an error of a loading process again, with its text and traceback as the only argument.
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(shortened(self.problems)))

    def __reduce__(self) -> tuple[type["DataError"], tuple[list[str]]]:
        return DataError, (self.problems,)  # an exception is pickled by its text otherwise
