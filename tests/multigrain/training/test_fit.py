"""The training loop: its results, how it goes on after an interruption, and how ranks share the work."""

import copy
import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from networks import EPOCHS, STEPS, spec, with_dropout
from ranks import start_ranks
from torch import distributed

from multigrain.data.folders import read_dataset
from multigrain.evaluation import embed
from multigrain.evaluation.held_out import METRICS, held_out_grid, held_out_metrics
from multigrain.losses.joint import JointLoss
from multigrain.models import checkpoint
from multigrain.models.multigrain import network_of
from multigrain.training import fit as module
from multigrain.training import trainer as training_module
from multigrain.training.fit import fit
from multigrain.training.trainer import Training, TrainingError

CPU = torch.device("cpu")


class Interrupted(BaseException):
    """What no handler of ordinary errors sees."""


EVERYTHING = {
    "model": {"learn_p": True},
    "loss": {"entropy": 0.2},
    "batch": {"accumulate": 2},
    "augment": {"mixup": 0.4},
    "optimizer": {"algorithm": "adamw", "rate": 0.01, "ema": 0.9, "clip": 1.0, "schedule": "cosine", "warmup": 0.5},
    "evaluation": {"variants": {"sizes": [24], "exponents": [1.0, math.inf], "whiten": True}},
}
"""All that could be forgotten when a run goes on."""
RARELY = {**EVERYTHING, "compute": {"checkpoint_steps": 1000}}
"""Saves at the end of an epoch, and where it is told to end."""
RUNS = {
    "plain": {},
    "everything": EVERYTHING,
    "loaders": {**EVERYTHING, "compute": {"loaders": 2}},
    "rarely": RARELY,
    "rarely, loaders": {**RARELY, "compute": {"checkpoint_steps": 1000, "loaders": 2}},
}


@pytest.fixture(autouse=True)
def dropout(monkeypatch):
    with_dropout(monkeypatch)


@pytest.fixture(scope="module")
def data(shapes_folder):
    return read_dataset(shapes_folder)


def without_clocks(metrics):
    return {name: value for name, value in metrics.items() if name not in {"views_per_second", "data_wait"}}


def known(results):
    return {result.epoch: (without_clocks(result.metrics), result.variants) for result in results}


