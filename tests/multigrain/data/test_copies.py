"""Which original each copy has: by the numbers of Copydays, by names of one's own, or by a table."""

from pathlib import Path

import pytest

from multigrain.data.copies import by_name, read_copies
from multigrain.data.folders import read_dataset
from multigrain.errors import DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root):
    """The names of each copy and its original."""
    copies, _ = read_copies(root)
    originals = [copies.database[index].relative_to(root).as_posix() for index in copies.truth]
    return dict(zip((path.relative_to(root).as_posix() for path in copies.queries), originals, strict=True))


def problems_of(root):
    with pytest.raises(DataError) as caught:
        read_copies(root)
    return caught.value.problems


def test_a_set_needs_no_distractors(tmp_path):
    touch(tmp_path, "original/200000.png", "strong/200001.png")
    copies, listing = read_copies(tmp_path)
    assert (len(copies.database), copies.truth, listing.left_out) == (1, (0,), {})


def test_names_of_cameras_name_each_its_own_original(tmp_path):
    for number in range(6):
        touch(tmp_path, f"copies/original/IMG_000{number}.jpg", f"copies/strong/IMG_000{number}_crop.jpg")
    touch(tmp_path, "a/0.jpg", "a/1.jpg", "a/2.jpg")
    assert read_dataset(tmp_path).copies.truth == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("originals", "copy", "original"),
    [
        (("200000", "200100"), "200101", "200100"),
        (("200000", "200100"), "200100", "200100"),
        (("IMG_1", "IMG_10"), "IMG_10_crop", "IMG_10"),
        (("IMG_1", "IMG_10"), "IMG_1_crop", "IMG_1"),
        (("IMG_1", "IMG_10"), "IMG_1 (2)", "IMG_1"),
        (("IMG_1", "IMG_1_2"), "IMG_1_2_dark", "IMG_1_2"),
        (("rose", "rosebud"), "rosebud1", "rosebud"),
        (("0001", "0002"), "0002a", "0002"),
        (("x", "y"), "y", "y"),
        (("caf\u00e9", "cafe"), "cafe\u0301-small", "caf\u00e9"),
        (("200000", "IMG"), "200000_3", "200000"),
    ],
)
def test_the_longest_name_that_a_copy_begins_with_is_its_original(originals, copy, original):
    paths = {name: Path(f"original/{name}.png") for name in originals}
    assert by_name([*paths.values()], [Path(f"strong/{copy}.jpg")]) == {Path(f"strong/{copy}.jpg"): paths[original]}


@pytest.mark.parametrize("copy", ["IMG_12", "IMG_2_crop", "rosebud", "img_1_crop", "IM", "my IMG_1"])
def test_a_word_or_a_number_is_never_cut(tmp_path, copy):
    touch(tmp_path, "original/IMG_1.jpg", "original/rose.jpg", f"strong/{copy}.jpg", "strong/rose_2.jpg")
    (problem,) = problems_of(tmp_path)
    assert "must begin with the whole name of its original" in problem
    assert f"no such original for {tmp_path}/strong/{copy}.jpg; rename it, or name both in copies.csv" in problem


@pytest.mark.parametrize(
    ("first", "second", "copy"),
    [
        ("IMG_1.jpg", "IMG_1.png", "IMG_1_crop.jpg"),
        ("a/IMG_1.jpg", "b/IMG_1.jpg", "IMG_1_crop.jpg"),
        ("200000.jpg", "200000.png", "200001.jpg"),
    ],
)
def test_originals_of_one_name_are_refused_with_both(tmp_path, first, second, copy):
    touch(tmp_path, f"original/{first}", f"original/{second}", f"strong/{copy}")
    (problem,) = problems_of(tmp_path)
    assert f"there are {tmp_path}/original/{first} and {tmp_path}/original/{second}; rename one" in problem


def test_a_table_names_any_original(tmp_path):
    touch(tmp_path, "original/a/1.jpg", "original/b/1.jpg", "strong/x.jpg", "strong/y.jpg", "strong/z.jpg")
    rows = (
        "original,copy\noriginal/b/1.jpg,strong/x.jpg\noriginal/a/1.jpg,./strong/y.jpg\noriginal/b/1.jpg,strong/z.jpg\n"
    )
    (tmp_path / "copies.csv").write_text(rows)
    b, a = "original/b/1.jpg", "original/a/1.jpg"
    assert pairs(tmp_path) == {"strong/x.jpg": b, "strong/y.jpg": a, "strong/z.jpg": b}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("copy,original\nstrong/x.jpg,original/a.jpg\n", ["not that of {root}/strong/y.jpg; add a row"]),
        (
            "copy,original\nstrong/x.jpg,original/a.jpg\nstrong/x.jpg,original/b.jpg\nstrong/y.jpg,original/b.jpg\n",
            ["line 3: a copy has one original, but {root}/strong/x.jpg is a copy of {root}/original/a.jpg, too"],
        ),
        (
            "copy,original\nx.jpg,original/a.jpg\nstrong/y.jpg\n",
            ["line 2: a row must name an image in strong/", "line 3: a row must be", "strong/x.jpg", "strong/y.jpg"],
        ),
        ("copy;original\nstrong/x.jpg;original/a.jpg\n", ["separated by commas, but are by semicolons"]),
        ("query,original\n", ["line 1: the columns must be copy and original, got query, original"]),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, text, told):
    touch(tmp_path, "original/a.jpg", "original/b.jpg", "strong/x.jpg", "strong/y.jpg")
    (tmp_path / "copies.csv").write_text(text)
    problems = problems_of(tmp_path)
    assert len(problems) == len(told)
    assert all(part.format(root=tmp_path) in problem for part, problem in zip(told, problems, strict=True))
