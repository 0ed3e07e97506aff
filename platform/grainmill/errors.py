"""What a user can put right. Each message says the rule, the value found, and the remedy.

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
└── SubmissionError    a cluster does not get a job
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class GrainmillError(Exception):
    """The root: whatever is not one of these is a defect of ours."""


class Problem(NamedTuple):
    """One thing that is wrong with an experiment file."""

    line: int | None
    """From 1; None for what a command-line override or a default said."""
    key: str
    """Dotted path, empty for the file as a whole."""
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return place + (f"{self.key}: " if self.key else "") + self.message


class ExperimentError(GrainmillError):
    """Everything that is wrong with one experiment file."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.key))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{file}: {count}", *(f"  {problem}" for problem in self.problems)]))


class NameTakenError(GrainmillError):
    """A name stands for one set of settings."""


class StorageError(GrainmillError):
    """A run needs a folder to write to. Each argument is one problem."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class SourceError(StorageError, ValueError):
    """Data in S3 cannot be read; also a ValueError, since a trainable knows no other error of its caller."""


class BusyError(GrainmillError):
    """One process at a time works in a run's folder."""


class ResourceError(GrainmillError):
    """The cluster is too small."""


class TrackingError(GrainmillError):
    """MLflow did not answer, or not as it should."""


class SearchError(GrainmillError):
    """There is no winner."""


class EvaluationError(GrainmillError):
    """A model or a benchmark cannot be used."""


class PromotionError(GrainmillError):
    """The champion stays as it is."""


class CorpusError(GrainmillError):
    """There are no images to embed, or the index is of no use for what is asked."""


class SubmissionError(GrainmillError):
    """A cluster cannot be given a job, or must not be."""


def hidden(text: str) -> str:
    """A text without the users and passwords in its addresses; of an `@` in a path rather too much goes."""
    return re.sub(r"(?<=://)[^\s\"']*@", "", text)
