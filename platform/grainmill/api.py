"""The public functions: each does the work of the command of the same name, and returns its result.

Progress is shown on the terminal or in the notebook unless `quiet`. `tracking_uri` is MLflow's: MLFLOW_TRACKING_URI by
default, else a database in the storage folder. `address` is that of a Ray cluster, such as `auto`: RAY_ADDRESS by
default, else a local Ray that is started for the time of the call. Before the first use of Ray and MLflow, defaults
are set in the environment of the process (`grainmill.environment`). Errors are those of `grainmill.errors`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from grainmill.config.experiment import Experiment
    from grainmill.config.yaml_document import Overrides
    from grainmill.corpus.embed import EmbedResult
    from grainmill.corpus.query import DuplicatesResult, QueryResult
    from grainmill.registry.models import Version
    from grainmill.registry.promotion import Decision
    from grainmill.workflows.evaluate import RecordedEvaluation
    from grainmill.workflows.tune import Outcome


def load(file: str | Path, overrides: "Overrides" = (), *, quiet: bool = False) -> "Experiment":
    """Read and check an experiment file and the images that it names; starts and writes nothing.

    Args:
        file: YAML.
        overrides: changes to the file, such as `{"base.epochs": 3}` or `["base.epochs=3"]`.
        quiet: show no progress.
    Raises:
        ExperimentError: with every problem found.
    """
    from grainmill import progress
    from grainmill.config import experiment

    return experiment.load(Path(file), overrides, progress.bar(quiet))


def tune(
    experiment: "Experiment", *, tracking_uri: str | None = None, address: str | None = None, quiet: bool = False
) -> "Outcome":
    """Search, train the best trials again, register the winner in MLflow and write a report.

    Called again, it carries on where it was cut short; a finished run is followed by another.

    Raises:
        NameTakenError, BusyError, StorageError: the folder of the run cannot be used.
        ResourceError: a trial does not fit into the cluster.
        TrackingError: MLflow does not answer.
        SearchError: no trial ran to its end.
    """
    return _run("tune", experiment, tracking_uri, address, quiet)


def train(
    experiment: "Experiment", *, tracking_uri: str | None = None, address: str | None = None, quiet: bool = False
) -> "Outcome":
    """Train the base settings once, without a search, and register the model; errors as for `tune`."""
    return _run("train", experiment, tracking_uri, address, quiet)


def _run(
    verb: Literal["tune", "train"], experiment: "Experiment", tracking_uri: str | None, address: str | None, quiet: bool
) -> "Outcome":
    from grainmill import progress
    from grainmill.workflows import run_folder

    run_folder.check_name(experiment)  # before what takes seconds to start
    with progress.RunDisplay(experiment, quiet) as display:
        display.message("starting Ray and MLflow")
        uri, address = _start(tracking_uri or experiment.tracking.uri, address, experiment.storage)
        from grainmill.cluster import session

        session.check(address)  # before MLflow, which takes seconds to import
        from grainmill.workflows import tune as workflow

        call = workflow.tune if verb == "tune" else workflow.train
        return call(experiment, uri, address, display, progress.bar(quiet))


def evaluate(
    model: "str | Path | Version",
    on: Mapping[str, str | Path],
    settings: "Overrides" = (),
    *,
    out: str | Path = "evaluation",
    trainable: str = "multigrain",
    workers: int = 1,
    tracking_uri: str | None = None,
    address: str | None = None,
) -> "RecordedEvaluation":
    """Evaluate a trained model on benchmarks; the MLflow run of a registered model gets the values.

    Args:
        model: a registered version, `models:/name@alias`, the folder of a run, or a folder with checkpoints.
        on: folder of each benchmark.
        settings: such as `{"sizes": [224, 500]}`.
        out: folder for tables, pictures and pages.
        trainable: what made the model in a folder; a registered model knows its own.
        workers: more than 1 evaluate together through Ray, and must all see the folders.
        tracking_uri, address: see `grainmill.api`.
    Raises:
        ExperimentError: the settings are wrong.
        EvaluationError: there is no model, or a benchmark cannot be evaluated.
        ResourceError: the cluster is too small.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    uri, address = _start(tracking_uri, address)
    from grainmill.workflows import evaluate as workflow

    benchmarks = {f"on.{name}": str(place) for name, place in on.items()}
    if isinstance(settings, Mapping):
        overrides: Overrides = {**benchmarks, **settings}
    else:
        overrides = [
            *(f"{key}={json.dumps(place, ensure_ascii=False)}" for key, place in benchmarks.items()),
            *settings,
        ]
    return workflow.evaluate(_name(model), overrides, trainable, Path(out), uri, workers, address)


