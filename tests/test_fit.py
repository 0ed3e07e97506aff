"""The training loop: its results, how it goes on after an interruption, and how ranks share the work."""

import itertools
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from multigrain import checkpoint
from multigrain import fit as module
from multigrain.augment import TrainTransform
from multigrain.data import read_dataset
from multigrain.evaluate import METRICS
from multigrain.fit import EpochResult, Objective, Training, TrainingError, fit
from multigrain.model import MultiGrain
from multigrain.sampling import Triplets, sample_triplets
from multigrain.spec import LossSettings, MultiGrainSpec
from multigrain.views import TrainViews, Views

CPU = torch.device("cpu")
EPOCHS = 3


def spec(**changes):
    """Two steps of 24 views an epoch, from the 26 images for training."""
    settings = {
        "image_size": 32,
        "epochs": EPOCHS,
        "model": {"trunk": "narrow"},
        "batch": {"size": 24, "repeats": 2, "length_factor": 1.0},
        "augment": {"crop": 0.5},
        "optimizer": {"rate": 1.0},
    }
    for group, values in changes.items():
        settings[group] = {**settings.get(group, {}), **values} if isinstance(values, dict) else values
    return MultiGrainSpec.model_validate(settings)


def dead(*_):
    raise AssertionError("nothing is left to train")


def without_speed(result):
    return result.epoch, {name: value for name, value in result.metrics.items() if name != "views_per_second"}


def assert_same_state(a, b):
    assert without_speed(EpochResult(a.state["epoch"], a.state["metrics"])) == without_speed(
        EpochResult(b.state["epoch"], b.state["metrics"])
    )
    assert a.model.keys() == b.model.keys()
    assert all(torch.equal(tensor, b.model[name]) for name, tensor in a.model.items())
    assert a.optimizer["param_groups"] == b.optimizer["param_groups"]
    assert a.optimizer["state"].keys() == b.optimizer["state"].keys()
    for name, state in a.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], b.optimizer["state"][name]["momentum_buffer"])


@pytest.fixture(scope="module")
def data(shapes_folder):
    return read_dataset(shapes_folder)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The results of a whole run, and the checkpoint that it ends with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return list(fit(spec(), data, folder, CPU)), checkpoint.latest(folder)


def test_every_epoch_gives_a_result_and_a_checkpoint(uninterrupted, data):
    results, last = uninterrupted
    assert [result.epoch for result in results] == [1, 2, 3]
    course = {"loss", "classification_loss", "margin_loss", "beta", "active_terms", "views_per_second"}
    distances = {"positive_distance", "negative_distance"}
    for result in results:
        assert set(result.metrics) == set(METRICS) | course | distances
        assert all(type(value) is float and math.isfinite(value) for value in result.metrics.values())
        assert all(0 <= result.metrics[name] <= 1 for name in (*METRICS, "active_terms"))
        assert all(0 < result.metrics[name] < math.sqrt(2) for name in distances)
    assert last.state == {
        "epoch": 3,
        "metrics": results[-1].metrics,
        "spec": spec().model_dump(),
        "classes": list(data.classes),
    }
    assert results[0].metrics["beta"] != 1.2
    assert last.model["margin.beta"].item() == results[-1].metrics["beta"]


def test_course_of_the_training_is_the_mean_over_its_steps(data, monkeypatch):
    steps, batches = [], []
    joint_loss = module.joint_loss

    def recorded(logits, labels, margin, weight):
        loss = joint_loss(logits, labels, margin, weight)
        steps.append([value.item() for value in loss])
        return loss

    def sampled(descriptors, instances, *settings):
        triplets = sample_triplets(descriptors, instances, *settings)
        batches.append((descriptors, triplets, training.objective.margin.beta.item()))
        return triplets

    monkeypatch.setattr(module, "joint_loss", recorded)
    monkeypatch.setattr(module, "sample_triplets", sampled)
    training = Training(spec(), data, CPU)
    course = training.train_epoch(0)
    assert len(steps) == 2
    for position, name in enumerate(("loss", "classification_loss", "margin_loss")):
        assert course[name] == pytest.approx(sum(step[position] for step in steps) / 2, rel=1e-5)
    near, far, active = [], [], 0
    for descriptors, triplets, beta in batches:
        for anchor, positive, negative in zip(*(indices.tolist() for indices in triplets), strict=True):
            near.append(math.dist(descriptors[anchor].tolist(), descriptors[positive].tolist()))
            far.append(math.dist(descriptors[anchor].tolist(), descriptors[negative].tolist()))
            active += (near[-1] - beta + 0.2 > 0) + (beta - far[-1] + 0.2 > 0)
    assert len(near) == 2 * 24
    assert course["positive_distance"] == pytest.approx(sum(near) / len(near), abs=1e-4)
    assert course["negative_distance"] == pytest.approx(sum(far) / len(far), abs=1e-4)
    assert course["active_terms"] == pytest.approx(active / (2 * len(near)), abs=0.011)


