"""Every benchmark in small: images, truth, what is missing or extra, and what makes it of no use."""

import os
import pickle
import random
import sys
from collections import Counter
from contextlib import nullcontext

import layouts
import numpy as np
import pandas as pd
import pytest

from multigrain.benchmarks import imagenet, instances, landmarks
from multigrain.benchmarks.published import PUBLISHED
from multigrain.benchmarks.readers import read
from multigrain.config.evaluation import BENCHMARKS
from multigrain.data.picture import Picture
from multigrain.errors import DataError
from multigrain.retrieval.metrics import MEASURES


def names(pictures):
    return [picture.path.stem for picture in pictures]


def told(benchmark, setting=""):
    """Query -> names of its positives and of its junk."""
    database = names(benchmark.database)
    assert all(part.dtype == np.int64 for truth in benchmark.truth[setting] for part in truth)
    return {
        query: tuple({database[index] for index in part} for part in truth)
        for query, truth in zip(names(benchmark.queries), benchmark.truth[setting], strict=True)
    }


def problems_of(name, root):
    with pytest.raises(DataError) as caught:
        read(name, root)
    return caught.value.problems


def has(problems, *parts):
    """Whether each part is in one of the problems."""
    return all(any(part in problem for problem in problems) for part in parts)


MAKERS = {
    "imagenet": layouts.imagenet,
    "holidays": layouts.holidays,
    "ukbench": layouts.ukbench,
    "copydays": layouts.copydays,
    "oxford5k": layouts.oxford5k,
    "paris6k": layouts.paris6k,
    "roxford5k": layouts.revisited,
    "rparis6k": lambda root: layouts.revisited(root, "rparis6k"),
    "disc21": layouts.disc21,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_file_of_a_benchmark_exists_and_every_measure_is_known(tmp_path, monkeypatch, name):
    MAKERS[name](tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    benchmark = read(name, tmp_path.relative_to(tmp_path.parent))
    monkeypatch.chdir("/")
    assert benchmark.name == name
    assert benchmark.queries
    assert all(picture.path.is_file() for picture in (*benchmark.database, *benchmark.queries))
    assert set(benchmark.measures) <= set(MEASURES)
    assert benchmark.as_published == (name == "disc21"), "of DISC21, no number is expected"


@pytest.mark.parametrize("name", MAKERS)
def test_the_order_of_names_on_disk_changes_nothing(tmp_path, monkeypatch, name):
    MAKERS[name](tmp_path)
    benchmark, scan = read(name, tmp_path), os.scandir

    def shuffled(folder):
        with scan(folder) as entries:
            found = list(entries)
        random.Random(len(found)).shuffle(found)
        return nullcontext(found[::-1])

    monkeypatch.setattr(os, "scandir", shuffled)
    other = read(name, tmp_path)
    assert (other.database, other.queries, other.labels) == (benchmark.database, benchmark.queries, benchmark.labels)
    assert all(told(other, setting) == told(benchmark, setting) for setting in benchmark.truth)


@pytest.mark.parametrize("name", MAKERS)
def test_two_roots_are_two_sets(tmp_path, monkeypatch, name):
    for folder in ("a", "b"):
        MAKERS[name](tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    first, second = (read(name, tmp_path / folder) for folder in ("a", "b"))
    assert all((tmp_path / "a") in picture.path.parents for picture in first.queries)
    assert all((tmp_path / "b") in picture.path.parents for picture in second.queries)


LOOKED_FOR = {
    "imagenet": ["val/<wnid>/"],
    "holidays": ["jpg/NNNN00.jpg"],
    "holidays-upright": ["jpg/NNNN00.jpg"],
    "ukbench": ["ukbenchNNNNN.jpg"],
    "copydays": ["original/NNNN00.jpg", "strong/NNNNNN.jpg"],
    "oxford5k": ["<landmark>_NNNNNN.jpg", "_{query,good,ok,junk}.txt"],
    "paris6k": ["<landmark>_NNNNNN.jpg", "_{query,good,ok,junk}.txt"],
    "roxford5k": ["jpg/", "gnd_roxford5k.pkl"],
    "rparis6k": ["jpg/", "gnd_rparis6k.pkl"],
    "disc21": ["queries/", "references/", "groundtruth.csv"],
}


@pytest.mark.parametrize("name", LOOKED_FOR)
def test_a_wrong_root_is_told_with_all_that_was_looked_for_and_what_was_found(tmp_path, name):
    (tmp_path / "strange").mkdir()
    layouts.draw(tmp_path, "picture.png")
    problems = problems_of(name, tmp_path)
    for part, problem in zip(LOOKED_FOR[name], problems, strict=True):
        assert part in problem
        assert f"found none in {tmp_path}, which holds picture.png, strange/; name" in problem


@pytest.mark.parametrize("name", LOOKED_FOR)
@pytest.mark.parametrize(("place", "found"), [("nowhere", "nothing"), ("file", "a file")])
def test_a_root_that_is_no_folder_is_told_by_its_full_path(tmp_path, monkeypatch, name, place, found):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(name, instances.Path(place))
    assert f"there is {found} at {tmp_path / place}" in problem


def test_an_unknown_name_is_told_with_the_known_ones(tmp_path):
    assert set(BENCHMARKS) == {*LOOKED_FOR, "manifest"}
    with pytest.raises(ValueError, match=r"one of imagenet, .*manifest, got 'oxford'"):
        read("oxford", tmp_path)


# --- Holidays


def test_holidays_takes_each_query_out_of_its_own_list_and_keeps_the_last_group(tmp_path):
    benchmark = read("holidays", layouts.holidays(tmp_path))
    assert names(benchmark.database) == [*layouts.HOLIDAYS]
    assert told(benchmark) == {
        "100000": ({"100001", "100002"}, {"100000"}),
        "100100": ({"100101"}, {"100100"}),
        "149900": ({"149901", "149902", "149903"}, {"149900"}),
    }
    assert has(benchmark.problems, "1,491 images, found 9", "500 queries, found 3")


def test_holidays_is_whole_with_all_its_images(tmp_path):
    benchmark = read("holidays", layouts.holidays_whole(tmp_path))
    assert benchmark.as_published
    assert (len(benchmark.database), len(benchmark.queries)) == (1491, 500)
    assert sum(len(truth.positives) for truth in benchmark.truth[""]) == 991


def test_what_holidays_lacks_or_holds_beside_is_named(tmp_path):
    layouts.holidays(tmp_path, (*layouts.HOLIDAYS, "120001", "130000"))
    layouts.draw(tmp_path / "jpg", "cover.png", "100000.png", ".hidden.jpg", "deeper/100200.jpg")
    (tmp_path / "jpg" / "notes.txt").write_text("no image")
    benchmark = read("holidays", tmp_path)
    assert has(
        benchmark.problems,
        "1,491 images, found 11",
        "2 images in",
        "left out: 100000.png, cover.png",
        "1 queries are missing: 120000",
        "1 queries have no other image of their group: 130000",
    )
    assert told(benchmark)["130000"] == (set(), {"130000"})


def test_no_more_than_a_few_names_are_told(tmp_path):
    layouts.holidays(tmp_path, [*layouts.HOLIDAYS, *(f"1{number}001" for number in range(10, 30))])
    (problem,) = [problem for problem in read("holidays", tmp_path).problems if "queries are missing" in problem]
    assert problem == "20 queries are missing: 110000, 111000, 112000, 113000, 114000 and 15 more"


TURNS = "100001.jpg 90\n\n149903 270\n100100.jpg\t180\n"


def test_upright_holidays_turns_what_its_list_names(tmp_path):
    layouts.holidays(tmp_path)
    (tmp_path / "rotations.txt").write_text(TURNS)
    benchmark = read("holidays-upright", tmp_path)
    turns = {picture.path.stem: picture.turn for picture in benchmark.database}
    assert turns == dict.fromkeys(layouts.HOLIDAYS, 0) | {"100001": 90, "149903": 270, "100100": 180}
    assert [picture.turn for picture in benchmark.queries] == [0, 180, 0]
    assert benchmark.name == "holidays-upright"
    assert has(benchmark.problems, "200 images turned by 90 degrees, found 1", "27 images turned by 270", "1,491")
    assert not has(benchmark.problems, "turned by 180")
    assert {picture.turn for picture in read("holidays", tmp_path).database} == {0}


def test_upright_holidays_is_whole_with_228_turns(tmp_path):
    layouts.holidays_whole(tmp_path)
    every = [picture.path.stem for picture in read("holidays", tmp_path).database]
    turns = [90] * 200 + [270] * 27 + [180]
    (tmp_path / "rotations.txt").write_text("".join(f"{a}.jpg {b}\n" for a, b in zip(every, turns, strict=False)))
    assert read("holidays-upright", tmp_path).as_published
    (tmp_path / "rotations.txt").write_text("".join(f"9{a}.jpg {b}\n" for a, b in zip(every, turns, strict=False)))
    assert has(read("holidays-upright", tmp_path).problems, "228 turned images are missing: 9100000")


def test_upright_holidays_needs_its_list_and_names_every_wrong_line(tmp_path):
    layouts.holidays(tmp_path)
    (problem,) = problems_of("holidays-upright", tmp_path)
    assert "rotations.txt" in problem
    assert "evaluate `holidays`" in problem
    (tmp_path / "rotations.txt").write_text("100001 90\n100001 180\n100002\n100100 45\n100101 90 cw\n")
    problems = problems_of("holidays-upright", tmp_path)
    assert [problem.split(": ")[0].split("line ")[1] for problem in problems] == ["2", "3", "4", "5"]


# --- UKBench


def test_ukbench_counts_each_image_itself(tmp_path):
    benchmark = read("ukbench", layouts.ukbench(tmp_path))
    assert benchmark.queries == benchmark.database
    assert names(benchmark.database) == [f"ukbench{number:05}" for number in range(12)]
    for number, truth in enumerate(benchmark.truth[""]):
        first = number - number % 4
        assert truth.positives.tolist() == [first, first + 1, first + 2, first + 3]
        assert truth.junk.tolist() == []


def test_a_missing_image_of_ukbench_shifts_no_other(tmp_path):
    layouts.ukbench(tmp_path, [0, 2, 3, 4, 5, 6, 7, 10199, 10200])
    benchmark = read("ukbench", tmp_path)
    assert told(benchmark)["ukbench00002"][0] == {"ukbench00000", "ukbench00002", "ukbench00003"}
    assert told(benchmark)["ukbench00004"][0] == {f"ukbench0000{number}" for number in (4, 5, 6, 7)}
    assert has(
        benchmark.problems,
        "10,200 images, found 8",
        "10,192 images are missing: ukbench00001.jpg, ukbench00008.jpg",
        "1 images are beyond ukbench10199.jpg and left out: ukbench10200.jpg",
    )


def test_ukbench_is_whole_with_all_its_images(tmp_path):
    benchmark = read("ukbench", layouts.ukbench(tmp_path, range(10_200)))
    assert benchmark.as_published
    assert len(benchmark.queries) == 10_200


# --- Copydays


@pytest.mark.parametrize("originals", ["original", "."])
def test_copydays_is_read_in_both_layouts(tmp_path, originals):
    benchmark = read("copydays", layouts.copydays(tmp_path, originals, distractors=4))
    assert names(benchmark.database) == ["200000", "200100", "200200", "0", "1", "2", "3"]
    assert list(benchmark.truth) == ["strong"]
    assert told(benchmark, "strong") == {
        "200001": ({"200000"}, set()),
        "200002": ({"200000"}, set()),
        "200102": ({"200100"}, set()),
        "200202": ({"200200"}, set()),
    }
    assert has(benchmark.problems, "157 originals, found 3", "229 copies in strong/, found 4")
    assert len(benchmark.problems) == 2


def test_further_copies_are_settings_whose_lists_do_not_know_the_others(tmp_path):
    folders = ("jpegqual/3", "crops/80", "crops/10")
    benchmark = read("copydays", layouts.copydays(tmp_path, crops=folders, distractors=2))
    assert list(benchmark.truth) == ["strong", "crops/10", "crops/80", "jpegqual/3"]
    assert len(benchmark.queries) == 4 + 3 * 3
    for setting, truths in benchmark.truth.items():
        for query, truth in zip(benchmark.queries, truths, strict=True):
            if query.path.parent == tmp_path / setting:
                assert [benchmark.database[k].path.stem[:4] for k in truth.positives] == [query.path.stem[:4]]
                assert not len(truth.junk)
            else:
                assert not len(truth.positives)
                assert truth.junk.tolist() == [0, 1, 2, 3, 4]
    assert has(benchmark.problems, "157 copies in crops/80/, found 3")


def test_copies_without_an_original_are_left_out_and_named(tmp_path):
    layouts.copydays(tmp_path)
    layouts.draw(tmp_path / "strong", "999901.jpg", "cover.jpg")
    layouts.draw(tmp_path / "original", "200001.jpg", "200301.jpg")
    benchmark = read("copydays", tmp_path)
    assert len(benchmark.queries) == 4
    assert has(
        benchmark.problems,
        "1 copies in strong/ have no original and are left out: 999901.jpg",
        "1 images in strong/ are not of the set and left out: cover.jpg",
        "original are not of the set and left out: 200001.jpg, 200301.jpg",
    )


def test_copydays_is_whole_with_or_without_distractors_and_further_copies(tmp_path):
    layouts.copydays(tmp_path, blocks=[f"{2000 + number}" for number in range(157)], crops=["crops/50"])
    assert has(read("copydays", tmp_path).problems, "229 copies")
    layouts.draw(tmp_path / "strong", *(f"2100{number}.jpg" for number in range(10, 81)))
    whole = read("copydays", tmp_path)
    assert whole.as_published
    assert not any(picture.upright for picture in (*whole.database, *whole.queries))


@pytest.mark.parametrize(
    ("gone", "part"), [("original", "originals NNNN00.jpg"), ("strong", "strong copies strong/NNNNNN.jpg")]
)
def test_half_of_copydays_is_refused(tmp_path, gone, part):
    layouts.copydays(tmp_path)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    (problem,) = problems_of("copydays", tmp_path)
    assert part in problem


# --- Oxford and Paris


def test_oxford_keeps_the_query_in_its_list_and_drops_the_prefix(tmp_path):
    benchmark = read("oxford5k", layouts.oxford5k(tmp_path))
    assert names(benchmark.database) == [*(f"all_souls_00000{k}" for k in range(5)), "new_000001"]
    assert {picture.box for picture in benchmark.database} == {None}
    assert [picture.box for picture in benchmark.queries] == [(1.5, 2, 6.5, 5), (0, 0, 4, 4)]
    assert told(benchmark) == {
        "all_souls_000000": ({"all_souls_000000", "all_souls_000001", "all_souls_000002"}, {"all_souls_000003"}),
        "new_000001": ({"new_000001", "all_souls_000004"}, set()),
    }
    assert has(benchmark.problems, "5,063 images in the database, found 6", "55 queries, found 2")


@pytest.mark.parametrize("count", [5062, 5063])
def test_both_numbers_of_images_of_oxford_are_whole(tmp_path, monkeypatch, count):
    monkeypatch.setitem(landmarks._QUERIES, "oxford5k", 2)
    layouts.oxford5k(tmp_path)
    layouts.draw(tmp_path / "oxbuild_images", *(f"oxford_{number:06}.jpg" for number in range(count - 6)))
    assert read("oxford5k", tmp_path).as_published
    layouts.draw(tmp_path / "oxbuild_images", "oxford_100000.jpg", "oxford_100001.jpg")
    assert not read("oxford5k", tmp_path).as_published


def test_paris_is_read_from_its_folders_without_its_corrupt_images(tmp_path):
    benchmark = read("paris6k", layouts.paris6k(tmp_path))
    assert names(benchmark.database) == ["paris_defense_000000", "paris_defense_000001", "paris_louvre_000137"]
    assert told(benchmark) == {
        "paris_defense_000001": ({"paris_defense_000000", "paris_defense_000001"}, {"paris_louvre_000137"})
    }
    assert benchmark.queries[0].box == (0, 1, 7, 5)
    assert has(benchmark.problems, "6,392 images in the database, found 3", "55 queries, found 1")
    (tmp_path / "paris/louvre/paris_louvre_000136.jpg").unlink()
    without = read("paris6k", tmp_path)
    assert told(without) == told(benchmark)
    assert without.problems == benchmark.problems, "that a corrupt image is not there is no problem"


def test_twenty_images_of_paris_are_corrupt():
    by_landmark = Counter(name.split("_")[1] for name in landmarks.DAMAGED)
    assert by_landmark == {
        "louvre": 2,
        "moulinrouge": 1,
        "museedorsay": 1,
        "notredame": 1,
        "pantheon": 3,
        "pompidou": 5,
        "sacrecoeur": 3,
        "triomphe": 4,
    }
    assert {"paris_museedorsay_001059", "paris_triomphe_000867"} < landmarks.DAMAGED


def test_images_that_the_ground_truth_names_and_are_not_there_are_told(tmp_path):
    layouts.oxford5k(tmp_path)
    for gone in ("all_souls_000002", "all_souls_000003", "new_000001"):
        (tmp_path / "oxbuild_images" / f"{gone}.jpg").unlink()
    layouts.draw(tmp_path / "oxbuild_images", "cover.jpg")
    benchmark = read("oxford5k", tmp_path)
    assert told(benchmark) == {"all_souls_000000": ({"all_souls_000000", "all_souls_000001"}, set())}
    assert has(
        benchmark.problems,
        "3 images that the ground truth names are missing: all_souls_000002, all_souls_000003, new_000001",
        "55 queries, found 1",
        "1 images are not of the set and left out: cover",
    )


def test_an_image_that_is_positive_and_junk_is_told(tmp_path):
    layouts.oxford5k(tmp_path)
    (tmp_path / "gt_files_170407/new_1_junk.txt").write_text("new_000001\n")
    assert has(read("oxford5k", tmp_path).problems, "1 queries have an image as positive and as junk: new_000001")


def test_all_that_is_wrong_with_classic_ground_truth_is_told_at_once(tmp_path):
    layouts.oxford5k(tmp_path)
    truth = tmp_path / "gt_files_170407"
    (truth / "all_souls_1_ok.txt").unlink()
    (truth / "new_1_query.txt").write_text("oxc1_new_000001 4 0 0 4\n")
    layouts.write_truth(truth, "new_2", "oxc1_new_000001 0 0 4")
    layouts.write_truth(truth, "new_3", "oxc1_new_000001 0 0 4 nan")
    layouts.write_truth(truth, "new_4", "")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/new_1_good.txt").write_text("")
    problems = problems_of("oxford5k", tmp_path)
    parts = ("new_1_good.txt; keep", "all_souls_1_ok.txt is missing in", "new_1_q", "new_2_q", "new_3_q", "new_4_q")
    assert len(problems) == len(parts)
    assert has(problems, *parts)


def test_an_image_that_lies_twice_is_refused(tmp_path):
    layouts.oxford5k(tmp_path)
    layouts.draw(tmp_path / "small", "new_000001.png")
    (problem,) = problems_of("oxford5k", tmp_path)
    assert "oxbuild_images/new_000001.jpg" in problem
    assert "small/new_000001.png" in problem


def test_ground_truth_of_other_images_is_refused(tmp_path):
    layouts.oxford5k(tmp_path / "set")
    layouts.draw(tmp_path / "other", "landmark_000001.jpg")
    (tmp_path / "set/gt_files_170407").rename(tmp_path / "other/lab")
    (problem,) = problems_of("oxford5k", tmp_path / "other")
    assert "images of its queries" in problem


# --- revisited


def answers(easy, medium, hard):
    return {"easy": easy, "medium": medium, "hard": hard}


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_revisited_sets_have_three_settings(tmp_path, name, nested, protocol):
    layouts.revisited(tmp_path / name if nested else tmp_path, name, protocol=protocol)
    benchmark = read(name, tmp_path)
    assert names(benchmark.database) == [*layouts.IMLIST], "in the order of the published features"
    assert names(benchmark.queries) == [*layouts.QIMLIST]
    assert [picture.box for picture in benchmark.queries] == [(1, 1, 6, 5), (0, 0, 3.5, 4)]
    found = {
        setting: [(truth.positives.tolist(), truth.junk.tolist()) for truth in truths]
        for setting, truths in benchmark.truth.items()
    }
    assert found == {
        "easy": [([2], [0, 3]), ([], [1, 4])],
        "medium": [([0, 2], [3]), ([1, 4], [])],
        "hard": [([0], [2, 3]), ([1, 4], [])],
    }
    count = {"roxford5k": "4,993", "rparis6k": "6,322"}[name]
    assert has(benchmark.problems, f"{count} images in the database, found 5", "70 queries, found 2")


def test_a_missing_image_of_the_revisited_sets_shifts_the_indices(tmp_path):
    layouts.revisited(tmp_path)
    (tmp_path / "jpg" / f"{layouts.IMLIST[1]}.jpg").unlink()
    (tmp_path / "jpg" / f"{layouts.QIMLIST[0]}.jpg").unlink()
    layouts.draw(tmp_path / "jpg", "extra_000001.jpg")
    layouts.draw(tmp_path / "distractors", "x/1.jpg", "0.jpg")
    benchmark = read("roxford5k", tmp_path)
    assert names(benchmark.database) == [layouts.IMLIST[k] for k in (0, 2, 3, 4)] + ["0", "1"]
    assert told(benchmark, "medium") == {"new_000003": ({"new_000007"}, set())}
    assert has(
        benchmark.problems,
        "2 images that the ground truth names are missing: all_souls_000051, new_000002",
        "1 images in jpg/ are not of the set and left out: extra_000001",
    )


def test_the_corrupt_images_of_paris_are_not_extra(tmp_path):
    layouts.revisited(tmp_path, "rparis6k")
    layouts.draw(tmp_path / "jpg", *(f"{name}.jpg" for name in landmarks.DAMAGED))
    assert not has(read("rparis6k", tmp_path).problems, "left out")


def test_revisited_oxford_is_whole_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(landmarks._SIZES, "roxford5k", (5,))
    monkeypatch.setitem(landmarks._QUERIES, "roxford5k", 2)
    assert read("roxford5k", layouts.revisited(tmp_path)).as_published


def broken(**changes):
    truth = layouts.revisited_truth()
    truth["gnd"][0] |= changes.pop("gnd0", {})
    return truth | changes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["'imlist'", "'qimlist'", "'gnd'"]),
        ([1, 2], ["'imlist'", "'qimlist'", "'gnd'"]),
        (broken(imlist=[]), ["'imlist'"]),
        (broken(qimlist=["a", 3]), ["'qimlist'"]),
        (broken(qimlist=["a"]), ["an entry for each name of qimlist"]),
        (broken(gnd=[1, {}]), ["gnd[0]: 'easy'", "gnd[0]: 'bbx'", "gnd[1]: 'junk'"]),
        (broken(gnd0={"easy": [5]}), ["gnd[0]: 'easy' must be a list of indices into the 5 names"]),
        (broken(gnd0={"hard": [-1]}), ["gnd[0]: 'hard'"]),
        (broken(gnd0={"junk": [True]}), ["gnd[0]: 'junk'"]),
        (broken(gnd0={"junk": np.array([1.0])}), ["gnd[0]: 'junk'"]),
        (broken(gnd0={"bbx": [5, 0, 1, 4]}), ["gnd[0]: 'bbx'"]),
        (broken(gnd0={"bbx": [0, 0, 4]}), ["gnd[0]: 'bbx'"]),
    ],
)
def test_ground_truth_that_is_not_in_its_form_is_refused(tmp_path, content, parts):
    layouts.revisited(tmp_path, content=pickle.dumps(content))
    assert has(problems_of("roxford5k", tmp_path), *parts)


