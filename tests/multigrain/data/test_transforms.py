"""Training and evaluation transforms: by figures where they are fixed, by distribution where they are drawn."""

import io
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from multigrain.config.training import AugmentSettings
from multigrain.data.transforms import (
    NEUTRAL,
    TrainTransform,
    colour,
    evaluation_pixels,
    evaluation_view,
    lighting,
    paints,
    rect_shape,
    scale,
)

# The colour axes and their standard deviations as published, one row per channel.
AXES = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
STD = [0.2175, 0.0188, 0.0045]
JITTERED = ["full", "senet", "copy"]
POLICIES = [*JITTERED, "torch", "autoaugment"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads cost more than they save on images this small


def still(policy="torch", **changes):
    """Settings under which nothing is drawn but what `changes` name; `autoaugment` still does its own."""
    quiet = {"crop": 1.0, "flip": 0.0, "lighting": 0.0, "rotation": 0.0, "blur": 0.0, "jpeg": 0.0}
    jitter = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    return AugmentSettings(policy=policy, **{**quiet, **jitter, **changes})


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def constant(value, side=16):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def drawn(count, transform, image):
    """Views (count, 3, s, s) and their colour parameters (count, 11)."""
    views, parameters = zip(*(transform(image) for _ in range(count)), strict=True)
    return torch.stack(views), torch.stack(parameters)


def row(factors=(1, 1, 1), order=(0, 1, 2), grey=0, shift=(0, 0, 0), divisor=1):
    return torch.tensor([*factors, *order, grey, *shift, divisor], dtype=torch.float32)


def slow_colour(image, parameters):
    """One view, step by step, as torchvision's own functions do it."""
    factors, order, (grey, *shift, divisor) = (part.tolist() for part in parameters.split([3, 3, 5]))
    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    x = image.float() / 255
    for which in order:
        x = steps[int(which)](x, factors[int(which)])
    if grey:
        x = functional.rgb_to_grayscale(x, num_output_channels=3)
    return torch.stack([(channel + moved) / divisor for channel, moved in zip(x, shift, strict=True)]).clamp(0, 1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 7))
def test_colour_does_to_each_view_what_torchvision_does_to_one(seed, size):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 4, 5), dtype=torch.uint8, generator=generator)
    rows = []
    for _ in range(size):
        uniform = torch.rand(5, generator=generator)
        order = torch.randperm(3, generator=generator).tolist()
        shift = (0.1 * torch.randn(3, generator=generator)).tolist()
        rows.append(row((2 * uniform[:3]).tolist(), order, int(uniform[3] < 0.3), shift, 1 + uniform[4]))
    before = images.clone()
    coloured = colour(images, torch.stack(rows))
    assert coloured.dtype == torch.float32
    assert torch.equal(images, before)
    expected = torch.stack([slow_colour(image, parameters) for image, parameters in zip(images, rows, strict=True)])
    torch.testing.assert_close(coloured, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        # Pixels (1, .2, 0) and (0, .2, 1) with greys .4163 and .2314, of mean .32385.
        (row(factors=(0.5, 1, 1)), [(0.5, 0.1, 0), (0, 0.1, 0.5)]),
        (row(factors=(3.0, 1, 1)), [(1, 0.6, 0), (0, 0.6, 1)]),
        (row(factors=(1, 0.5, 1)), [(0.661925, 0.261925, 0.161925), (0.161925, 0.261925, 0.661925)]),
        (row(factors=(1, 1, 0.5)), [(0.70815, 0.30815, 0.20815), (0.1157, 0.2157, 0.6157)]),
        (row(factors=(1, 1, 0.0)), [(0.4163,) * 3, (0.2314,) * 3]),
        (row(grey=1), [(0.4163,) * 3, (0.2314,) * 3]),
        # Twice as bright and clamped: (1, .4, 0) and (0, .4, 1), grey .5337 and .3488. The other way round, from above.
        (row(factors=(2, 1, 0.5)), [(0.76685, 0.46685, 0.26685), (0.1744, 0.3744, 0.6744)]),
        (row(factors=(2, 1, 0.5), order=(2, 1, 0)), [(1, 0.6163, 0.4163), (0.2314, 0.4314, 1)]),
        (row(shift=(-0.5, 0.9, 0.05), divisor=1.1), [(0.454545, 1, 0.045455), (0, 1, 0.954545)]),
    ],
)
def test_colour_gives_figures_worked_out_by_hand(parameters, expected):
    images = torch.tensor([[[[255, 0]], [[51, 51]], [[0, 255]]]], dtype=torch.uint8)
    coloured = colour(images, parameters[None])[0, :, 0].T
    torch.testing.assert_close(coloured, torch.tensor(expected, dtype=torch.float32), atol=2e-6, rtol=0)


