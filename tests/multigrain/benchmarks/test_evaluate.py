"""Evaluation on benchmarks: figures against a forward pass for each picture and exponent, and naive ranks."""

import csv
import math
import re
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from layouts import copydays, draw, holidays
from PIL import Image
from ranks import start_ranks
from safetensors.torch import load_file
from torch import distributed
from torch.nn.functional import normalize

from multigrain.benchmarks import evaluate, gallery, proxy, results
from multigrain.benchmarks.evaluate import run_benchmarks
from multigrain.benchmarks.results import Measurement, headlines
from multigrain.config.evaluation import QUERY_MEASURES, Evaluation
from multigrain.config.training import MultiGrainSpec
from multigrain.data.folders import read_dataset
from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_view
from multigrain.errors import DataError
from multigrain.evaluation import embed
from multigrain.evaluation.embed import Setting
from multigrain.export import inference
from multigrain.models import checkpoint, served_setting
from multigrain.models.multigrain import MultiGrain, network_of
from multigrain.models.whitening import Whitening
from multigrain.retrieval import ranking
from multigrain.training.fit import fit

CPU = torch.device("cpu")
SIZES, EXPONENTS = (32, 24), (3.0, 1.0)
OWN = Setting(32, 3.0, False)
SPEC = {
    "image_size": 32,
    "epochs": 1,
    "model": {"trunk": "narrow"},
    "batch": {"size": 24, "repeats": 2, "length_factor": 2.5},
    "augment": {"crop": 0.5},
    "compute": {"precision": "fp32"},
}
CROPS = ("crops/10", "crops/80")


def noise(folder, seed=0):
    """Images of several shapes in the place of those below a folder, lossless whatever their names say."""
    rng = np.random.default_rng(seed)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".jpg", ".png", ".JPEG"}):
        height, width = rng.integers(20, 50, 2)
        image = rng.integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(image).resize((int(width), int(height))).save(path, "PNG")
    return folder


