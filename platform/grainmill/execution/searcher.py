"""Search algorithm and scheduler for Ray Tune: which trial runs next, and which trials end early."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grainmill.search.asha import ASHA
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study


class StudySearcher(Searcher):  # type: ignore[misc]
    """Gives the study's trials to Tune: those that a killed process left running, then promoted ones, then new ones.

    Results are recorded by `TrialCallback`, which also learns why a trial failed.
    """

    def __init__(self, study: Study, asha: ASHA, spent: Callable[[], bool]) -> None:
        super().__init__()
        self.study, self.asha = study, asha
        self.spent = spent
        """Returns True when the budget is used up."""
        self._left_running = [record for record in study.records if record.state == "running"]
        self._running: set[str] = set()
        """Tune's ids of the trials that have not ended."""

    @property
    def finished(self) -> bool:
        """Return True when no trial is left to run."""
        left = self._left_running or self.study.remaining > 0 or self.asha.promoted(self._paused())
        return self.spent() or not left

    def _paused(self) -> list[TrialRecord]:
        if self.study.experiment.search.losers != "pause":
            return []
        return [record for record in self.study.records if record.state == "paused"]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return number and settings of the next trial; None if Tune must ask again later."""
        if self.spent():
            return Searcher.FINISHED
        if self._left_running:
            record = self._left_running.pop(0)
            self.study.interrupt(record.number, "the command ended")
        elif promoted := self.asha.promoted(self._paused()):
            self.study.note(promoted.number, "paused", False)
            record = promoted
        elif asked := self.study.ask():
            record = asked
        else:
            # The result of a running trial can promote a paused one.
            waits = self._running and self.study.experiment.search.losers == "pause"
            return None if waits else Searcher.FINISHED
        self.study.keep()  # before the trial writes a checkpoint under its number
        self._running.add(trial_id)
        return {"number": record.number, "spec": self.study.experiment.spec(record.setting)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that a trial has ended."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is in its database."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that is not used here; an open database does not pickle


class Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Passes each result on, and stops the trial if the answer is False."""

    def __init__(self, receive: Callable[[Trial, Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.receive = receive

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return Tune's decision to continue or to stop."""
        decision: str = TrialScheduler.CONTINUE if self.receive(trial, result) else TrialScheduler.STOP
        return decision

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see `StudySearcher`
