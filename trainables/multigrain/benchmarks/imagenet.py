"""ImageNet's validation images (ILSVRC 2012), in folders by class or with the development kit."""

import re
from pathlib import Path

from multigrain.benchmarks.base import counted, demand, images, noted, pictures
from multigrain.data.listing import list_folders
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark

_FOLDERS = (("train", "ILSVRC2012_img_train"), ("val", "ILSVRC2012_img_val"))
_KIT = Path("ILSVRC2012_devkit_t12", "data")
_IMAGES, _CLASSES = 50_000, 1000


def _class_folders(folder: Path) -> list[str]:
    """Return the sorted WordNet ids that are names of subfolders."""
    return [name for name in list_folders(folder) if re.fullmatch("n[0-9]{8}", name)]


def _kit(folder: Path) -> tuple[list[str], list[str]]:
    """Read the development kit: all classes, sorted, and the class of each validation image.

    Raises:
        DataError: one of its two files cannot be used.
    """
    from scipy.io import loadmat

    file = folder / "meta.mat"
    try:
        synsets = loadmat(file, squeeze_me=True, variable_names=("synsets",))["synsets"]
        # The file also holds the 860 ancestors of the classes, which have children.
        wnids = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if not int(synset["num_children"])
        }
    except Exception as error:  # SciPy raises many types
        raise DataError(
            [f"{file} must hold the `synsets` of ImageNet, but cannot be read ({error}); unpack the kit again"]
        ) from error
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    numbers = truth.read_text(encoding="utf-8", errors="replace").split()
    wrong = [
        f"{truth}, entry {index}: a class must be one of the {len(wnids)} numbers in {file}, got {number!r}"
        for index, number in enumerate(numbers, 1)
        if not number.isdecimal() or int(number) not in wnids
    ]
    if wrong:
        raise DataError(wrong)
    return sorted(wnids.values()), [wnids[int(number)] for number in numbers]


def _flat(found: list[Path], labels: list[str]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Pair each image with its class by the number in its name; return the pairs, and sentences on missing images."""
    numbered: dict[int, Path] = {}
    strange, again = [], []
    for path in found:
        match = re.fullmatch("ILSVRC2012_val_([0-9]{8})", path.stem)
        if not match or not 1 <= int(match[1]) <= len(labels):
            strange.append(path.name)
        elif numbered.setdefault(int(match[1]), path) != path:
            again.append(path.name)
    missing = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, len(labels) + 1) if number not in numbered]
    problems = noted("images have no class in the ground truth and are left out", strange)
    problems += noted("images have the number of another one and are left out", again)
    problems += noted("images that the ground truth names are missing", missing)
    return [(path, labels[number - 1]) for number, path in sorted(numbered.items())], problems


def imagenet(root: Path) -> Benchmark:
    """Read ImageNet's 50,000 validation images: `val/<wnid>/`, or a flat `val/` and `ILSVRC2012_devkit_t12/data/`.

    `val` may be called `ILSVRC2012_img_val`, and `train` `ILSVRC2012_img_train`; of `train`, only the names of its
    folders are read. A label is the position of the class among the sorted WordNet ids.

    Raises:
        DataError: there are no images, or their classes are unknown.
    """
    places = ([root / name for name in names if (root / name).is_dir()] or [root / names[0]] for names in _FOLDERS)
    (train, *_), (val, *_) = places
    problems: list[str] = []
    folders, flat = _class_folders(val), images(val, problems)
    if folders:
        classes = sorted({*folders, *_class_folders(train)})
        by_class = {wnid: images(val / wnid, problems) for wnid in folders}
        pairs = [(path, wnid) for wnid, found in by_class.items() for path in found]
        uneven = [wnid for wnid in classes if len(by_class.get(wnid, ())) != _IMAGES // _CLASSES]
        problems += noted(f"classes do not hold {_IMAGES // _CLASSES} images", uneven)
        problems += noted("images lie next to the folders of classes and are left out", [path.name for path in flat])
    else:
        kit = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        wanted: dict[str, object] = {"images val/<wnid>/*.JPEG or val/ILSVRC2012_val_NNNNNNNN.JPEG": flat}
        if flat:
            wanted |= {f"the classes of a flat val/, {_KIT / name},": (root / _KIT / name).is_file() for name in kit}
        demand("ImageNet", root, wanted)
        classes, labels = _kit(root / _KIT)
        pairs, wrong = _flat(flat, labels)
        problems += wrong
    demand("ImageNet", root, {"images in the folders val/<wnid>/, or ILSVRC2012_val_NNNNNNNN.JPEG": pairs})
    problems += counted("classes", _CLASSES, len(classes)) + counted("images", _IMAGES, len(pairs))
    number = {wnid: index for index, wnid in enumerate(classes)}
    queries, label_of_query = pictures(path for path, _ in pairs), tuple(number[wnid] for _, wnid in pairs)
    return Benchmark("imagenet", (), queries, {}, ("top1", "top5"), label_of_query, tuple(classes), tuple(problems))
