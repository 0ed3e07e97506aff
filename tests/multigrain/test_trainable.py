"""What the mill sees of MultiGrain: metrics to choose from, problems of the data, preparing, training, loading."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from s3_servers import SECRET

from grainmill.storage import s3
from grainmill.storage.mirror import S3Files
from multigrain import trainable
from multigrain.config.data import DataSettings
from multigrain.config.training import MultiGrainSpec
from multigrain.data.folders import read_dataset
from multigrain.data.manifest import read_manifest
from multigrain.errors import SHOWN, DataError
from multigrain.hooks import LocalFiles, no_progress
from multigrain.models.weights import weight_problems

SPEC = MultiGrainSpec.model_validate(
    {
        "image_size": 32,
        "epochs": 1,
        "model": {"trunk": "narrow"},
        "batch": {"size": 24, "repeats": 2, "length_factor": 1.0},
    }
)


def write_images(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 5, 100, 200)).save(root / name)


SPLIT = ("train/a/0.png", "train/a/1.png", "train/b/0.png", "val/a/2.png", "val/a/3.png", "val/b/1.png")
COPIES = ("copies/original/200000.png", "copies/strong/200001.png")
PLAIN = {"top1": "max", "class_map": "max"}
ALL = {**PLAIN, "copy_map": "max", "mean_top1_copy_map": "max"}


@pytest.mark.parametrize("builtin", ["digits", "shapes"])
def test_built_in_sources_have_all_metrics(builtin):
    assert trainable.metrics(DataSettings(builtin=builtin)) == ALL


@pytest.mark.parametrize(("files", "expected"), [(SPLIT, PLAIN), ((*SPLIT, *COPIES), ALL)])
def test_metrics_of_a_folder_need_copies_where_they_say_so(tmp_path, files, expected):
    write_images(tmp_path, *files)
    assert trainable.metrics(DataSettings(folder=str(tmp_path))) == expected


def test_metrics_of_an_unusable_folder_tell_its_problems(tmp_path):
    with pytest.raises(DataError, match="must exist"):
        trainable.metrics(DataSettings(folder=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("images", [3, 20])
@pytest.mark.parametrize("copies", [(), COPIES])
def test_metrics_are_those_that_training_gives(tmp_path, images, copies):
    # Of three images of a class, one is held out: there is no other of its class to be found.
    files = [f"{name}/{number}.png" for name in ("a", "b") for number in range(images)]
    write_images(tmp_path / "images", *files, *copies)
    data = DataSettings(folder=str(tmp_path / "images"))
    (result,) = trainable.fit(SPEC, data, tmp_path / "run")
    assert set(trainable.metrics(data)) == {name for name in ALL if name in result.metrics}


def write_manifest(root, rows):
    (root / "list.csv").write_text("image,class,role\n" + "".join(",".join(row) + "\n" for row in rows))
    return DataSettings(manifest=str(root / "list.csv"))


ROWS = [(name, *name.split("/")[1::-1]) for name in SPLIT]


def test_a_manifest_gives_what_its_folder_gives(tmp_path):
    write_images(tmp_path, *SPLIT)
    data = write_manifest(tmp_path, ROWS)
    assert trainable.metrics(data) == PLAIN
    assert trainable.data_problems(data, no_progress) == []
    results = [
        list(trainable.fit(SPEC, source, tmp_path / f"run-{number}"))
        for number, source in enumerate((data, DataSettings(folder=str(tmp_path))))
    ]
    assert results[0][0].metrics["loss"] == results[1][0].metrics["loss"]
    assert results[0][0].metrics["class_map"] == results[1][0].metrics["class_map"]
    assert list(trainable.example(data)["image"]) == [(tmp_path / name).read_bytes() for name in SPLIT[3:5]]


def test_problems_of_a_manifest_are_told_with_their_lines(tmp_path):
    write_images(tmp_path, *SPLIT[1:])
    data = write_manifest(tmp_path, [*ROWS, (SPLIT[1], "a", "vall")])
    problems = trainable.data_problems(data, no_progress)
    assert [f"line {line}: " in problem for line, problem in zip((2, 8), problems, strict=True)] == [True, True]
    with pytest.raises(DataError, match="vall"):
        trainable.metrics(data)


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_long_list_of_problems_is_cut(tmp_path, skip_broken):
    write_images(tmp_path, *SPLIT)
    for number in range(SHOWN + 5):
        (tmp_path / f"train/a/x{number}.png").write_bytes(b"")
        (tmp_path / f"val/x{number}").mkdir()
    data = DataSettings(folder=str(tmp_path), skip_broken=skip_broken)
    problems = trainable.data_problems(data, no_progress)
    assert len(problems) == SHOWN + 1
    assert problems[-1] == f"and {SHOWN + 10} more of the kind", "every class of val is empty, and not in train"
    for number in range(SHOWN + 5):
        (tmp_path / f"val/x{number}").rmdir()
    problems = trainable.data_problems(data, no_progress)
    assert len(problems) == (1 if skip_broken else SHOWN + 1)


def many(root, broken, count=30):
    write_images(root, *(f"{name}/{number}.png" for name in ("a", "b") for number in range(count)), *COPIES)
    for name in broken:
        (root / name).write_bytes(b"")


def test_broken_images_are_told_and_skipped_by_choice(tmp_path):
    many(tmp_path / "images", ["a/3.png", "b/7.png"])
    folder = str(tmp_path / "images")
    assert len(trainable.data_problems(DataSettings(folder=folder), no_progress)) == 2
    data = DataSettings(folder=folder, skip_broken=True)
    assert trainable.data_problems(data, no_progress) == []
    warned = trainable.findings(data, MultiGrainSpec(), no_progress).warnings
    assert "2 files are left out, because each is empty: a/3.png, b/7.png" in warned
    with pytest.warns(UserWarning, match="2 of 62 images left out, listed in ") as warned:
        prepared = trainable.prepare(data, tmp_path / "data", no_progress)
    listed = str(warned[0].message).rpartition("listed in ")[2]
    assert Path(listed).read_text() == f"{folder}/a/3.png\tis empty\n{folder}/b/7.png\tis empty\n"
    assert Path(prepared.manifest).parent == Path(listed).parent
    assert Path(listed).parents[1] == tmp_path / "data"
    assert trainable.data_problems(prepared, no_progress) == []
    assert trainable.metrics(prepared) == trainable.metrics(data) == ALL
    before, after = read_dataset(tmp_path / "images"), read_manifest(Path(prepared.manifest))
    left_out = {tmp_path / "images/a/3.png", tmp_path / "images/b/7.png"}
    assert set(after.train) == set(before.train) - left_out, "the split is that of all images"
    assert set(after.val) == set(before.val) - left_out
    assert after.classes == before.classes


def test_skipping_keeps_the_instances_of_a_manifest(tmp_path):
    files = [f"{number}.png" for number in range(24)]
    write_images(tmp_path, *files)
    (tmp_path / "0.png").write_bytes(b"")
    rows = [f"{name},a,{'val' if number > 20 else 'train'},{number // 3}" for number, name in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(["image,class,role,instance_id", *rows]))
    data = DataSettings(manifest=str(tmp_path / "list.csv"), skip_broken=True)
    with pytest.warns(UserWarning, match="1 of 24 images left out"):
        prepared = trainable.prepare(data, tmp_path / "data", no_progress)
    # Without the first, the groups of three begin at 0 (two are left), 2, 5, ...
    assert read_manifest(Path(prepared.manifest)).instances == (0, 0, *(2 + 3 * (n // 3) for n in range(18)))


def test_where_nothing_is_broken_nothing_is_said(tmp_path):
    many(tmp_path / "images", [])
    data = DataSettings(folder=str(tmp_path / "images"), skip_broken=True)
    assert trainable.data_problems(data, no_progress) == []
    prepared = trainable.prepare(data, tmp_path / "data", no_progress)
    assert set(read_manifest(Path(prepared.manifest)).paths) == set(read_dataset(tmp_path / "images").paths)


def test_what_cannot_be_skipped_stays_a_problem(tmp_path):
    many(tmp_path, [COPIES[0]])
    data = DataSettings(folder=str(tmp_path), skip_broken=True)
    (problem,) = trainable.data_problems(data, no_progress)
    assert "no copy_map" in problem
    with pytest.raises(DataError, match="no copy_map"):
        trainable.prepare(data, tmp_path / "data", no_progress)


def test_problems_of_the_layout_are_told_all_at_once(tmp_path):
    write_images(tmp_path, "train/a/0.png", "val/c/0.png", COPIES[0])
    data = DataSettings(folder=str(tmp_path))
    problems = trainable.data_problems(data, no_progress)
    assert len(problems) == 3
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path)
    assert problems == caught.value.problems


def test_problems_of_the_images_are_told_all_at_once(tmp_path):
    write_images(tmp_path, *SPLIT, *COPIES)
    data = DataSettings(folder=str(tmp_path))
    assert trainable.data_problems(data, no_progress) == []
    for name in (SPLIT[0], COPIES[1]):
        (tmp_path / name).write_bytes(b"")
    problems = trainable.data_problems(data, no_progress)
    assert [name for problem in problems for name in (SPLIT[0], COPIES[1]) if name in problem] == [SPLIT[0], COPIES[1]]


def test_a_folder_that_may_not_be_read_is_a_problem_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trainable, "read_dataset", Mock(side_effect=PermissionError(13, "not yours", str(tmp_path))))
    (problem,) = trainable.data_problems(DataSettings(folder=str(tmp_path)), no_progress)
    assert str(tmp_path) in problem


def test_problems_are_looked_for_in_the_split_that_is_asked_for(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png", "a/2.png", "a/3.png")
    assert trainable.data_problems(DataSettings(folder=str(tmp_path), val_share=0.25), no_progress) == []
    assert trainable.data_problems(DataSettings(folder=str(tmp_path), val_share=0.7), no_progress) != []


def test_a_manifest_without_roles_is_split_as_asked_for(tmp_path):
    write_images(tmp_path, *(f"{number}.png" for number in range(4)))
    (tmp_path / "list.csv").write_text("image,class\n" + "".join(f"{number}.png,a\n" for number in range(4)))
    source = str(tmp_path / "list.csv")
    assert trainable.metrics(DataSettings(manifest=source, val_share=0.25)) == {"top1": "max"}
    assert trainable.metrics(DataSettings(manifest=source, val_share=0.5)) == PLAIN


def test_a_built_in_source_has_no_problems_and_is_not_written_to_find_that_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainable.data_problems(DataSettings(builtin="digits"), no_progress) == []
    assert list(tmp_path.iterdir()) == []


def test_preparing_a_built_in_source_writes_it_once(tmp_path):
    data = DataSettings(builtin="shapes", images=20, image_size=16)
    prepared = trainable.prepare(data, tmp_path, no_progress)
    assert prepared == trainable.prepare(data, tmp_path, no_progress)
    assert len(read_dataset(tmp_path / "shapes-20x16").train) == 12
    assert prepared.folder == str(tmp_path / "shapes-20x16")
    assert trainable.data_problems(prepared, no_progress) == []


@pytest.mark.parametrize(
    "data",
    [
        {"builtin": "shapes", "images": 20, "image_size": 16},
        {"folder": "images", "val_share": 0.3},
        {"folder": "images", "skip_broken": True},
        {"manifest": "images/list.csv", "val_share": 0.3},
        {"manifest": "images/list.csv", "skip_broken": True},
    ],
)
def test_prepared_data_is_found_from_any_directory(tmp_path, monkeypatch, data):
    write_images(tmp_path / "images", "a/0.png", "a/1.png", "a/2.png")
    (tmp_path / "images/list.csv").write_text("image,class\na/0.png,a\na/1.png,a\na/2.png,a\n")
    monkeypatch.chdir(tmp_path)
    data = DataSettings(**data)
    prepared = trainable.prepare(data, (tmp_path / "data").relative_to(tmp_path), no_progress)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trainable.data_problems(prepared, no_progress) == []
    assert data.skip_broken or prepared.val_share == data.val_share


def test_what_fit_trains_load_answers_with(tmp_path, shapes_folder):
    data = trainable.prepare(DataSettings(folder=str(shapes_folder)), tmp_path, no_progress)
    (result,) = trainable.fit(SPEC, data, tmp_path / "run")
    assert set(ALL) <= set(result.metrics)
    example = trainable.example(data)
    assert list(example["image"]) == [path.read_bytes() for path in read_dataset(shapes_folder).val[:2]]
    answers = trainable.load(tmp_path / "run")(example)
    assert set(answers["class_name"]) <= set(read_dataset(shapes_folder).classes)
    # The accuracy that training told is that of the model that it left.
    paths = read_dataset(shapes_folder).val
    everything = example.iloc[:0].reindex(range(len(paths))).assign(image=[path.read_bytes() for path in paths])
    names = trainable.load(tmp_path / "run")(everything)["class_name"]
    assert np.mean([name == path.parent.name for name, path in zip(names, paths, strict=True)]) == pytest.approx(
        result.metrics["top1"]
    )


def test_an_experiment_file_is_checked_without_torch():
    program = "import sys, multigrain.trainable; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_settings_are_the_methods_own():
    assert trainable.Spec is MultiGrainSpec
    assert trainable.Data is DataSettings


def test_worker_problems_are_those_of_the_batch_and_of_the_weights(tmp_path):
    assert trainable.worker_problems(SPEC, 2) == []
    (problem,) = trainable.worker_problems(SPEC, 5)
    assert problem[0] == ""
    assert "batch.size must be a multiple" in problem[1]
    model = SPEC.model.model_copy(update={"weights": str(tmp_path / "nowhere.safetensors")})
    wrong = SPEC.model_copy(update={"model": model})
    told = weight_problems(model)
    assert len(told) == 1
    assert trainable.worker_problems(wrong, 2) == told
    assert trainable.worker_problems(wrong, 5) == [problem, *told]


# --- in s3://


def test_images_are_listed_once_for_each_run(tmp_path, monkeypatch):
    write_images(tmp_path / "images", *(f"{name}/{number}.png" for name in "ab" for number in range(4)))
    listed = []
    monkeypatch.setattr(trainable, "read_dataset", lambda *args: listed.append(args) or read_dataset(*args))
    for run, files in enumerate((LocalFiles(), LocalFiles()), start=1):
        data = DataSettings(folder=str(tmp_path / "images"))
        assert trainable.data_problems(data, no_progress, files) == []
        assert trainable.metrics(data, files) == {"top1": "max"}
        prepared = trainable.prepare(data, tmp_path / "data", no_progress, files)
        assert len(trainable.sources(prepared, files)) == len(trainable.example(prepared, files))
        assert len(listed) == run


def test_sources_in_s3_need_grainmill(tmp_path):
    (problem,) = trainable.data_problems(DataSettings(folder="s3://bucket/set"), no_progress)
    assert "need Grainmill" in problem
    (tmp_path / "list.csv").write_text("image,class\ns3://me:secret@bucket/a.png,a\n")
    problems = trainable.data_problems(DataSettings(manifest=str(tmp_path / "list.csv")), no_progress)
    assert any("line 2: data in s3:// need Grainmill" in problem for problem in problems)
    assert "secret" not in str(problems)


@pytest.fixture
def stored(bucket, tmp_path):
    """Images below `set/` of a bucket, and the same in the folder `here`."""
    many(tmp_path / "here", [], 10)
    for path in (path for path in (tmp_path / "here").rglob("*") if path.is_file()):
        bucket.put(**{f"set/{path.relative_to(tmp_path / 'here')}": path.read_bytes()})
    bucket.url = f"s3://{bucket.name}/set"
    return bucket


def there(bucket, tmp_path, node="cache", **settings):
    """Data of a bucket, as a node with a disk of its own sees them."""
    source = settings if "manifest" in settings else {"folder": bucket.url}
    return DataSettings(**source | settings, cache=str(tmp_path / node))


TIMES = ("views_per_second", "data_wait")


def relative(paths, root):
    return [str(path.relative_to(root)) for path in paths]


def test_training_from_a_bucket_gives_the_metrics_of_the_folder_to_the_last_bit(stored, tmp_path, proxy):
    here, data = DataSettings(folder=str(tmp_path / "here")), there(stored, tmp_path)
    assert trainable.data_problems(data, no_progress, S3Files()) == []
    assert trainable.metrics(data, S3Files()) == trainable.metrics(here, S3Files()) == ALL
    prepared = trainable.prepare(data, tmp_path / "data", no_progress, S3Files())
    assert len(proxy.got()) == len(read_dataset(tmp_path / "here").paths)
    assert set(proxy.got().values()) == {1}
    # Another node has nothing yet.
    results = [
        next(trainable.fit(SPEC, source, tmp_path / f"run-{number}", files=S3Files()))
        for number, source in enumerate((here, prepared, prepared.model_copy(update={"cache": str(tmp_path / "b")})))
    ]
    first, *others = ({name: value for name, value in one.metrics.items() if name not in TIMES} for one in results)
    assert set(ALL) < set(first)
    assert others == [first, first]
    assert set(proxy.got().values()) == {2}
    told = [part._replace(where="") for part in trainable.sources(here, S3Files())]
    assert [part._replace(where="") for part in trainable.sources(prepared, S3Files())] == told
    assert {part.where for part in trainable.sources(prepared, S3Files())} == {stored.url}
    examples = [list(trainable.example(source, S3Files())["image"]) for source in (here, prepared)]
    assert examples[0] == examples[1]


def test_what_a_node_has_is_listed_at_most(stored, tmp_path, proxy):
    data = there(stored, tmp_path)
    prepared = trainable.prepare(data, tmp_path / "data", no_progress, S3Files())
    proxy.seen.clear()
    again = trainable.images_of(data, S3Files())
    assert {path for path, _ in proxy.seen} == {f"/{stored.name}"}
    proxy.seen.clear()
    pinned = trainable.images_of(prepared, S3Files())
    assert proxy.seen == []
    assert (pinned.train, pinned.val, pinned.copies) == (again.train, again.val, again.copies)
    assert relative(pinned.paths, tmp_path / "cache" / stored.name / "set") == relative(
        read_dataset(tmp_path / "here").paths, tmp_path / "here"
    )


def test_progress_of_the_first_reading_is_shown(stored, tmp_path):
    shown = []

    def progress(items, title, length):
        count = 0
        for item in items:
            yield item
            count += 1
        shown.append((title, length, count))

    for _ in range(2):
        trainable.data_problems(there(stored, tmp_path), progress, S3Files())
    assert shown == [(f"reading {stored.url}", 22, 22), *[("checking images", 22, 22)] * 2]


def test_a_manifest_names_objects_beside_it_and_of_other_buckets(stored, tmp_path, moto, proxy):
    other = stored.name.replace("bucket", "other")
    moto.client.create_bucket(Bucket=other)
    moto.client.put_object(Bucket=other, Key="x/0.png", Body=(tmp_path / "here/b/0.png").read_bytes())
    rows = ["a/0.png,a,train", "a/../a/1.png,a,val", f"s3://{other}/x/0.png,b,train", f"{tmp_path}/here/b/1.png,b,val"]
    text = "\n".join(["image,class,role", *rows])
    stored.put(**{"set/list.csv": text.encode()})
    data = there(stored, tmp_path, manifest=f"{stored.url}/list.csv")
    assert trainable.data_problems(data, no_progress, S3Files()) == []
    keys = [f"{stored.name}/set/{name}" for name in ("list.csv", "a/0.png", "a/1.png")]
    assert proxy.got() == {f"/{key}": 1 for key in (*keys, f"{other}/x/0.png")}
    mirror = tmp_path / "cache"
    expected = (mirror / keys[1], mirror / other / "x/0.png"), (mirror / keys[2], tmp_path / "here/b/1.png")
    prepared = trainable.prepare(data, tmp_path / "data", no_progress, S3Files())
    for source in (data, prepared):
        dataset = trainable.images_of(source, S3Files())
        assert (dataset.train, dataset.val, dataset.classes) == (*expected, ("a", "b"))
    (tmp_path / "mine.csv").write_text(text.replace("\na/", f"\n{stored.url}/a/").replace("/../a", ""))
    assert trainable.images_of(there(stored, tmp_path, manifest=str(tmp_path / "mine.csv")), S3Files()) == dataset


def test_a_relative_path_in_a_manifest_in_s3_stays_in_its_bucket(stored, tmp_path):
    (tmp_path / "0.png").write_bytes((tmp_path / "here/b/0.png").read_bytes())
    images = ["../../../0.png", "../../other/0.png", "../../.s3/lock", "../a/0.png"]
    stored.put(**{"set/list.csv": "\n".join(["image,class", *(f"{image},a" for image in images)]).encode()})
    data = there(stored, tmp_path, manifest=f"{stored.url}/list.csv")
    told = [one for one in trainable.data_problems(data, no_progress, S3Files()) if "must stay in its bucket" in one]
    assert [one.partition("got ")[2].partition(";")[0] for one in told] == [repr(image) for image in images[:3]]


def test_what_is_wrong_with_a_manifest_of_objects_is_told_with_its_lines(stored, tmp_path):
    stored.put(**{"set/a/3.png": b""})
    pins = ["12,", ",x", "x,x", "-1,x"]
    rows = [f"{stored.url}/a/0.png,a,,", "a/0.png,a,,", f"{stored.url}/a/99.png,a,,", f"s3://me:{SECRET}@x/y,a,,"]
    rows += [f"{stored.url}/b/{number}.png,b,{pin}" for number, pin in enumerate(pins)]
    (tmp_path / "list.csv").write_text("\n".join(["image,class,size,etag", *rows]))
    problems = trainable.data_problems(
        there(stored, tmp_path, manifest=str(tmp_path / "list.csv")), no_progress, S3Files()
    )
    told = {
        "line 3": f"there is no file {tmp_path}/a/0.png",
        "line 4": f"there is no file {stored.url}/a/99.png",
        "line 5": "must be s3://bucket/prefix",
        **{f"line {line}": "both a size in bytes and an etag" for line in range(6, 10)},
    }
    for line, words in told.items():
        assert any(f"{line}: " in problem and words in problem for problem in problems), (line, problems)


def test_a_broken_object_is_told_by_its_url_and_left_out_by_choice(stored, tmp_path):
    stored.put(**{"set/a/3.png": b"", "set/a/4.png": b"<html>"})
    problems = trainable.data_problems(there(stored, tmp_path), no_progress, S3Files())
    assert [f"{stored.url}/a/{number}.png is" in one for number, one in zip((3, 4), problems, strict=True)] == [
        True
    ] * 2
    data = there(stored, tmp_path, skip_broken=True)
    files = S3Files()
    assert trainable.data_problems(data, no_progress, files) == []
    warned = trainable.findings(data, MultiGrainSpec(), no_progress, files).warnings
    assert "1 file is left out, because each is empty: a/3.png" in warned
    with pytest.warns(UserWarning, match="2 of 22 images left out, listed in ") as warned:
        prepared = trainable.prepare(data, tmp_path / "data", no_progress, S3Files())
    listed = Path(str(warned[0].message).rpartition("listed in ")[2]).read_text()
    assert listed.splitlines()[0] == f"{stored.url}/a/3.png\tis empty"
    node = prepared.model_copy(update={"cache": str(tmp_path / "b")})
    expected = {*relative(read_dataset(tmp_path / "here").paths, tmp_path / "here")} - {"a/3.png", "a/4.png"}
    assert {*relative(trainable.images_of(node, S3Files()).paths, tmp_path / "b" / stored.name / "set")} == expected
    assert not (tmp_path / "b" / stored.name / "set/a/3.png").exists()


@pytest.mark.parametrize("change", ["other", "gone"])
def test_an_object_that_changes_in_mid_search_is_refused_where_it_must_be_read(stored, tmp_path, proxy, change):
    prepared = trainable.prepare(there(stored, tmp_path), tmp_path / "data", no_progress, S3Files())
    before = trainable.images_of(prepared, S3Files())
    key = f"set/{relative(before.train, tmp_path / 'cache' / stored.name / 'set')[0]}"
    content = before.train[0].read_bytes()
    if change == "other":
        stored.put(**{key: content[:-1] + b"x", "set/a/new.png": b"as long as before, and one more"})
    else:
        stored.delete(key)
    assert trainable.images_of(prepared, S3Files()) == before
    assert before.train[0].read_bytes() == content
    with pytest.raises(DataError) as caught:
        trainable.images_of(prepared.model_copy(update={"cache": str(tmp_path / "b")}), S3Files())
    (problem,) = caught.value.problems
    assert problem.startswith(f"s3://{stored.name}/{key} must stay as it was listed, but has changed")
    assert not (tmp_path / "b" / stored.name / key).exists()


def test_credentials_that_expire_in_mid_reading_cost_only_the_rest(stored, tmp_path, proxy, monkeypatch):
    monkeypatch.setattr(s3, "REQUESTS", 1)
    keys = [f"set/a/{number}.png" for number in range(10)]
    proxy.faults = {f"/{stored.name}/{keys[6]}": [(400, "ExpiredToken")] * 9}
    (problem,) = trainable.data_problems(there(stored, tmp_path), no_progress, S3Files())
    assert problem.startswith(
        f"s3://{stored.name}/{keys[6]} needs credentials that are still good, but these have expired"
    )
    assert SECRET not in problem
    assert proxy.got() == {f"/{stored.name}/{key}": 1 for key in keys[:7]}, "it is told at once"
    proxy.faults.clear()
    proxy.seen.clear()
    assert trainable.data_problems(there(stored, tmp_path), no_progress, S3Files()) == []
    assert not {f"/{stored.name}/{key}" for key in keys[:6]} & set(proxy.got())
    assert len(proxy.got()) == 22 - 6


def test_settings_of_the_cache_stay_in_prepared_data(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ({"folder": stored.url}, {"folder": "here"}, {"builtin": "shapes", "images": 20, "image_size": 16}):
        data = DataSettings(**source, cache="relative", cache_limit=1)
        prepared = trainable.prepare(data, tmp_path / "data", no_progress, S3Files())
        assert (Path(prepared.cache), prepared.cache_limit) == (tmp_path / "relative", 1), source
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepared = trainable.prepare(DataSettings(folder=stored.url), tmp_path / "data", no_progress, S3Files())
    assert prepared.cache == "~/.cache/grainmill", "another node has another home"
    assert (tmp_path / "home/.cache/grainmill" / stored.name / "set").is_dir()


def test_a_check_of_the_images_warns_of_what_lies_beside_them(tmp_path):
    write_images(tmp_path, *SPLIT)
    for name in ("0.jp2", "1.jp2", "2.jp2", "notes.txt", ".DS_Store"):
        (tmp_path / "train" / "a" / name).touch()
    found = trainable.findings(DataSettings(folder=str(tmp_path)), MultiGrainSpec(), no_progress)
    unread = "is a .jp2 file, which is not read; save it as JPEG or PNG"
    names = [f"train/a/{number}.jp2" for number in range(3)]
    assert f"3 files are left out, because each {unread}: {', '.join(names)}" in found.warnings
    assert found.figures["left out"] == f"4: {', '.join(names)}, ...; 1 hidden or left behind by systems"
    assert found.facts["left_out"] == {unread: names, "is not an image, by its suffix": ["train/a/notes.txt"]}
