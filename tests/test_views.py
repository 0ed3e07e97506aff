"""Files become tensors: how often they are decoded, what each view depends on, which formats are read."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from multigrain import views
from multigrain.augment import TrainTransform, evaluation_crop
from multigrain.spec import AugmentSettings
from multigrain.views import TrainViews, decode, evaluation_batches, whole

LABELS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Four images of different sizes, all noise."""
    root, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    found = []
    for number, (width, height) in enumerate([(40, 30), (30, 40), (64, 64), (24, 50)]):
        found.append(root / f"{number}.png")
        Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3)).save(found[-1])
    return found


def make(paths, seed=0, epoch=0, policy="full"):
    made = TrainViews(paths, LABELS, TrainTransform(AugmentSettings(policy=policy), 24), seed)
    made.epoch = epoch
    return made


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_holds_images_labels_and_instances_in_the_order_asked_for(paths):
    batch = make(paths).__getitems__([2, 2, 0, 0, 3, 3])
    assert batch.images.shape == (6, 3, 24, 24)
    assert batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [7, 7, 5, 5, 8, 8]
    assert batch.instances.tolist() == [2, 2, 0, 0, 3, 3]


def test_a_view_shows_the_image_of_its_index(paths):
    still = AugmentSettings(policy="torch", crop=1.0, flip=0.0)
    batch = TrainViews(paths, LABELS, TrainTransform(still, 64), 0).__getitems__([2, 0, 2])
    shown = decode(paths[2]).float() / 255
    assert torch.allclose(batch.images[0], shown, atol=1e-6)
    assert torch.allclose(batch.images[2], shown, atol=1e-6)
    assert not torch.allclose(batch.images[1], shown, atol=0.1)


def test_an_image_is_decoded_once_for_all_its_copies(paths, monkeypatch):
    decoded = []
    monkeypatch.setattr(views, "decode", lambda path: decoded.append(path) or decode(path))
    make(paths).__getitems__([2, 2, 2, 0, 0, 0, 1, 1, 1])
    assert decoded == [paths[2], paths[0], paths[1]]


def test_copies_of_an_image_differ(paths):
    images = make(paths).__getitems__([1] * 6).images
    assert not any(torch.equal(images[a], images[b]) for a in range(6) for b in range(a))


def test_a_view_depends_on_seed_epoch_image_and_copy_alone(paths):
    torch.manual_seed(1)
    first = make(paths).__getitems__([0, 0, 1, 1, 2, 2])
    torch.manual_seed(2)
    reordered = make(paths)
    reordered.__getitems__([3, 3, 3])
    assert torch.equal(reordered.__getitems__([2, 2, 0, 0]).images, first.images[[4, 5, 0, 1]])
    assert torch.equal(reordered.__getitems__([1]).images, first.images[[2]])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"seed": 1, "epoch": 1}])
def test_another_seed_or_epoch_gives_other_views(paths, change):
    before = make(paths, seed=0, epoch=0).__getitems__([0, 0, 1, 1]).images
    after = make(paths, **change).__getitems__([0, 0, 1, 1]).images
    assert not any(torch.equal(a, b) for a in before for b in after)


def test_the_same_draw_is_not_made_for_two_images(tmp_path):
    for number in range(2):
        Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3)).save(tmp_path / f"{number}.png")
    images = make([tmp_path / "0.png", tmp_path / "1.png"]).__getitems__([0, 0, 1, 1]).images
    assert not any(torch.equal(images[a], images[b]) for a in range(4) for b in range(a))


def test_drawing_views_leaves_the_global_random_state_alone(paths):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    make(paths, policy="full").__getitems__([0, 0, 1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_a_loader_hands_whole_batches_on(paths):
    made = make(paths)
    batches = [[0, 0, 1, 1], [3, 3]]
    loaded = list(DataLoader(made, batch_sampler=batches, collate_fn=whole))
    assert all(same(batch, made.__getitems__(indices)) for batch, indices in zip(loaded, batches, strict=True))


def test_evaluation_batches_are_plain_crops_in_order(paths):
    batches = list(evaluation_batches(paths, 24, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 1]
    assert same(torch.cat(batches), [evaluation_crop(decode(path), 24) for path in paths])
    assert list(evaluation_batches([], 24)) == []


def palette():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


def rgba():
    pixels = np.full((3, 4, 4), (200, 100, 50, 255), np.uint8)
    pixels[:, :2, 3] = 0  # transparent: what lies beneath shows
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.new("L", (4, 3), 77), (77, 77, 77)),
        ("grey.jpg", Image.new("L", (4, 3), 77), (77, 77, 77)),
        ("grey with alpha.png", Image.new("LA", (4, 3), (77, 9)), (77, 77, 77)),
        ("two tones.png", Image.new("1", (4, 3), 1), (255, 255, 255)),
        ("palette.png", palette(), (10, 200, 30)),
        ("colour.bmp", Image.new("RGB", (4, 3), (10, 200, 30)), (10, 200, 30)),
        ("alpha.png", rgba(), (200, 100, 50)),
        ("print.tif", Image.new("CMYK", (4, 3), (0, 255, 255, 0)), (255, 0, 0)),
        ("print.jpg", Image.new("CMYK", (4, 3), (0, 255, 255, 0)), (255, 0, 0)),
        ("lossless.webp", Image.new("RGB", (4, 3), (10, 200, 30)), (10, 200, 30)),
    ],
)
def test_every_colour_mode_is_read_as_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    pixels = decode(tmp_path / name)
    assert pixels.shape == (3, 3, 4)
    assert pixels.dtype == torch.uint8
    for channel, value in zip(pixels, expected, strict=True):
        assert (channel.int() - value).abs().max() <= 1


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bit_grey_keeps_its_upper_eight(tmp_path, name):
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / name)
    for channel in decode(tmp_path / name):
        assert channel.tolist() == [[0, 128, 255]]


def test_transparency_in_a_palette_is_read_without_a_warning(tmp_path):
    palette().save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert decode(tmp_path / "palette.png")[:, 0, 0].tolist() == [10, 200, 30]


def test_the_camera_orientation_is_left_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").shape == (3, 3, 4)