def test_loss_goes_down(data, tmp_path):
    settings = spec(
        epochs=8,
        batch={"length_factor": 3.0},
        augment={"policy": "torch", "crop": 0.9, "flip": 0.0},
        optimizer={"schedule": "cosine"},
    )
    results = list(fit(settings, data, tmp_path, CPU))
    for name in ("loss", "classification_loss"):
        assert results[-1].metrics[name] < 0.7 * results[0].metrics[name]
    assert results[-1].metrics["margin_loss"] < results[0].metrics["margin_loss"]


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_interrupted_after_an_epoch_ends_as_if_it_had_not_been(uninterrupted, data, tmp_path, done):
    results, last = uninterrupted
    first = list(itertools.islice(fit(spec(), data, tmp_path, CPU), done))
    torch.manual_seed(99)
    second = list(fit(spec(), data, tmp_path, CPU))
    assert second[0] == first[-1], "the last result comes again, as it was"
    assert list(map(without_speed, [*first, *second[1:]])) == list(map(without_speed, results))
    assert_same_state(checkpoint.latest(tmp_path), last)


def test_a_run_interrupted_amid_an_epoch_ends_as_if_it_had_not_been(uninterrupted, data, tmp_path, monkeypatch):
    results, last = uninterrupted
    joint_loss, steps = module.joint_loss, itertools.count(1)

    def interrupted(*args):
        if next(steps) == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return joint_loss(*args)

    running = fit(spec(), data, tmp_path, CPU)
    monkeypatch.setattr(module, "joint_loss", interrupted)
    assert next(running).epoch == 1
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert list(map(without_speed, fit(spec(), data, tmp_path, CPU))) == list(map(without_speed, results))
    assert_same_state(checkpoint.latest(tmp_path), last)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(uninterrupted, data, tmp_path):
    list(itertools.islice(fit(spec(), data, tmp_path, CPU), 2))
    (tmp_path / "epoch-0002" / "optimizer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="epoch-0002"):
        resumed = list(fit(spec(), data, tmp_path, CPU))
    assert [result.epoch for result in resumed] == [1, 2, 3]
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted[1])


def test_random_numbers_drawn_between_epochs_change_nothing(uninterrupted, data, tmp_path):
    running = fit(spec(), data, tmp_path, CPU)
    for _ in running:
        torch.randn(17)
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted[1])


def test_another_seed_gives_another_network(uninterrupted, data, tmp_path):
    (result,) = fit(spec(seed=1, epochs=1), data, tmp_path, CPU)
    assert result.metrics["loss"] != uninterrupted[0][0].metrics["loss"]


def test_a_finished_run_gives_its_last_result_and_trains_no_more(data, tmp_path, monkeypatch):
    (finished,) = fit(spec(epochs=1), data, tmp_path, CPU)
    monkeypatch.setattr(Training, "train_epoch", dead)
    monkeypatch.setattr(checkpoint, "save", dead)
    assert list(fit(spec(epochs=1), data, tmp_path, CPU)) == [finished]


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 4}, {"loss": {"beta": 1.3}}, {"optimizer": {"rate": 1.01}}])
def test_other_settings_are_refused(data, tmp_path, change):
    next(fit(spec(), data, tmp_path, CPU))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="settings"):
        next(fit(spec(**change), data, tmp_path, CPU))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_classes_are_refused(data, tmp_path):
    next(fit(spec(), data, tmp_path, CPU))
    renamed = data.__class__(**{**vars(data), "classes": tuple(name.upper() for name in data.classes)})
    with pytest.raises(ValueError, match="class"):
        next(fit(spec(), renamed, tmp_path, CPU))