def flat(tree, path=""):
    """The leaves of dictionaries and lists, by their path."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: leaf for name, branch in pairs for key, leaf in flat(branch, f"{path}/{name}").items()}
    return {path: tree}


def assert_same_state(a, b):
    """Bit for bit."""
    for which in ("model", "optimizer", "state"):
        one, other = flat(getattr(a, which)), flat(getattr(b, which))
        assert one.keys() == other.keys()
        for name in one.keys() - {"/seconds", "/waited"}:
            mine, theirs = one[name], other[name]
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, name


def cut_short(settings, data, folder, step=0, evaluation=0):
    """The results of a run that ends before a step, or after an evaluation, counted from 1 over all epochs."""
    results, left = [], {"step": step, "evaluation": evaluation}

    def until(which, function, after):
        def counted(*args):
            given = function(*args) if after else None
            left[which] -= 1
            if not left[which]:
                raise Interrupted
            return given if after else function(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_train_step", until("step", Training._train_step, False))
        patch.setattr(module, "held_out_grid", until("evaluation", held_out_grid, True))
        with pytest.raises(Interrupted):
            results.extend(fit(settings, data, folder, CPU))  # it keeps those before the interruption
    return results


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The results of whole runs, and the checkpoints that they end with, by name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        with_dropout(patch)
        for name, changes in RUNS.items():
            folder = tmp_path_factory.mktemp("uninterrupted")
            found[name] = list(fit(spec(**changes), data, folder, CPU)), checkpoint.latest(folder)
    return found


def test_every_epoch_gives_a_result(uninterrupted):
    course = {"loss", "classification_loss", "margin_loss", "classification_gradient", "beta", "active_terms"}
    course |= {"positive_distance", "negative_distance", "fallback_rows", "views_per_second", "data_wait"}
    for name, extra in (("plain", set()), ("everything", {"p", "entropy_loss"})):
        results, last = uninterrupted[name]
        assert [result.epoch for result in results] == [1, 2]
        for result in results:
            assert set(result.metrics) == set(METRICS) | course | extra
            assert all(type(value) is float and math.isfinite(value) for value in result.metrics.values())
            shares = (*METRICS, "active_terms", "fallback_rows", "data_wait", "classification_gradient")
            assert all(0 <= result.metrics[share] <= 1 for share in shares)
            assert all(0 < result.metrics[which] < math.sqrt(2) for which in ("positive_distance", "negative_distance"))
        assert results[0].metrics["beta"] != 1.2
        assert last.model["margin.beta"].item() == results[-1].metrics["beta"]
        assert (last.state["steps"], last.state["epoch"], last.state["step"]) == (EPOCHS * STEPS, EPOCHS - 1, STEPS)


def test_what_is_evaluated_and_kept_is_the_average(uninterrupted, data):
    for name, changes in RUNS.items():
        results, last = uninterrupted[name]
        network, _ = network_of(last)
        averaged = "ema." if name != "plain" else "network."
        assert all(torch.equal(tensor, last.model[averaged + key]) for key, tensor in network.state_dict().items())
        expected = held_out_metrics(network, data, spec(**changes), CPU)
        assert {metric: results[-1].metrics[metric] for metric in METRICS} == expected
    assert not torch.equal(last.model["ema.classifier.weight"], last.model["network.classifier.weight"])


def test_variants_come_after_the_last_epoch_if_they_are_asked_for(uninterrupted, data):
    assert [result.variants for result in uninterrupted["plain"][0]] == [{}, {}]
    (first, last), saved = uninterrupted["everything"]
    assert first.variants == {}
    network, settings = network_of(saved)
    own = f"{network.pool.p.item():g}"
    grid = {f"s{size}-p{p}{white}" for size in (32, 24) for p in (own, "1", "inf") for white in ("", "-whitened")}
    assert set(last.variants) == grid - {f"s32-p{own}"}
    _, expected = held_out_grid(network, data, settings, settings.evaluation.variants, CPU)
    assert last.variants == expected
    assert all(set(metrics) == set(METRICS) for metrics in expected.values())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_evaluated_is_what_the_checkpoint_keeps(data, tmp_path, monkeypatch, ema):
    evaluated = []

    def recorded(network, *args):
        evaluated.append(copy.deepcopy(network.state_dict()))
        return held_out_grid(network, *args)

    monkeypatch.setattr(module, "held_out_grid", recorded)
    for result in fit(spec(optimizer={"ema": ema}), data, tmp_path, CPU):
        kept = network_of(checkpoint.latest(tmp_path))[0].state_dict()
        assert len(evaluated) == result.epoch
        assert evaluated[-1].keys() == kept.keys()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in evaluated[-1].items())


def test_loaders_change_nothing(uninterrupted):
    (results, last), (others, other) = uninterrupted["everything"], uninterrupted["loaders"]
    assert known(results) == known(others)
    settings = spec(**EVERYTHING).model_dump()
    assert_same_state(last, other._replace(state=other.state | {"spec": settings}))


def test_loss_goes_down(data, tmp_path):
    settings = spec(
        epochs=8,
        augment={"policy": "torch", "crop": 0.9, "flip": 0.0},
        optimizer={"schedule": "cosine"},
        compute={"checkpoint_steps": 1000},
    )
    results = list(fit(settings, data, tmp_path, CPU))
    for name in ("loss", "classification_loss"):
        assert results[-1].metrics[name] < 0.8 * results[0].metrics[name]


CUTS = [{"step": step} for step in range(2, EPOCHS * STEPS + 1)] + [{"evaluation": epoch} for epoch in (1, 2)]


def cut_name(cut):
    return " ".join(f"{where} {number}" for where, number in cut.items())


@pytest.mark.parametrize("cut", CUTS, ids=cut_name)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_run_interrupted_anywhere_ends_as_if_it_had_not_been(uninterrupted, data, tmp_path, name, cut):
    results, last = uninterrupted[name]
    settings = spec(**RUNS[name])
    before = cut_short(settings, data, tmp_path, **cut)
    done = cut["step"] - 1 if "step" in cut else STEPS * cut["evaluation"]
    assert checkpoint.latest(tmp_path).state["steps"] == done
    torch.manual_seed(99)
    after = list(fit(settings, data, tmp_path, CPU))
    assert known(before) | known(after) == known(results)
    assert [result.epoch for result in after] == list(range(math.ceil(done / STEPS), EPOCHS + 1))
    assert all(known(before)[epoch] == known(after)[epoch] for epoch in known(before).keys() & known(after).keys())
    assert_same_state(checkpoint.latest(tmp_path), last)


@pytest.mark.parametrize("cut", [{"step": 3}, {"step": 5}, {"evaluation": 1}], ids=cut_name)
def test_loading_processes_go_on_where_they_were(uninterrupted, data, tmp_path, cut):
    settings = spec(**RUNS["loaders"])
    cut_short(settings, data, tmp_path, **cut)
    after = known(fit(settings, data, tmp_path, CPU))
    assert after.items() <= known(uninterrupted["loaders"][0]).items()
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted["loaders"][1])


def test_a_run_interrupted_again_and_again_still_ends_the_same(uninterrupted, data, tmp_path):
    settings = spec(**EVERYTHING)
    for _ in range(EPOCHS * STEPS - 1):
        cut_short(settings, data, tmp_path, step=2)
    list(fit(settings, data, tmp_path, CPU))
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted["everything"][1])


def test_a_run_that_lost_its_steps_since_the_last_checkpoint_does_them_again(uninterrupted, data, tmp_path):
    settings = spec(compute={"checkpoint_steps": 2})
    cut_short(settings, data, tmp_path, step=6)  # five are done, four saved
    assert checkpoint.latest(tmp_path).state["steps"] == 4
    assert known(fit(settings, data, tmp_path, CPU)).items() <= known(uninterrupted["plain"][0]).items()
    saved, (_, last) = checkpoint.latest(tmp_path), uninterrupted["plain"]
    saved.state["spec"]["compute"]["checkpoint_steps"] = 1
    assert_same_state(saved, last)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "MANIFEST.json"])
def test_a_run_with_a_truncated_checkpoint_goes_on_from_the_one_before(uninterrupted, data, tmp_path, file):
    cut_short(spec(), data, tmp_path, step=5)
    path = tmp_path / "step-00000004" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="step-00000004"):
        resumed = list(fit(spec(), data, tmp_path, CPU))
    assert [result.epoch for result in resumed] == [1, 2]
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted["plain"][1])


def test_random_numbers_drawn_between_epochs_change_nothing(uninterrupted, data, tmp_path):
    for _ in fit(spec(**EVERYTHING), data, tmp_path, CPU):
        torch.randn(17)
    assert_same_state(checkpoint.latest(tmp_path), uninterrupted["everything"][1])


def test_another_seed_gives_another_network(uninterrupted, data, tmp_path):
    result = next(fit(spec(seed=1), data, tmp_path, CPU))
    assert result.metrics["loss"] != uninterrupted["plain"][0][0].metrics["loss"]


def test_a_result_comes_when_its_checkpoint_is_on_disk(data, tmp_path, monkeypatch):
    def write(writer):
        if "late" in vars(writer):
            checkpoint.save(writer.folder, vars(writer).pop("late"))

    # The slowest writer that there can be: it begins when it is waited for.
    monkeypatch.setattr(checkpoint.Writer, "save", lambda writer, saved: setattr(writer, "late", copy.deepcopy(saved)))
    monkeypatch.setattr(checkpoint.Writer, "wait", write)
    epochs = 0
    for result in fit(spec(compute={"checkpoint_steps": 1000}), data, tmp_path, CPU):
        saved = checkpoint.latest(tmp_path).state
        assert (saved["steps"], saved["epoch"], saved["step"]) == (STEPS * result.epoch, result.epoch - 1, STEPS)
        assert saved["totals"]["loss"] / STEPS == result.metrics["loss"]
        epochs += 1
    assert epochs == EPOCHS


def dead(*_):
    raise AssertionError("nothing is left to train")


def test_a_finished_run_gives_its_last_result_and_trains_no_more(data, tmp_path, monkeypatch):
    results = list(fit(spec(**EVERYTHING), data, tmp_path, CPU))
    before = contents(tmp_path)
    monkeypatch.setattr(Training, "_train_step", dead)
    monkeypatch.setattr(checkpoint, "save", dead)
    assert list(fit(spec(**EVERYTHING), data, tmp_path, CPU)) == [results[-1]], "the clocks' figures, too"
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 4},
        {"loss": {"beta": 1.3}},
        {"optimizer": {"rate": 1.01}},
        {"evaluation": {"variants": {"sizes": [48]}}},
    ],
)
def test_other_settings_are_refused(data, tmp_path, change):
    next(fit(spec(), data, tmp_path, CPU))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="settings"):
        next(fit(spec(**change), data, tmp_path, CPU))
    assert contents(tmp_path) == before


def test_other_classes_are_refused(data, tmp_path):
    next(fit(spec(), data, tmp_path, CPU))
    renamed = data.__class__(**{**vars(data), "classes": tuple(name.upper() for name in data.classes)})
    with pytest.raises(ValueError, match="class"):
        next(fit(spec(), renamed, tmp_path, CPU))


def poison(patch, position):
    """Spoils the embeddings of a step, counted from 1 over all epochs; 0: of none."""
    backward, steps = JointLoss.backward, []

    def spoilt(self, embeddings, *args):
        steps.append(embeddings)
        return backward(self, embeddings * (math.nan if len(steps) == position else 1), *args)

    patch.setattr(JointLoss, "backward", spoilt)
    return steps


def assert_finite(folder):
    """All that lies there."""
    for directory in folder.glob("step-*"):
        saved = checkpoint.read(directory)
        tensors = [leaf for leaf in flat((saved.model, saved.optimizer)).values() if isinstance(leaf, torch.Tensor)]
        assert all(tensor.isfinite().all() for tensor in tensors)
        json.dumps(saved.state, allow_nan=False)


@pytest.mark.parametrize("interval", [1, 2, 1000])
@pytest.mark.parametrize("position", [1, 2, 3, 4, 6])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(data, tmp_path, monkeypatch, position, interval):
    poison(monkeypatch, position)
    epoch, step = (position - 1) // STEPS + 1, (position - 1) % STEPS + 1
    with pytest.raises(TrainingError, match=rf"\bstep {step} of epoch {epoch};.* lower optimizer\.rate"):
        list(fit(spec(compute={"checkpoint_steps": interval}), data, tmp_path, CPU))
    saved = checkpoint.latest(tmp_path)
    safe = max(done for done in range(position) if done % STEPS == 0 or done % interval == 0)
    assert (saved.state["steps"] if saved else 0) == safe
    assert_finite(tmp_path)


def test_a_loss_is_looked_at_between_checkpoints(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "CHECK_STEPS", 2)
    steps = poison(monkeypatch, 1)
    with pytest.raises(TrainingError, match=r"\bstep 1 of epoch 1;"):
        list(fit(spec(compute={"checkpoint_steps": 1000}), data, tmp_path, CPU))
    assert len(steps) == 2


@pytest.mark.parametrize("negatives", ["uniform", "distance_weighted", "reference"])
def test_too_high_a_rate_ends_the_run_with_advice(data, tmp_path, negatives):
    settings = spec(optimizer={"rate": 1e30}, loss={"negatives": negatives}, compute={"checkpoint_steps": 1000})
    with pytest.raises(TrainingError, match=r"epoch 1;.* lower optimizer\.rate"):
        list(fit(settings, data, tmp_path, CPU))
    assert checkpoint.latest(tmp_path) is None


def test_weights_that_are_not_finite_after_the_last_step_end_the_run(data, tmp_path, monkeypatch):
    backward, steps = JointLoss.backward, []

    def spoilt(self, *args):
        gradient, values = backward(self, *args)
        steps.append(gradient)
        return gradient * (math.inf if len(steps) == STEPS else 1), values

    monkeypatch.setattr(JointLoss, "backward", spoilt)
    with pytest.raises(TrainingError, match=r"weights must be finite, but were not after step 3 of epoch 1; lower"):
        list(fit(spec(epochs=1), data, tmp_path, CPU))
    assert checkpoint.latest(tmp_path).state["steps"] == 2
    assert_finite(tmp_path)


def counted(patch):
    """The steps that are done from now on, a list that grows."""
    steps, step = [], Training._train_step

    def counting(self, batch):
        step(self, batch)
        steps.append(self.steps)

    patch.setattr(Training, "_train_step", counting)
    return steps


@pytest.mark.parametrize("name", ["rarely", "rarely, loaders"])
@pytest.mark.parametrize("last", range(1, EPOCHS * STEPS + 1))
def test_a_run_that_is_told_to_end_does_so_at_once_and_repeats_no_step(
    uninterrupted, data, tmp_path, monkeypatch, last, name
):
    settings, steps = spec(**RUNS[name]), counted(monkeypatch)
    before = list(fit(settings, data, tmp_path, CPU, lambda: len(steps) >= last))
    assert len(steps) == checkpoint.latest(tmp_path).state["steps"] == last
    after = list(fit(settings, data, tmp_path, CPU))
    assert len(steps) == EPOCHS * STEPS
    results, end = uninterrupted[name]
    assert known(before) | known(after) == known(results)
    assert_same_state(checkpoint.latest(tmp_path), end)


def test_an_evaluation_that_is_told_to_end_is_made_by_the_next_start(uninterrupted, data, tmp_path, monkeypatch):
    settings, steps, shown = spec(**RARELY), counted(monkeypatch), []
    pooled = embed.pooled
    monkeypatch.setattr(embed, "pooled", lambda *args: shown.append(len(steps)) or pooled(*args))
    assert list(fit(settings, data, tmp_path, CPU, lambda: bool(shown))) == []
    assert shown == [STEPS], "no batch after the first"
    assert known(fit(settings, data, tmp_path, CPU)) == known(uninterrupted["rarely"][0])
    assert len(steps) == EPOCHS * STEPS


def test_a_run_that_must_end_before_its_first_step_makes_one(data, tmp_path):
    assert list(fit(spec(), data, tmp_path, CPU, lambda: True)) == []
    assert checkpoint.latest(tmp_path).state["steps"] == 1


def test_without_copies_only_the_class_is_learnt(data, tmp_path):
    settings = spec(epochs=1, loss={"weight": 1.0}, batch={"repeats": 1})
    (result,) = fit(settings, data, tmp_path, CPU)
    assert result.metrics["loss"] == result.metrics["classification_loss"] > 0
    assert result.metrics["margin_loss"] == result.metrics["active_terms"] == 0
    assert result.metrics["classification_gradient"] == 1
    assert result.metrics["beta"] == pytest.approx(1.2)


# From here on: two ranks, in processes of their own, that do everything the tests below look at.

RANK_CUTS = [{"step": 3}, {"step": 5}, {"evaluation": 1}]


def outcome(settings, data, folder, cut):
    """A run, cut short and gone on with; results before and after."""
    before = cut_short(settings, data, folder, **cut) if cut else []
    distributed.barrier()  # the first rank may still write
    after = list(fit(settings, data, folder, CPU))
    distributed.barrier()
    return before, after


def poisoned(rank, data, folder):
    """What a rank says of a loss that only the second one spoils."""
    found = []
    for interval in (1, 1000):
        # Negatives of the same rank: the other's loss stays finite.
        settings = spec(loss={"negatives_from": "rank"}, compute={"checkpoint_steps": interval})
        with pytest.MonkeyPatch.context() as patch:
            steps = poison(patch, 5 if rank == 1 else 0)
            with pytest.raises(TrainingError) as error:
                list(fit(settings, data, folder / f"nan-{interval}", CPU))
        found.append((str(error.value), len(steps)))
        distributed.barrier()
    return found


TOLD = {0: 6, 1: 2, 2: 3, 3: 3, 5: 6}
"""After which step the second rank is told to end, 0 for never; after which all do."""


def told(rank, data, folder, step, evaluating=False):
    """A run of which only the second rank is told to end, and gone on with: results, and steps done and kept."""
    settings, shown = spec(**RARELY), []
    with pytest.MonkeyPatch.context() as patch:
        steps, pooled = counted(patch), embed.pooled
        patch.setattr(embed, "pooled", lambda *args: shown.append(len(steps)) or pooled(*args))

        def ends():
            return rank == 1 and bool(shown if evaluating else 0 < step <= len(steps))

        before = list(fit(settings, data, folder, CPU, ends))
        distributed.barrier()  # the first rank may still write
        done, kept = len(steps), checkpoint.latest(folder).state["steps"]
        after = list(fit(settings, data, folder, CPU))
        distributed.barrier()
    return before, after, (done, kept, len(steps))


def of_one_rank(rank, meeting, images):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    saves, save = [], checkpoint.save
    data, folder = read_dataset(Path(images)), Path(meeting)
    found = {"poisoned": poisoned(rank, data, folder)}
    checkpoint.save = lambda *args: saves.append(rank) or save(*args)
    with pytest.MonkeyPatch.context() as patch:
        with_dropout(patch)
        found["runs"] = [
            outcome(spec(**EVERYTHING), data, folder / str(number), cut) for number, cut in enumerate([{}, *RANK_CUTS])
        ]
        found["again"] = list(fit(spec(**EVERYTHING), data, folder / "0", CPU))
        found["told"] = {step: told(rank, data, folder / f"told-{step}", step) for step in TOLD}
        found["told"]["evaluating"] = told(rank, data, folder / "told-evaluating", 0, True)
    found["saves"] = len(saves)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shapes_folder):
    """What each of two ranks found, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(of_one_rank, (str(folder), str(shapes_folder)))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


