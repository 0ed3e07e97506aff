"""What a manifest says, how it is split, everything that can be wrong with it, and that it reads what it writes."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.folders import read_dataset
from multigrain.data.layout import spelling
from multigrain.data.manifest import manifest_text, read_manifest
from multigrain.errors import DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image: nobody looks")


FILES = tuple(f"{number}.jpg" for number in range(10))


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest beside ten files."""
    touch(tmp_path, *FILES)

    def write(text, encoding="utf-8"):
        file = tmp_path / "list.csv"
        file.write_bytes(text.encode(encoding))
        return file

    return write


def names(paths):
    return [path.name for path in paths]


def problems_of(file, **arguments):
    with pytest.raises(DataError) as caught:
        read_manifest(file, **arguments)
    return caught.value.problems


FULL = """\
image,class,role,instance_id
0.jpg,dog,train,
1.jpg,cat,train,mug
2.jpg,dog,train,
3.jpg,cat,train,mug
4.jpg,dog,val,mug
5.jpg,cat,val,
6.jpg,,database,
7.jpg,dog,database,x
8.jpg,,query,x
9.jpg,ape,query,x
0.jpg,,database,y
"""


def check_full(data, folder):
    assert data.classes == ("cat", "dog")
    assert data.train == tuple(folder / f"{number}.jpg" for number in (0, 1, 2, 3))
    assert data.train_labels == (1, 0, 1, 0)
    assert data.instances == (0, 1, 2, 1)
    assert (names(data.val), data.val_labels) == (["4.jpg", "5.jpg"], (1, 0))
    assert names(data.copies.database) == ["7.jpg", "6.jpg", "0.jpg"]
    assert names(data.copies.queries) == ["8.jpg", "9.jpg"]
    assert data.copies.truth == (0, 0)


def test_a_manifest_with_everything_is_read_in_its_order(manifest, tmp_path):
    check_full(read_manifest(manifest(FULL)), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: "\n" + text,
        lambda text: text.replace("dog", '"dog"'),
        lambda text: text.replace(",train,\n", ",train, \n"),
        lambda text: text.replace("\n3.jpg", "\n./3.jpg"),
        lambda text: "\n".join(",".join(reversed(line.split(","))) for line in text.splitlines()),
    ],
    ids=["BOM", "CRLF", "no last newline", "blank lines", "blank first", "quotes", "blank cell", "dot", "other order"],
)
def test_what_is_not_said_of_the_images_does_not_matter(manifest, tmp_path, change):
    check_full(read_manifest(manifest(change(FULL))), tmp_path)


def test_paths_begin_at_the_folder_of_the_manifest_or_at_the_root(tmp_path, monkeypatch):
    touch(tmp_path, "lists/deep/0.jpg", "elsewhere/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "lists/list.csv").write_text(
        f"image,class,role\ndeep/0.jpg,a,train\n../elsewhere/1.jpg,a,train\n{tmp_path}/elsewhere/2.jpg,a,val\n"
    )
    monkeypatch.chdir(tmp_path)
    data = read_manifest(Path("lists/list.csv"))
    monkeypatch.chdir("/")
    assert all(path.is_absolute() and path.is_file() for path in data.paths)
    assert names(data.paths) == ["0.jpg", "1.jpg", "2.jpg"]


def test_cells_with_commas_quotes_and_line_ends_are_read(tmp_path):
    touch(tmp_path, 'a, "b".jpg', "c\nd.jpg", "e.jpg")
    (tmp_path / "list.csv").write_text(
        'image,class,role\n"a, ""b"".jpg","x, y",train\n"c\nd.jpg","x, y",train\ne.jpg,"x, y",val\nf.jpg,"x, y",val\n'
    )
    (problem,) = problems_of(tmp_path / "list.csv")
    assert "list.csv, line 6: " in problem, "the file's own lines are counted"
    touch(tmp_path, "f.jpg")
    data = read_manifest(tmp_path / "list.csv")
    assert names(data.train) == ['a, "b".jpg', "c\nd.jpg"]
    assert data.classes == ("x, y",)


def test_without_instance_ids_each_image_is_its_own(manifest):
    text = "image,class,role\n0.jpg,a,train\n1.jpg,a,train\n2.jpg,a,val\n"
    assert read_manifest(manifest(text)).instances == (0, 1)


