"""What an earlier run knows of its trials; only read."""

import statistics
from itertools import pairwise
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from grainmill.errors import StorageError

STUDY = "trial"
"""Name of the study of a search in its database."""


def epoch_seconds(folder: Path) -> float:
    """The median time of an epoch over a search, between the reports of two after another.

    Args:
        folder: of a run, such as `grainmill-runs/demo/run-1`.
    Raises:
        StorageError: there is no study, or no trial in it has two epochs.
    """
    file = folder / "study.db"
    if not file.is_file():
        raise StorageError(
            f"an earlier run has its study in its folder, but there is no {file.absolute()}; name one such as "
            "grainmill-runs/demo/run-1, or give --epoch-seconds"
        )
    try:
        study = optuna.load_study(study_name=STUDY, storage=optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}"))
        histories = [trial.user_attrs.get("history", ()) for trial in study.get_trials(deepcopy=False)]
    except (KeyError, RuntimeError, StorageInternalError, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"{file} must hold a search, but cannot be read ({reason}); give --epoch-seconds") from error
    times = [after["at"] - before["at"] for rows in histories for before, after in pairwise(rows)]
    if not times:
        raise StorageError(
            f"the time of an epoch is taken between two reports of a trial, but in {folder} no trial has two; give "
            "--epoch-seconds"
        )
    return statistics.median(times) / 1000
