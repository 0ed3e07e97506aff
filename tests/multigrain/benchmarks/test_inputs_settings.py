"""What an evaluation is asked for: which settings are refused, and what is read before anything is embedded."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from layouts import draw, holidays, imagenet

from multigrain.benchmarks.inputs import inputs
from multigrain.config.evaluation import Evaluation, Serve
from multigrain.errors import DataError
from multigrain.hooks import LocalFiles

ON = {"ukbench": "y"}
CLASSES = ("ant", "bee")
C = 4
"""Channels of the network."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": {"holiday": "x", "ukbench": "y"}}, "benchmarks must be among imagenet, holidays, .*, got holiday"),
        ({"on": {}}, "at least 1 item"),
        ({"on": ON, "sizes": [8]}, "greater than or equal to 16"),
        ({"on": ON, "exponents": [math.nan]}, "greater than or equal to 1"),
        ({"on": ON, "exponents": []}, "at least 1 item"),
        ({"on": ON, "whiten": "w", "dimension": 0}, "greater than or equal to 1"),
        ({"on": ON, "dimension": 3}, "dimension must come with whiten, got 3 alone; name a folder in whiten"),
        ({"on": ON, "serve": {"size": 15, "p": 3}}, "greater than or equal to 16"),
        ({"on": ON, "serve": {"p": 3}}, "Field required"),
        ({"on": ON, "serve": {"size": 16}}, "Field required"),
        ({"on": ON, "serve": {"size": 16, "p": 0.5}}, "a number from 1 on, or the word proxy, got 0.5"),
        ({"on": ON, "serve": {"size": 16, "p": math.nan}}, "a number from 1 on, or the word proxy, got nan"),
        ({"on": ON, "proxy": "x", "serve": {"size": 16, "p": "best"}}, "or the word proxy, got 'best'"),
        ({"on": ON, "serve": {"size": 16, "p": "proxy"}}, "serve.p = proxy must come with proxy"),
        ({"on": ON, "serve": {"size": 16, "p": 3, "whitened": True}}, "serve.whitened must come with whiten"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation.model_validate(settings)


def test_what_settings_need_of_each_other_is_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)dimension must.*serve\.whitened must.*serve\.p = proxy must"):
        Evaluation(on=ON, dimension=3, serve=Serve(size=16, p="proxy", whitened=True))


@pytest.mark.parametrize("p", [1, 3, 4.5, math.inf, "proxy"])
def test_a_setting_to_serve(p):
    settings = {"on": ON, "whiten": "w", "proxy": "x", "dimension": 3, "serve": {"size": 500, "p": p, "whitened": True}}
    found = Evaluation.model_validate(settings)
    assert found.serve == Serve(size=500, p=p, whitened=True)
    assert type(found.serve.p) is (str if p == "proxy" else float)
    assert Evaluation.model_validate(found.model_dump(by_alias=True)) == found
    assert not Serve(size=500, p=p).whitened


@pytest.fixture
def mirrored(tmp_path):
    """Sources that are asked for, with the folder of the mirror, and the `Files` whose buckets lie below a folder."""
    asked = []

    class Mirrored(LocalFiles):
        def mirror(self, cache, limit):
            self.cache = Path(cache).expanduser()
            return self

        def fetch(self, source, progress):
            if not source.startswith("s3://"):
                return Path(source)
            asked.append((source, self.cache))
            if "closed" in source:
                raise ValueError(f"{source} is closed")
            return tmp_path / "mirror" / source.removeprefix("s3://")

    return SimpleNamespace(asked=asked, files=Mirrored())


