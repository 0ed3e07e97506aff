"""Metrics of held-out images: against figures worked out by hand, slow loops, and between one process and two."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import slow_average_precision
from PIL import Image
from ranks import start_ranks
from torch import distributed, nn

from multigrain import Whitening
from multigrain.config.training import MultiGrainSpec, VariantSettings
from multigrain.data import loading
from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.folders import read_dataset
from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_view
from multigrain.evaluation import embed
from multigrain.evaluation import held_out as module
from multigrain.evaluation.held_out import METRICS, held_out_grid, held_out_metrics
from multigrain.models.multigrain import MultiGrain
from multigrain.models.pooling import GeM

CPU = torch.device("cpu")


def spec(size, transform="crop"):
    return MultiGrainSpec.model_validate({"image_size": 64, "evaluation": {"size": size, "transform": transform}})


def small_network():
    """Whose classifier, untrained as it is, has several answers."""
    torch.manual_seed(5)
    network = MultiGrain("narrow", 8).eval()
    with torch.no_grad():
        nn.init.normal_(network.classifier.weight)
        network.classifier.bias.copy_(-network.classifier.weight @ network.embed(torch.rand(1, 3, 32, 32))[0])
    return network


def colours():
    """Describes an image by its mean colour, and takes it for class 0 where it is more red than green."""
    network = MultiGrain("narrow", 2, p=1.0)
    network.trunk, network.mean, network.std = nn.Identity(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    network.classifier = nn.Linear(3, 2, bias=False)
    nn.init.eye_(network.classifier.weight)
    return network


@pytest.fixture(scope="module")
def paint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")

    def painted(*colours):
        paths = [folder / "-".join(map(str, colour)) for colour in colours]
        for colour, path in zip(colours, paths, strict=True):
            Image.new("RGB", (20, 30), colour).save(path, "PNG")
        return tuple(paths)

    return painted


RED, ORANGE, GREEN, YELLOW = (255, 0, 0), (255, 128, 0), (0, 255, 0), (255, 200, 0)


def test_metrics_of_colours_are_those_worked_out_by_hand(paint):
    # Unit vectors: red (1, 0), orange (.894, .449), yellow (.787, .617), green (0, 1); blue 0. Similarities:
    # red-orange .894, red-yellow .787, orange-yellow .981, orange-green .449, yellow-green .617, red-green 0.
    # Ranks of the other of one's class: orange for red 0, red for orange 1, yellow for green 0, green for yellow 2.
    # Its average precision is half of 1 / (rank + 1), or 1 at rank 0: 1, 1/4, 1, 1/6.
    # Dark blue finds blue first; (100, 255, 255) finds white (.941) after cyan (.963): 1 and 1/4.
    copies = CopySet(
        paint((0, 0, 255), (255, 255, 255), (0, 255, 255)), paint((100, 255, 255), (0, 0, 120)), truth=(1, 0)
    )
    data = Dataset(("a", "b"), (), (), paint(RED, ORANGE, GREEN, YELLOW), (0, 0, 1, 1), copies)
    metrics = held_out_metrics(colours(), data, spec(16), CPU)
    assert metrics == pytest.approx(
        {
            "top1": 0.75,  # yellow is more red than green
            "class_map": (1 + 1 / 4 + 1 + 1 / 6) / 4,
            "copy_map": (1 + 1 / 4) / 2,
            "mean_top1_copy_map": (0.75 + 0.625) / 2,
        }
    )
    assert set(metrics) == set(METRICS)


def test_metrics_without_truth_are_left_out(paint):
    data = Dataset(("a", "b"), (), (), paint(RED, GREEN), (0, 1), None)
    assert held_out_metrics(colours(), data, spec(16), CPU) == {"top1": 1.0}


def test_a_class_with_one_image_is_no_query(paint):
    data = Dataset(("a", "b"), (), (), paint(RED, ORANGE, GREEN), (0, 0, 1), None)
    assert held_out_metrics(colours(), data, spec(16), CPU) == {"top1": 1.0, "class_map": 1.0}


def slow_metrics(network, data, size, transform, whitened_on=()):
    def outputs(paths):
        with torch.no_grad():
            return [network.eval()(evaluation_view(decode(path), transform, size)[None]) for path in paths]

    def descriptor(output):
        return whitening.transform(output.embedding)[0] if whitened_on else output.descriptor[0]

    def similarity(a, b):
        return float(descriptor(a) @ descriptor(b))

    if whitened_on:
        training = torch.cat([output.embedding for output in outputs(whitened_on)])
        whitening = Whitening.fit(training, min(training.shape[1] + 1, len(training) - 1))
    val, database, queries = outputs(data.val), outputs(data.copies.database), outputs(data.copies.queries)
    right, class_aps, copy_aps = 0, [], []
    for number, output in enumerate(val):
        logits = output.logits[0].tolist()
        right += logits.index(max(logits)) == data.val_labels[number]
        others = [other for other in range(len(val)) if other != number]
        same = [data.val_labels[other] == data.val_labels[number] for other in others]
        if any(same):
            class_aps.append(slow_average_precision([similarity(output, val[other]) for other in others], same))
    for query, truth in zip(queries, data.copies.truth, strict=True):
        scores = [similarity(query, item) for item in database]
        copy_aps.append(slow_average_precision(scores, [item == truth for item in range(len(database))]))
    top1, copy_map = right / len(val), sum(copy_aps) / len(copy_aps)
    class_map = sum(class_aps) / len(class_aps)
    return {"top1": top1, "class_map": class_map, "copy_map": copy_map, "mean_top1_copy_map": (top1 + copy_map) / 2}


@pytest.mark.parametrize(("size", "transform"), [(32, "crop"), (48, "rect")])
def test_metrics_of_a_network_are_those_of_slow_loops(shapes_folder, size, transform):
    data, network = read_dataset(shapes_folder), small_network()
    expected = slow_metrics(network, data, size, transform)
    assert held_out_metrics(network, data, spec(size, transform), CPU) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["copy_map"] < 1


def test_the_size_of_training_crops_is_that_of_evaluation_unless_told(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    untold = MultiGrainSpec.model_validate({"image_size": 40})
    assert held_out_metrics(network, data, untold, CPU) == held_out_metrics(network, data, spec(40), CPU)


def test_evaluation_neither_trains_nor_depends_on_training_mode(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    metrics = [held_out_metrics(network.train(mode), data, spec(32), CPU) for mode in (False, True)]
    assert metrics[0] == metrics[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_batches_and_loaders_change_nothing(shapes_folder, monkeypatch):
    data, network = read_dataset(shapes_folder), small_network()
    expected = held_out_metrics(network, data, spec(32), CPU)
    monkeypatch.setattr(loading, "BATCH_PIXELS", 3 * 32 * 32)
    for loaders in (0, 2):
        assert held_out_metrics(network, data, spec(32), CPU, loaders) == pytest.approx(expected, abs=1e-6)


def test_metrics_are_computed_in_fp32_whatever_surrounds_it(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    expected = held_out_metrics(network, data, spec(32), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert held_out_metrics(network, data, spec(32), CPU) == expected


# Variants


def variants(**settings):
    return VariantSettings.model_validate(settings)


def with_exponent(p):
    network = small_network()
    network.pool = GeM(p)
    return network


@pytest.fixture
def shown(monkeypatch):
    """Shapes of the batches that pass through a trunk."""
    shapes, through = [], embed.pooled
    monkeypatch.setattr(embed, "pooled", lambda net, images, p: shapes.append(images.shape) or through(net, images, p))
    return shapes


@pytest.mark.parametrize("transform", ["crop", "rect"])
def test_each_variant_is_what_a_network_of_that_exponent_finds_at_that_size(shapes_folder, transform):
    data = read_dataset(shapes_folder)
    wanted = variants(sizes=[48, 32, 24], exponents=[1.0, 5.3, 3.0, np.inf])
    own, found = held_out_grid(small_network(), data, spec(32, transform), wanted, CPU)
    # At another size images are whole: of square ones, a crop would show 7/8.
    settings = {32: spec(32, transform), 48: spec(48, "rect"), 24: spec(24, "rect")}
    expected = {
        f"s{size}-p{p:g}": held_out_metrics(with_exponent(p), data, settings[size], CPU)
        for size in settings
        for p in (1.0, 5.3, 3.0, np.inf)
    }
    assert own == pytest.approx(expected.pop("s32-p3"), abs=1e-6)
    assert found.keys() == expected.keys()
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6), name
    assert len({tuple(metrics.values()) for metrics in found.values()}) > 5


def turn_by_turn(data, count):
    """The first image of each class, by name, then the second of each, and so on."""
    of_class = [
        sorted(str(path) for path, label in zip(data.train, data.train_labels, strict=True) if label == which)
        for which in range(len(data.classes))
    ]
    images = []
    for turn in range(max(map(len, of_class))):
        images += sorted(names[turn] for names in of_class if turn < len(names))
    return [Path(name) for name in images[:count]]


@pytest.mark.parametrize("most", [11, 20_000])
def test_whitened_variants_are_those_of_slow_loops(shapes_folder, monkeypatch, most):
    data, network = read_dataset(shapes_folder), small_network()
    assert module.WHITENED == 20_000
    monkeypatch.setattr(module, "WHITENED", most)
    # In another order than by name, and not as many of each class.
    mixed = [19, 3, 4, 0, 1, 25, 2, 24, 7, 6, 5, 8, 9, 10, 12, 11, 13, 14, 15, 18]
    data = Dataset(
        data.classes,
        tuple(data.train[index] for index in mixed),
        tuple(data.train_labels[index] for index in mixed),
        data.val,
        data.val_labels,
        data.copies,
    )
    own, found = held_out_grid(network, data, spec(32), variants(sizes=[48], exponents=[1], whiten=True), CPU)
    training = turn_by_turn(data, most)
    assert len(training) == min(most, 20)
    assert len(found) == 7
    for size, transform in ((32, "crop"), (48, "rect")):
        for p in (1.0, 3.0):
            expected = slow_metrics(with_exponent(p), data, size, transform, training)
            assert found[f"s{size}-p{p:g}-whitened"] == pytest.approx(expected, abs=1e-6)
            plain = own if (size, p) == (32, 3.0) else found[f"s{size}-p{p:g}"]
            assert plain["top1"] == expected["top1"]
            assert plain["class_map"] != expected["class_map"]


def test_with_more_images_than_channels_a_whitening_keeps_all_directions(paint):
    rng = np.random.default_rng(0)
    files = paint(*(tuple(map(int, rng.integers(0, 256, 3))) for _ in range(30)))
    labels = (0, 1) * 5
    data = Dataset(
        ("a", "b"), files[:10], labels, files[10:20], labels, CopySet(files[20:25], files[25:], (0, 1, 2, 3, 4))
    )
    for count in (4, 5, 10):
        few = Dataset(("a", "b"), files[:count], labels[:count], data.val, data.val_labels, data.copies)
        _, found = held_out_grid(colours(), few, spec(16), variants(whiten=True), CPU)
        assert found == {
            "s16-p1-whitened": pytest.approx(slow_metrics(colours(), few, 16, "crop", few.train), abs=1e-6)
        }


def test_no_variants_cost_nothing(shapes_folder, shown):
    data = read_dataset(shapes_folder)
    settings = spec(32)
    settings = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"variants": variants(sizes=[48], whiten=True)})}
    )
    held_out = len(data.val) + len(data.copies.database) + len(data.copies.queries)
    metrics = held_out_metrics(small_network(), data, settings, CPU)
    assert shown == [(held_out, 3, 32, 32)]
    assert held_out_grid(small_network(), data, settings, variants(), CPU) == (metrics, {})


@pytest.mark.parametrize("whiten", [False, True])
def test_each_image_passes_through_the_trunk_once_for_each_size(shapes_folder, shown, whiten):
    data = read_dataset(shapes_folder)
    count = len(data.val) + len(data.copies.database) + len(data.copies.queries) + whiten * len(data.train)
    wanted = variants(sizes=[48, 32, 48, 24], exponents=[1, 3, 4.7, 1], whiten=whiten)
    _, found = held_out_grid(small_network(), data, spec(32), wanted, CPU)
    assert shown == [(count, 3, size, size) for size in (32, 48, 24)]
    assert len(found) == 3 * 3 * (1 + whiten) - 1


def test_whitening_alone_is_a_variant_of_the_networks_own_setting(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    own, found = held_out_grid(network, data, spec(32), variants(whiten=True), CPU)
    assert own == held_out_metrics(network, data, spec(32), CPU)
    assert list(found) == ["s32-p3-whitened"]


@pytest.mark.parametrize(("p", "named"), [(2.2, "2.2"), (0.7, "1")])
def test_an_exponent_that_was_learnt_is_the_networks_own_once(shapes_folder, p, named):
    data = read_dataset(shapes_folder)
    network = small_network()
    network.pool = GeM(p, learnable=True)
    own, found = held_out_grid(network, data, spec(32), variants(exponents=[max(1.0, p), 4]), CPU)
    assert float(network.pool.p.detach()) != p
    assert own == pytest.approx(held_out_metrics(with_exponent(float(named)), data, spec(32), CPU), abs=1e-6)
    assert list(found) == ["s32-p4"]


def test_a_network_that_maps_all_to_one_point_has_no_whitened_variants(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    network.trunk = nn.Conv2d(3, 128, 1)
    nn.init.zeros_(network.trunk.weight)
    with pytest.warns(UserWarning, match="no metrics of whitened descriptors: .* embeddings that differ"):
        own, found = held_out_grid(network, data, spec(32), variants(sizes=[24], whiten=True), CPU)
    assert found == {"s24-p3": own}


GRID = variants(sizes=[40], exponents=[1, 4], whiten=True)


def of_one_rank(rank, meeting, folder):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    data, network = read_dataset(Path(folder)), small_network()
    found = held_out_metrics(network, data, spec(32), CPU), held_out_grid(network, data, spec(32), GRID, CPU)
    torch.save(found, Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(shapes_folder, tmp_path):
    start_ranks(of_one_rank, (str(tmp_path), str(shapes_folder)))
    data, network = read_dataset(shapes_folder), small_network()
    expected, (own, others) = (
        held_out_metrics(network, data, spec(32), CPU),
        held_out_grid(network, data, spec(32), GRID, CPU),
    )
    for rank in range(2):
        metrics, (of_own, of_others) = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert metrics == pytest.approx(expected, abs=1e-6)
        assert of_own == pytest.approx(own, abs=1e-6)
        assert of_others.keys() == others.keys()
        assert all(of_others[name] == pytest.approx(metrics, abs=1e-6) for name, metrics in others.items())
