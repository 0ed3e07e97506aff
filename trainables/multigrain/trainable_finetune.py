"""Fine-tuning of p*, the pooling exponent for images of another size, as the mill sees it.

The trained network stays as it is; only p learns (the released code's recipe [R]; the paper picks p* by hand).
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from multigrain.config.data import DataSettings
from multigrain.config.finetune import FinetuneSpec as Spec
from multigrain.hooks import Files, Heartbeat, no_heartbeat
from multigrain.trainable import (  # noqa: F401 - all but its settings and how it is done is that of training
    Data,
    Evaluation,
    data_problems,
    evaluate,
    example,
    export,
    images,
    images_of,
    load,
    metrics,
    prepare,
    sources,
)

if TYPE_CHECKING:
    from multigrain.training.fit import EpochResult


def worker_problems(spec: Spec, workers: int) -> list[str]:
    """What keeps `spec` from running on `workers` ranks, in words; empty if nothing does."""
    problems = []
    # The manifest is written last: where it is, a checkpoint is whole. Whether it is intact is found when it is read.
    if spec.checkpoint is None or not glob.glob("step-*/MANIFEST.json", root_dir=spec.checkpoint):
        problems.append(
            f"checkpoint must be a folder with the checkpoints of a trained network, got {spec.checkpoint}; "
            "name that of a trial, such as grainmill-runs/demo/run-1/trials/final-0000"
        )
    if spec.batch_size % workers:
        problems.append(
            f"batch_size must be a multiple of the workers, got {spec.batch_size} and {workers}; change one of them"
        )
    return problems


def fit(
    spec: Spec, data: DataSettings, folder: Path, heartbeat: Heartbeat = no_heartbeat, files: Files | None = None
) -> Iterator["EpochResult"]:
    """Fine-tune p on prepared data; see `multigrain.training.finetune.fit`."""
    import multigrain.training.finetune

    return multigrain.training.finetune.fit(spec, images_of(data, files), folder, heartbeat=heartbeat)