def test_a_number_as_instance_id_is_not_the_place_of_an_image(manifest):
    text = "image,class,role,instance_id\n0.jpg,a,train,\n1.jpg,a,train,0\n2.jpg,a,train,\n3.jpg,a,val,\n"
    assert read_manifest(manifest(text)).instances == (0, 1, 2)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_without_roles_a_share_of_each_class_is_held_out_by_hash(manifest, tmp_path, share):
    rows = [(name, "ab"[number < 7]) for number, name in enumerate(FILES)]
    data = read_manifest(manifest("image,class\n" + "".join(f"{name},{label}\n" for name, label in rows)), share)
    for label in "ab":
        members = sorted(
            (name for name, known in rows if known == label), key=lambda name: hashlib.sha256(name.encode()).hexdigest()
        )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out = [
            path.name for path, number in zip(data.val, data.val_labels, strict=True) if data.classes[number] == label
        ]
        assert held_out == sorted(members[:count])
    assert sorted(names((*data.train, *data.val))) == list(FILES)
    assert list(data.train) == sorted(data.train)


def test_moving_a_manifest_with_its_images_does_not_change_its_split(manifest, tmp_path):
    file = manifest("image,class\n" + "".join(f"{name},a\n" for name in FILES))
    before = names(read_manifest(file, 0.5).val)
    shutil.copytree(tmp_path, tmp_path / "there")
    assert names(read_manifest(tmp_path / "there/list.csv", 0.5).val) == before


def test_a_manifest_without_roles_may_have_instances(manifest):
    text = "image,class,instance_id\n" + "".join(f"{name},a,same\n" for name in FILES)
    assert set(read_manifest(manifest(text)).instances) == {0}


