"""The choice of p*: against figures worked out by hand and slow loops over single copies."""

import random

import pytest
import torch
from networks import slow_average_precision
from PIL import Image
from torch import nn

from multigrain.benchmarks import proxy
from multigrain.benchmarks.proxy import Score, best, score
from multigrain.config.training import AugmentSettings
from multigrain.data.dataset import Dataset
from multigrain.data.folders import read_dataset
from multigrain.data.loading import TrainViews, decode
from multigrain.data.transforms import TrainTransform, colour
from multigrain.models.multigrain import MultiGrain

CPU = torch.device("cpu")
GRID = (3.0, 1.0)


def network_of(p):
    torch.manual_seed(3)
    return MultiGrain("narrow", 8, p).eval()


def slow(data, chosen, settings, size, p, copies, seed):
    """Each copy made, embedded and compared alone."""
    network, vectors, images, right = network_of(p), [], [], 0
    for number, index in enumerate(chosen):
        for copy in range(copies):
            torch.manual_seed(hash((seed, 0, number, copy)) % 2**63)
            pixels, parameters = TrainTransform(settings, size)(decode(data.train[index]))
            with torch.no_grad():
                output = network(colour(pixels[None], parameters[None]))
            vectors.append(output.descriptor[0])
            images.append(number)
            right += int(output.logits[0].argmax()) == data.train_labels[index]
    precisions = []
    for query, image in enumerate(images):
        others = [other for other in range(len(images)) if other != query]
        similarities = [float(vectors[query] @ vectors[other]) for other in others]
        precisions.append(slow_average_precision(similarities, [images[other] == image for other in others]))
    return Score(sum(precisions) / len(precisions), right / len(images))


@pytest.mark.parametrize("loaders", [0, 2])
def test_scores_are_those_of_slow_loops(shapes_folder, monkeypatch, loaders):
    data, settings = read_dataset(shapes_folder), AugmentSettings(crop=0.5)
    # The first two of each class by name, which is how they are listed.
    chosen = [
        index
        for label in range(len(data.classes))
        for index in [index for index, found in enumerate(data.train_labels) if found == label][:2]
    ]
    expected = {p: slow(data, chosen, settings, 40, p, 5, 7) for p in GRID}
    for pixels in (15 * 40 * 40, 10**9):  # three images at a time, and all
        monkeypatch.setattr(proxy, "BATCH_PIXELS", pixels)
        found = score(network_of(3.0).train(), data, settings, 40, GRID, CPU, loaders, seed=7)
        assert list(found) == list(GRID)
        for p, expected_score in expected.items():
            assert found[p] == pytest.approx(expected_score, abs=1e-6)
    assert all(0.05 < value.copy_map < 0.95 and 0 < value.top1 < 1 for value in expected.values())
    assert expected[3.0].copy_map != expected[1.0].copy_map


def test_numbers_of_images_and_copies_are_those_asked_for(shapes_folder, monkeypatch):
    data, made = read_dataset(shapes_folder), []
    fetch = TrainViews.__getitems__
    monkeypatch.setattr(TrainViews, "__getitems__", lambda self, indices: made.extend(indices) or fetch(self, indices))
    arguments = (network_of(3.0), data, AugmentSettings(), 32, [3.0], CPU)
    score(*arguments)
    count = sum(min(2, data.train_labels.count(label)) for label in range(8))
    assert made == [number for number in range(count) for _ in range(5)]
    made.clear()
    score(*arguments, images_per_class=1, copies=3)
    assert made == [number for number in range(8) for _ in range(3)]


def test_the_seed_decides_the_copies(shapes_folder):
    data = read_dataset(shapes_folder)
    found = [score(network_of(3.0), data, AugmentSettings(), 32, [3.0], CPU, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def mean_colours():
    """Embeds an image by its mean colour and takes it for class 0 where it is more red than green."""
    network = MultiGrain("narrow", 2, p=1.0)
    network.trunk, network.mean, network.std = nn.Identity(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    network.classifier = nn.Linear(3, 2, bias=False)
    nn.init.eye_(network.classifier.weight)
    return network


def test_plain_colours_are_worth_what_is_worked_out_by_hand(tmp_path):
    # Two copies of each image. A red copy finds the two of the other red as near as its own, and ties count against
    # it: rank 2, which is worth 1 / (2 * 3). Green and yellow find theirs first: 1. Yellow is more red than green,
    # but in the second class.
    paths = []
    for number, shade in enumerate([(255, 0, 0), (255, 0, 0), (0, 255, 0), (250, 240, 0)]):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 20), shade).save(paths[-1])
    data = Dataset(("a", "b"), tuple(paths), (0, 0, 1, 1), (), (), None)
    settings = AugmentSettings(policy="torch")
    found = score(mean_colours(), data, settings, 16, [1.0], CPU, copies=2)
    assert found[1.0] == pytest.approx(Score((1 / 6 + 1 / 6 + 1 + 1) / 4, 0.75))


def test_a_score_is_the_mean_of_both_and_the_best_has_the_largest():
    scores = {5.0: Score(1.0, 0.0), 4.0: Score(0.75, 0.5), 3.0: Score(0.5, 0.75), 1.0: Score(0.125, 1.0)}
    assert [value.mean for value in scores.values()] == [0.5, 0.625, 0.625, 0.5625]
    assert best(scores) == 3.0  # and not 4, which is as good
    assert best({4.0: Score(0.75, 0.25), 2.0: Score(0.25, 0.75), 9.0: Score(0.5, 0.5)}) == 2.0
    rng = random.Random(0)
    for _ in range(20):
        drawn = {float(p): Score(rng.random(), rng.random()) for p in range(1, 9)}
        chosen = best(drawn)
        assert all(sum(other) <= sum(drawn[chosen]) + 1e-12 for other in drawn.values())
