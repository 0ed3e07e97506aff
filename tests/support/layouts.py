"""Small copies of the benchmarks' layouts: folders, file names and ground truth, with images of a few pixels."""

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def _encoded(kind):
    content = io.BytesIO()
    Image.new("RGB", (8, 6), (90, 120, 30)).save(content, kind)
    return content.getvalue()


_CONTENT = {".jpg": _encoded("JPEG"), ".jpeg": _encoded("JPEG"), ".png": _encoded("PNG")}


def draw(folder, *names):
    """Write an image for each name."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_CONTENT[path.suffix.lower()])


HOLIDAYS = ("100000", "100001", "100002", "100100", "100101", "149900", "149901", "149902", "149903")
"""Groups of 3, 2 and 4 images. The last one must not be dropped."""


def holidays(root, names=HOLIDAYS):
    draw(root / "jpg", *(f"{name}.jpg" for name in names))
    return root


def holidays_whole(root):
    """Names of 491 groups of 3 and 9 of 2 images: 1,491 images, as in the published set."""
    return holidays(root, [f"{100000 + 100 * g + k}" for g in range(500) for k in range(3 if g < 491 else 2)])


def ukbench(root, numbers=range(12)):
    draw(root, *(f"ukbench{number:05}.jpg" for number in numbers))
    return root


COPYDAYS = ("2000", "2001", "2002")


def copydays(root, originals="original", crops=(), distractors=0, blocks=COPYDAYS):
    """Write originals, two strong copies of the first, one of each other, and one copy of each per folder of crops."""
    draw(root / originals, *(f"{block}00.jpg" for block in blocks))
    draw(root / "strong", f"{blocks[0]}01.jpg", *(f"{block}02.jpg" for block in blocks))
    for folder in crops:
        draw(root / folder, *(f"{block}05.jpg" for block in blocks))
    draw(root / "distractors", *(f"ab/{number}.png" for number in range(distractors)))
    return root


def write_truth(folder, query, line, good="", ok="", junk=""):
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in (("query", line), ("good", good), ("ok", ok), ("junk", junk)):
        (folder / f"{query}_{part}.txt").write_text("".join(f"{one}\n" for one in text.split(",") if one))


def oxford5k(root):
    """Write six images and two queries. The image of the first query is labelled `good`, that of the second `ok`."""
    draw(root / "oxbuild_images", *(f"all_souls_00000{number}.jpg" for number in range(5)), "new_000001.jpg")
    truth = root / "gt_files_170407"
    write_truth(
        truth,
        "all_souls_1",
        "oxc1_all_souls_000000 1.5 2 6.5 5",
        good="all_souls_000000,all_souls_000002",
        ok="all_souls_000001",
        junk="all_souls_000003",
    )
    write_truth(truth, "new_1", "oxc1_new_000001 0 0 4 4", ok="new_000001,all_souls_000004")
    return root


def paris6k(root):
    """Write images in one folder per landmark. One is corrupt, as published, and listed in the ground truth."""
    names = ("defense_000000", "defense_000001", "louvre_000136", "louvre_000137")
    draw(root / "paris", *(f"{name.split('_')[0]}/paris_{name}.jpg" for name in names))
    (root / "paris/louvre/paris_louvre_000136.jpg").write_bytes(b"\xff\xd8 cut")
    write_truth(
        root / "gt",
        "defense_1",
        "paris_defense_000001 0 1 7 5",
        good="paris_defense_000001,paris_louvre_000136",
        ok="paris_defense_000000",
        junk="paris_louvre_000137",
    )
    return root


IMLIST = ("all_souls_000013", "new_000002", "all_souls_000001", "oxford_000009", "new_000007")
"""Image names, unsorted as in the published pickle."""
QIMLIST = ("all_souls_000051", "new_000003")


def revisited_truth():
    return {
        "imlist": [*IMLIST],
        "qimlist": [*QIMLIST],
        "gnd": [
            {"easy": np.array([2]), "hard": np.array([0]), "junk": np.array([3]), "bbx": [1.0, 1.0, 6.0, 5.0]},
            {"easy": np.array([], int), "hard": np.array([1, 4]), "junk": [], "bbx": np.array([0, 0, 3.5, 4])},
        ],
    }


def revisited(root, name="roxford5k", content=None, protocol=2):
    draw(root / "jpg", *(f"{image}.jpg" for image in (*IMLIST, *QIMLIST)))
    content = pickle.dumps(revisited_truth(), protocol) if content is None else content
    (root / f"gnd_{name}.pkl").write_bytes(content)
    return root


WNIDS = ("n01440764", "n01443537", "n02119789")


def imagenet(root, val="val", train="train"):
    """Write two images of each class, but one of the second, and empty folders of training images."""
    names = (f"{WNIDS[k]}/ILSVRC2012_val_0000000{n}.JPEG" for k, n in ((2, 1), (0, 2), (1, 3), (0, 4), (2, 5)))
    draw(root / val, *names)
    for wnid in WNIDS:
        (root / train / wnid).mkdir(parents=True)
    return root


def imagenet_flat(root, val="val"):
    """Write five images in one folder, and a development kit whose class numbers do not follow the WordNet ids."""
    draw(root / val, *(f"ILSVRC2012_val_0000000{number}.JPEG" for number in range(1, 6)))
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    synsets = [(1, WNIDS[2], 0), (2, WNIDS[0], 0), (3, WNIDS[1], 0), (4, "n00001740", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(kit / "meta.mat", {"synsets": np.array(synsets, dtype=kinds).reshape(-1, 1)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n2\n1\n")
    return root


def disc21(root):
    """Write three references and three queries, the last of them a distractor."""
    draw(root / "queries", "Q00000.jpg", "Q00001.jpg", "Q00002.jpg")
    draw(root / "references", "R000000.jpg", "R000001.jpg", "R000002.jpg")
    (root / "groundtruth.csv").write_text("query,reference\nQ00000,R000002\nQ00001,R000000\nQ00002,\n")
    return root