SOUND = "0.jpg,a,train\n1.jpg,a,train\n2.jpg,a,val\n"
ROLES = "image,class,role\n" + SOUND
COPIES = "image,class,role,instance_id\n0.jpg,a,train,\n1.jpg,a,train,\n2.jpg,a,val,\n"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("image,class,rolle\n" + SOUND, 1, "unknown column 'rolle'; did you mean 'role'?"),
        ("image,class,kind\n" + SOUND, 1, "unknown column 'kind'; known: image, class, role, instance_id"),
        ("image,class, role\n" + SOUND, 1, "unknown column ' role'; remove the blanks around 'role'"),
        ("image;class;role\n" + SOUND.replace(",", ";"), 1, "separated by commas, but are by semicolons; save"),
        ("image\tclass\n" + SOUND.replace(",", "\t"), 1, "separated by commas, but are by tabs; save"),
        ('"image";"class"\n' + SOUND, 1, "separated by commas, but are by semicolons; save"),
        ("Datei|Class\n" + SOUND, 1, "separated by commas, but are by bars; save"),
        ("sep=;\nimage;class;role\n" + SOUND, 1, "but does with 'sep=;', a line for Excel; delete it"),
        ("sep=,\r\n" + ROLES, 1, "but does with 'sep=,', a line for Excel; delete it"),
        ("image,class,role,class\n" + SOUND.replace("\n", ",a\n"), 1, "'class' comes 2 times"),
        (ROLES + "3.jpg,,train\n", 5, "the cell of 'class' must not be empty"),
        (ROLES + "3.jpg, ,val\n", 5, "the cell of 'class' must not be empty"),
        (ROLES + ",a,val\n", 5, "the cell of 'image' must not be empty"),
        (ROLES + "3.jpg,a,\n", 5, "the cell of 'role' must not be empty"),
        (ROLES + "3.jpg,a,trian\n", 5, "unknown role 'trian'; did you mean 'train'?"),
        (ROLES + "3.jpg,a,x\n", 5, "unknown role 'x'; known: train, val, database, query"),
        (ROLES + "3.jpg,a\n", 5, "as many cells as the header, 3, got 2"),
        (ROLES + "3.jpg,a,val,,\n", 5, "as many cells as the header, 3, got 5"),
        (ROLES + "none.jpg,a,val\n", 5, "there is no file {root}/none.jpg"),
        (ROLES + "..,a,val\n", 5, "there is no file {root}/.."),
        (ROLES + "a\0b.jpg,a,val\n", 5, "there is no file"),
        (ROLES + "./2.jpg,a,val\n", 5, "once in a role 'val', but ./2.jpg is in line 4, too"),
        ("image,class\n0.jpg,a\n1.jpg,a\n0.jpg,a\n", 4, "once in a manifest, but 0.jpg is in line 2, too"),
        (ROLES + "lists/../2.jpg,a,val\n", 5, "once in a role 'val', but lists/../2.jpg is in line 4, too"),
        (ROLES + "{root}/2.jpg,a,val\n", 5, "once in a role 'val', but {root}/2.jpg is in line 4, too"),
        (ROLES + "./0.jpg,a,val\n", 5, "but ./0.jpg, of role 'val', is the image of line 2, of role 'train'"),
        (ROLES + "link.jpg,a,val\n", 5, "but link.jpg, of role 'val', is the image of line 2, of role 'train'"),
        (COPIES + "3.jpg,,database,x\n./0.jpg,,query,x\n", 6, "./0.jpg, of role 'query', is the image of line 2"),
        (ROLES + "3.jpg,b,val\n4.jpg,b,val\n", 5, "each class of val must have training images, but 'b' has none"),
        ("image,class\n0.jpg,a\n1.jpg,a\n3.jpg,a\n2.jpg,b\n", 5, "needs 2 images to be split, found 1 of 'b'"),
        (COPIES + "3.jpg,,database,x\n4.jpg,,query,y\n", 6, "no row of the database has 'y'"),
        (COPIES + "3.jpg,,database,\n4.jpg,,query,\n", 6, "instance_id of its original, but the cell is empty"),
        (COPIES + "4.jpg,,query,y\n", 5, "no row of the database has 'y'"),
        (
            COPIES + "3.jpg,,database,x\n4.jpg,,database,x\n5.jpg,,query,x\n6.jpg,,query,x\n",
            6,
            "originals must differ in instance_id, but 'x' is in line 5",
        ),
        (ROLES + '"3.jpg,a,val\n', 5, "comma-separated values"),
        (ROLES + f"3.jpg,{'a' * 200_000},val\n", 5, "comma-separated values"),
        ("", 1, "but is empty"),
        ("\n\n", 1, "but is empty"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_with_its_number(manifest, tmp_path, text, line, problem):
    (tmp_path / "link.jpg").symlink_to("0.jpg")
    (tmp_path / "lists").mkdir()
    (found,) = problems_of(manifest(text.replace("{root}", str(tmp_path))))
    assert found.startswith(f"{tmp_path}/list.csv, line {line}: ")
    assert problem.format(root=tmp_path) in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image,class,role\n0.jpg,a,train\n1.jpg,a,train\n", "validation needs at least 1 image, found none"),
        ("image,class,role\n0.jpg,a,train\n2.jpg,a,val\n", "training needs at least 2 images, found 1"),
        ("image,class\n0.jpg,a\n1.jpg,a\n", "training needs at least 2 images, found 1"),
        (ROLES + "3.jpg,,database\n", "needs queries, but {root}/list.csv has a database only"),
    ],
)
def test_what_is_missing_of_the_whole_is_told(manifest, tmp_path, text, problem):
    (found,) = problems_of(manifest(text))
    assert problem.format(root=tmp_path) in found


def test_a_distractors_instance_id_may_be_that_of_another(manifest):
    text = COPIES + "3.jpg,,database,x\n4.jpg,,database,y\n5.jpg,,database,y\n6.jpg,,query,x\n"
    assert len(read_manifest(manifest(text)).copies.database) == 3


def test_one_image_may_have_several_roles(manifest):
    text = COPIES + "2.jpg,,database,x\n3.jpg,,query,x\n"
    assert names(read_manifest(manifest(text)).copies.database) == ["2.jpg"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (ROLES.encode() + "3.jpg,é,val\n".encode("latin-1"), 5),
        (b"\xff\xfe" + ROLES.encode("utf-16-le"), 1),
        (ROLES.encode("utf-16-be"), 1),
        (b"\xef\xbb\xbf" + ROLES.encode() + b"\xff", 5),
    ],
)
def test_what_is_not_utf8_is_told_with_its_line(tmp_path, content, line):
    (tmp_path / "list.csv").write_bytes(content)
    (problem,) = problems_of(tmp_path / "list.csv")
    assert problem.startswith(f"{tmp_path}/list.csv, line {line}: a manifest must be UTF-8")


@pytest.mark.parametrize("name", ["nowhere.csv", "folder.csv"])
def test_a_missing_manifest_is_told_by_its_full_path(tmp_path, monkeypatch, name):
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(Path(name))
    assert f"there is no file {tmp_path / name}" in problem


