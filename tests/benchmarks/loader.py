"""Augmented views per second that reach the training loop, against common pipelines.

python -m tests.benchmarks.loader [--device cuda] [--seconds 6] [--rounds 3] [--loaders 2]

JPEGs of 500 x 375 pixels and about 75 kB become batches of 224 x 224 crops, with three views of each image.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import v2

from multigrain.config.training import AugmentSettings
from multigrain.data.loading import TrainViews, decode, training_batches
from multigrain.data.sampler import RepeatedAugmentationBatches
from multigrain.data.transforms import TrainTransform, colour, lighting
from tests.benchmarks.table import Goal, compare, machine, report

SIZE, REPEATS, BATCH, IMAGES = 224, 3, 60, 240
SETTINGS = AugmentSettings()
REFERENCE, UINT8 = "Pillow and floats, per view", "torchvision v2 on uint8, per view"
OURS, COLOURED = "ours, uint8", "ours, coloured on the device"
LIMIT = "limit: a third of a decode and a crop"


def photo(rng: np.random.Generator) -> bytes:
    """A drawn JPEG of discs and grain, with as many bytes as a photograph of its size."""
    image = Image.new("RGB", (500, 375), tuple(rng.integers(40, 220, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, radius = rng.integers(0, 500), rng.integers(0, 375), rng.integers(10, 120)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(0, 255, 3).tolist()))
    grain = rng.normal(0, 9, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Reference(Dataset[Tensor]):
    """Pipeline of Pillow and floats: each view is read, decoded and transformed separately."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.3, 0.3, 0.3),
                transforms.ToTensor(),
            ]
        )

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            view = self.transform(image.convert("RGB"))
        return ((view + lighting(0.1 * torch.randn(3))[:, None, None]) / 1.1).clamp(0, 1)


class Uint8(Dataset[Tensor]):
    """Pipeline of torchvision on uint8: each view is read, decoded, cropped and flipped separately, without colours."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(decode_jpeg(read_file(str(self.paths[index])), mode="RGB"))


class Endless(RepeatedAugmentationBatches):
    """Batches of one epoch after another, without end."""

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from super().__iter__()


def loaded(loader: DataLoader, use: Callable[[object], object], seconds: float, warm: int) -> float:
    """Views per second, measured after the loading processes have started and read ahead."""
    batches = iter(loader)
    for _ in range(warm):
        use(next(batches))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        use(next(batches))
        count += BATCH
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


def alone(work: Callable[[Path], object], paths: list[Path], seconds: float) -> float:
    """Calls per second of CPU time of one core, independent of the machine's load."""
    started = time.process_time()
    for count, path in enumerate(cycle(paths), 1):
        work(path)
        if (used := time.process_time() - started) > seconds:
            return count / used
    raise AssertionError("a cycle does not end")


def by_pillow(path: Path) -> Tensor:
    """Decode an image by Pillow."""
    with Image.open(path) as image:
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def main() -> None:
    """Measure all pipelines, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="device on which the colours of the views are changed")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=2, help="number of image-reading processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the loading processes have one each, too
    before, device, loaders = machine(), torch.device(arguments.device), arguments.loaders
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        paths = [Path(folder) / f"{number:03d}.jpg" for number in range(IMAGES)]
        print(f"{np.mean([path.write_bytes(photo(rng)) for path in paths]) / 1000:.1f} kB per image, {loaders} loaders")

        def others(dataset: Dataset) -> float:
            loader = DataLoader(dataset, batch_sampler=Endless(IMAGES, BATCH, REPEATS), num_workers=loaders)
            return loaded(loader, lambda batch: batch, arguments.seconds, 3 * loaders)

        def ours(use: Callable[[object], object]) -> float:
            views = TrainViews(paths, [0] * IMAGES, SETTINGS, SIZE, seed=0)
            loader = training_batches(views, Endless(IMAGES, BATCH, REPEATS), loaders, device.type == "cuda")
            return loaded(loader, use, arguments.seconds, 3 * loaders)

        def on_device(batch: object) -> Tensor:
            return colour(batch.images.to(device, non_blocking=True), batch.colour.to(device, non_blocking=True))

        image, transform = decode(paths[0]), TrainTransform(SETTINGS, SIZE)
        short = arguments.seconds / 3
        decodes, crops = "decode alone, one core", "crop and draws alone, one core"
        figures = compare(
            {
                REFERENCE: lambda: others(Reference(paths)),
                UINT8: lambda: others(Uint8(paths)),
                OURS: lambda: ours(lambda batch: batch),
                COLOURED: lambda: ours(on_device),
                "decode by Pillow alone, one core": lambda: alone(by_pillow, paths, short),
                decodes: lambda: alone(decode, paths, short),
                crops: lambda: alone(lambda _: transform(image), paths, short),
            },
            arguments.rounds,
        )
    figures[LIMIT] = [
        loaders / (1 / (REPEATS * decoded) + 1 / cropped)
        for decoded, cropped in zip(figures[decodes], figures[crops], strict=True)
    ]
    goals = [Goal(OURS, REFERENCE, 3.8), Goal(OURS, UINT8, 1.6), Goal(COLOURED, REFERENCE), Goal(OURS, LIMIT)]
    report("loader", figures, goals, before, "views or images per second")


if __name__ == "__main__":
    main()
