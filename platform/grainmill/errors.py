"""Errors that a user can fix. Each message says the rule, the value found, and the remedy.

GrainmillError
├── ExperimentError    the experiment file, or what it names, is wrong; holds every problem
├── NameTakenError     the name belongs to a run with other settings
├── StorageError       the storage folder cannot be written, or S3 cannot be read
│   └── SourceError    the same in what a trainable reads; also a ValueError
├── BusyError          another process works in the same folder
├── ResourceError      Ray cannot give what a trial asks for
├── TrackingError      MLflow cannot be reached
├── SearchError        no trial came through
├── EvaluationError    there is no model, or nothing to evaluate it on
├── PromotionError     a version does not become the champion
├── CorpusError        images or an index cannot be used
├── SubmissionError    a cluster does not get a job
└── ServingError       a server could be reached by anyone
"""

from collections.abc import Sequence
from typing import NamedTuple


class GrainmillError(Exception):
    """Base class; any other exception is a defect of Grainmill."""


class Problem(NamedTuple):
    """A problem in an experiment file."""

    line: int | None
    """Line number from 1; None for a setting of the command line or a default."""
    key: str
    """Dotted path of the setting; empty for the whole file."""
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return place + (f"{self.key}: " if self.key else "") + self.message


class ExperimentError(GrainmillError):
    """An experiment file, or something that it names, is wrong; `problems` has everything."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.key))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{file}: {count}", *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type["ExperimentError"], tuple[str, list[Problem]]]:
        return ExperimentError, (self.file, self.problems)  # an exception is pickled by its text otherwise


class NameTakenError(GrainmillError):
    """The name belongs to a run with other settings."""


class StorageError(GrainmillError):
    """A folder cannot be written, or S3 cannot be read; each argument is one problem."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class SourceError(StorageError, ValueError):
    """A trainable's data in S3 cannot be read; a ValueError, since a trainable does not know our errors."""


class BusyError(GrainmillError):
    """Another process works in the same folder."""


class ResourceError(GrainmillError):
    """The cluster cannot give what a trial asks for."""


class TrackingError(GrainmillError):
    """MLflow does not answer, or not as expected."""


class SearchError(GrainmillError):
    """A search has no winner, because no trial finished."""


class EvaluationError(GrainmillError):
    """A model or a benchmark cannot be used for an evaluation."""


class PromotionError(GrainmillError):
    """A version does not become the champion, which stays as it is."""


class CorpusError(GrainmillError):
    """Images cannot be embedded, or an index cannot answer a query."""


class ServingError(GrainmillError):
    """A server could be reached by anyone."""


class SubmissionError(GrainmillError):
    """A job cannot be submitted to a cluster."""