@pytest.mark.parametrize(("step", "epoch"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_epoch(data, tmp_path, monkeypatch, step, epoch):
    joint_loss, steps = module.joint_loss, itertools.count(1)

    def spoilt(logits, labels, margin, weight):
        return joint_loss(logits * (float("nan") if next(steps) == step else 1), labels, margin, weight)

    monkeypatch.setattr(module, "joint_loss", spoilt)
    found = []
    with pytest.raises(TrainingError, match=rf"epoch {epoch}\b.*optimizer\.rate"):
        found.extend(fit(spec(), data, tmp_path, CPU))
    saved = checkpoint.latest(tmp_path)
    assert (saved.state["epoch"] if saved else 0) == epoch - 1


@pytest.mark.parametrize("negatives", ["uniform", "distance_weighted"])
def test_too_high_a_rate_ends_the_run_with_advice(data, tmp_path, negatives):
    settings = spec(optimizer={"rate": 1e30}, loss={"negatives": negatives})
    with pytest.raises(TrainingError, match=r"epoch 1\b.*lower optimizer\.rate"):
        list(fit(settings, data, tmp_path, CPU))
    assert checkpoint.latest(tmp_path) is None


def test_weights_that_are_not_finite_after_the_last_step_end_the_run(data, tmp_path, monkeypatch):
    joint_loss, steps = module.joint_loss, itertools.count(1)

    def spoilt(logits, *others):
        losses = joint_loss(logits, *others)
        if next(steps) < 2:
            return losses
        # A zero whose gradient is not a number.
        return losses._replace(loss=losses.loss + (0 * logits.sum()).sqrt())

    monkeypatch.setattr(module, "joint_loss", spoilt)
    with pytest.raises(TrainingError, match=r"epoch 1\b"):
        list(fit(spec(epochs=1), data, tmp_path, CPU))
    assert checkpoint.latest(tmp_path) is None


def test_without_copies_only_the_class_is_learnt(data, tmp_path):
    settings = spec(epochs=1, loss={"weight": 1.0}, batch={"repeats": 1})
    (result,) = fit(settings, data, tmp_path, CPU)
    assert result.metrics["loss"] == result.metrics["classification_loss"] > 0
    assert result.metrics["margin_loss"] == result.metrics["active_terms"] == 0
    assert result.metrics["beta"] == pytest.approx(1.2)


def test_rates_follow_the_views_that_a_step_really_has(data):
    # 26 images give a step of 52 views, however large the batch might be.
    training = Training(spec(batch={"size": 504}), data, CPU)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert rates == pytest.approx([1.0 * 52 / 512, 0.1 * 52 / 512])


# From here on: two ranks, in processes of their own, that do everything the tests below look at.

LOSSES = [
    LossSettings(beta=0.35),
    LossSettings(weight=0.2, beta=0.3),
    LossSettings(negatives="uniform", beta=0.45, margin=0.1),
]


def objective(settings):
    """In double precision, with the statistics of BatchNorm fixed: gradients can then be compared exactly."""
    torch.manual_seed(7)
    return Objective(MultiGrain("narrow", 3), settings).double().eval()


def whole_batch():
    """Eight views for each rank: three copies of two images and two of a third, noise around a colour of their own."""
    torch.manual_seed(8)
    instances = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5])
    colours = torch.rand(6, 3, 1, 1, dtype=torch.float64)
    noise = torch.rand(16, 3, 16, 16, dtype=torch.float64)
    images = 0.5 * colours[instances] + torch.where(instances < 3, 0.1, 0.5)[:, None, None, None] * noise
    return Views(images, torch.randint(0, 3, (16,)), instances)


def drawn_views(data):
    views = TrainViews(data.train, data.train_labels, TrainTransform(spec().augment, 32), seed=3)
    views.epoch = 2
    return views.__getitems__([0, 0, 1]).images