def test_names_in_a_pickle_cannot_lead_out_of_the_folder(tmp_path):
    layouts.draw(tmp_path, "outside.jpg")
    truth = broken(imlist=["../outside", *layouts.IMLIST[1:]])
    benchmark = read("roxford5k", layouts.revisited(tmp_path / "set", content=pickle.dumps(truth)))
    assert "outside" not in names(benchmark.database)
    assert has(benchmark.problems, "missing: ../outside")


# --- ImageNet


@pytest.mark.parametrize(
    ("val", "train"),
    [("val", "train"), ("ILSVRC2012_img_val", "ILSVRC2012_img_train"), ("val", "ILSVRC2012_img_train")],
)
def test_imagenet_numbers_its_classes_by_their_sorted_ids(tmp_path, val, train):
    benchmark = read("imagenet", layouts.imagenet(tmp_path, val, train))
    assert benchmark.classes == layouts.WNIDS
    assert names(benchmark.queries) == [f"ILSVRC2012_val_0000000{number}" for number in (2, 4, 3, 1, 5)]
    assert benchmark.labels == (0, 0, 1, 2, 2)
    assert (benchmark.database, benchmark.truth, benchmark.measures) == ((), {}, ("top1", "top5"))
    assert has(
        benchmark.problems, "1,000 classes, found 3", "50,000 images, found 5", "3 classes do not hold 50 images"
    )


