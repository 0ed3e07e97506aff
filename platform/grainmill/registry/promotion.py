"""Promotion: the alias `champion` moves only to a version that is shown to be better than the champion.

Setting the alias is the one step that decides; all else follows from it. The tag `promotion.over` of a version names
the champion before it, and the alias `previous` follows from that tag: the next promotion or rollback completes what a
killed process left undone. Each decision is a tag `promotion.<number>` of the versions that it concerns, with the
number of the promotion lock.
"""

import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping
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
from grainmill.errors import PromotionError
from grainmill.registry import comparison, models, promotion_lock
from grainmill.registry.comparison import StoredScores
from grainmill.registry.models import CHALLENGER, CHAMPION, SCHEME, Version
from grainmill.registry.promotion_lock import PromotionLock
from grainmill.tracking.mlflow_runs import PARENT, check_registry, translate_errors

PREVIOUS = "previous"
"""Alias of the version that was the champion before."""
OVER, DECISION = "promotion.over", "promotion.{:06d}"
MIN_QUERIES = 20
"""Smallest number of queries; the bootstrap interval of fewer is too narrow."""
WARM_UP_CALLS, TIMED_CALLS = 3, 20


class Decision(NamedTuple):
    """Outcome of a promotion or a rollback: the champion, and the reason."""

    champion: Version
    why: str


def promote(tracking_uri: str, model: str, overrides: Overrides, note: Callable[[str], None]) -> Decision:
    """Make a version the champion if it passes the gates and beats the champion beyond the bootstrap interval.

    The gates are the section `promotion` of the experiment that trained the version, changed by the overrides. `note`
    receives messages about what takes time. See `grainmill.api.promote` for errors.
    """
    with _registry(tracking_uri, model) as client:
        challenger = models.look_up(client, model)
        version = Version.of(challenger)
        gates = _gates(client, challenger, overrides)
        scores = comparison.load(client, challenger)
        _stop_if_unmeasured(version, gates, scores)
        assert gates.metric is not None, "checked above"
        failures = [
            f"{name} must be at least {least:g}, but is {scores[name].mean:.4f}"
            for name, least in gates.minimum.items()
            if not scores[name].mean >= least
        ]
        if gates.megabytes or gates.milliseconds:
            note("loading the model")
            failures += _size_and_speed_failures(tracking_uri, version, gates)
        with promotion_lock.hold(client, version.name, note) as lock:
            champion = _champion(client, version.name)
            if champion and str(champion.version) == version.number:
                return Decision(version, "it is the champion already")
            why, better = "there was no champion", True
            if champion:
                why, better = _compare(gates.metric, version, scores[gates.metric], client, champion)
            if not better:
                failures.append(f"it must be better beyond the interval, but is not: {why}")
            if failures:
                _record(client, challenger, lock, f"refused: {'; '.join(failures)}")
                raise PromotionError(f"{version.uri} does not become the champion: {'; '.join(failures)}")
            _replace_champion(client, lock, challenger, champion, why)
            return Decision(version, why)


def rollback(tracking_uri: str, name: str, note: Callable[[str], None]) -> Decision:
    """Make the version the champion again that the champion replaced; see `grainmill.api.rollback` for errors."""
    name = name.removeprefix(SCHEME).partition("@")[0].partition("/")[0]
    with (
        _registry(tracking_uri, f"{SCHEME}{name}@{CHAMPION}") as client,
        promotion_lock.hold(client, name, note) as lock,
    ):
        champion = _champion(client, name)
        over = champion and champion.tags.get(OVER)
        if not over:
            raise PromotionError(
                f"a rollback needs a champion that has replaced another version, but {name} has "
                f"{'one that replaced none' if champion else 'no champion'}; promote a version"
            )
        earlier = client.get_model_version(name, over)
        back, gone = Version.of(earlier), Version.of(champion)
        _record(client, champion, lock, f"rolling back to {back.uri}")
        lock.check()
        client.set_registered_model_alias(name, CHAMPION, back.number)
        _set_previous(client, name, earlier.tags.get(OVER))
        _record(client, champion, lock, f"rolled back to {back.uri}")
        _record(client, earlier, lock, f"champion again, {gone.uri} was rolled back")
        return Decision(back, f"{gone.uri} was rolled back")


@contextmanager
def _registry(tracking_uri: str, model: str) -> Iterator[MlflowClient]:
    """Connect to MLflow, and explain errors about a model that is not in the registry."""
    check_registry(tracking_uri)
    with translate_errors(tracking_uri):
        try:
            yield MlflowClient(tracking_uri)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise models.not_registered(tracking_uri, model, error) from error


