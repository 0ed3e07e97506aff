"""Single image files: what keeps one from being used.

No torch here, as in `data`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from multigrain.data.dataset import Dataset
from multigrain.hooks import Progress, no_progress

SMALLEST = 2
"""Pixels that an image must have each way."""
AHEAD = 1024
"""Images that are handed to the threads at once."""


def _fault(path: Path) -> str | None:
    """Why a file cannot be used, to be put after its name; None if it can. Decodes it whole, huge ones excepted."""
    try:
        with Image.open(path) as image:
            if fault := _header_fault(image):
                return fault
            image.draft("RGB", (64, 64))  # a JPEG is then decoded at a fraction of its size, but to its last byte
            image.load()
    except UnidentifiedImageError:
        return _content(path)
    # Pillow reads the size from the header: above 89,478,485 pixels it warns, above twice as many it refuses.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"is too large, perhaps a decompression bomb ({error})"
    except Exception as error:  # Pillow raises many types, SyntaxError among them
        if isinstance(error, OSError) and error.errno:
            return f"cannot be read ({error.strerror})"
        return f"is cut short or damaged ({error})"
    return None


def _header_fault(image: Image.Image) -> str | None:
    width, height = image.size
    if min(width, height) < SMALLEST:
        return f"is {width} x {height} pixels, but needs {SMALLEST} each way"
    frames = getattr(image, "n_frames", 1)
    # A camera's MPO is a JPEG with previews; its first picture is the one that is meant.
    if frames > 1 and image.format != "MPO":
        return f"has {frames} frames, and which one is meant is not known"
    return None


def _content(path: Path) -> str:
    """What a file is that Pillow does not know."""
    with path.open("rb") as file:
        start = file.read(1024).lower()
    if not start:
        return "is empty"
    page = b"<html" in start or b"<!doctype html" in start
    return "is a web page, not an image" if page else "is not an image, or its first bytes are damaged"


def image_faults(dataset: Dataset, progress: Progress = no_progress) -> dict[Path, str]:
    """Decode every image once, in threads; for each that cannot be used the reason, to be put after its name."""
    paths = dataset.paths
    with ThreadPoolExecutor() as threads:
        found = (
            fault
            for start in range(0, len(paths), AHEAD)
            for fault in threads.map(_fault, paths[start : start + AHEAD])
        )
        tracked = zip(paths, progress(found, "checking images", len(paths)), strict=True)
        return {path: fault for path, fault in tracked if fault}


def image_problems(dataset: Dataset, progress: Progress = no_progress) -> list[str]:
    """A sentence for each image that cannot be used."""
    faults = image_faults(dataset, progress)
    return [
        f"every image must be usable, but {path} {fault}; repair or remove it, or set data.skip_broken to true"
        for path, fault in faults.items()
    ]