@pytest.mark.parametrize("val", ["val", "ILSVRC2012_img_val"])
def test_a_flat_imagenet_is_labelled_by_the_development_kit(tmp_path, val):
    benchmark = read("imagenet", layouts.imagenet_flat(tmp_path, val))
    assert benchmark.classes == layouts.WNIDS
    assert names(benchmark.queries) == [f"ILSVRC2012_val_0000000{number}" for number in range(1, 6)]
    assert benchmark.labels == (2, 0, 1, 0, 2)
    assert has(benchmark.problems, "1,000 classes, found 3", "50,000 images, found 5")


def test_a_second_image_of_a_number_of_a_flat_imagenet_is_named(tmp_path):
    layouts.imagenet_flat(tmp_path)
    layouts.draw(tmp_path / "val", "ILSVRC2012_val_00000002.png")
    benchmark = read("imagenet", tmp_path)
    assert benchmark.labels == (2, 0, 1, 0, 2)
    assert has(
        benchmark.problems, "1 images have the number of another one and are left out: ILSVRC2012_val_00000002.png"
    )


def test_a_missing_image_of_a_flat_imagenet_shifts_no_label(tmp_path):
    layouts.imagenet_flat(tmp_path)
    (tmp_path / "val/ILSVRC2012_val_00000002.JPEG").unlink()
    layouts.draw(tmp_path / "val", "ILSVRC2012_val_00000006.JPEG", "cover.jpg")
    benchmark = read("imagenet", tmp_path)
    assert benchmark.labels == (2, 1, 0, 2)
    assert has(
        benchmark.problems,
        "1 images that the ground truth names are missing: ILSVRC2012_val_00000002.JPEG",
        "2 images have no class in the ground truth and are left out: ILSVRC2012_val_00000006.JPEG, cover.jpg",
    )