def test_folders_in_s3_are_read_through_the_cache(mirrored, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mirror = tmp_path / "mirror/pail"
    holidays(mirror / "sets/holidays")
    draw(mirror / "white/deep", *(f"{number}.png" for number in range(6)))
    draw(mirror / "train", *(f"{name}/{number}.png" for name in CLASSES for number in range(3)))
    sources = {"whiten": "s3://pail/white", "proxy": "s3://pail/train"}
    found = inputs(Evaluation(on={"holidays": "s3://pail/sets/holidays"}, **sources), CLASSES, C, mirrored.files)
    (benchmark,) = found.benchmarks
    assert benchmark.name == "holidays"
    assert benchmark.database[0].path == mirror / "sets/holidays/jpg/100000.jpg"
    assert found.whitening == [mirror / f"white/deep/{number}.png" for number in range(6)]
    assert found.proxy.classes == CLASSES
    cache = tmp_path / "home/.cache/grainmill"
    assert mirrored.asked == [(f"s3://pail/{name}", cache) for name in ("sets/holidays", "white", "train")]
    mirrored.asked.clear()
    inputs(
        Evaluation(on={"holidays": "s3://pail/sets/holidays"}, cache=str(tmp_path / "here")), CLASSES, C, mirrored.files
    )
    assert mirrored.asked == [("s3://pail/sets/holidays", tmp_path / "here")]


def test_without_whitening_and_proxy_only_benchmarks_are_read(tmp_path):
    found = inputs(Evaluation(on={"holidays": str(holidays(tmp_path))}), CLASSES, C)
    assert (len(found.benchmarks), found.whitening, found.proxy) == (1, [], None)


@pytest.mark.parametrize(("count", "dimension", "enough"), [(5, None, False), (6, None, True), (5, 5, False)])
def test_a_whitening_needs_more_images_than_dimensions(tmp_path, count, dimension, enough):
    draw(tmp_path / "white", *(f"{number}.png" for number in range(count)))
    on = {"holidays": str(holidays(tmp_path / "holidays"))}
    settings = Evaluation(on=on, whiten=str(tmp_path / "white"), dimension=dimension)
    if enough:
        assert len(inputs(settings, CLASSES, C).whitening) == count
        return
    with pytest.raises(DataError, match=r"needs more images than dimensions, got 5 for 5 in .*white; add images or"):
        inputs(settings, CLASSES, C)
    fewer = settings.model_copy(update={"dimension": 4})
    assert len(inputs(fewer, CLASSES, C).whitening) == count


def test_a_whitening_of_a_list_of_images(tmp_path):
    draw(tmp_path / "lists/images", *(f"{number} ü.png" for number in range(7)))
    paths = [tmp_path / f"lists/images/{number} ü.png" for number in range(7)]
    lines = [*(f"images/{path.name}" for path in paths[:0:-1]), "", str(paths[0]), f"images/{paths[3].name}"]
    file = tmp_path / "lists/images.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    settings = Evaluation(on={"holidays": str(holidays(tmp_path / "holidays"))}, whiten=str(file))
    assert inputs(settings, CLASSES, C).whitening == paths
    paths[2].unlink()
    with pytest.raises(DataError, match=rf"^1 images of {file} are missing: {paths[2]}$"):
        inputs(settings, CLASSES, C)


def test_the_dimension_is_at_most_that_of_the_network(tmp_path):
    draw(tmp_path / "white", *(f"{number}.png" for number in range(9)))
    on = {"holidays": str(holidays(tmp_path / "holidays"))}
    settings = Evaluation(on=on, whiten=str(tmp_path / "white"), dimension=5)
    assert len(inputs(settings, CLASSES, C).whitening) == 9
    with pytest.raises(DataError, match="must be at most 5, the network's channels and one more, got 6; lower"):
        inputs(settings.model_copy(update={"dimension": 6}), CLASSES, C)


@pytest.mark.parametrize("names", [("bee", "ant", "cat"), ("ant", "cat"), ("ant",)])
def test_the_proxy_task_needs_the_networks_classes(tmp_path, names):
    draw(tmp_path / "train", *(f"{name}/{number}.png" for name in names for number in range(3)))
    settings = Evaluation(on={"holidays": str(holidays(tmp_path / "holidays"))}, proxy=str(tmp_path / "train"))
    told = rf"the network's 2 classes \(ant, bee\), got {len(names)} \({', '.join(sorted(names))}\) in .*train; name"
    with pytest.raises(DataError, match=told):
        inputs(settings, CLASSES, C)


def test_all_that_is_wrong_is_told_at_once(tmp_path, mirrored):
    on = {
        "holidays": str(tmp_path / "no"),
        "imagenet": str(imagenet(tmp_path / "imagenet")),
        "ukbench": "s3://closed/x",
    }
    settings = Evaluation(on=on, whiten=str(tmp_path / "white"), proxy="s3://closed/y")
    with pytest.raises(DataError) as caught:
        inputs(settings, CLASSES, C, mirrored.files)
    starts = (
        f"the root of holidays must be a folder, but there is nothing at {tmp_path / 'no'}",
        "imagenet needs a network of its classes, but this one knows 2 others; leave it out",
        "s3://closed/x is closed",
        f"whitening needs images, but there are none in {tmp_path / 'white'}; name another folder",
        "s3://closed/y is closed",
    )
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)


def whitened_by(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    on = {"holidays": str(holidays(tmp_path / "holidays"))}
    return inputs(Evaluation(on=on, whiten=str(tmp_path / "list.txt"), dimension=1), CLASSES, C)


def test_spellings_of_one_file_are_one_image_of_a_whitening(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    found = whitened_by(tmp_path, b"\xef\xbb\xbf1.jpg\n2.jpg\r\n./1.jpg\n")
    assert found.whitening == [tmp_path / "1.jpg", tmp_path / "2.jpg"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"1.jpg;x\n", "separated by semicolons; keep the paths only"),
        (b"1.jpg\tx\n", "separated by tabs; keep the paths only"),
        (b"image,class\n1.jpg,x\n", "separated by commas; keep the paths only"),
        ("1.jpg\n".encode("utf-16"), "must be UTF-8, but is UTF-16"),
        (b"1.jpg\n3.jpg\n", "are missing"),
    ],
)
def test_a_list_of_images_that_is_a_table_is_refused(tmp_path, content, told):
    draw(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match=told):
        whitened_by(tmp_path, content)


def test_what_a_folder_for_a_whitening_holds_besides_is_told(tmp_path):
    draw(tmp_path, "white/1.jpg", "white/2.jpg", "white/.thumbnails/1.jpg")
    (tmp_path / "white/3.jp2").touch()
    on = {"holidays": str(holidays(tmp_path / "holidays"))}
    found = inputs(Evaluation(on=on, whiten=str(tmp_path / "white"), dimension=1), CLASSES, C)
    assert len(found.whitening) == 2
    (problem,) = found.problems
    assert "left out, because each is a .jp2 file, which is not read; save it as JPEG or PNG: 3.jp2" in problem
