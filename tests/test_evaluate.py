"""Metrics of held-out images: against figures worked out by hand, slow loops, and between one process and two."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed, multiprocessing, nn

from multigrain import views
from multigrain.augment import evaluation_view
from multigrain.data import Copies, Dataset, read_dataset
from multigrain.evaluate import METRICS, embed, evaluate
from multigrain.model import MultiGrain
from multigrain.spec import MultiGrainSpec
from multigrain.views import decode

CPU = torch.device("cpu")


def spec(size, transform="crop"):
    return MultiGrainSpec.model_validate({"image_size": 64, "evaluation": {"size": size, "transform": transform}})


def small_network():
    torch.manual_seed(3)
    return MultiGrain("narrow", 8)


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
    copies = Copies(
        paint((0, 0, 255), (255, 255, 255), (0, 255, 255)), paint((100, 255, 255), (0, 0, 120)), truth=(1, 0)
    )
    data = Dataset(("a", "b"), (), (), paint(RED, ORANGE, GREEN, YELLOW), (0, 0, 1, 1), copies)
    metrics = evaluate(colours(), data, spec(16), CPU)
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
    assert evaluate(colours(), data, spec(16), CPU) == {"top1": 1.0}


def test_a_class_with_one_image_is_no_query(paint):
    data = Dataset(("a", "b"), (), (), paint(RED, ORANGE, GREEN), (0, 0, 1), None)
    assert evaluate(colours(), data, spec(16), CPU) == {"top1": 1.0, "class_map": 1.0}


def slow_average_precision(scores, positive):
    # Of equal scores the negatives come first.
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], positive[item]))
    found, total = 0, 0.0
    for rank, item in enumerate(order):
        if positive[item]:
            total += (found / rank if rank else 1.0) / 2 + (found + 1) / (rank + 1) / 2
            found += 1
    return total / found


def slow_metrics(network, data, size, transform):
    def outputs(paths):
        with torch.no_grad():
            return [network.eval()(evaluation_view(decode(path), transform, size)[None]) for path in paths]

    def similarity(a, b):
        return float(a.descriptor[0] @ b.descriptor[0])

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
    assert evaluate(network, data, spec(size, transform), CPU) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["copy_map"] < 1


def test_the_size_of_training_crops_is_that_of_evaluation_unless_told(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    untold = MultiGrainSpec.model_validate({"image_size": 40})
    assert evaluate(network, data, untold, CPU) == evaluate(network, data, spec(40), CPU)


def test_evaluation_neither_trains_nor_depends_on_training_mode(shapes_folder):
    data, network = read_dataset(shapes_folder), small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    metrics = [evaluate(network.train(mode), data, spec(32), CPU) for mode in (False, True)]
    assert metrics[0] == metrics[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_embedding_keeps_the_order_of_the_files_over_batches(shapes_folder, monkeypatch):
    paths, network = read_dataset(shapes_folder).val, small_network()
    descriptors, logits = embed(network, paths, "crop", 32, CPU)
    monkeypatch.setattr(views, "BATCH_PIXELS", 3 * 32 * 32)
    assert descriptors.shape == (14, 128)
    assert logits.shape == (14, 8)
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
    for loaders in (0, 2):
        in_threes = embed(network, paths, "crop", 32, CPU, loaders)
        np.testing.assert_allclose(in_threes[0], descriptors, atol=1e-6)
        np.testing.assert_allclose(in_threes[1], logits, atol=1e-5)


def test_images_of_any_shapes_are_embedded_whole_and_in_order(tmp_path):
    network, paths, expected = small_network().eval(), [], []
    sizes = [(40, 30), (30, 40), (64, 64), (40, 30), (21, 90), (80, 60), (64, 48)]
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.png")
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(paths[-1])
        with torch.no_grad():
            expected.append(network(evaluation_view(decode(paths[-1]), "rect", 48)[None]))
    descriptors, logits = embed(network, paths, "rect", 48, CPU)
    np.testing.assert_allclose(descriptors, torch.cat([output.descriptor for output in expected]), atol=1e-6)
    np.testing.assert_allclose(logits, torch.cat([output.logits for output in expected]), atol=1e-5)
    assert np.linalg.norm(descriptors[:, None] - descriptors[None], axis=2)[~np.eye(7, dtype=bool)].min() > 1e-3


def test_embedding_is_computed_in_fp32_whatever_surrounds_it(shapes_folder):
    paths, network = read_dataset(shapes_folder).val, small_network()
    expected = embed(network, paths, "crop", 32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = embed(network, paths, "crop", 32, CPU)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def of_one_rank(rank, meeting, folder):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    data, network = read_dataset(Path(folder)), small_network()
    found = {
        "odd": embed(network, data.val[:7], "crop", 32, CPU),
        "fewer than ranks": embed(network, data.val[:1], "crop", 32, CPU),
        "metrics": evaluate(network, data, spec(32), CPU),
    }
    torch.save(found, Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(shapes_folder, tmp_path):
    multiprocessing.spawn(of_one_rank, (str(tmp_path), str(shapes_folder)), nprocs=2)
    data, network = read_dataset(shapes_folder), small_network()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, count in (("odd", 7), ("fewer than ranks", 1)):
            for whole, alone in zip(found[name], embed(network, data.val[:count], "crop", 32, CPU), strict=True):
                np.testing.assert_allclose(whole, alone, atol=1e-5)
        assert found["metrics"] == pytest.approx(evaluate(network, data, spec(32), CPU), abs=1e-6)