@pytest.mark.parametrize("train", ["train", "ILSVRC2012_img_train"])
def test_a_class_without_validation_images_keeps_its_number(tmp_path, train):
    layouts.imagenet(tmp_path, train=train)
    for path in (tmp_path / "val" / layouts.WNIDS[0]).iterdir():
        path.unlink()
    (tmp_path / "val" / layouts.WNIDS[0]).rmdir()
    benchmark = read("imagenet", tmp_path)
    assert benchmark.classes == layouts.WNIDS
    assert benchmark.labels == (1, 2, 2)


@pytest.mark.parametrize("maker", [layouts.imagenet, layouts.imagenet_flat])
def test_imagenet_is_whole_with_its_numbers(tmp_path, monkeypatch, maker):
    monkeypatch.setattr(imagenet, "_CLASSES", 3)
    monkeypatch.setattr(imagenet, "_IMAGES", 6)
    maker(tmp_path)
    assert not read("imagenet", tmp_path).as_published
    folder = layouts.WNIDS[1] if maker is layouts.imagenet else "."
    layouts.draw(tmp_path / "val" / folder, "ILSVRC2012_val_00000006.JPEG")
    kit = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    if kit.exists():
        kit.write_text(kit.read_text() + "3\n")
    assert read("imagenet", tmp_path).as_published
    layouts.draw(tmp_path / "val", "cover.jpg")
    assert not read("imagenet", tmp_path).as_published