def test_neutral_parameters_leave_every_level_exactly_as_it_is():
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([levels, levels.flip(0), levels.roll(77)]).reshape(1, 3, 16, 16).repeat(2, 1, 1, 1)
    assert torch.equal(colour(images, NEUTRAL.repeat(2, 1)), images / 255)


def test_colour_never_waits_for_the_device():
    # On `meta` there are no values to wait for: to ask for one is an error.
    images = torch.empty(6, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert colour(images, NEUTRAL.repeat(6, 1).to("meta")).shape == (6, 3, 8, 8)


def test_colour_is_one_graph_to_the_compiler():
    images, parameters = torch.stack([noise(8, 8), noise(8, 8)]), torch.stack([NEUTRAL, row(grey=1)])
    whole = torch.compile(colour, fullgraph=True, backend="eager")
    assert torch.equal(whole(images, parameters), colour(images, parameters))


@pytest.mark.parametrize(
    ("alpha", "pixel", "expected"),
    [
        ((0.1, -0.2, 0.05), 0.5, (0.440948, 0.442910, 0.445467)),
        ((0.0, 0.0, 0.0), 1.0, (0.909091, 0.909091, 0.909091)),
        ((0.0, 0.0, 0.0), 0.0, (0.0, 0.0, 0.0)),
        ((3.0, 0.0, 0.0), 0.2, (0.0, 0.0, 0.0)),
        ((-4.0, 0.0, 0.0), 0.9, (1.0, 1.0, 1.0)),
    ],
)
def test_lighting_gives_the_published_figures(alpha, pixel, expected):
    image = torch.full((1, 3, 2, 5), round(pixel * 255), dtype=torch.uint8)
    shift = lighting(torch.tensor(alpha)) + pixel - round(pixel * 255) / 255  # what eight bits have rounded
    lit = colour(image, row(shift=shift.tolist(), divisor=1.1)[None])[0]
    for channel, value in zip(lit, expected, strict=True):
        torch.testing.assert_close(channel, torch.full((2, 5), value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(48, 31), (20, 90), (16, 16), (200, 150)])
def test_views_are_square(policy, shape):
    transform = TrainTransform(AugmentSettings(policy=policy, grey=0.2, randaugment=5), 24)
    image = noise(*shape)
    before = image.clone()
    views, parameters = drawn(8, transform, image)
    assert views.shape == (8, 3, 24, 24)
    assert views.dtype == torch.uint8
    assert parameters.shape == (8, 11)
    assert 0 <= colour(views, parameters).min() < colour(views, parameters).max() <= 1
    assert torch.equal(image, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_drawn_from_torch_alone(policy):
    transform = TrainTransform(AugmentSettings(policy=policy, grey=0.5, randaugment=9), 24)
    image = noise(40, 40)
    random_before, numpy_before = random.getstate(), np.random.get_state()[1].copy()
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(drawn(10, transform, image))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert random.getstate() == random_before
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("policy", ["torch", "full", "senet", "copy"])
@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.5, 72, 128), (0.1, 4, 36)])
def test_flip_has_its_probability(policy, flip, low, high):
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, 8:] = 255
    views, _ = drawn(200, TrainTransform(still(policy, flip=flip), 16), image)
    # The bounds of a drawn number lie four standard deviations from its mean.
    assert low <= int((views[:, 0, 0, 0] > views[:, 0, 0, 15]).sum()) <= high


