"""The steps of a run: on any number of ranks, in parts, with the optimizers' extras, and what they log."""

import copy
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch
from networks import merged, with_dropout
from ranks import start_ranks
from safetensors.torch import save_file
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from multigrain.config.training import ComputeSettings, MultiGrainSpec
from multigrain.data.folders import read_dataset
from multigrain.data.transforms import colour
from multigrain.losses import joint
from multigrain.losses.joint import JointLoss
from multigrain.losses.triplets import draw_triplets
from multigrain.models.multigrain import build_trunk
from multigrain.training import trainer as module
from multigrain.training.trainer import Training, TrainingError, autocast_type

CPU = torch.device("cpu")
WORLDS = (2, 4, 8)
VIEWS = 32
"""In one step: 16 of the 26 images, so that each of eight ranks has two with their copies."""


def spec(**changes):
    """One step an epoch, without decay: SGD's momentum is the gradient then."""
    settings = {
        "image_size": 32,
        "epochs": 2,
        "model": {"trunk": "narrow"},
        "batch": {"size": VIEWS, "repeats": 2, "length_factor": 1.0},
        "augment": {"crop": 0.5},
        "optimizer": {"weight_decay": 0.0},
        "compute": {"precision": "fp32"},
    }
    return MultiGrainSpec.model_validate(merged(settings, changes))


@pytest.fixture(scope="module")
def data(shapes_folder):
    return read_dataset(shapes_folder)


def with_kin(data):
    """Three images each show one instance, so that some have copies on several ranks."""
    return replace(data, instances=tuple(index // 3 for index in range(len(data.train))))


@pytest.fixture(scope="module")
def kin(data):
    return with_kin(data)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file that brings statistics of batch normalisation."""
    torch.manual_seed(5)
    trunk = build_trunk("narrow").module
    for layer in trunk.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    file = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_file(trunk.state_dict(), file)
    return file


@contextmanager
def doubles():
    """Everything in fp64, from the pixels on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "colour", lambda images, parameters: colour(images, parameters.float()).double())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def gradients(training):
    """Of the only step so far."""
    state = {**training.optimizers[0].state, **training.optimizers[1].state}
    named = training.loss.named_parameters()
    return {name: state[weight]["momentum_buffer"] for name, weight in named if weight in state}


def first_step(settings, data):
    """What a run's first step does: gradients, the triplets, this rank's losses, the totals of all, what is saved."""
    drawn, values = [], []

    def recorded_draw(*args):
        drawn.append(draw_triplets(*args))
        return drawn[-1]

    def recorded_backward(self, *args):
        gradient, found = backward(self, *args)
        values.append({name: value.item() for name, value in found.items()})
        return gradient, found

    backward = JointLoss.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "draw_triplets", recorded_draw)
        patch.setattr(JointLoss, "backward", recorded_backward)
        training = Training(settings, data, CPU)
        saved = []
        training.train_epoch(saved.append)
    ((triplets, _),) = drawn
    training.batches.set_epoch(0)
    found = {
        "gradients": gradients(training),
        "values": values,
        "triplets": torch.stack(triplets, dim=1).tolist(),
    }
    return found | {
        "totals": saved[-1].state["totals"],
        "model": saved[-1].model,
        "batch": next(iter(training.batches)),
    }


# Bounds amid the distances of the fresh network's descriptors.
LOSS = {"beta": 0.3, "margin": 0.02, "cutoff": 0.1, "nonzero_loss_cutoff": 0.4, "dimension": 8}
CASES = {
    "active": {},
    "triplets": {"loss": {"normalise": "triplets", "entropy": 0.3}},
    "active in parts": {"loss": {"negatives": "uniform"}, "batch": {"accumulate": 2}},
    "pairs in parts": {"loss": {"normalise": "pairs", "entropy": 0.3}, "batch": {"accumulate": 2}},
    "reference": {"loss": {"negatives": "reference"}},
    "class only": {"loss": {"weight": 1.0}},
    "margin only": {"loss": {"weight": 0.0}},
}
ON_A_RANK = {"loss": {"negatives_from": "rank"}}