@pytest.mark.parametrize("gone", [["meta.mat"], ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"]])
def test_a_flat_imagenet_needs_both_files_of_the_kit(tmp_path, gone):
    layouts.imagenet_flat(tmp_path)
    for name in gone:
        (tmp_path / "ILSVRC2012_devkit_t12/data" / name).unlink()
    problems = problems_of("imagenet", tmp_path)
    assert len(problems) == len(gone)
    assert has(problems, *gone)


def test_a_damaged_kit_is_told(tmp_path):
    layouts.imagenet_flat(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12/data"
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n4\nx\n2\n1\n")
    problems = problems_of("imagenet", tmp_path)
    assert len(problems) == 2
    assert has(problems, "entry 2: a class must be one of the 3", "entry 3: a class must be one of the 3")
    for content in (b"", b"<html>", (kit / "meta.mat").read_bytes()[:150]):
        (kit / "meta.mat").write_bytes(content)
        (problem,) = problems_of("imagenet", tmp_path)
        assert "meta.mat must hold the `synsets`" in problem


# --- DISC21


def test_disc21_has_queries_without_a_reference(tmp_path):
    benchmark = read("disc21", layouts.disc21(tmp_path))
    assert told(benchmark) == {"Q00000": ({"R000002"}, set()), "Q00001": ({"R000000"}, set()), "Q00002": (set(), set())}
    assert benchmark.measures[0] == "micro_ap"


def test_ground_truth_of_disc21_as_its_authors_head_it(tmp_path):
    expected = told(read("disc21", layouts.disc21(tmp_path)))
    text = (tmp_path / "groundtruth.csv").read_text().replace("query,reference", "query_id,reference_id")
    (tmp_path / "groundtruth.csv").write_text(text)
    assert told(read("disc21", tmp_path)) == expected


def test_what_disc21_lacks_is_named(tmp_path):
    layouts.disc21(tmp_path)
    (tmp_path / "references/R000000.jpg").unlink()
    layouts.draw(tmp_path / "queries", "Q00003.jpg")
    with (tmp_path / "groundtruth.csv").open("a") as file:
        file.write("\nQ00004,R000001\nQ00000,R000001\n")
    benchmark = read("disc21", tmp_path)
    assert told(benchmark)["Q00000"] == ({"R000001", "R000002"}, set())
    assert has(
        benchmark.problems,
        "1 queries have no row in groundtruth.csv and are left out: Q00003",
        "1 queries of groundtruth.csv are missing: Q00004",
        "1 references of groundtruth.csv are missing: R000000",
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["must begin with query,reference or query_id,reference_id, got nothing"]),
        ("Q00000,R000002\n", ["must begin with query,reference"]),
        ("query,reference\nQ00000\n,R000002\n", ["row 2: a row must be", "row 3: a row must be"]),
        ("query,reference\nQ00000,\nQ00000,R000001\n", ["row 3: a query comes again"]),
        ("query,reference\nQ00000,R000001\nQ00000,\n", ["row 3: a query comes again"]),
        ("query,reference\nQ00000,R000001\nQ00000,R000001\n", ["row 3: a query comes again"]),
        ('query,reference\n"Q00000,R000001\n', ["comma-separated"]),
        ("query,reference\nQ00000,R9\n", ["a query whose reference is there"]),
    ],
)
def test_wrong_ground_truth_of_disc21_is_refused(tmp_path, text, parts):
    layouts.disc21(tmp_path)
    (tmp_path / "groundtruth.csv").write_text(text)
    problems = problems_of("disc21", tmp_path)
    assert len(problems) == len(parts)
    assert has(problems, *parts)


# --- one's own

ROWS = [
    ("0.jpg", "mug", "database", "a"),
    ("1.jpg", "mug", "database", "b"),
    ("2.jpg", "cup", "database", None),
    ("3.jpg", "mug", "query", "a"),
    ("2.jpg", "cup", "query", None),
    ("0.jpg", "mug", "query", None),
    ("4.jpg", None, "query", "b"),
    ("5.jpg", "ape", "train", None),
]


def write_manifest(folder, kind, rows=ROWS, columns=("image", "class", "role", "instance_id")):
    layouts.draw(folder, *(f"{number}.jpg" for number in range(6)))
    table = pd.DataFrame(rows, columns=columns)
    file = folder / f"list.{kind}"
    table.to_csv(file, index=False) if kind == "csv" else table.to_parquet(file)
    return file


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_is_asked_by_instance_and_by_class(tmp_path, kind):
    benchmark = read("manifest", write_manifest(tmp_path, kind))
    assert names(benchmark.database) == ["0", "1", "2"]
    assert names(benchmark.queries) == ["3", "2", "0", "4"]
    assert benchmark.as_published
    assert told(benchmark, "instance") == {
        "3": ({"0"}, set()),
        "2": (set(), {"2"}),
        "0": (set(), {"0"}),
        "4": ({"1"}, set()),
    }
    assert told(benchmark, "class") == {
        "3": ({"0", "1"}, set()),
        "2": (set(), {"2"}),
        "0": ({"1"}, {"0"}),
        "4": (set(), set()),
    }


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_without_instances_has_one_setting(tmp_path, kind):
    rows = [row[:3] for row in ROWS]
    benchmark = read("manifest", write_manifest(tmp_path, kind, rows, ("image", "class", "role")))
    assert list(benchmark.truth) == [""]
    assert told(benchmark)["3"] == ({"0", "1"}, set())


def test_numbers_in_a_parquet_file_are_the_text_that_they_have_in_csv(tmp_path):
    rows = [("0.jpg", 1, "database", 7), ("1.jpg", 2, "database", None), ("3.jpg", 1, "query", 7)]
    table = pd.DataFrame(rows, columns=["image", "class", "role", "instance_id"]).astype({"instance_id": "Int64"})
    layouts.draw(tmp_path, "0.jpg", "1.jpg", "3.jpg")
    table.to_parquet(tmp_path / "list.parquet")
    benchmark = read("manifest", tmp_path / "list.parquet")
    assert told(benchmark, "instance") == told(benchmark, "class") == {"3": ({"0"}, set())}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_all_that_is_wrong_with_a_manifest_is_told_at_once(tmp_path, kind):
    rows = [*ROWS[:2], ("none.jpg", "mug", "query", "a"), ("3.jpg", "mug", "quary", "a")]
    problems = problems_of("manifest", write_manifest(tmp_path, kind, rows))
    place = {"csv": ("line 4", "line 5"), "parquet": ("row 3", "row 4")}[kind]
    assert has(problems, f"{place[0]}: every image must exist", f"{place[1]}: unknown role 'quary'")
    assert not has(problems, "needs rows of role 'database'")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (ROWS[:3], "rows of role 'query', found none"),
        (ROWS[3:], "rows of role 'database', found none"),
        ([ROWS[0], ("3.jpg", "ape", "query", "z")], "needs the class or instance_id of a row of the database"),
        ([ROWS[0], ("0.jpg", "mug", "query", "a")], "needs the class or instance_id of a row of the database"),
    ],
)
def test_half_a_manifest_is_refused(tmp_path, kind, rows, part):
    (problem,) = problems_of("manifest", write_manifest(tmp_path, kind, rows))
    assert part in problem


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_that_cannot_be_a_benchmark_is_refused(tmp_path, kind):
    file = write_manifest(tmp_path, kind, [row[:2] for row in ROWS], ("image", "class"))
    assert has(problems_of("manifest", file), "needs the column 'role'")
    file.write_bytes(b"\xff\xfe")
    assert has(problems_of("manifest", file), {"csv": "must be UTF-8", "parquet": "must be a Parquet file"}[kind])
    file.unlink()
    (problem,) = problems_of("manifest", file)
    assert str(file) in problem


