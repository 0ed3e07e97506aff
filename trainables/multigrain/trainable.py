"""MultiGrain as a trainable of Grainmill, under the name `multigrain`; see the protocol in `grainmill.trainable`.

Registered models and indexes hold the name of this module, so the module must keep it.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from multigrain.config import training as settings
from multigrain.config.data import DataSettings
from multigrain.config.evaluation import QUERY_MEASURES, Evaluation
from multigrain.config.training import MultiGrainSpec
from multigrain.data.dataset import Dataset
from multigrain.data.findings import Findings, all_equal, find
from multigrain.data.fingerprint import DataPart, parts
from multigrain.data.folders import read_dataset
from multigrain.data.manifest import manifest_text, read_manifest
from multigrain.data.validation import ImageFacts, examine, faults, image_problems, leave_out, write_intact
from multigrain.errors import DataError, shortened
from multigrain.hooks import (
    SCHEME,
    Files,
    Heartbeat,
    LocalFiles,
    Mirror,
    Progress,
    data_errors,
    no_heartbeat,
    no_progress,
)
from multigrain.models.weights import weight_problems

if TYPE_CHECKING:
    import pandas as pd

    from multigrain.benchmarks.results import EvaluationResult
    from multigrain.data.image_sources import BucketImages, FolderImages
    from multigrain.export.standalone import Model
    from multigrain.training.fit import EpochResult

# torch is imported when something is computed, not when an experiment file is checked.

Spec = MultiGrainSpec
Data = DataSettings


def images_of(data: DataSettings, files: Files | None = None, progress: Progress = no_progress) -> Dataset:
    """List the images of a folder or a manifest, once for each `files`; images in S3 are copied first.

    Raises:
        DataError: the images cannot be read or listed.
    """
    files = files or LocalFiles()
    if data not in files.listings:
        mirror = files.mirror(data.cache, data.cache_limit)
        try:
            files.listings[data] = _list(data, mirror, progress)
        except DataError as error:
            raise DataError([mirror.named(problem) for problem in error.problems]) from error
    return files.listings[data]


def _list(data: DataSettings, mirror: Mirror, progress: Progress) -> Dataset:
    if data.manifest is not None:
        file = Path(data.manifest)
        if data.manifest.startswith(SCHEME):
            with data_errors():
                mirror.fetch_objects({data.manifest: None}, no_progress)
                file = mirror.path(data.manifest)
        return read_manifest(file, data.val_share, mirror, progress)
    assert data.folder is not None, "prepare() writes a built-in source to a folder"
    with data_errors():
        folder = mirror.fetch(data.folder, progress)
    return read_dataset(folder, data.val_share)


def metrics(data: DataSettings, files: Files | None = None) -> Mapping[str, Literal["max", "min"]]:
    """Return the metrics that an objective can name, and which way is better.

    Raises:
        DataError: the images cannot be listed.
    """
    if data.builtin is not None:
        return dict.fromkeys(("top1", "class_map", "copy_map", "mean_top1_copy_map"), "max")
    return dict.fromkeys(images_of(data, files).metrics, "max")


def query_measures() -> Mapping[str, tuple[str, ...]]:
    """Return the measures of each benchmark that have a score for each query."""
    return QUERY_MEASURES


def data_problems(data: DataSettings, progress: Progress, files: Files | None = None) -> list[str]:
    """Open every image of a folder or a manifest; return a sentence on each problem.

    With `skip_broken`, images that cannot be used are a problem only if the rest cannot be used without them.
    """
    if data.builtin is not None:
        return []
    files = files or LocalFiles()
    named = files.mirror(data.cache, data.cache_limit).named
    try:
        dataset = images_of(data, files, progress)
        examined = _examined(data, files, progress)
        broken = faults(examined)
        if data.skip_broken:
            leave_out(dataset, broken)
        elif broken:
            return shortened([named(problem) for problem in image_problems(broken)])
        if all_equal(examined):
            count = len(examined) - len(broken)
            return [f"images must differ, but all {count:,} have the same content; name other images"]
    except DataError as error:
        return shortened([named(problem) for problem in error.problems])
    except OSError as error:
        return [f"the images must be readable, but are not ({error}); change the permissions or name others"]
    return []


def _examined(data: DataSettings, files: Files, progress: Progress) -> Mapping[Path, ImageFacts | str]:
    """Decode all images, once for each `files`."""
    key = "examined", data
    if key not in files.listings:
        files.listings[key] = examine(images_of(data, files, progress), progress)
    return files.listings[key]


def data_findings(data: DataSettings, progress: Progress, files: Files | None = None) -> Findings:
    """Count what is in a folder or a manifest without problems, and warn of what looks like a mistake."""
    if data.builtin is not None:
        return Findings({}, [], {})
    files = files or LocalFiles()
    return find(images_of(data, files, progress), _examined(data, files, progress))


def findings(data: DataSettings, spec: MultiGrainSpec, progress: Progress, files: Files | None = None) -> Findings:
    """Count and warn as `data_findings`; warn of batches that are larger than the set, too."""
    found = data_findings(data, progress, files)
    batch, images = spec.batch, found.facts.get("train")
    if images is None or batch.size <= images * batch.repeats:
        return found
    warning = (
        f"batch.size is {batch.size:,}, but {images:,} images x {batch.repeats} copies are {images * batch.repeats:,} "
        "views, so steps are of these; lower batch.size"
    )
    return found._replace(warnings=[*found.warnings, warning])


def prepare(data: DataSettings, root: Path, progress: Progress, files: Files | None = None) -> DataSettings:
    """Return settings to train with; a built-in source is written below `root`.

    A source in S3 becomes a manifest below `root` with the version of every object, so that all workers read the same
    images or stop. With `skip_broken`, the result is a manifest of the intact images; a warning says how many images
    are left out, and names the file below `root` that lists them.

    Raises:
        DataError: the images cannot be used; see `data_problems`.
    """
    files = files or LocalFiles()
    if data.builtin is not None:
        from multigrain.data.builtin import write_builtin

        folder = str(write_builtin(data, root.absolute(), progress))
        return DataSettings(folder=folder, cache=data.cache, cache_limit=data.cache_limit)
    if data.folder is not None and not (data.skip_broken or data.folder.startswith(SCHEME)):
        return data
    dataset, mirror = images_of(data, files, progress), files.mirror(data.cache, data.cache_limit)
    pins = mirror.pins(dataset.paths)
    if not (data.skip_broken or pins):
        return data
    intact, left_out = dataset, dict[Path, str]()
    if data.skip_broken:
        intact, left_out = leave_out(dataset, faults(_examined(data, files, progress)))
    text = manifest_text(intact, pins)
    skipped = "".join(f"{path}\t{fault}\n" for path, fault in left_out.items())
    manifest = write_intact(text, mirror.named(skipped), root.absolute())
    if left_out:
        listed = manifest.with_name("skipped.txt")
        warnings.warn(f"{len(left_out)} of {len(dataset.paths)} images left out, listed in {listed}", stacklevel=2)
    return DataSettings(manifest=str(manifest), cache=data.cache, cache_limit=data.cache_limit)


def sources(data: DataSettings, files: Files | None = None) -> list[DataPart]:
    """Return the parts of prepared data with their digests; see `data.fingerprint`."""
    files = files or LocalFiles()
    named = files.mirror(data.cache, data.cache_limit).named
    return [part._replace(where=named(part.where)) for part in parts(images_of(data, files))]


def worker_problems(spec: MultiGrainSpec, workers: int) -> list[tuple[str, str]]:
    """Check that `spec` can run on `workers` ranks, and its network and weights.

    Returns:
        The setting at fault, "" for the number of workers, and a sentence on it.
    """
    return [*(("", one) for one in settings.worker_problems(spec, workers)), *weight_problems(spec.model)]


def fit(
    spec: MultiGrainSpec,
    data: DataSettings,
    folder: Path,
    heartbeat: Heartbeat = no_heartbeat,
    files: Files | None = None,
) -> Iterator["EpochResult"]:
    """Train on prepared data; see `training.fit.fit`."""
    import multigrain.training.fit

    return multigrain.training.fit.fit(spec, images_of(data, files), folder, heartbeat=heartbeat)


def load(folder: Path) -> "Model":
    """Load the model that `fit` left in `folder`; see `export.standalone.Model`."""
    from multigrain.export import inference

    return inference.load(folder)


def images(source: str, files: Files | None = None) -> "FolderImages | BucketImages":
    """Return the images of a corpus to embed; see `data.image_sources.images`."""
    from multigrain.data import image_sources

    return image_sources.images(source, files or LocalFiles())


def export(folder: Path, out: Path) -> Mapping[str, Any]:
    """Write the model that `fit` left in `folder` for use without MultiGrain; see `export.export`."""
    from multigrain.export import export

    return export.export(folder, out)


def evaluate(folder: Path, settings: Evaluation, out: Path, files: Files | None = None) -> "EvaluationResult":
    """Evaluate the model that `fit` left in `folder` on benchmarks; see `benchmarks.evaluate.run_benchmarks`."""
    from multigrain.benchmarks.evaluate import run_benchmarks

    return run_benchmarks(folder, settings, out, files)


def example(data: DataSettings, files: Files | None = None) -> "pd.DataFrame":
    """Return a table with two held-out images, as the result of `load` takes it."""
    import pandas as pd

    return pd.DataFrame({"image": [path.read_bytes() for path in images_of(data, files).val[:2]]})
