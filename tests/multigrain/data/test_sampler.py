import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from multigrain.data.sampler import RepeatedAugmentationBatches

WORLDS = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def plans(draw):
    world, repeats, groups = draw(WORLDS), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return {
        "num_images": draw(st.integers(world, 90)),
        "batch_size": world * repeats * groups,
        "repeats": repeats,
        "length_factor": draw(st.sampled_from([0.5, 1.0, 2.0, 3.25])),
        "world_size": world,
        "seed": draw(st.integers(0, 2**32)),
    }


def all_ranks(plan, epoch=0):
    samplers = [RepeatedAugmentationBatches(**plan, rank=rank) for rank in range(plan["world_size"])]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers, [list(sampler) for sampler in samplers]


@given(plans())
@settings(deadline=None, max_examples=50)
def test_every_image_stands_in_a_whole_run_of_repeats_within_one_ranks_batch(plan):
    repeats = plan["repeats"]
    _, ranks = all_ranks(plan)
    for batch in (batch for rank in ranks for batch in rank):
        assert all(type(index) is int and 0 <= index < plan["num_images"] for index in batch)
        runs = [batch[start : start + repeats] for start in range(0, len(batch), repeats)]
        assert all(run == [run[0]] * repeats for run in runs)
        assert len({run[0] for run in runs}) == len(runs)