def test_two_ranks_give_the_same_results_and_one_saves_them(two_ranks):
    (one, two), _ = two_ranks
    for mine, other in zip(one["runs"], two["runs"], strict=True):
        assert [known(results) for results in mine] == [known(results) for results in other]
    (_, results), *_ = one["runs"]
    assert [result.epoch for result in results] == [1, 2]
    assert all(math.isfinite(value) for result in results for value in result.metrics.values())
    assert known(one["again"]) == known(two["again"]) == known(results[-1:])
    assert (one["saves"] > 0, two["saves"]) == (True, 0)


@pytest.mark.parametrize("number", range(1, 1 + len(RANK_CUTS)))
def test_two_ranks_interrupted_anywhere_end_as_if_they_had_not_been(two_ranks, number):
    ranks, folder = two_ranks
    for found in ranks:
        (_, results), (before, after) = found["runs"][0], found["runs"][number]
        assert known(before) | known(after) == known(results)
    assert_same_state(checkpoint.latest(folder / str(number)), checkpoint.latest(folder / "0"))


def test_metrics_of_two_ranks_are_those_of_the_saved_network(two_ranks, data):
    (one, _), folder = two_ranks
    network, settings = network_of(checkpoint.latest(folder / "0"))
    metrics = one["runs"][0][1][-1].metrics
    assert {name: metrics[name] for name in METRICS} == pytest.approx(
        held_out_metrics(network, data, settings, CPU), abs=1e-6
    )
    _, variants = held_out_grid(network, data, settings, settings.evaluation.variants, CPU)
    found = one["runs"][0][1][-1].variants
    assert found.keys() == variants.keys()
    assert all(found[name] == pytest.approx(metrics, abs=1e-6) for name, metrics in variants.items())