def crops(settings, draws=200):
    """Area and width-to-height ratio of drawn crops, read off an image whose colours are its coordinates."""
    ramp = torch.arange(128, dtype=torch.uint8)
    image = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), ramp.expand(128, 128)])
    views = drawn(draws, TrainTransform(settings, 32), image)[0].float()
    # The second and the last but one of 32 pixels have their centres 29/32 of the crop apart.
    width = (views[:, 0, :, -2] - views[:, 0, :, 1]).mean(dim=1) * 32 / 29
    height = (views[:, 1, -2, :] - views[:, 1, 1, :]).mean(dim=1) * 32 / 29
    return (width * height).numpy() / 128**2, (width / height).numpy()


@pytest.mark.parametrize(
    ("policy", "bound", "ratio"),
    [("torch", 0.08, 4 / 3), ("torch", 0.4, 4 / 3), ("torch", 0.8, 1.1), ("full", 0.3, 2.0), ("senet", 0.3, 1.0)],
)
def test_crops_keep_their_share_of_the_area_and_their_ratio(policy, bound, ratio):
    areas, ratios = crops(still(policy, crop=bound, ratio=ratio))
    tolerance = 1.06  # whole pixels, and what the resampling rounds
    assert areas.min() >= bound / tolerance
    assert areas.min() <= bound + 0.1 * (1 - bound)
    assert areas.max() >= bound + 0.7 * (1 - bound)
    assert 1 / ratio / tolerance <= ratios.min() <= ratio**-0.7 * tolerance
    assert ratio**0.7 / tolerance <= ratios.max() <= ratio * tolerance


def test_a_crop_of_everything_is_the_resized_image():
    image = noise(50, 50)
    assert torch.equal(TrainTransform(still(), 50)(image)[0], image)
    assert torch.equal(TrainTransform(still(), 24)(image)[0], functional.resize(image, [24, 24], antialias=True))