def of_one_rank(rank, meeting, folder):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    recorded = []

    def recording(*args):
        recorded.append(sample_triplets(*args))
        return recorded[-1]

    module.sample_triplets = recording
    comparisons = []
    mine = Views(*(tensor[rank * 8 : rank * 8 + 8] for tensor in whole_batch()))
    for settings in LOSSES:
        made = objective(settings)
        shared = DistributedDataParallel(made)
        losses, sums = shared(mine, torch.Generator().manual_seed(rank))
        losses.loss.backward()
        grads = {name: parameter.grad for name, parameter in made.named_parameters()}
        triplets = [indices + rank * 8 for indices in recorded[-1]]
        comparisons.append((grads, triplets, losses.loss.item(), sums["active"].item()))

    saves = []
    save = checkpoint.save
    checkpoint.save = lambda *args: saves.append(rank) or save(*args)
    data = read_dataset(Path(folder))
    run = Path(meeting) / "run"
    results = list(fit(spec(epochs=2), data, run, CPU))
    distributed.barrier()
    again = list(fit(spec(epochs=2), data, run, CPU))
    training = Training(spec(), data, CPU)
    training.train_epoch(0)
    found = {
        "comparisons": comparisons,
        "results": results,
        "again": again,
        "saves": saves,
        "weights": {name: parameter.detach() for name, parameter in training.objective.named_parameters()},
        "instances": list(training.batches),
        "views": drawn_views(data),
    }
    torch.save(found, Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shapes_folder):
    """What each of two ranks found, and the folder of their run."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(of_one_rank, (str(folder), str(shapes_folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_gradients_of_two_ranks_are_those_of_the_whole_batch(two_ranks, monkeypatch, number):
    ranks = [found["comparisons"][number] for found in two_ranks[0]]
    triplets = Triplets(*(torch.cat(parts) for parts in zip(ranks[0][1], ranks[1][1], strict=True)))
    assert len(triplets.anchors) == 2 * (6 + 6 + 2)
    assert ranks[0][3] != ranks[1][3], "equally many active terms would hide a mean of means"
    monkeypatch.setattr(module, "sample_triplets", lambda *_: triplets)
    alone = objective(LOSSES[number])
    losses, _ = alone(whole_batch(), torch.Generator())
    losses.loss.backward()
    assert sum(rank[2] for rank in ranks) / 2 == pytest.approx(losses.loss.item(), abs=1e-12)
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    assert "margin.beta" in expected
    for rank in ranks:
        assert rank[0].keys() == expected.keys()
        for name, gradient in rank[0].items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=0)
    assert all(gradient.abs().max() > 1e-6 for name, gradient in expected.items() if "bias" not in name)


@pytest.mark.slow
def test_two_ranks_share_each_step_and_keep_the_same_weights(two_ranks):
    (one, two), _ = two_ranks
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    for mine, other in zip(one["instances"], two["instances"], strict=True):
        assert len(mine) == len(other) == 12
        assert not set(mine) & set(other)


@pytest.mark.slow
def test_two_ranks_give_the_same_results_and_one_saves_them(two_ranks):
    (one, two), folder = two_ranks
    assert [result.epoch for result in one["results"]] == [1, 2]
    assert list(map(without_speed, one["results"])) == list(map(without_speed, two["results"]))
    assert all(math.isfinite(value) for result in one["results"] for value in result.metrics.values())
    assert (one["saves"], two["saves"]) == ([0, 0], [])
    assert one["again"] == two["again"] == [one["results"][-1]]
    assert checkpoint.latest(folder).state["metrics"] == one["results"][-1].metrics


@pytest.mark.slow
def test_metrics_of_two_ranks_are_those_of_the_saved_network(two_ranks, data):
    (one, _), folder = two_ranks
    made = Objective(MultiGrain("narrow", 8), LossSettings())
    made.load_state_dict(checkpoint.latest(folder).model)
    expected = module.evaluate(made.network, data, 32, CPU)
    assert {name: one["results"][-1].metrics[name] for name in METRICS} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_another_process_draws_the_same_views(two_ranks, data):
    # Python salts the hashes of strings anew in each process.
    here = drawn_views(data)
    assert all(torch.equal(found["views"], here) for found in two_ranks[0])