def _gates(client: MlflowClient, version: Any, overrides: Overrides) -> Promotion:
    """Read the gates of the experiment that trained a version, and apply the overrides."""
    tree: dict[str, Any] = {}
    parent = client.get_run(version.run_id).data.tags.get(PARENT)
    if parent and any(item.path == "experiment.yaml" for item in client.list_artifacts(parent)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(client.download_artifacts(parent, "experiment.yaml", folder))
            tree = Document(file).tree.get("promotion", {})
    return checked_settings(Promotion, overrides, tree)


def _stop_if_unmeasured(version: Version, gates: Promotion, scores: Mapping[str, StoredScores]) -> None:
    measured = ", ".join(sorted(scores)) or "nothing"
    if gates.metric is None:
        raise PromotionError(
            f"a promotion needs a metric in which {version.uri} must be better, got none; measured is {measured}; "
            "set promotion.metric in the experiment file, or --set metric=NAME"
        )
    if missing := [name for name in (gates.metric, *gates.minimum) if name not in scores]:
        raise PromotionError(
            f"{version.uri} must have been evaluated for {', '.join(missing)}, but {measured} is measured; grainmill "
            f"evaluate {version.uri} --on BENCHMARK=PATH, or --set another metric that has a value for each query"
        )


def _size_and_speed_failures(tracking_uri: str, version: Version, gates: Promotion) -> list[str]:
    """List the limits of size and time that the model exceeds; the time is the median of several calls."""
    with models.fetched(tracking_uri, version.uri) as stored:
        megabytes = sum(path.stat().st_size for path in stored.folder.rglob("*") if path.is_file()) / 1e6
        model = trainable.find(stored.trainable).load(stored.folder)
    failures = []
    if gates.megabytes and megabytes > gates.megabytes:
        failures.append(f"its files must take at most {gates.megabytes:g} MB, but take {megabytes:.1f}")
    if gates.milliseconds:
        row = stored.example.head(1)
        seconds = timeit.repeat(lambda: model(row), number=1, repeat=WARM_UP_CALLS + TIMED_CALLS)
        took = 1000 * median(seconds[WARM_UP_CALLS:])
        if took > gates.milliseconds:
            failures.append(f"a row must take at most {gates.milliseconds:g} ms, but takes {took:.1f}")
    return failures


def _compare(
    metric: str, version: Version, scores: StoredScores, client: MlflowClient, champion: Any
) -> tuple[str, bool]:
    """Compare a version with the champion; returns the result in words, and True if the version is better."""
    rival, known = Version.of(champion), comparison.load(client, champion).get(metric)
    if known is None or known.data != scores.data:
        lacks = "was not evaluated for it" if known is None else "was evaluated on other data"
        raise PromotionError(
            f"{version.uri} and the champion must be compared in {metric} on the same data, but {rival.uri} {lacks}; "
            f"grainmill evaluate {rival.uri} and {version.uri} with the same --on"
        )
    count = len(scores.values)
    found = comparison.difference(scores.values, known.values)
    text = (
        f"{metric} {scores.mean:.4f} against {known.mean:.4f} of {rival.uri}, {found.mean:+.4f} with a 95 % interval "
        f"from {found.low:+.4f} to {found.high:+.4f} over {count} queries"
    )
    if count < MIN_QUERIES:
        return f"{text}, but at least {MIN_QUERIES} are needed", False
    return text, found.low > 0


def _champion(client: MlflowClient, name: str) -> Any:
    """Return the champion, or None; completes what a killed process left undone about it."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    if number is None:
        return None
    champion = client.get_model_version(name, str(number))
    _set_previous(client, name, champion.tags.get(OVER))
    for key, text in champion.tags.items():
        if text.startswith("promoting: "):
            client.set_model_version_tag(name, str(number), key, text.replace("promoting: ", "promoted: ", 1))
    return champion


def _set_previous(client: MlflowClient, name: str, over: str | None) -> None:
    """Set the alias `previous` to version `over`, or remove the alias."""
    now = client.get_registered_model(name).aliases.get(PREVIOUS)
    if over is None and now is not None:
        client.delete_registered_model_alias(name, PREVIOUS)
    elif over is not None and over != str(now):
        client.set_registered_model_alias(name, PREVIOUS, over)


def _record(client: MlflowClient, version: Any, lock: PromotionLock, decision: str) -> None:
    client.set_model_version_tag(version.name, str(version.version), DECISION.format(lock.number), decision)


def _replace_champion(client: MlflowClient, lock: PromotionLock, version: Any, champion: Any, why: str) -> None:
    """Move the alias `champion`, in steps that can be completed after a kill at any of them."""
    name, number = version.name, str(version.version)
    _record(client, version, lock, f"promoting: {why}")
    if champion:
        client.set_model_version_tag(name, number, OVER, str(champion.version))
        client.set_registered_model_alias(name, PREVIOUS, str(champion.version))
    lock.check()
    client.set_registered_model_alias(name, CHAMPION, number)
    _record(client, version, lock, f"promoted: {why}")
    if champion:
        _record(client, champion, lock, f"replaced by {Version(name, number).uri}")
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
