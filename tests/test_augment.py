"""Training and evaluation transforms: by figures where they are fixed, by distribution where they are drawn."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from multigrain.augment import TrainTransform, evaluation_crop, light
from multigrain.spec import AugmentSettings

# The colour axes and their standard deviations as published, one row per channel.
AXES = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
STD = [0.2175, 0.0188, 0.0045]
POLICIES = ["torch", "full", "copy"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads cost more than they save on images this small


def still(policy="torch", **changes):
    """Settings under which nothing is drawn but what `changes` name."""
    quiet = {"crop": 1.0, "flip": 0.0, "jitter": 0.0, "lighting": 0.0, "rotation": 0.0}
    return AugmentSettings(policy=policy, **{**quiet, **changes})


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def constant(value, side=16):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def unchanged(view, image):
    return torch.allclose(view, image.float() / 255, rtol=0, atol=1e-6)


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
    lit = light(torch.full((3, 2, 5), pixel), torch.tensor(alpha), 0.1)
    assert lit.shape == (3, 2, 5)
    for channel, value in zip(lit, expected, strict=True):
        torch.testing.assert_close(channel, torch.full((2, 5), value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(48, 31), (20, 90), (16, 16), (200, 150)])
def test_views_are_square_floats_between_0_and_1(policy, shape):
    transform = TrainTransform(AugmentSettings(policy=policy), 24)
    image = noise(*shape)
    before = image.clone()
    for _ in range(8):
        view = transform(image)
        assert view.shape == (3, 24, 24)
        assert view.dtype == torch.float32
        assert 0 <= view.min() < view.max() <= 1
    assert torch.equal(image, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_drawn_from_torch_alone(policy):
    transform, image = TrainTransform(AugmentSettings(policy=policy), 24), noise(40, 40)
    random_before, numpy_before = random.getstate(), np.random.get_state()[1].copy()
    views = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        views.append([transform(image) for _ in range(10)])
    assert all(torch.equal(a, b) for a, b in zip(views[0], views[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(views[0], views[1], strict=True))
    assert random.getstate() == random_before
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.5, 72, 128), (0.1, 4, 36)])
def test_flip_has_its_probability(policy, flip, low, high):
    transform = TrainTransform(still(policy, flip=flip), 16)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, 8:] = 255
    flipped = sum(
        bool(view[:, :, :4].mean() > view[:, :, 12:].mean()) for view in (transform(image) for _ in range(200))
    )
    # The bounds of a drawn number lie four standard deviations from its mean.
    assert low <= flipped <= high


def crops(settings, draws=200):
    """Area and width-to-height ratio of drawn crops, read off an image whose colours are its coordinates."""
    ramp = torch.arange(128, dtype=torch.uint8)
    image = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), ramp.expand(128, 128)])
    transform = TrainTransform(settings, 32)
    sides = []
    for _ in range(draws):
        view = transform(image) * 255
        # The second and the last but one of 32 pixels have their centres 29/32 of the crop apart.
        width = (view[0, :, -2] - view[0, :, 1]).mean() * 32 / 29
        height = (view[1, -2, :] - view[1, 1, :]).mean() * 32 / 29
        sides.append((width.item(), height.item()))
    areas = np.array([width * height / 128**2 for width, height in sides])
    return areas, np.array([width / height for width, height in sides])


@pytest.mark.parametrize(("policy", "bound"), [("torch", 0.08), ("torch", 0.4), ("torch", 0.8), ("full", 0.4)])
def test_crops_keep_at_least_their_share_of_the_area(policy, bound):
    areas, ratios = crops(still(policy, crop=bound))
    tolerance = 1.06  # whole pixels, and what the resampling rounds
    assert areas.min() >= bound / tolerance
    assert areas.min() <= bound + 0.1 * (1 - bound)
    assert areas.max() >= bound + 0.7 * (1 - bound)
    assert 3 / 4 / tolerance <= ratios.min() < 1 < ratios.max() <= 4 / 3 * tolerance


def test_a_crop_of_everything_is_the_whole_image():
    image = noise(24, 24)
    transform = TrainTransform(still(), 24)
    assert unchanged(transform(image), image)


def test_lighting_of_a_view_has_the_published_spread():
    transform = TrainTransform(still("full", lighting=0.1), 16)
    drawn = torch.stack([transform(constant(128))[:, 0, 0] for _ in range(1500)])
    for channel in range(3):
        spread = sum((0.1 * AXES[channel][axis] * STD[axis]) ** 2 for axis in range(3)) ** 0.5 / 1.1
        assert drawn[:, channel].std().item() == pytest.approx(spread, rel=0.1)
        assert drawn[:, channel].mean().item() == pytest.approx(128 / 255 / 1.1, abs=4 * spread / 1500**0.5)
    # The first axis dwarfs the others, so the channels move together.
    assert torch.corrcoef(drawn.T).min() > 0.95


@pytest.mark.parametrize("policy", ["full", "copy"])
def test_brightness_jitter_stays_within_its_strength_and_fills_it(policy):
    transform = TrainTransform(still(policy, jitter=0.3), 16)
    drawn = torch.stack([transform(constant(128)).mean() for _ in range(300)]) / (128 / 255)
    # JPEG at its coarsest moves a level of 90 or 166 by up to 5.
    assert 0.65 <= drawn.min() < 0.75
    assert 1.25 < drawn.max() <= 1.35


@pytest.mark.parametrize("policy", ["full", "copy"])
def test_contrast_and_saturation_are_jittered_too(policy):
    transform = TrainTransform(still(policy, jitter=0.3), 16)
    image = constant(60)
    image[:, :8] = torch.tensor([190, 120, 80])[:, None, None]
    views = torch.stack([transform(image) for _ in range(200)])
    top, bottom = views[:, :, 3, 8], views[:, :, 12, 8]
    grey = torch.tensor([0.299, 0.587, 0.114])
    step = (top - bottom) @ grey
    # Brightness scales both sides of each ratio; contrast the step alone, saturation the difference of channels alone.
    contrast, saturation = step / ((top + bottom) @ grey), (top[:, 0] - top[:, 2]) / step
    for ratio in (contrast, saturation):
        low, high = ratio.quantile(torch.tensor([0.05, 0.95])).tolist()
        assert 1.4 < high / low < 2.2


def test_policy_torch_neither_jitters_nor_lights():
    transform = TrainTransform(still(jitter=0.9, lighting=0.9, rotation=90.0), 16)
    assert all(unchanged(transform(constant(128)), constant(128)) for _ in range(10))


def test_policy_full_does_not_rotate_blur_or_compress():
    image = noise(16, 16)
    transform = TrainTransform(still("full", rotation=90.0), 16)
    assert all(unchanged(transform(image), image) for _ in range(20))


def test_policy_copy_blurs_and_compresses_three_times_in_ten():
    image = noise(32, 32)
    transform = TrainTransform(still("copy"), 32)
    views = [transform(image) for _ in range(400)]
    untouched = sum(unchanged(view, image) for view in views)
    # 0.7 x 0.7 of 400 are 196, with a standard deviation of 10.
    assert abs(untouched - 196) <= 40
    smooth = sum((view[:, :, 1:] - view[:, :, :-1]).abs().mean() < 0.25 for view in views)
    assert 0 < smooth < 400 - untouched


def test_policy_copy_rotates_either_way_up_to_its_bound():
    image = constant(255, 64)
    transform = TrainTransform(still("copy", rotation=15.0), 64)
    views = [transform(image).mean(dim=0) < 0.5 for _ in range(150)]
    bound = (functional.rotate(image, 16.5)[0] < 128).sum()
    dark = torch.stack([view.sum() for view in views])
    assert dark.max() <= bound
    assert dark.max() > 0.7 * bound
    assert (dark < 0.3 * bound).any()
    # A turn to the left uncovers the top edge right of its middle less than left of it, and the other way round.
    leans = {torch.sign(view[0, :32].sum() - view[0, 32:].sum()).item() for view in views}
    assert {-1.0, 1.0} <= leans


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
    crop = evaluation_crop(pixels, size)
    assert crop.shape == (3, size, size)
    assert crop.dtype == torch.float32
    whole = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(resized, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in resized)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))) / np.float32(255)
    # Pillow and torchvision round the same weights a little differently.
    assert np.abs(crop.permute(1, 2, 0).numpy() - expected).max() < 2.5 / 255


def test_evaluation_draws_nothing_and_does_not_darken():
    before = torch.get_rng_state()
    assert torch.equal(evaluation_crop(constant(255, 50), 32), torch.ones(3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)
