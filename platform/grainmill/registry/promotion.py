"""Which version of a model is for users: the alias `champion` moves only to one that is shown to be better.

`champion` is set in one step; all else can be told from it. The tag `promotion.over` of a version says which one it
took the place of, and the alias `previous` follows from that: whatever a killed process left undone, the next one puts
right. Each decision is a tag `promotion.<number>` of the versions that it is about, numbered as the leases are.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from grainmill import trainable
from grainmill.config.experiment import Promotion
from grainmill.config.validation import checked_settings
from grainmill.config.yaml_document import Document, Overrides
from grainmill.errors import PromotionError, TrackingError, hidden
from grainmill.registry import comparison, models, promotion_lock
from grainmill.registry.models import CHALLENGER, CHAMPION, Version
from grainmill.tracking.mlflow_runs import PARENT, check_server, translate_errors

PREVIOUS = "previous"
OVER, DECISION = "promotion.over", "promotion.{:06d}"
QUERIES = 20
"""Fewer show nothing: the bootstrap interval of so few is too narrow."""
LOADS, CALLS = 3, 20
"""Calls of a model before its time is taken, and while it is."""


class Decision(NamedTuple):
    """What became of a model's champion."""

    champion: Version
    why: str


def promote(tracking_uri: str, model: str, overrides: Overrides, note: Callable[[str], None]) -> Decision:
    """Make a version the champion if it passes the gates and beats the champion beyond the bootstrap interval.

    The gates are the section `promotion` of the experiment that trained it.

    Args:
        tracking_uri: MLflow's.
        model: such as `models:/name/3`, or `models:/name@challenger`.
        overrides: changes to the gates.
        note: is told of what takes time.
    Raises:
        ExperimentError: an override is wrong.
        PromotionError: the version does not pass, or was not evaluated on what the champion was; it says so.
        TrackingError: there is no such version, or MLflow does not answer.
    """
    with _registry(tracking_uri, model) as client:
        challenger = models.look_up(client, model.removeprefix("models:/"))
        version = Version(challenger.name, str(challenger.version))
        gates = _gates(client, challenger, overrides)
        shown = comparison.load(client, challenger)
        if missing := [one for one in (gates.metric, *gates.minimum) if one not in shown]:
            raise _unshown(version, missing, shown)
        assert gates.metric, "it was shown"
        failures = [
            f"{name} must be at least {least:g}, but is {shown[name].mean:.4f}"
            for name, least in gates.minimum.items()
            if not shown[name].mean >= least
        ]
        if gates.megabytes or gates.milliseconds:
            note("loading the model")
            failures += _size_and_time(tracking_uri, version, gates)
        with promotion_lock.hold(client, version.name, note) as right:
            champion = _champion(client, version.name)
            if champion and str(champion.version) == version.number:
                return Decision(version, "it is the champion already")
            why, better = "there was no champion", True
            if champion:
                why, better = _compared(gates.metric, version, shown[gates.metric], client, champion)
            refusals = [*failures, *([] if better else [f"it must be better beyond the interval, but is not: {why}"])]
            if refusals:
                text = f"{version.uri} does not become the champion: {'; '.join(refusals)}"
                _write(client, challenger, right, f"refused: {'; '.join(refusals)}")
                raise PromotionError(text)
            _crown(client, right, challenger, champion, why)
            return Decision(version, why)


def rollback(tracking_uri: str, name: str, note: Callable[[str], None]) -> Decision:
    """Make the version the champion again of which the champion took the place.

    Raises:
        PromotionError: there is none.
        TrackingError: there is no such model, or MLflow does not answer.
    """
    name = name.removeprefix("models:/").partition("@")[0].partition("/")[0]
    with (
        _registry(tracking_uri, f"models:/{name}@{CHAMPION}") as client,
        promotion_lock.hold(client, name, note) as right,
    ):
        champion = _champion(client, name)
        over = champion and champion.tags.get(OVER)
        if not over:
            raise PromotionError(
                f"a champion can be rolled back if it took the place of another, but that of {name} "
                f"{'did not' if champion else 'is missing'}; promote a version"
            )
        earlier = client.get_model_version(name, over)
        back, gone = Version(name, str(earlier.version)), Version(name, str(champion.version))
        _write(client, champion, right, f"rolling back to {back.uri}")
        right.check()
        client.set_registered_model_alias(name, CHAMPION, back.number)
        _follow(client, name, earlier.tags.get(OVER))
        _write(client, champion, right, f"rolled back to {back.uri}")
        _write(client, earlier, right, f"champion again, {gone.uri} was rolled back")
        return Decision(back, f"{gone.uri} was rolled back")


@contextmanager
def _registry(tracking_uri: str, model: str) -> Iterator[MlflowClient]:
    """MLflow's client; what is not there is told as such."""
    check_server(tracking_uri)
    with translate_errors(tracking_uri):
        client = MlflowClient(tracking_uri)
        try:
            yield client
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise TrackingError(
                f"{model} must be in the registry at {hidden(tracking_uri)}, named as models:/name@alias or "
                f"models:/name/version, but: {error.message}"
            ) from error