# --- published figures


def figures(**wanted):
    return [row for row in PUBLISHED if all(getattr(row, name) == value for name, value in wanted.items())]


def test_published_figures_are_those_of_the_paper():
    assert len(PUBLISHED) == 6 * 3 * 3 + 8 * 2 * 2
    (best,) = figures(benchmark="imagenet", measure="top1", value=0.794)
    assert (best.method, best.weight, best.p, best.size) == ("MultiGrain + AutoAugment", 0.5, 3, 500)
    (row,) = figures(benchmark="holidays", weight=0.5, size=800, method="MultiGrain")
    assert (row.value, row.source) == (0.925, "Table D.1")
    (row,) = figures(benchmark="copydays", weight=1, size=800)
    assert (row.value, row.distractors, row.setting) == (0.825, 10_000, "strong")
    (row,) = figures(benchmark="ukbench", method="PyTorch zoo", size=500)
    assert row.value == 3.85
    (row,) = figures(benchmark="imagenet", method="ResNet-50", weight=None, p=3, measure="top5")
    assert (row.value, row.source) == (0.931, "Table 2")


def test_published_figures_are_of_benchmarks_and_measures_that_there_are():
    assert {row.benchmark for row in PUBLISHED} <= set(BENCHMARKS)
    assert {row.measure for row in PUBLISHED} <= set(MEASURES)
    assert all(0 < row.value < (4 if row.measure == "ukb" else 1) for row in PUBLISHED)