def test_all_problems_of_the_header_and_of_single_lines_are_told_at_once(manifest):
    problems = problems_of(manifest("image,class,rol,,rol\nnone.jpg,a,train,,\n0.jpg,,,,\n1.jpg\n"))
    parts = ["comes 2 times", "'rol'", "unknown column ''", "none.jpg", "'class' must not", "got 1"]
    assert len(problems) == len(parts)
    for part, problem in zip(parts, problems, strict=True):
        assert part in problem


def test_all_problems_between_lines_are_told_at_once(manifest):
    problems = problems_of(
        manifest(
            "image,class,role,instance_id\n0.jpg,a,train,\n0.jpg,a,train,\nnone.jpg,b,val,\n4.jpg,c,val,\n"
            "5.jpg,,database,x\n6.jpg,,database,x\n7.jpg,,query,x\n8.jpg,,query,y\n9.jpg,,quary,x\n"
        )
    )
    parts = ["line 4: every image", "line 10: unknown role", "line 3: an image may come once", "'b'", "'c'"]
    parts += ["line 9: a query", "line 7: originals"]
    assert len(problems) == len(parts)
    for part, problem in zip(parts, problems, strict=True):
        assert part in problem


def same(one, other):
    """Whether two data sets say the same; distractors and originals without a copy in any order."""
    plain = ("classes", "train", "train_labels", "val", "val_labels", "instances")
    if any(getattr(one, name) != getattr(other, name) for name in plain) or bool(one.copies) != bool(other.copies):
        return False
    if not one.copies:
        return True
    pairs = [
        [
            (query, data.copies.database[index])
            for query, index in zip(data.copies.queries, data.copies.truth, strict=True)
        ]
        for data in (one, other)
    ]
    return pairs[0] == pairs[1] and set(one.copies.database) == set(other.copies.database)


@st.composite
def datasets(draw):
    """Any data set over files `0` to `11` in the working directory, with strange names of classes."""
    label = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4).filter(str.strip)
    classes = tuple(sorted(draw(st.lists(label, min_size=1, max_size=3, unique_by=spelling))))
    files = draw(st.permutations([Path.cwd() / str(number) for number in range(12)]))
    train_labels = [*range(len(classes)), *draw(st.lists(st.integers(0, len(classes) - 1), min_size=1, max_size=3))]
    train, rest = files[: len(train_labels)], files[len(train_labels) :]
    first = {}
    groups = draw(st.lists(st.integers(0, 3), min_size=len(train), max_size=len(train)))
    instances = tuple(first.setdefault(group, index) for index, group in enumerate(groups))
    val_labels = draw(st.lists(st.integers(0, len(classes) - 1), min_size=1, max_size=2))
    copies = None
    if draw(st.booleans()):
        truth = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
        copies = CopySet(tuple(rest[2:5]), tuple(rest[5 - len(truth) : 5]), tuple(truth))
    val = tuple(rest[: len(val_labels)])
    return Dataset(classes, tuple(train), tuple(train_labels), val, tuple(val_labels), copies, instances)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        touch(folder, *map(str, range(12)))
        dataset = data.draw(datasets())
        (folder / "list.csv").write_bytes(manifest_text(dataset).encode())
        assert same(read_manifest(folder / "list.csv"), dataset)


def test_a_built_in_folder_is_read_again_from_its_manifest(tmp_path, shapes_folder):
    dataset = read_dataset(shapes_folder)
    (tmp_path / "list.csv").write_bytes(manifest_text(dataset).encode())
    assert same(read_manifest(tmp_path / "list.csv"), dataset)


def test_classes_that_look_the_same_are_refused(manifest):
    text = "image,class,role\n0.jpg,caf\u00e9,train\n1.jpg,cafe\u0301,train\n2.jpg,dog,train\n3.jpg,dog ,val\n"
    accents, blanks, unknown = problems_of(manifest(text))
    assert r"has 'caf\xe9' and 'cafe\u0301'; make them one" in accents
    assert "has 'dog' and 'dog '; make them one" in blanks
    assert "'dog ' has none" in unknown


def test_a_pipe_is_no_image(manifest, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (problem,) = problems_of(manifest(ROLES + "pipe.jpg,a,val\n"))
    assert f"there is no file {tmp_path}/pipe.jpg" in problem


def test_hard_links_are_files_of_their_own(manifest, tmp_path):
    os.link(tmp_path / "0.jpg", tmp_path / "x.jpg")
    assert len(read_manifest(manifest(ROLES + "x.jpg,a,val\n")).val) == 2