def case(weights, changes):
    exact = {"image_size": 16, "model": {"weights": str(weights), "batchnorm": "frozen", "learn_p": True}, "loss": LOSS}
    return spec(**merged(exact, changes))


def of_one_rank(rank, world, folder, images, weights):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    data = with_kin(read_dataset(Path(images)))
    with doubles():
        found = {name: first_step(case(weights, changes), data) for name, changes in CASES.items()}
        found["rank"] = first_step(case(weights, ON_A_RANK), data)
    with pytest.raises(TrainingError, match=r"model\.batchnorm: sync needs GPUs.*set it to local"):
        Training(spec(model={"batchnorm": "sync"}), data, CPU)
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory, shapes_folder, weights):
    """What each of some ranks found."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    start_ranks(of_one_rank, (world, str(folder), str(shapes_folder), str(weights)), world)
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(kin, weights):
    """What a single process finds."""
    with doubles():
        return {name: first_step(case(weights, changes), kin) for name, changes in CASES.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_several_ranks_is_that_of_one_process(ranks, alone, name):
    expected = alone[name]
    found = [rank[name] for rank in ranks]
    for which in ("triplets", "batch"):
        assert list(chain.from_iterable(rank[which] for rank in found)) == expected[which]
    for rank in found:
        assert_same(rank["gradients"], expected["gradients"])
        assert_same(rank["model"], expected["model"])
        for total in {"loss", "classification", "margin"} | ({"entropy"} & expected["totals"].keys()):
            assert rank["totals"][total] == pytest.approx(expected["totals"][total], rel=1e-12, abs=1e-12)
        for total in ("triplets", "active", "anchors", "fallback", "positive_distance", "negative_distance"):
            assert rank["totals"][total] * len(ranks) == pytest.approx(expected["totals"][total], rel=1e-12)


@pytest.mark.parametrize("name", [*CASES, "rank"])
def test_totals_are_means_over_the_ranks(ranks, name):
    for rank in ranks:
        for total, value in rank[name]["totals"].items():
            mean = sum(other[name]["values"][0][total] for other in ranks) / len(ranks)
            assert value == pytest.approx(mean, rel=1e-12, abs=1e-12)


def test_the_comparison_tells_much(alone, ranks):
    for name, found in alone.items():
        totals = found["totals"]
        assert totals["triplets"] > totals["anchors"] == VIEWS
        assert 0 < totals["active"] < 2 * totals["triplets"]
        assert "margin.beta" in found["gradients"]
        assert "network.pool.p" in found["gradients"]
        silent = {"class only": "margin.beta"}.get(name)
        assert all(gradient.abs().max() > 1e-6 for key, gradient in found["gradients"].items() if key != silent)
    assert alone["active"]["totals"]["fallback"] > 0
    assert len({rank["active"]["values"][0]["active"] for rank in ranks}) > 1, "equal counts hide a mean of means"


def test_negatives_of_one_rank_give_the_loss_over_all_chunks(ranks, kin, weights):
    chunk = VIEWS // len(ranks)
    triplets = [
        tuple(index + chunk * number for index in triplet)
        for number, rank in enumerate(ranks)
        for triplet in rank["rank"]["triplets"]
    ]
    shown = [kin.instances[index] for rank in ranks for index in rank["rank"]["batch"]]
    pairs = [(i, j) for i in range(VIEWS) for j in range(VIEWS) if i != j and i // chunk == j // chunk]
    different = {(i, j) for i, j in pairs if shown[i] != shown[j]}
    anchors = {i for i, _ in different}  # a rank whose images all show one instance has none
    assert [triplet[:2] for triplet in triplets] == [(i, j) for i, j in pairs if shown[i] == shown[j] and i in anchors]
    assert {(i, k) for i, _, k in triplets} <= different
    with doubles():
        training = Training(case(weights, ON_A_RANK), kin, CPU)
        views = training.views.__getitems__(next(iter(training.batches)))
        output = training.network(module.colour(views.images, views.colour))
        beta, terms = training.loss.margin.beta, []
        for anchor, positive, negative in triplets:
            near, far = (
                ((output.descriptor[anchor] - output.descriptor[other]) ** 2).sum().add(1e-8).sqrt()
                for other in (positive, negative)
            )
            terms += [term for term in (near - beta + 0.02, beta - far + 0.02) if term > 0]
        loss = 0.5 * cross_entropy(output.logits, views.labels) + 0.5 * sum(terms) / len(terms)
        loss.backward()
    expected = {name: weight.grad for name, weight in training.loss.named_parameters()}
    for rank in ranks:
        assert_same(rank["rank"]["gradients"], expected)
        assert rank["rank"]["totals"]["loss"] == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_whole_step(alone, kin, weights, parts):
    with doubles():
        found = first_step(case(weights, {"batch": {"accumulate": parts}}), kin)
    expected = alone["active"]
    assert found["triplets"] == expected["triplets"]
    assert_same(found["gradients"], expected["gradients"])
    assert_same(found["model"], expected["model"])
    assert found["totals"] == pytest.approx(expected["totals"], rel=1e-12, abs=1e-12)


def views_of_first_step(training):
    training.batches.set_epoch(0)
    return training.views.__getitems__(next(iter(training.batches)))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_statistics_of_batch_normalisation_see_each_part_once(data, parts):
    training = Training(spec(batch={"accumulate": parts}), data, CPU)
    network = copy.deepcopy(training.network).train()
    views = views_of_first_step(training)
    training.batches.set_epoch(0)
    training.train_epoch(lambda _: None)
    for part in colour(views.images, views.colour).chunk(parts):
        network.embed(part)
    counters = 0
    for (name, found), expected in zip(training.network.named_buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, n=name: f"{n}: {text}")
        counters += name.endswith("num_batches_tracked") and found == parts
    assert counters == 7


def test_a_part_passes_a_second_time_as_it_did_the_first(data, monkeypatch):
    with_dropout(monkeypatch)
    training = Training(spec(batch={"accumulate": 2}), data, CPU)
    passed = []
    training.encoder.register_forward_hook(lambda _module, _inputs, output: passed.append(output.detach()))
    training.train_epoch(lambda _: None)
    one, two, one_again, two_again = passed
    assert torch.equal(one, one_again)
    assert torch.equal(two, two_again)
    dropped = [part == part.amin(dim=1, keepdim=True) for part in (one, two)]
    assert min(channels.sum(dim=1).min() for channels in dropped) > 10
    assert not torch.equal(*dropped), "each part has numbers of its own"


def test_gradients_in_parts_pass_through_each_part_by_its_own_statistics(data):
    with doubles():
        found = first_step(spec(batch={"accumulate": 2}, loss=LOSS), data)
        training = Training(spec(loss=LOSS), data, CPU)
        views = views_of_first_step(training)
        images = module.colour(views.images, views.colour)
        embeddings = torch.cat([training.network.embed(part) for part in images.chunk(2)])
        output, beta, terms = training.network.head(embeddings), training.loss.margin.beta, []
        for anchor, positive, negative in found["triplets"]:
            near, far = (
                ((output.descriptor[anchor] - output.descriptor[other]) ** 2).sum().add(1e-8).sqrt()
                for other in (positive, negative)
            )
            terms += [term for term in (near - beta + 0.02, beta - far + 0.02) if term > 0]
        (0.5 * cross_entropy(output.logits, views.labels) + 0.5 * sum(terms) / len(terms)).backward()
    assert_same(found["gradients"], {name: weight.grad for name, weight in training.loss.named_parameters()})


def trained(training, epochs=1):
    """Copies of what each checkpoint holds."""
    saved = []
    for epoch in range(epochs):
        training.begin_epoch(epoch)
        training.train_epoch(lambda state: saved.append(copy.deepcopy(state)))
    return saved


def norm(tensors):
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def test_clipping_bounds_the_gradient_of_the_network_and_keeps_its_direction(data):
    found = {}
    for clip in (0.0, 0.25, 1e6):
        training = Training(spec(optimizer={"clip": clip}), data, CPU)
        trained(training)
        found[clip] = gradients(training)
    beta = {clip: tensors.pop("margin.beta") for clip, tensors in found.items()}
    length = norm(found[0.0].values())
    assert length > 0.5
    assert norm(found[0.25].values()) == pytest.approx(0.25, rel=1e-4)
    for name, gradient in found[0.0].items():
        torch.testing.assert_close(found[0.25][name], gradient * 0.25 / length, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[1e6][name], gradient)
    assert beta[0.0] == beta[0.25] == beta[1e6] != 0


@pytest.mark.parametrize("ema", [0.15, 0.9])
def test_the_running_average_follows_its_rule(data, ema):
    settings = spec(optimizer={"ema": ema}, batch={"length_factor": 3.0}, compute={"checkpoint_steps": 1})
    training = Training(settings, data, CPU)
    mean = {name: weight.double() for name, weight in training.network.state_dict().items()}
    saved = trained(training, epochs=2)
    assert len(saved) == 6
    parameters = {name for name, _ in training.network.named_parameters()}
    for step, state in enumerate(saved):
        decay = min(ema, (1 + step) / (10 + step))
        assert (decay == ema) == (ema == 0.15 and step >= 1)
        for name, before in list(mean.items()):
            now, averaged = state.model[f"network.{name}"], state.model[f"ema.{name}"]
            if name in parameters:
                mean[name] = decay * before + (1 - decay) * now.double()
                torch.testing.assert_close(averaged.double(), mean[name], rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(averaged, now)
    assert training.result_network is training.averaged
    assert not any(weight.requires_grad for weight in training.averaged.parameters())
    for name, tensor in training.result_network.state_dict().items():
        assert torch.equal(tensor, saved[-1].model[f"ema.{name}"])


def test_without_an_average_the_network_itself_is_the_result(data):
    training = Training(spec(), data, CPU)
    assert training.result_network is training.network
    assert not any(name.startswith("ema.") for name in trained(training)[0].model)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        # Three steps an epoch. A tenth from epochs 1, 2 and 3 of 4 on.
        ("step", 0.0, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001]),
        ("step", 2.0, [0, 1 / 6, 2 / 6, 0.05, 0.4 / 6, 0.5 / 6, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001]),
        ("cosine", 0.0, [0.5 + 0.5 * math.cos(math.pi * step / 12) for step in range(12)]),
    ],
)
def test_rates_follow_the_schedule_at_each_step(data, schedule, warmup, factors):
    settings = spec(
        epochs=4,
        optimizer={"schedule": schedule, "warmup": warmup, "rate": 0.5, "beta_rate": 0.3},
        batch={"length_factor": 3.0},
    )
    training = Training(settings, data, CPU)
    rates = ([], [])
    for optimizer, used in zip(training.optimizers, rates, strict=True):
        optimizer.register_step_pre_hook(
            lambda of, *_, used=used: used.append({group["lr"] for group in of.param_groups})
        )
    trained(training, epochs=4)
    for used, base in zip(rates, (0.5, 0.3), strict=True):
        assert all(len(values) == 1 for values in used)
        assert [value for (value,) in used] == pytest.approx([base * VIEWS / 512 * factor for factor in factors])


def test_rates_follow_the_views_that_a_step_really_has(data):
    # 26 images give a step of 52 views, however large the batch might be.
    training = Training(spec(batch={"size": 504}, optimizer={"rate": 1.0}), data, CPU)
    assert training.views_per_step == 52
    rates = [group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([1.0 * 52 / 512, 0.1 * 52 / 512])


def test_the_scale_of_fp16_is_saved_and_restored(data):
    settings = spec(compute={"precision": "fp16"})
    training = Training(settings, data, CPU)
    assert training.autocast is torch.float16
    before = copy.deepcopy(training.network.state_dict())
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**120})
    (saved,) = trained(training)
    # Gradients overflow: the step is left out, and the scale halved.
    assert saved.optimizer["scaler"]["scale"] == 2.0**119
    assert all(torch.equal(weight, before[name]) for name, weight in training.network.named_parameters())
    other = Training(settings, data, CPU)
    assert other.scaler.get_scale() != 2.0**119
    other.restore(saved)
    assert other.scaler.state_dict() == training.scaler.state_dict()


def test_the_scale_of_fp16_leaves_the_step_as_it_is(data):
    found = []
    for scale in (2.0**4, 2.0**12):
        training = Training(spec(compute={"precision": "fp16"}, optimizer={"clip": 0.5}), data, CPU)
        training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": scale})
        trained(training)
        found.append(gradients(training))
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            gradient, found[1][name], rtol=0.05, atol=2e-3, msg=lambda text, n=name: f"{n} {text}"
        )
    assert norm(tensor for name, tensor in found[0].items() if name != "margin.beta") == pytest.approx(0.5, rel=1e-3)


def test_bf16_trains_and_what_follows_the_trunk_is_fp32(data):
    training = Training(spec(compute={"precision": "bf16"}, loss=LOSS), data, CPU)
    assert training.autocast is torch.bfloat16
    inside = []
    training.network.trunk.register_forward_hook(lambda _module, _inputs, output: inside.append(output.dtype))
    training.encoder.register_forward_hook(lambda _module, _inputs, output: inside.append(output.dtype))
    plain = Training(spec(loss=LOSS), data, CPU)
    (saved,), (expected,) = trained(training), trained(plain)
    assert inside == [torch.bfloat16, torch.float32]
    assert {tensor.dtype for tensor in saved.model.values()} == {torch.float32, torch.int64}
    loss, wanted = saved.state["totals"]["classification"], expected.state["totals"]["classification"]
    assert loss != wanted
    assert loss == pytest.approx(wanted, rel=0.02)
    assert not saved.optimizer["scaler"]


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_bf16_where_the_hardware_multiplies_it_fast(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    assert autocast_type(ComputeSettings(), CPU) is (torch.bfloat16 if fast else None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    assert autocast_type(ComputeSettings(), torch.device("cuda")) is (torch.bfloat16 if fast else None)
    for name, wanted in {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        assert autocast_type(ComputeSettings(precision=name), CPU) is wanted


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch compiles C++ on a CPU")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_run_is_the_plain_one(data):
    found = [
        trained(Training(spec(compute={"compile": compiled}, optimizer={"ema": 0.5}), data, CPU))[0]
        for compiled in (True, False)
    ]
    assert found[0].model.keys() == found[1].model.keys()
    for name, tensor in found[0].model.items():
        torch.testing.assert_close(
            tensor, found[1].model[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("interval", [1, 1000])
def test_the_course_of_an_epoch_is_counted_step_by_step(data, monkeypatch, interval):
    steps = []

    def recorded_draw(descriptors, instances, *settings):
        found = draw_triplets(descriptors, instances, *settings)
        beta = training.loss.margin.beta.item()
        steps.append((descriptors.tolist(), instances.tolist(), torch.stack(found[0], dim=1).tolist(), beta))
        return found

    def recorded_backward(self, *args):
        gradient, values = backward(self, *args)
        losses.append({name: value.item() for name, value in values.items()})
        return gradient, values

    backward, losses = JointLoss.backward, []
    monkeypatch.setattr(joint, "draw_triplets", recorded_draw)
    monkeypatch.setattr(JointLoss, "backward", recorded_backward)
    settings = spec(
        loss=LOSS | {"entropy": 0.1},
        model={"learn_p": True},
        batch={"repeats": 2, "length_factor": 3.0},
        compute={"checkpoint_steps": interval},
    )
    training = Training(settings, data, CPU)
    course = training.train_epoch(lambda _: None)
    assert len(steps) == 3
    near, far, active, fallback = [], [], 0, 0
    for views, instances, triplets, beta in steps:
        for anchor, positive, negative in triplets:
            near.append(math.dist(views[anchor], views[positive]))
            far.append(math.dist(views[anchor], views[negative]))
            active += (near[-1] - beta + 0.02 > 0) + (beta - far[-1] + 0.02 > 0)
        for view, mine in zip(views, instances, strict=True):
            others = [other for other, theirs in zip(views, instances, strict=True) if theirs != mine]
            fallback += all(math.dist(view, other) >= 0.4 for other in others)
    assert len(near) == 3 * VIEWS
    assert 0 < active < 6 * VIEWS
    assert 0 < fallback < 3 * VIEWS
    expected = {
        "positive_distance": sum(near) / len(near),
        "negative_distance": sum(far) / len(far),
        "active_terms": active / (2 * len(near)),
        "fallback_rows": fallback / (3 * VIEWS),
        "beta": training.loss.margin.beta.item(),
        "p": training.network.pool.p.item(),
    }
    for name, logged in {
        "loss": "loss",
        "classification": "classification_loss",
        "margin": "margin_loss",
        "entropy": "entropy_loss",
        "classification_gradient": "classification_gradient",
    }.items():
        expected[logged] = sum(values[name] for values in losses) / 3
    assert set(course) == {*expected, "views_per_second", "data_wait"}
    assert {name: course[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert course["loss"] == pytest.approx(
        0.5 * course["classification_loss"] + 0.5 * course["margin_loss"] + 0.1 * course["entropy_loss"], rel=1e-5
    )
    assert course["views_per_second"] > 0
    assert 0 < course["data_wait"] < 1


def test_a_step_is_the_images_that_its_instances_name(data, monkeypatch):
    """Rows that share an instance are copies of one image, with its label."""
    steps = []

    def recorded(self, embeddings, step, *args):
        steps.append(step)
        return backward(self, embeddings, step, *args)

    backward = JointLoss.backward
    monkeypatch.setattr(JointLoss, "backward", recorded)
    training = Training(spec(batch={"length_factor": 3.0}, compute={"loaders": 2}), data, CPU)
    for epoch in range(2):
        training.begin_epoch(epoch)
        training.train_epoch(lambda _: None)
    training.batches.set_epoch(0)
    batches = list(training.batches)
    training.batches.set_epoch(1)
    batches += list(training.batches)
    assert len(steps) == len(batches) == 6
    for step, batch in zip(steps, batches, strict=True):
        assert step.instances.tolist() == [data.instances[index] for index in batch]
        assert step.labels.tolist() == [data.train_labels[index] for index in batch]


def test_each_epoch_shows_views_of_its_own(data, monkeypatch):
    shown = []
    train_step = Training._train_step

    def recorded(self, batch):
        shown.append(batch)
        train_step(self, batch)

    monkeypatch.setattr(Training, "_train_step", recorded)
    training = Training(spec(compute={"loaders": 2}), data, CPU)
    trained(training, epochs=2)
    other = Training(spec(), data, CPU)
    for epoch, batch in enumerate(shown):
        other.views.set_epoch(epoch)
        expected = other.views.__getitems__(batch.indices.tolist())
        assert all(torch.equal(*tensors) for tensors in zip(batch, expected, strict=True))
    other.views.set_epoch(0)
    assert not torch.equal(shown[1].images, other.views.__getitems__(shown[1].indices.tolist()).images)