@pytest.mark.parametrize("policy", ["torch", "autoaugment"])
def test_policies_without_jitter_are_neutral(policy):
    strong = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "lighting": 0.9}
    _, parameters = drawn(20, TrainTransform(still(policy, **strong), 16), constant(128))
    order = parameters[:, 3:6].clone()
    parameters[:, 3:6] = NEUTRAL[3:6]
    assert torch.equal(parameters, NEUTRAL.repeat(20, 1))
    assert torch.equal(order.sort().values, NEUTRAL[3:6].repeat(20, 1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_colour_is_asked_for_where_it_changes_anything(policy, grey):
    settings = AugmentSettings(policy=policy, grey=grey)
    views, parameters = drawn(40, TrainTransform(settings, 8), noise(8, 8))
    assert paints(settings) == (not torch.equal(colour(views, parameters), scale(views)))


@pytest.mark.parametrize(("policy", "share"), [("full", 1), ("senet", 2 / 3), ("copy", 1)])
def test_jitter_fills_its_strengths_evenly_and_no_more(policy, share):
    strengths = torch.tensor([0.3, 0.1, 0.6])
    names = ("brightness", "contrast", "saturation")
    jitter = dict(zip(names, strengths.tolist(), strict=True))
    _, parameters = drawn(600, TrainTransform(still(policy, **jitter), 16), constant(128))
    spread = (parameters[:, :3] - 1) / (share * strengths)
    assert spread.abs().max() <= 1 + 1e-5
    # Of a uniform draw in [-1, 1]: ends, mean (of standard deviation .024) and variance; and they are independent.
    assert spread.abs().max(dim=0).values.min() > 0.97
    assert spread.mean(dim=0).abs().max() < 0.1
    torch.testing.assert_close(spread.var(dim=0), torch.full((3,), 1 / 3), atol=0.05, rtol=0)
    assert torch.corrcoef(spread.T).fill_diagonal_(0).abs().max() < 0.17
    orders = Counter(map(tuple, parameters[:, 3:6].tolist()))
    # 600 / 6 = 100, with a standard deviation of 9.
    assert len(orders) == 6
    assert all(abs(count - 100) <= 37 for count in orders.values())


@pytest.mark.parametrize("policy", JITTERED)
def test_lighting_of_a_view_has_the_published_spread(policy):
    _, parameters = drawn(1500, TrainTransform(still(policy, lighting=0.1), 16), constant(128))
    shift = parameters[:, 7:10]
    for channel in range(3):
        spread = sum((0.1 * AXES[channel][axis] * STD[axis]) ** 2 for axis in range(3)) ** 0.5
        assert shift[:, channel].std().item() == pytest.approx(spread, rel=0.1)
        assert shift[:, channel].mean().item() == pytest.approx(0, abs=4 * spread / 1500**0.5)
    # The first axis dwarfs the others, so the channels move together.
    assert torch.corrcoef(shift.T).min() > 0.95
    torch.testing.assert_close(parameters[:, 10], torch.full((1500,), 1.1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("grey", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.2, 18, 62)])
def test_grey_views_have_their_probability_in_every_policy(policy, grey, low, high):
    _, parameters = drawn(200, TrainTransform(still(policy, grey=grey), 8), constant(128, 8))
    assert low <= int(parameters[:, 6].sum()) <= high


@pytest.mark.parametrize("policy", ["torch", "full", "senet"])
def test_other_policies_do_not_rotate_blur_or_compress(policy):
    image = noise(16, 16)
    views, _ = drawn(20, TrainTransform(still(policy, rotation=90.0, blur=1.0, jpeg=1.0), 16), image)
    assert (views == image).all()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_policy_copy_blurs_with_its_probability(share):
    image = noise(32, 32)
    views, _ = drawn(400, TrainTransform(still("copy", blur=share), 32), image)
    blurred = views[(views != image).flatten(1).any(dim=1)]
    # A deviation below .25 or so, one in twelve, changes no level. Four standard deviations of 400 draws are 40.
    assert abs(len(blurred) - 400 * share * 11 / 12) <= 40
    contrast = (blurred[..., 1:].float() - blurred[..., :-1]).abs().mean(dim=(1, 2, 3))
    assert contrast.max() <= (image[..., 1:].float() - image[..., :-1]).abs().mean()
    assert contrast.min() < 0.3 * contrast.max()


def jpeg(image, quality):
    buffer = io.BytesIO()
    functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
    return functional.pil_to_tensor(Image.open(buffer))


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_policy_copy_compresses_with_its_probability_and_some_quality(share):
    image = noise(32, 32)
    views, _ = drawn(400, TrainTransform(still("copy", jpeg=share), 32), image)
    compressed = {jpeg(image, quality).numpy().tobytes(): quality for quality in range(10, 91)}
    qualities = [compressed[view.numpy().tobytes()] for view in views if not torch.equal(view, image)]
    assert abs(len(qualities) - 400 * share) <= 40
    assert min(qualities) < 20
    assert max(qualities) > 80


def test_policy_copy_rotates_either_way_up_to_its_bound():
    image = constant(255, 64)
    views = drawn(150, TrainTransform(still("copy", rotation=15.0), 64), image)[0][:, 0] < 128
    bound = (functional.rotate(image, 16.5)[0] < 128).sum()
    dark = views.sum(dim=(1, 2))
    assert dark.max() <= bound
    assert dark.max() > 0.7 * bound
    assert (dark < 0.3 * bound).any()
    # A turn to the left uncovers the top edge right of its middle less than left of it, and the other way round.
    leans = torch.sign(views[:, 0, :32].sum(dim=1) - views[:, 0, 32:].sum(dim=1))
    assert {-1, 1} <= set(leans.tolist())


def test_policy_autoaugment_fills_with_grey():
    image = constant(255, 32)
    views, _ = drawn(200, TrainTransform(still("autoaugment"), 32), image)
    corners = Counter(views[:, 0, 0, 0].tolist())
    # Rotations and shears uncover a corner in a third of the views or so; what else it may be is white, changed.
    assert corners[128] > 10
    middle = views[:, 0, 16, 16]
    assert (middle == 255).any()
    assert (middle == 0).any(), "some views are inverted"


@pytest.mark.parametrize("policy", POLICIES)
def test_randaugment_works_in_every_policy_by_its_magnitude(policy):
    def change(magnitude):
        torch.manual_seed(1)
        views, _ = drawn(60, TrainTransform(still(policy, randaugment=magnitude), 32), image)
        return (views.float() - image).abs().mean().item()

    image = noise(32, 32)
    off, weak, strong = change(0), change(1), change(30)
    assert off == 0 or policy == "autoaugment"
    assert off < weak < strong


# Sizes of the published recipe, width x height, from which the middle is cut.
@pytest.mark.parametrize(
    ("size", "image", "resized"),
    [
        (224, (640, 480), (341, 256)),
        (224, (480, 640), (256, 341)),
        (224, (333, 500), (256, 384)),
        (224, (100, 100), (256, 256)),
        (32, (64, 48), (48, 36)),
        (32, (20, 60), (36, 108)),
        (500, (600, 600), (571, 571)),
    ],
)
def test_evaluation_cuts_the_middle_out_of_the_resized_image(size, image, resized):
    pixels = noise(image[1], image[0])
    crop = evaluation_view(pixels, "crop", size)
    assert crop.shape == (3, size, size)
    assert crop.dtype == torch.float32
    whole = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(resized, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in resized)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))) / np.float32(255)
    # Pillow and torchvision round the same weights a little differently.
    assert np.abs(crop.permute(1, 2, 0).numpy() - expected).max() < 2.5 / 255