@given(plans())
@settings(deadline=None, max_examples=50)
def test_the_images_of_one_step_are_all_different_over_all_ranks(plan):
    _, ranks = all_ranks(plan)
    # The step shrinks to what the ranks can share evenly of a smaller set.
    groups = min(plan["batch_size"] // plan["repeats"], plan["num_images"]) // plan["world_size"]
    assert groups >= 1
    for batches in zip(*ranks, strict=True):
        assert [len(batch) for batch in batches] == [groups * plan["repeats"]] * plan["world_size"]
        assert set(Counter(index for batch in batches for index in batch).values()) == {plan["repeats"]}


@given(plans())
@settings(deadline=None, max_examples=50)
def test_all_ranks_have_the_fewest_steps_that_hold_the_epochs_views(plan):
    samplers, ranks = all_ranks(plan)
    views = sum(len(rank[0]) for rank in ranks)
    steps = 1
    while steps * views < math.floor(plan["num_images"] * plan["length_factor"]):
        steps += 1
    assert {len(sampler) for sampler in samplers} == {len(rank) for rank in ranks} == {steps}


@given(plans())
@settings(deadline=None, max_examples=50)
def test_a_permutation_exhausts_all_images_but_the_remainder_before_any_comes_again(plan):
    plan["length_factor"] = 4.0 * plan["repeats"]
    _, ranks = all_ranks(plan)
    steps = [{index for batch in batches for index in batch} for batches in zip(*ranks, strict=True)]
    left = plan["num_images"] - sum(len(step) for step in steps[: plan["num_images"] // len(steps[0])])
    assert 0 <= left < len(steps[0])
    turns = plan["num_images"] // len(steps[0])
    for first in range(0, len(steps) - turns + 1, turns):
        seen = Counter(index for step in steps[first : first + turns] for index in step)
        assert set(seen.values()) == {1}
        assert len(seen) == plan["num_images"] - left


@given(plans(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_the_order_depends_on_seed_and_epoch_alone(plan, epoch):
    _, once = all_ranks(plan, epoch)
    samplers, again = all_ranks(plan, epoch)
    assert once == again
    # Not on what was drawn before.
    assert [list(sampler) for sampler in samplers] == once


def test_the_order_differs_between_seeds_epochs_and_permutations():
    orders = {}
    for seed in (0, 1, 2):
        sampler = RepeatedAugmentationBatches(50, 50, repeats=1, seed=seed)
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            for turn, batch in enumerate(sampler):
                assert sorted(batch) == list(range(50))
                orders[seed, epoch, turn] = tuple(batch)
    assert len(orders) == len(set(orders.values())) == 18


@given(plans())
@settings(deadline=None, max_examples=50)
def test_the_images_of_any_step_are_those_of_the_ranks_batches(plan):
    samplers, ranks = all_ranks(plan, epoch=2)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        runs = [index for batch in batches for index in batch[:: plan["repeats"]]]
        for sampler in samplers:
            assert sampler.images(step).tolist() == runs
            assert sampler.images_per_step == len(runs)


@given(plans(), st.data())
@settings(deadline=None, max_examples=50)
def test_an_epoch_goes_on_where_its_state_was_taken(plan, data):
    sampler = RepeatedAugmentationBatches(**plan)
    sampler.set_epoch(data.draw(st.integers(0, 5)))
    whole, done = list(sampler), data.draw(st.integers(0, len(sampler)))
    batches = iter(sampler)
    for _ in range(done):
        next(batches)
    state = sampler.state_dict()
    # The seed comes with the state.
    resumed = RepeatedAugmentationBatches(**plan | {"seed": 1})
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert list(batches) == list(resumed) == whole[done:]
    # What comes after the end is the epoch from its first step.
    assert list(sampler) == list(resumed) == whole
    for other in (sampler, resumed):
        other.load_state_dict(state)
        other.set_epoch(state["epoch"])
        assert list(other) == whole


@given(plans(), st.data())
@settings(deadline=None, max_examples=15)
def test_a_loader_goes_on_where_its_state_was_taken(plan, data):
    sampler = RepeatedAugmentationBatches(**plan)
    whole, done = list(sampler), data.draw(st.integers(0, len(sampler)))

    def loader(batches):
        return iter(DataLoader(range(plan["num_images"]), batch_sampler=batches, collate_fn=list))

    batches = loader(sampler)
    for _ in range(done):
        next(batches)
    resumed = RepeatedAugmentationBatches(**plan)
    resumed.load_state_dict(sampler.state_dict())
    assert list(batches) == list(loader(resumed)) == whole[done:]


def test_every_image_is_as_likely_to_come_first():
    sampler = RepeatedAugmentationBatches(6, 1, repeats=1)
    epochs, counts = 2000, Counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts[next(iter(sampler))[0]] += 1
    # Hoeffding: a frequency is off by more than 0.07 with a probability below 2 exp(-2 * 2000 * 0.07^2) = 7e-9.
    assert [counts[image] / epochs for image in range(6)] == pytest.approx([1 / 6] * 6, abs=0.07)


def test_the_step_holds_the_same_images_however_many_ranks_share_it():
    steps = []
    for world in (1, 2, 4, 8):
        plan = {"num_images": 40, "batch_size": 72, "repeats": 3, "world_size": world, "seed": 5}
        _, ranks = all_ranks(plan, epoch=3)
        steps.append([[index for batch in batches for index in batch] for batches in zip(*ranks, strict=True)])
    assert steps[0] == steps[1] == steps[2] == steps[3]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
# 2,562,334 views: the paper's 5,005 steps of 512, and as many more as 504 needs for them, 5083.99 rounded up.
@pytest.mark.parametrize(("batch_size", "repeats", "expected"), [(512, 1, 5005), (504, 3, 5084)])
def test_an_imagenet_epoch_has_its_views_in_whole_steps(world, batch_size, repeats, expected):
    sampler = RepeatedAugmentationBatches(1281167, batch_size, repeats, world_size=world)
    assert len(sampler) == expected
    assert sampler.images_per_step * repeats == batch_size


@pytest.mark.parametrize(
    ("num_images", "batch_size", "repeats", "world", "expected_groups", "expected_steps"),
    [
        # 20 views by steps of 6
        (10, 6, 3, 1, 2, 4),
        # a set of 4 in place of the 168 images of a step: one step of 12 views holds the epoch's 8
        (4, 504, 3, 1, 4, 1),
        # 10 images on 4 ranks: 2 each, two wait; 20 views by steps of 24
        (10, 504, 3, 4, 2, 1),
        # a set below 256 images, which a common sampler leaves without a batch
        (200, 504, 3, 4, 42, 1),
        # one image a rank
        (8, 504, 3, 8, 1, 1),
        # 2 images make 4 views, of 1 a step
        (2, 1, 1, 1, 1, 4),
    ],
)
def test_small_sets_still_have_full_steps(num_images, batch_size, repeats, world, expected_groups, expected_steps):
    plan = {"num_images": num_images, "batch_size": batch_size, "repeats": repeats, "world_size": world}
    _, ranks = all_ranks(plan)
    assert [[len(batch) for batch in rank] for rank in ranks] == [[expected_groups * repeats] * expected_steps] * world


def test_an_epoch_has_at_least_one_step():
    assert len(list(RepeatedAugmentationBatches(3, 3, repeats=3, length_factor=0.01))) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"batch_size": 8}, "multiple"),
        ({"batch_size": 512}, "multiple"),
        ({"batch_size": 6, "world_size": 4}, "multiple"),
        ({"batch_size": 0}, "multiple"),
        ({"num_images": 0}, "every rank needs an image"),
        ({"num_images": 1, "world_size": 2}, "every rank needs an image"),
        ({"rank": 1}, "rank must lie in"),
        ({"rank": -1}, "rank must lie in"),
    ],
)
def test_impossible_plans_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        RepeatedAugmentationBatches(**{"num_images": 20, "batch_size": 6, "repeats": 3} | arguments)
