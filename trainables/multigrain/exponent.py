"""Fine-tuning of p*, the pooling exponent for images of another size, as a trainable of Grainmill.

Only p is trained, as in the released code [R]; the rest of the trained network is fixed. The paper picks p* by hand.
Registered models and indexes hold the name of this module, so the module must keep it.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from multigrain import trainable
from multigrain.config import evaluation as settings
from multigrain.config.data import DataSettings as Data
from multigrain.config.finetune import FinetuneSpec as Spec
from multigrain.data.findings import Findings
from multigrain.hooks import Files, Heartbeat, Progress, no_heartbeat

if TYPE_CHECKING:
    from multigrain.training.fit import EpochResult

Evaluation = settings.Evaluation
# Everything but the settings and the training itself is the same for both trainables.
metrics, query_measures, data_problems = trainable.metrics, trainable.query_measures, trainable.data_problems
prepare, sources, images, example = trainable.prepare, trainable.sources, trainable.images, trainable.example
load, export, evaluate = trainable.load, trainable.export, trainable.evaluate


def worker_problems(spec: Spec, workers: int) -> list[tuple[str, str]]:
    """Check that `spec` can run on `workers` ranks; see `trainable.worker_problems`."""
    problems = []
    # The manifest of a checkpoint is written last. Its digests are checked when the checkpoint is read.
    if spec.checkpoint is None or not glob.glob("step-*/MANIFEST.json", root_dir=spec.checkpoint):
        rule = f"must be a folder with the checkpoints of a trained network, got {spec.checkpoint}"
        remedy = "name that of a trial, such as grainmill-runs/demo/run-1/trials/final-0000"
        problems.append(("checkpoint", f"{rule}; {remedy}"))
    if spec.batch_size % workers:
        rule = "batch_size must be a multiple of the workers"
        problems.append(("", f"{rule}, got {spec.batch_size} and {workers}; change one of them"))
    return problems


def findings(data: Data, spec: Spec, progress: Progress, files: Files | None = None) -> Findings:  # noqa: ARG001
    """Count what is in the data; see `trainable.data_findings`."""
    return trainable.data_findings(data, progress, files)


def fit(
    spec: Spec, data: Data, folder: Path, heartbeat: Heartbeat = no_heartbeat, files: Files | None = None
) -> Iterator["EpochResult"]:
    """Fine-tune p on prepared data; see `training.finetune.fit`."""
    import multigrain.training.finetune

    return multigrain.training.finetune.fit(spec, trainable.images_of(data, files), folder, heartbeat=heartbeat)