@pytest.fixture(scope="module")
def trained(shapes_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    list(fit(MultiGrainSpec.model_validate(SPEC), read_dataset(shapes_folder), folder, CPU))
    return folder


def changed(trained, folder, **changes):
    """The checkpoint with changes to what it knows about its network."""
    saved = checkpoint.latest(trained)
    checkpoint.save(folder, saved._replace(state={**saved.state, **changes}))
    return folder


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("roots")
    white = base / "white"
    white.mkdir()
    rng = np.random.default_rng(5)
    for number in range(150):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(white / f"{number}.png")
    return {
        "holidays": noise(holidays(base / "holidays"), 1),
        "copydays": noise(copydays(base / "copydays", crops=CROPS, distractors=5), 2),
        "white": white,
    }


@pytest.fixture(scope="module")
def evaluated(trained, roots, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    on = {name: str(roots[name]) for name in ("holidays", "copydays")}
    settings = Evaluation(on=on, sizes=[24, 32], exponents=[1, 3], whiten=str(roots["white"]))
    return run_benchmarks(trained, settings, out), out, settings


def slow_embeddings(trained, paths, size, p, transform="rect"):
    """(N, C) and logits (N, K): one forward pass of a network with this exponent for each file."""
    saved = checkpoint.latest(trained)
    network = MultiGrain("narrow", len(saved.state["classes"]), p)
    network.load_state_dict(network_of(saved)[0].state_dict())
    network.eval()
    with torch.no_grad():
        outputs = [network(evaluation_view(decode(path), transform, size)[None]) for path in paths]
    return torch.cat([one.embedding for one in outputs]), torch.cat([one.logits for one in outputs])


def slow_whitened(fitted_on, embeddings):
    """Mean and covariance of l2([e; 1]), its eigenvectors divided by the roots of its eigenvalues [P section 3.6]."""

    def lifted(e):
        return normalize(torch.cat([e.double(), torch.ones(len(e), 1)], dim=1), dim=1)

    v = lifted(fitted_on)
    values, vectors = torch.linalg.eigh(torch.cov(v.T))
    return normalize(
        (lifted(embeddings) - v.mean(dim=0)) @ (vectors / values.clamp(min=1e-6 * values[-1]).sqrt()), dim=1
    )


def slow_maps(queries, database, truths):
    """Of (positives, left out) of each query, position for position: trapezoids under the curve, and its steps."""
    found = []
    for query, (positives, left_out) in zip(queries, truths, strict=True):
        order = [i for i in torch.argsort(-(database @ query)).tolist() if i not in left_out]
        right, area, steps, last = 0, 0.0, 0.0, 1.0
        for position, item in enumerate(order):
            if item in positives:
                right += 1
                area += (last + right / (position + 1)) / 2 / len(positives)
                steps += right / (position + 1) / len(positives)
            last = right / (position + 1)
        found.append((area, steps))
    return [sum(values) / len(values) for values in zip(*found, strict=True)]


def slow_micro(queries, database, positives):
    """Micro-AP, and the recall at a precision of 90 %, pair for pair."""
    asked = zip(queries, positives, strict=True)
    pairs = [(float(query @ item), i in positive) for query, positive in asked for i, item in enumerate(database)]
    scores = sorted(pairs, reverse=True)
    right, total, reached = 0, 0.0, 0
    for position, (_, good) in enumerate(scores, 1):
        right += good
        total += good * right / position
        reached = right if right / position >= 0.9 else reached
    return total / right, reached / right


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", EXPONENTS)
def test_figures_are_those_of_whole_forward_passes(evaluated, trained, roots, size, p, whitened):
    found = {
        (one.benchmark, one.part, one.measure): one.value
        for one in evaluated[0].measurements
        if one.at == (size, p, whitened)
    }
    fitted_on = slow_embeddings(trained, sorted(roots["white"].iterdir()), size, p)[0]

    def described(paths):
        embeddings = slow_embeddings(trained, paths, size, p)[0]
        return slow_whitened(fitted_on, embeddings) if whitened else normalize(embeddings.double(), dim=1)

    paths = sorted((roots["holidays"] / "jpg").iterdir())
    everything = described(paths)
    groups = [path.stem[:4] for path in paths]
    heads = [index for index, path in enumerate(paths) if path.stem.endswith("00")]
    truths = [({i for i, group in enumerate(groups) if group == groups[q] and i != q}, {q}) for q in heads]
    maps = slow_maps(everything[heads], everything, truths)
    expected = {("holidays", "", name): value for name, value in zip(("map", "map_finite"), maps, strict=True)}

    originals = sorted((roots["copydays"] / "original").iterdir())
    database = described([*originals, *sorted((roots["copydays"] / "distractors").rglob("*.png"))])
    for part in ("strong", *CROPS):
        copies = sorted((roots["copydays"] / part).iterdir())
        queries = described(copies)
        positives = [{[path.stem[:4] for path in originals].index(copy.stem[:4])} for copy in copies]
        values = (
            *slow_maps(queries, database, [(one, set()) for one in positives]),
            *slow_micro(queries, database, positives),
        )
        for name, value in zip(("map", "map_finite", "micro_ap", "recall@p90"), values, strict=True):
            expected["copydays", part, name] = value
    assert found == pytest.approx(expected, abs=1e-9)


def test_queries_of_other_parts_do_not_count(evaluated, trained, roots, tmp_path):
    shutil.copytree(roots["copydays"], tmp_path / "copydays", ignore=shutil.ignore_patterns("crops"))
    alone = run_benchmarks(
        trained, Evaluation(on={"copydays": str(tmp_path / "copydays")}), tmp_path / "out"
    ).measurements
    assert [one.measure for one in alone] == ["map", "map_finite", "micro_ap", "recall@p90"]
    for mine, other in zip(alone, [one for one in evaluated[0].measurements if one.at == OWN][2:6], strict=True):
        assert other.part == "strong"
        assert (mine.value, mine.low, mine.high) == (other.value, other.low, other.high)


def test_intervals_hold_their_figures(evaluated):
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in evaluated[0].measurements if one.measure == "map")
    assert any(one.low < one.high for one in evaluated[0].measurements)


def test_every_figure_is_in_the_table_and_has_a_name_that_mlflow_takes(evaluated):
    result, out, _ = evaluated
    assert len(result.measurements) == 8 * (2 + 3 * 4)
    names = [one.name for one in result.measurements]
    assert len(set(names)) == len(names)
    assert {"holidays/map/32/p3", "copydays/crops/10/micro_ap/24/p1-whitened"} <= {*names}
    assert result.files[0] == out / "figures.csv"
    with result.files[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, result.measurements, strict=True):
        assert [row[name] for name in ("benchmark", "setting", "measure")] == [one.benchmark, one.part, one.measure]
        assert (int(row["size"]), float(row["p"]), row["whitened"]) == (one.at.size, one.at.p, str(one.at.whitened))
        assert [float(row[name]) for name in ("value", "low", "high")] == [one.value, one.low, one.high]
        assert row["paper"] == ""


@pytest.mark.parametrize("p", [1.0, 2.25, 3e6, math.inf])
@pytest.mark.parametrize("measure", ["map@r", "recall@1", "mp@10", "recall@p90", "micro_ap"])
def test_names_of_figures_have_only_characters_that_mlflow_allows(measure, p):
    name = Measurement("roxford5k", "hard", measure, Setting(500, p, True), 0.5, 0.4, 0.6).name
    assert re.fullmatch(r"[\w\-. :/]+", name, re.ASCII)


def test_no_name_of_a_figure_is_a_folder_of_another(evaluated):
    # MLflow's file store makes a file of each name.
    names = [one.name for one in evaluated[0].measurements]
    assert not [(one, other) for one in names for other in names if other.startswith(f"{one}/")]


def test_headlines_are_the_own_setting_and_the_best(evaluated):
    result = evaluated[0]
    for key in {(one.benchmark, one.part, one.measure) for one in result.measurements}:
        group = [one for one in result.measurements if (one.benchmark, one.part, one.measure) == key]
        told = [one for one in result.headlines if (one.benchmark, one.part, one.measure) == key]
        assert told[0].at == OWN
        assert max(one.value for one in told) == max(one.value for one in group)
        assert len(told) == (1 if told[0].value == max(one.value for one in group) else 2)


def test_whitenings_are_kept_for_each_size_and_exponent(evaluated, trained, roots):
    out = evaluated[1]
    white = sorted(roots["white"].iterdir())
    for size in SIZES:
        for p in EXPONENTS:
            kept = Whitening.from_state(load_file(out / f"whitening-{size}-p{p:g}.safetensors"))
            embeddings = slow_embeddings(trained, white, size, p)[0]
            whitened = kept.project(embeddings.double())
            torch.testing.assert_close(torch.cov(whitened.T), torch.eye(129, dtype=torch.double), atol=1e-2, rtol=0)


def test_files_and_notes(evaluated):
    result, out, _ = evaluated
    pages = {"holidays.html", "copydays-strong.html", "copydays-crops-10.html", "copydays-crops-80.html"}
    assert {path.name for path in result.files} == {"figures.csv", "grid.png", *pages}
    assert all(path.parent == out and path.stat().st_size for path in result.files)
    for name in ("holidays", "copydays"):
        assert any(note.startswith(f"{name} is not the published set: ") for note in result.notes)
    assert "holidays is not the published set: the set holds 1,491 images, found 9" in result.notes
    with Image.open(out / "grid.png") as image:
        image.load()


def test_galleries_show_the_queries_of_their_part_at_the_own_setting(evaluated):
    page = (evaluated[1] / "copydays-crops-10.html").read_text()
    captions = re.findall(r"<figure class=query>.*?<figcaption>(\w+\.jpg)", page)
    assert {*captions} == {"200005.jpg", "200105.jpg", "200205.jpg"}
    assert len(captions) == 6


def test_a_second_call_reads_what_the_first_embedded(evaluated, trained, monkeypatch):
    result, out, settings = evaluated

    def computed(*_):
        raise AssertionError("the trunk ran")

    monkeypatch.setattr(embed, "pooled", computed)
    assert run_benchmarks(trained, settings, out).measurements == result.measurements
    with pytest.raises(AssertionError, match="the trunk ran"):
        run_benchmarks(trained, settings.model_copy(update={"sizes": (40,)}), out)


def settings_of(result):
    return [one.at for one in result.measurements if one.measure == "map"]


def test_without_a_grid_only_the_own_setting_counts(trained, roots, tmp_path):
    result = run_benchmarks(trained, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path)
    assert settings_of(result) == [OWN]
    assert [table.title for table in result.tables] == ["", "published: holidays"]
    assert result.headlines == result.measurements
    assert [path.name for path in result.files] == ["figures.csv", "holidays.html"]


def test_the_own_setting_joins_a_grid_without_it(trained, roots, tmp_path):
    settings = Evaluation(on={"holidays": str(roots["holidays"])}, sizes=[24], exponents=[2, 5])
    result = run_benchmarks(trained, settings, tmp_path)
    assert [at[:2] for at in settings_of(result)] == [(size, p) for size in (32, 24) for p in (3, 2, 5)]
    assert result.headlines[0].at == OWN


@pytest.mark.parametrize(("learnt", "own"), [(0.5, 1.0), (2.2, float(np.float32(2.2)))])
def test_an_exponent_that_was_learnt(trained, roots, tmp_path, learnt, own):
    saved = checkpoint.latest(trained)
    spec = {**saved.state["spec"], "model": {**saved.state["spec"]["model"], "learn_p": True}}
    model = {**saved.model, "network.pool.p": torch.tensor(learnt)}
    checkpoint.save(tmp_path / "trained", saved._replace(model=model, state={**saved.state, "spec": spec}))
    settings = Evaluation(on={"holidays": str(roots["holidays"])}, exponents=[2.2, 1])
    result = run_benchmarks(tmp_path / "trained", settings, tmp_path / "out")
    assert {one.at.p for one in result.measurements} == {own, *({1.0} if own > 1 else {2.2})}
    assert result.headlines[0].at == Setting(32, own, False)
    with torch.no_grad():
        network = network_of(checkpoint.latest(tmp_path / "trained"))[0].eval()
        path = sorted((roots["holidays"] / "jpg").iterdir())[0]
        expected = network(evaluation_view(decode(path), "rect", 32)[None]).embedding
        torch.testing.assert_close(slow_embeddings(trained, [path], 32, own)[0], expected)


@pytest.fixture(scope="module")
def wnids(trained):
    return [f"n{number:08}" for number, _ in enumerate(checkpoint.latest(trained).state["classes"])]


@pytest.fixture(scope="module")
def imagenet_root(wnids, tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for wnid in wnids:
        (root / "val" / wnid).mkdir(parents=True)
        for number in range(4):
            (root / "val" / wnid / f"{number}.png").touch()
    return noise(root, 3)


@pytest.mark.parametrize("transform", ["crop", "rect"])
def test_classification_sees_images_as_the_network_says_at_its_own_size(
    trained, wnids, imagenet_root, tmp_path, transform
):
    spec = {**checkpoint.latest(trained).state["spec"], "evaluation": {"transform": transform, "size": 32}}
    folder = changed(trained, tmp_path / "trained", classes=wnids, spec=spec)
    settings = Evaluation(on={"imagenet": str(imagenet_root)}, sizes=[24], exponents=[1])
    result = run_benchmarks(folder, settings, tmp_path / "out")
    paths = sorted((imagenet_root / "val").rglob("*.png"))
    labels = [wnids.index(path.parent.name) for path in paths]
    expected = {}
    for size in SIZES:
        for p in EXPONENTS:
            logits = slow_embeddings(trained, paths, size, p, transform if size == 32 else "rect")[1]
            order = logits.argsort(dim=1, descending=True).tolist()
            for k in (1, 5):
                right = sum(label in row[:k] for label, row in zip(labels, order, strict=True))
                expected[f"imagenet/top{k}/{size}/p{p:g}"] = right / len(paths)
    assert {one.name: one.value for one in result.measurements} == expected
    assert len({*expected.values()}) > 2
    assert [path.name for path in result.files] == ["figures.csv", "grid.png"]


def test_a_network_of_other_classes_is_refused(trained, imagenet_root, roots, tmp_path):
    on = {"imagenet": str(imagenet_root), "holidays": str(roots["holidays"])}
    with pytest.raises(DataError, match="imagenet needs a network of its classes, but this one knows 8"):
        run_benchmarks(trained, Evaluation(on=on), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_wrong_roots_are_told_at_once(trained, roots, tmp_path):
    on = {"holidays": str(tmp_path / "no"), "copydays": str(roots["copydays"]), "ukbench": str(roots["white"])}
    with pytest.raises(DataError) as caught:
        run_benchmarks(trained, Evaluation(on=on), tmp_path / "out")
    first, second = caught.value.problems
    assert first.startswith("the root of holidays must be a folder")
    assert str(tmp_path / "no") in first
    assert second.startswith("UKBench needs images")
    assert str(roots["white"]) in second
    assert not (tmp_path / "out").exists()


def test_without_a_checkpoint_nothing_is_evaluated(roots, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(FileNotFoundError, match=f"needs a trained network, but .*{folder} holds no intact"):
            run_benchmarks(tmp_path / folder, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whitening_needs_images(trained, roots, tmp_path):
    (tmp_path / "white/.hidden").mkdir(parents=True)
    (tmp_path / "white/.hidden/one.jpg").touch()
    settings = Evaluation(on={"holidays": str(roots["holidays"])}, whiten=str(tmp_path / "white"))
    with pytest.raises(DataError, match=r"whitening needs images, but there are none in .*white"):
        run_benchmarks(trained, settings, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def published_tables(result):
    return {table.title: table.rows for table in result.tables if table.columns[0] == "method"}


def test_published_figures_of_what_was_measured_come_along(evaluated, trained, imagenet_root, wnids, tmp_path):
    found = published_tables(evaluated[0])
    assert {(title, row[4]) for title, rows in found.items() for row in rows} == {
        ("published: holidays", "map"),
        ("published: copydays strong with 10,000 distractors", "map"),
    }
    assert [len({*rows}) for rows in found.values()] == [len(rows) for rows in found.values()] == [6 * 3] * 2
    for name in ("holidays", "copydays"):
        assert (
            f"the paper's values for {name} are of other images: the set here is not the published one"
            in evaluated[0].notes
        )
    assert all(one.paper is None for one in evaluated[0].measurements)
    folder = changed(trained, tmp_path / "trained", classes=wnids)
    result = run_benchmarks(folder, Evaluation(on={"imagenet": str(imagenet_root)}), tmp_path / "out")
    of_classes = published_tables(result)["published: imagenet"]
    assert {row[4] for row in of_classes} == {"top1", "top5"}
    assert len(of_classes) == 8 * 2 * 2
    assert ("MultiGrain", "0.5", "3", "500", "top1", "0.7860", "Table 2") in of_classes
    manifest = tmp_path / "list.csv"
    shown = sorted((imagenet_root / "val").rglob("*.png"))[:4]
    rows = [f"{path},a,{role},{number // 2}" for number, (path, role) in enumerate(zip(shown, "dqdq", strict=True))]
    rows = [row.replace(",d,", ",database,").replace(",q,", ",query,") for row in rows]
    manifest.write_text("\n".join(["image,class,role,instance_id", *rows]))
    result = run_benchmarks(trained, Evaluation(on={"manifest": str(manifest)}), tmp_path / "more")
    assert published_tables(result) == {}


# The proxy task, and a model that serves


@pytest.fixture(scope="module")
def served(trained, roots, shapes_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("served")
    settings = Evaluation(
        on={"holidays": str(roots["holidays"])},
        exponents=[1, 2, 5],
        whiten=str(roots["white"]),
        dimension=100,
        proxy=str(shapes_folder),
        serve={"size": 24, "p": "proxy", "whitened": True},
    )
    return run_benchmarks(trained, settings, out), out, settings


@pytest.fixture(scope="module")
def scores(trained, shapes_folder):
    """Of the proxy task, each exponent alone, with the network's own augmentation."""
    saved = checkpoint.latest(trained)
    network, spec = network_of(saved)
    assert spec.augment.crop == 0.5
    data = read_dataset(shapes_folder)
    return {
        size: {p: proxy.score(network, data, spec.augment, size, [p], CPU)[p] for p in (3.0, 1.0, 2.0, 5.0)}
        for size in SIZES
    }


def test_the_proxy_task_chooses_for_each_size(served, scores):
    result, out, _ = served
    chosen = {size: max(found, key=lambda p: found[p].copy_map + found[p].top1) for size, found in scores.items()}
    with (out / "proxy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["size"]), float(row["p"])) for row in rows] == [(s, p) for s in SIZES for p in (3, 1, 2, 5)]
    for row in rows:
        size, p = int(row["size"]), float(row["p"])
        one = scores[size][p]
        expected = [one.copy_map, one.top1, (one.copy_map + one.top1) / 2]
        assert [float(row[name]) for name in ("copy_map", "top1", "mean")] == pytest.approx(expected, abs=1e-6)
        assert row["chosen"] == str(p == chosen[size])
    assert out / "proxy.csv" in result.files
    for size, p in chosen.items():
        one = scores[size][p]
        told = f"p* = {p:g} at {size} pixels by the proxy task: mean of copy mAP {one.copy_map:.2f} and "
        assert f"{told}top-1 {one.top1:.2f}" in result.notes
    for measure in ("map", "map_finite"):
        best = max((one for one in result.measurements if one.measure == measure), key=lambda one: one.value).at
        told = [OWN, *(Setting(size, p, False) for size, p in chosen.items() if measure == "map"), best]
        assert [one.at for one in result.headlines if one.measure == measure] == list(dict.fromkeys(told))


def test_headlines_come_once():
    figures = [
        Measurement("a", "", "map", Setting(size, p, False), value, 0, 1)
        for size, p, value in [(32, 3.0, 0.1), (32, 1.0, 0.9), (24, 3.0, 0.2)]
    ]
    own, chosen, other = figures
    assert headlines(figures, [own.at]) == [own, chosen]
    assert headlines(figures, [own.at, own.at, other.at]) == [own, other, chosen]
    assert headlines(figures, [own.at, chosen.at, other.at]) == [own, chosen, other]
    assert headlines(figures, []) == [chosen]


def test_a_whitening_keeps_the_dimension_that_is_asked_for(served):
    kept = {path.name: load_file(path)["projection"].shape for path in served[1].glob("whitening-*.safetensors")}
    assert kept == {f"whitening-{size}-p{p}.safetensors": (129, 100) for size in SIZES for p in (1, 2, 3, 5)}


def test_the_model_that_serves_answers_as_it_was_measured(served, scores, trained, roots):
    result, out, _ = served
    p = max(scores[24], key=lambda p: scores[24][p].mean)
    assert (result.model, result.served) == (out / "model", f"24/p{p:g}-whitened")
    paths = sorted((roots["holidays"] / "jpg").iterdir())
    answers = inference.load(out / "model")(pd.DataFrame({"image": [path.read_bytes() for path in paths]}))
    embeddings, logits = slow_embeddings(trained, paths, 24, p)
    whitening = Whitening.from_state(load_file(out / f"whitening-24-p{p:g}.safetensors"))
    np.testing.assert_allclose(np.array([*answers["embedding"]]), whitening.transform(embeddings), atol=1e-4)
    np.testing.assert_array_equal(answers["class_id"].astype(int), logits.argmax(dim=1))
    np.testing.assert_allclose(answers["score"].astype(float), logits.softmax(dim=1).amax(dim=1), atol=1e-5)
    found = torch.tensor([*answers["embedding"]])
    groups = [path.stem[:4] for path in paths]
    heads = [index for index, path in enumerate(paths) if path.stem.endswith("00")]
    truths = [({i for i, group in enumerate(groups) if group == groups[q] and i != q}, {q}) for q in heads]
    measured = [one.value for one in result.measurements if one.at.name == result.served]
    assert slow_maps(found[heads], found, truths) == pytest.approx(measured, abs=1e-6)


def served_at(trained, roots, out, **serve):
    return run_benchmarks(trained, Evaluation(on={"holidays": str(roots["holidays"])}, serve=serve), out)


def test_the_setting_to_serve_joins_the_grid(trained, roots, tmp_path):
    result = served_at(trained, roots, tmp_path, size=40, p=2.5)
    assert settings_of(result) == [Setting(s, p, False) for s in (32, 40) for p in (3, 2.5)]
    assert result.served == "40/p2.5"
    served = inference.read(result.model)
    assert (served.answers.network.pool.p, served.facts["p"], served.facts["size"], served.facts["transform"]) == (
        2.5,
        2.5,
        40,
        "rect",
    )
    assert not served.answers.whitened


def test_one_that_is_there_is_not_there_twice(trained, roots, tmp_path):
    result = served_at(trained, roots, tmp_path, size=32, p=3)
    assert settings_of(result) == [OWN]
    assert inference.read(result.model).facts["transform"] == "crop"


def test_a_model_to_serve_takes_the_place_of_the_one_before(trained, roots, tmp_path):
    served_at(trained, roots, tmp_path, size=40, p=2)
    (tmp_path / "model/other").touch()
    saved = checkpoint.latest(trained)
    newer = tmp_path / "newer"
    checkpoint.save(newer, saved._replace(state={**saved.state, "steps": saved.state["steps"] + 1}))
    served_at(newer, roots, tmp_path, size=24, p=2)
    assert inference.read(tmp_path / "model").facts["size"] == 24
    step = f"step-{saved.state['steps'] + 1:08d}"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {step, "serving.json", "serving.safetensors"}
    # Without anything to serve, it stays.
    result = run_benchmarks(trained, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path)
    assert (result.model, result.served) == (None, None)
    assert inference.read(tmp_path / "model").facts["size"] == 24


def test_only_the_newest_intact_checkpoint_is_kept_for_users(trained, roots, tmp_path):
    saved = checkpoint.latest(trained)
    for steps in (1, 2):
        checkpoint.save(tmp_path / "trained", saved._replace(state={**saved.state, "steps": steps}))
    (tmp_path / "trained/step-00000002/model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000002"):
        served_at(tmp_path / "trained", roots, tmp_path / "out", size=32, p=3)
    assert [path.name for path in (tmp_path / "out/model").glob("step-*")] == ["step-00000001"]
    assert checkpoint.latest(tmp_path / "out/model").state == {**saved.state, "steps": 1}


def test_what_is_no_model_is_not_replaced(trained, roots, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.txt").touch()
    with pytest.raises(DataError, match=r"a model to serve goes to .*model, but something else is there; move it"):
        served_at(trained, roots, tmp_path, size=32, p=3)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    run_benchmarks(trained, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path)
    assert (tmp_path / "model/thesis.txt").exists()


# Results that are whole


def everything(out):
    return {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and "embeddings" not in path.parts
    }


@pytest.fixture
def results_before(trained, roots, tmp_path):
    """Of an evaluation that wrote one of each kind of file."""
    out = tmp_path / "out"
    settings = Evaluation(
        on={name: str(roots[name]) for name in ("holidays", "copydays")},
        exponents=[1],
        whiten=str(roots["white"]),
        serve={"size": 32, "p": 1},
    )
    run_benchmarks(trained, settings, out)
    return out, everything(out), settings


@pytest.mark.parametrize("step", ["figures", "page", "whitening", "heat map", "model"])
def test_an_evaluation_that_fails_leaves_the_results_before_it(
    trained, results_before, roots, tmp_path, monkeypatch, step
):
    out, before, settings = results_before
    noise(holidays(tmp_path / "holidays"), 9)
    other = settings.model_copy(update={"on": {"holidays": str(tmp_path / "holidays")}})

    def full(*_, **__):
        raise OSError("no space left")

    module, name = {
        "figures": (results, "write_measurements"),
        "page": (gallery, "page"),
        "whitening": (evaluate, "save_file"),
        "heat map": (gallery, "heat_map"),
        "model": (served_setting, "write"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(OSError, match="no space left"):
            run_benchmarks(trained, other, out)
    assert everything(out) == before
    run_benchmarks(trained, other, out)
    after = everything(out)
    assert after[Path("figures.csv")] != before[Path("figures.csv")]
    # Nothing of the set that was left out remains.
    assert {path for path in before if "copydays" in path.name} == before.keys() - after.keys() != set()


def test_what_is_half_in_place_has_no_table(trained, results_before, monkeypatch):
    out, before, settings = results_before
    rename, done = Path.rename, []

    def cut(path, target):
        if ".draft" in path.parts and path.parent.name == ".draft":
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            run_benchmarks(trained, settings, out)
    assert not (out / "figures.csv").exists()
    assert not (out / ".draft").exists()
    run_benchmarks(trained, settings, out)
    assert everything(out).keys() == before.keys()


def test_files_of_others_stay(trained, roots, tmp_path):
    names = ("report.html", "holidaysnap.html", "notes.csv", "draft", "whitening.txt")
    for name in names:
        (tmp_path / name).touch()
    run_benchmarks(trained, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "figures.csv", "holidays.html", "embeddings"}


def test_too_few_images_for_a_whitening_are_refused_before_anything_is_embedded(trained, roots, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "pooled", None)
    draw(tmp_path / "white", *(f"{number}.png" for number in range(129)))
    settings = Evaluation(on={"holidays": str(roots["holidays"])}, whiten=str(tmp_path / "white"))
    with pytest.raises(DataError, match="more images than dimensions, got 129 for 129"):
        run_benchmarks(trained, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Two ranks


def of_one_rank(rank, meeting, trained, settings):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    asked, ranks = [], ranking.ranks
    ranking.ranks = lambda queries, *rest: asked.append(len(queries)) or ranks(queries, *rest)
    if rank:
        places = [
            (results, "write_measurements"),
            (results, "write_proxy"),
            (results, "put_in_place"),
            (gallery, "page"),
        ]
        places += [(gallery, "heat_map"), (served_setting, "write"), (evaluate, "save_file"), (ranking, "pairs")]
        for module, name in places:
            setattr(module, name, None)  # calling it is an error
    result = run_benchmarks(Path(trained), Evaluation(**settings), Path(meeting) / "out")
    torch.save([result, asked], Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_assess_what_one_process_does(trained, roots, shapes_folder, tmp_path):
    settings = Evaluation(
        on={name: str(roots[name]) for name in ("holidays", "copydays")},
        sizes=[24],
        exponents=[1],
        whiten=str(roots["white"]),
        dimension=20,
        proxy=str(shapes_folder),
        serve={"size": 24, "p": "proxy", "whitened": True},
    )
    start_ranks(of_one_rank, (str(tmp_path), str(trained), settings.model_dump()))
    (one, of_first), (two, of_second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = run_benchmarks(trained, settings, tmp_path / "alone")
    assert one == two
    shared, single = tmp_path / "out", tmp_path / "alone"
    assert [shared / path.relative_to(single) for path in alone.files] == one.files
    assert one == replace(alone, files=one.files, model=shared / "model")
    # The proxy task of one size for each, at two exponents; then three queries of Holidays at four settings, and of
    # Copydays four strong copies and three of each crop.
    assert of_first[:9] == [75, 75, 2, 2, 2, 2, 2, 2, 2]
    assert of_second[:9] == [75, 75, 1, 1, 1, 1, 2, 1, 1]
    assert len(of_first) == len(of_second)
    assert everything(shared).keys() == everything(single).keys()
    for name in ("figures.csv", "proxy.csv", "holidays.html", "copydays-strong.html"):
        assert (shared / name).read_bytes() == (single / name).read_bytes()
    image = pd.DataFrame({"image": [(roots["holidays"] / "jpg/100000.jpg").read_bytes()]})
    answers = [inference.load(folder / "model")(image) for folder in (shared, single)]
    # A fit on embeddings of other batches may point eigenvectors the other way.
    first, second = (np.abs(answer["embedding"][0]) for answer in answers)
    np.testing.assert_allclose(first, second, atol=1e-3)


def means(samples, served):
    return {one.name: sum(one.values) / len(one.values) for one in samples if one.served == served}


def figures_at(result, at):
    """Those that are means of a value for each query, by name without the setting."""
    pairs = ("micro_ap", "recall@p90")
    found = {one.name.removesuffix(f"/{at.name}"): one for one in result.measurements if one.at == at}
    return {name: pytest.approx(one.value) for name, one in found.items() if one.measure not in pairs}


def test_samples_are_what_the_own_figures_are_means_of(evaluated):
    found, _, _ = evaluated
    assert means(found.query_scores, served=False) == figures_at(found, OWN)
    assert means(found.query_scores, served=True) == {}
    by_data = {(one.name.rpartition("/")[0], one.data) for one in found.query_scores}
    assert len(by_data) == len({part for part, _ in by_data}) == len({data for _, data in by_data})
    listed = {(one.name.partition("/")[0], one.name.rpartition("/")[2]) for one in found.query_scores}
    benchmarks = {benchmark for benchmark, _ in listed}
    assert listed == {(benchmark, measure) for benchmark in benchmarks for measure in QUERY_MEASURES[benchmark]}


def test_samples_of_the_model_that_serves_are_those_of_its_setting(trained, roots, tmp_path):
    found = served_at(trained, roots, tmp_path / "out", size=24, p=2.0)
    assert means(found.query_scores, served=True) == figures_at(found, Setting(24, 2.0, False))
    assert means(found.query_scores, served=False) == figures_at(found, OWN)
    again = run_benchmarks(found.model, Evaluation(on={"holidays": str(roots["holidays"])}), tmp_path / "again")
    assert again.query_scores == []  # it does not answer at the setting of its network