def _gates(client: MlflowClient, version: Any, overrides: Overrides) -> Promotion:
    """Those of the experiment that trained a version, with changes."""
    tree: dict[str, Any] = {}
    parent = client.get_run(version.run_id).data.tags.get(PARENT)
    if parent and any(item.path == "experiment.yaml" for item in client.list_artifacts(parent)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(client.download_artifacts(parent, "experiment.yaml", folder))
            tree = Document(file).tree.get("promotion", {})
    return checked_settings(Promotion, overrides, tree)


def _unshown(
    version: Version, missing: Sequence[str | None], shown: Mapping[str, comparison.StoredScores]
) -> PromotionError:
    known = ", ".join(sorted(shown)) or "nothing"
    if None in missing:
        return PromotionError(
            f"a promotion needs a metric in which {version.uri} must be better, got none; measured is {known}; "
            "set promotion.metric in the experiment file, or --set metric=NAME"
        )
    return PromotionError(
        f"{version.uri} must have been evaluated for {', '.join(map(str, missing))}, but {known} is measured; "
        f"grainmill evaluate {version.uri} --on BENCHMARK=PATH, or --set another metric that has a value for each query"
    )


def _size_and_time(tracking_uri: str, version: Version, gates: Promotion) -> list[str]:
    """What is wrong with a model's size and speed."""
    stored = models.fetch(tracking_uri, version.uri)
    megabytes = sum(path.stat().st_size for path in stored.folder.rglob("*") if path.is_file()) / 1e6
    failures = []
    if gates.megabytes and megabytes > gates.megabytes:
        failures.append(f"its files must take at most {gates.megabytes:g} MB, but take {megabytes:.1f}")
    if gates.milliseconds:
        model, row = trainable.find(stored.trainable).load(stored.folder), stored.example.head(1)
        seconds = []
        for _ in range(LOADS + CALLS):
            began = time.perf_counter()
            model(row)
            seconds.append(time.perf_counter() - began)
        took = 1000 * median(seconds[LOADS:])
        if took > gates.milliseconds:
            failures.append(f"a row must take at most {gates.milliseconds:g} ms, but takes {took:.1f}")
    return failures


def _compared(
    metric: str, version: Version, shown: comparison.StoredScores, client: MlflowClient, champion: Any
) -> tuple[str, bool]:
    """The comparison in words, and whether the version is better than the champion."""
    rival, known = Version(champion.name, str(champion.version)), comparison.load(client, champion).get(metric)
    if known is None or known.data != shown.data:
        lacks = "was not evaluated for it" if known is None else "was evaluated on other data"
        raise PromotionError(
            f"{version.uri} and the champion must be compared in {metric} on the same data, but {rival.uri} {lacks}; "
            f"grainmill evaluate {rival.uri} and {version.uri} with the same --on"
        )
    count = len(shown.values)
    found = comparison.difference(shown.values, known.values)
    text = (
        f"{metric} {shown.mean:.4f} against {known.mean:.4f} of {rival.uri}, {found.mean:+.4f} with a 95 % interval "
        f"from {found.low:+.4f} to {found.high:+.4f} over {count} queries"
    )
    if count < QUERIES:
        return f"{text}, of which it takes at least {QUERIES}", False
    return text, found.low > 0


def _champion(client: MlflowClient, name: str) -> Any:
    """The champion, None if there is none; what a killed process left undone about it is put right."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    if number is None:
        return None
    champion = client.get_model_version(name, str(number))
    _follow(client, name, champion.tags.get(OVER))
    for key, text in champion.tags.items():
        if text.startswith("promoting: "):
            client.set_model_version_tag(name, str(number), key, text.replace("promoting: ", "promoted: ", 1))
    return champion


def _follow(client: MlflowClient, name: str, over: str | None) -> None:
    """Set the alias `previous` to the version of which the champion took the place."""
    now = client.get_registered_model(name).aliases.get(PREVIOUS)
    if over is None and now is not None:
        client.delete_registered_model_alias(name, PREVIOUS)
    elif over is not None and over != str(now):
        client.set_registered_model_alias(name, PREVIOUS, over)


def _write(client: MlflowClient, version: Any, right: promotion_lock.PromotionLock, text: str) -> None:
    client.set_model_version_tag(version.name, str(version.version), DECISION.format(right.number), text)


def _crown(client: MlflowClient, right: promotion_lock.PromotionLock, version: Any, champion: Any, why: str) -> None:
    """Move the alias; each step leaves what can be told apart from its outcome."""
    name, number = version.name, str(version.version)
    _write(client, version, right, f"promoting: {why}")
    if champion:
        client.set_model_version_tag(name, number, OVER, str(champion.version))
        client.set_registered_model_alias(name, PREVIOUS, str(champion.version))
    right.check()
    client.set_registered_model_alias(name, CHAMPION, number)
    _write(client, version, right, f"promoted: {why}")
    if champion:
        _write(client, champion, right, f"replaced by {Version(name, number).uri}")
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