@pytest.mark.parametrize("which", [0, 1], ids=["a checkpoint a step", "one an epoch"])
def test_all_ranks_end_where_one_finds_a_loss_that_is_not_finite(two_ranks, which):
    ranks, folder = two_ranks
    said = [found["poisoned"][which] for found in ranks]
    assert said[0] == said[1]
    assert "step 2 of epoch 2;" in said[0][0]
    saved = checkpoint.latest(folder / f"nan-{(1, 1000)[which]}")
    assert saved.state["steps"] == (4, 3)[which]
    assert_finite(folder / f"nan-{(1, 1000)[which]}")


@pytest.mark.parametrize(("told", "last"), [*TOLD.items(), ("evaluating", STEPS)])
def test_two_ranks_of_which_one_is_told_to_end_leave_together_and_repeat_no_step(two_ranks, told, last):
    ranks, folder = two_ranks
    for found in ranks:
        results, _, _ = found["told"][0]
        before, after, steps = found["told"][told]
        assert steps == (last, last, EPOCHS * STEPS)
        assert known(before) | known(after) == known(results)
        assert len(before) == (EPOCHS if told == 0 else (last - 1) // STEPS)
    assert_same_state(checkpoint.latest(folder / f"told-{told}"), checkpoint.latest(folder / "told-0"))