@pytest.mark.parametrize(
    ("size", "image", "resized"),
    [
        (500, (640, 480), (500, 375)),
        (500, (480, 640), (375, 500)),
        (500, (333, 500), (333, 500)),
        (500, (50, 40), (500, 400)),
        (64, (99, 34), (64, 21)),  # 21.98
        (32, (1000, 3), (32, 1)),
        (32, (3, 1000), (1, 32)),
    ],
)
def test_evaluation_may_show_the_whole_image(size, image, resized):
    pixels = noise(image[1], image[0])
    shown = evaluation_view(pixels, "rect", size)
    assert shown.shape == (3, resized[1], resized[0])
    whole = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(resized, Image.Resampling.BILINEAR)
    assert np.abs(shown.permute(1, 2, 0).numpy() - np.asarray(whole) / np.float32(255)).max() < 2.5 / 255


@given(height=st.integers(1, 9999), width=st.integers(1, 9999), size=st.integers(16, 2000))
def test_the_larger_side_has_the_size_and_the_smaller_is_rounded_down(height, width, size):
    shape = rect_shape(height, width, size)
    assert max(shape) == size
    assert (shape[0] < shape[1]) <= (height < width)
    smaller, exact = min(shape), min(height, width) * size / max(height, width)
    assert smaller == 1 or exact - 1 < smaller <= exact


@pytest.mark.parametrize("transform", ["crop", "rect"])
def test_evaluation_draws_nothing_and_does_not_darken(transform):
    before = torch.get_rng_state()
    assert torch.equal(evaluation_view(constant(255, 50), transform, 32), torch.ones(3, 32, 32))
    assert torch.equal(evaluation_pixels(constant(255, 50), transform, 32), constant(255, 32))
    assert torch.equal(torch.get_rng_state(), before)
