"""MultiGrain as the mill sees it: this module is what the name `multigrain` in an experiment file stands for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from multigrain.data import DataError, DataSettings, Track, image_problems, read_dataset
from multigrain.spec import MultiGrainSpec, worker_problems

if TYPE_CHECKING:
    import pandas as pd

    from multigrain.fit import EpochResult
    from multigrain.predict import Predictor

# torch is imported when something is to be computed, not when an experiment file is checked.

Spec = MultiGrainSpec
Data = DataSettings

__all__ = ["Data", "Spec", "data_problems", "example", "fit", "load", "metrics", "prepare", "worker_problems"]


def metrics(data: DataSettings) -> Mapping[str, Literal["max", "min"]]:
    """The metrics that an objective can name, and which way is better.

    Raises:
        DataError: the folder cannot be read.
    """
    names = ["top1", "class_map", "copy_map", "mean_top1_copy_map"]
    if data.folder is not None:
        dataset = read_dataset(Path(data.folder), data.val_share)
        if len(set(dataset.val_labels)) == len(dataset.val_labels):  # no held-out image has another of its class
            names.remove("class_map")
        if not dataset.copies:
            names = [name for name in names if "copy" not in name]
    return dict.fromkeys(names, "max")


def data_problems(data: DataSettings, track: Track) -> list[str]:
    """What is wrong with the images of a folder, all at once; every file is opened."""
    if data.folder is None:
        return []
    try:
        return image_problems(read_dataset(Path(data.folder), data.val_share), track)
    except DataError as error:
        return error.problems
    except OSError as error:
        return [f"the image folder must be readable, but is not ({error}); change its permissions or name another"]


def prepare(data: DataSettings, root: Path, track: Track) -> DataSettings:
    """Write a built-in source below `root`, unless it is there; the settings of the folder to train on."""
    if data.folder is None:
        from multigrain.demo import write_builtin

        return DataSettings(folder=str(write_builtin(data, root.absolute(), track)))
    return data.model_copy(update={"folder": str(Path(data.folder).absolute())})


def fit(spec: MultiGrainSpec, data: DataSettings, folder: Path) -> Iterator["EpochResult"]:
    """Train on prepared data; see `multigrain.fit.fit`."""
    import multigrain.fit

    assert data.folder is not None, "prepare() comes before fit()"
    return multigrain.fit.fit(spec, read_dataset(Path(data.folder), data.val_share), folder)


def load(folder: Path) -> "Predictor":
    """The model that `fit` left in `folder`; see `multigrain.predict.Predictor`."""
    from multigrain import predict

    return predict.load(folder)


def example(data: DataSettings) -> "pd.DataFrame":
    """Two held-out images, as `load`'s result takes them."""
    import pandas as pd

    assert data.folder is not None, "prepare() comes before example()"
    images = read_dataset(Path(data.folder), data.val_share).val[:2]
    return pd.DataFrame({"image": [path.read_bytes() for path in images]})
