"""What Tune is given of a search: where trials come from, and which of them end early."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from grainmill.search.asha import ASHA
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study


class StudySearcher(Searcher):  # type: ignore[misc]
    """Hands the study's trials to Tune: those that a killed process left running, then promoted ones, then new ones.

    It only gives. What comes back is taken down by the clerk of the trials, which sees why a trial failed, too.
    """

    def __init__(self, study: Study, asha: ASHA, spent: Callable[[], bool]) -> None:
        """
        Args:
            spent: whether the budget is.
        """
        super().__init__()
        self.study, self.asha, self.spent = study, asha, spent
        self._left_running = [record for record in study.records if record.state == "running"]
        self._out: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether nothing is to be run any more."""
        return self.spent() or not (
            self._left_running or self.study.remaining > 0 or self.asha.promoted(self._paused())
        )

    def _paused(self) -> list[TrialRecord]:
        if self.study.experiment.search.losers != "pause":
            return []
        return [record for record in self.study.records if record.state == "paused"]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The number and the settings of the next trial; None to ask again later."""
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
            # A trial that still runs can bring about that a paused one goes on.
            return None if self._out and self.study.experiment.search.losers == "pause" else Searcher.FINISHED
        self.study.keep()  # before it leaves a checkpoint under its number
        self._out.add(trial_id)
        return {"number": record.number, "spec": self.study.experiment.spec(record.setting).model_dump()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """It is no longer out."""
        self._out.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its database."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that we do not use; an open database does not pickle


class Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Asks the clerk after each epoch whether the trial goes on."""

    def __init__(self, goes_on: Callable[[Trial, Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.goes_on = goes_on

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether to go on."""
        decision: str = TrialScheduler.CONTINUE if self.goes_on(trial, result) else TrialScheduler.STOP
        return decision

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as the searcher