@pytest.mark.parametrize("name", MAKERS)
def test_published_images_are_shown_as_stored(tmp_path, name):
    MAKERS[name](tmp_path)
    benchmark = read(name, tmp_path)
    own = name == "copydays" and not benchmark.as_published
    assert {picture.upright for picture in (*benchmark.database, *benchmark.queries)} == {own}


def test_images_of_ones_own_are_shown_upright(tmp_path):
    benchmark = read("manifest", write_manifest(tmp_path, "csv"))
    assert {picture.upright for picture in (*benchmark.database, *benchmark.queries)} == {True}


def test_a_picture_is_whole_and_upright_by_default(tmp_path):
    assert Picture(tmp_path) == (tmp_path, None, 0, True)


def test_nothing_heavy_is_imported_to_name_the_benchmarks():
    from commands import python

    code = (
        "import sys, multigrain.benchmarks.readers; print({'torch', 'pandas', 'scipy', 'pyarrow'} & set(sys.modules))"
    )
    assert python("-c", code).strip() == "set()", sys.executable


# --- Copydays whose further copies lack their originals


@pytest.mark.parametrize("left", ["999901.jpg", "cover.jpg", "notes.txt"])
def test_further_copies_without_any_original_are_no_setting(tmp_path, left):
    layouts.copydays(tmp_path, crops=["crops/80"])
    (tmp_path / "crops/10").mkdir()
    layouts.draw(tmp_path / "crops/10", left) if left.endswith("jpg") else (tmp_path / "crops/10" / left).touch()
    benchmark = read("copydays", tmp_path)
    assert list(benchmark.truth) == ["strong", "crops/80"]
    assert len(benchmark.queries) == 4 + 3
    assert all(any(len(truth.positives) for truth in truths) for truths in benchmark.truth.values())
    assert has(benchmark.problems, "crops/10/ holds no copy of an original and is left out")
    assert not has(benchmark.problems, "crops/80/ holds no copy")


def test_strong_copies_without_any_original_stay_an_error(tmp_path):
    layouts.copydays(tmp_path, crops=["crops/10"])
    for path in (tmp_path / "strong").iterdir():
        path.rename(path.with_stem(f"9{path.stem[1:]}"))
    (problem,) = problems_of("copydays", tmp_path)
    assert "strong copies strong/NNNNNN.jpg of the originals" in problem


def test_copies_of_ones_own_are_read_by_their_names(tmp_path):
    layouts.draw(tmp_path, "original/IMG_1.jpg", "original/IMG_10.jpg", "distractors/x.jpg")
    layouts.draw(tmp_path, "strong/IMG_10_crop.jpg", "strong/IMG_1_dark.jpg")
    benchmark = read("copydays", tmp_path)
    shown = [path.stem for path, *_ in benchmark.database]
    asked = [path.stem for path, *_ in benchmark.queries]
    truth = dict(
        zip(asked, ([shown[index] for index in one.positives] for one in benchmark.truth["strong"]), strict=True)
    )
    assert truth == {"IMG_10_crop": ["IMG_10"], "IMG_1_dark": ["IMG_1"]}
    assert shown == ["IMG_1", "IMG_10", "x"]
    assert not benchmark.as_published