def embed(
    model: "str | Version",
    images: str | Path,
    out: str | Path,
    *,
    workers: int = 1,
    tracking_uri: str | None = None,
    address: str | None = None,
    quiet: bool = False,
) -> "EmbedResult":
    """Embed all images of a corpus into an index of Parquet files; one that is there already is brought up to date.

    Args:
        model: a registered version, or its name, such as `models:/photos@champion`.
        images: a folder, a manifest (.csv with a column `image`) or `s3://bucket/prefix`.
        out: folder of the index.
        workers: processes that each hold the model, on an equal share of the CPUs.
        tracking_uri, address, quiet: see `grainmill.api`. The cluster must see the images and the tracking server.
    Raises:
        BusyError, CorpusError: the images, the index or the model cannot be used.
        ResourceError: the cluster is too small.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    from grainmill.config import addresses
    from grainmill.errors import CorpusError

    if message := addresses.problem(str(images)) or addresses.misspelt(str(images)):
        raise CorpusError(f"the place of the images: {message}")
    uri, address = _start(tracking_uri, address)
    from grainmill import progress
    from grainmill.cluster import session

    session.check(address)  # before MLflow, which takes seconds to import
    from grainmill.corpus import embed as corpus

    return corpus.embed(uri, _name(model), str(images), Path(out), workers, address, progress.bar(quiet))


def find(
    model: "str | Version",
    index: str | Path,
    queries: Sequence[str | Path],
    *,
    count: int = 10,
    page: str | Path = "found.html",
    tracking_uri: str | None = None,
) -> "list[QueryResult]":
    """Find the `count` images of an index that are nearest to each query image, and write a page that shows them.

    Raises:
        CorpusError: the index is missing, empty or of another model, or no query is an image.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    uri, _ = _start(tracking_uri)
    from grainmill.corpus import query

    return query.find(uri, _name(model), Path(index), [str(one) for one in queries], count, Path(page))


def duplicates(
    index: str | Path, *, precision: float = 0.9, threshold: float | None = None, out: str | Path | None = None
) -> "DuplicatesResult":
    """List the pairs of images of an index that are copies of each other, as a table and a page.

    Args:
        index: its folder.
        precision: estimated share of copies in the list, which sets the threshold.
        threshold: lowest score to list, instead of `precision`.
        out: folder for `duplicates.csv` and `duplicates.html`; `INDEX.reports`, beside the index, by default.
    Raises:
        CorpusError: the index is missing, empty, or too small for an estimate while `threshold` is None.
    """
    from grainmill.corpus import query
    from grainmill.corpus.index import reports

    return query.duplicates(Path(index), precision, threshold, Path(out) if out else reports(Path(index)))


def promote(
    model: "str | Version", gates: "Overrides" = (), *, tracking_uri: str | None = None, quiet: bool = False
) -> "Decision":
    """Make a version the champion if it passes the gates and beats the champion beyond the bootstrap interval.

    Args:
        model: a registered version, or its name, such as `models:/photos@challenger`.
        gates: changes to the section `promotion` of the experiment file, such as `{"megabytes": 50}`.
        tracking_uri, quiet: see `grainmill.api`.
    Raises:
        ExperimentError: a gate is wrong.
        PromotionError: the version does not become the champion; the message says why.
        TrackingError: there is no such version, or MLflow does not answer.
    """
    uri, _ = _start(tracking_uri)
    from grainmill import progress
    from grainmill.registry import promotion

    return promotion.promote(uri, _name(model), gates, progress.note(quiet))


def rollback(name: str, *, tracking_uri: str | None = None, quiet: bool = False) -> "Decision":
    """Make the version champion again that the present champion of the model `name` replaced.

    Raises:
        PromotionError: there is none.
        TrackingError: there is no such model, or MLflow does not answer.
    """
    uri, _ = _start(tracking_uri)
    from grainmill import progress
    from grainmill.registry import promotion

    return promotion.rollback(uri, name, progress.note(quiet))


def _start(tracking_uri: str | None, address: str | None = None, storage: str | None = None) -> tuple[str, str | None]:
    """Prepare the process for Ray and MLflow; returns the URI of MLflow and the address of Ray."""
    from grainmill import environment

    environment.prepare()
    return environment.tracking_uri(tracking_uri, storage), environment.ray_address(address)


def _name(model: "str | Path | Version") -> str:
    return model if isinstance(model, str) else str(getattr(model, "uri", model))
