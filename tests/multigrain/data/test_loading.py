"""Files become tensors: how often they are decoded, what each view depends on, which formats are read."""

import io
import os
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from multigrain.config.training import AugmentSettings
from multigrain.data import loading
from multigrain.data.loading import TrainViews, decode, evaluation_batches, training_batches
from multigrain.data.sampler import RepeatedAugmentationBatches
from multigrain.data.transforms import evaluation_pixels
from multigrain.errors import DataError

LABELS = [5, 6, 7, 8]
SIZES = [(40, 30), (30, 40), (64, 64), (24, 50)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Four images of different sizes, all noise; names need not be text."""
    root, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    found = [root / os.fsdecode(name) for name in (b"0.png", b"one.jpg", b"2 \xc3\xa9.png", b"3 \xff.png")]
    for path, (width, height) in zip(found, SIZES, strict=True):
        Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3)).save(path)
    return found


def make(paths, seed=0, epoch=0, policy="full"):
    made = TrainViews(paths, LABELS, AugmentSettings(policy=policy, grey=0.1), 24, seed)
    made.set_epoch(epoch)
    return made


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_holds_images_colours_labels_and_indices_in_the_order_asked_for(paths):
    batch = make(paths).__getitems__([2, 2, 0, 0, 3, 3])
    assert (batch.images.shape, batch.images.dtype) == ((6, 3, 24, 24), torch.uint8)
    assert (batch.colour.shape, batch.colour.dtype) == ((6, 11), torch.float32)
    assert (batch.labels.tolist(), batch.labels.dtype) == ([7, 7, 5, 5, 8, 8], torch.int64)
    assert (batch.indices.tolist(), batch.indices.dtype) == ([2, 2, 0, 0, 3, 3], torch.int64)


def test_a_view_shows_the_image_of_its_index(paths):
    still = AugmentSettings(policy="torch", crop=1.0, flip=0.0)
    batch = TrainViews(paths, LABELS, still, 64, 0).__getitems__([2, 0, 2])
    shown = decode(paths[2])
    assert torch.equal(batch.images[0], shown)
    assert torch.equal(batch.images[2], shown)
    assert (batch.images[1].int() - shown).abs().float().mean() > 20


def test_an_image_is_decoded_once_for_all_its_copies(paths, monkeypatch):
    decoded = []
    monkeypatch.setattr(loading, "decode", lambda path: decoded.append(path) or decode(path))
    make(paths).__getitems__([2, 2, 2, 0, 0, 0, 1, 1, 1])
    assert decoded == [paths[2], paths[0], paths[1]]


def test_copies_of_an_image_differ(paths):
    batch = make(paths).__getitems__([1] * 6)
    for drawn in batch.images, batch.colour:
        assert not any(torch.equal(drawn[a], drawn[b]) for a in range(6) for b in range(a))


def test_a_view_depends_on_seed_epoch_image_and_copy_alone(paths):
    torch.manual_seed(1)
    first = make(paths).__getitems__([0, 0, 1, 1, 2, 2])
    torch.manual_seed(2)
    reordered = make(paths)
    reordered.__getitems__([3, 3, 3])
    assert same(reordered.__getitems__([2, 2, 0, 0]), [part[[4, 5, 0, 1]] for part in first])
    assert same(reordered.__getitems__([1]), [part[[2]] for part in first])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"seed": 1, "epoch": 1}])
def test_another_seed_or_epoch_gives_other_views(paths, change):
    before = make(paths, seed=0, epoch=0).__getitems__([0, 0, 1, 1])
    after = make(paths, **change).__getitems__([0, 0, 1, 1])
    assert not any(torch.equal(a, b) for a in before.images for b in after.images)
    assert not any(torch.equal(a, b) for a in before.colour for b in after.colour)


def test_the_same_draw_is_not_made_for_two_images(tmp_path):
    for number in range(2):
        Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3)).save(tmp_path / f"{number}.png")
    batch = make([tmp_path / "0.png", tmp_path / "1.png"]).__getitems__([0, 0, 1, 1])
    assert not any(torch.equal(batch.images[a], batch.images[b]) for a in range(4) for b in range(a))


def test_drawing_views_leaves_the_global_random_state_alone(paths):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    made = make(paths, policy="copy")
    made.__getitems__([0, 0, 1])
    list(training_batches(made, [[0, 0, 1]], 0, False))
    list(evaluation_batches(paths, "rect", 24))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize("policy", ["copy", "autoaugment"])
def test_batches_are_the_same_whatever_the_number_of_loaders(paths, policy):
    found = []
    for loaders in (0, 1, 2):
        made, sampler = make(paths, policy=policy), RepeatedAugmentationBatches(4, 6, 3, 3.0)
        loader = training_batches(made, sampler, loaders, False)
        found.append([])
        for epoch in (0, 1, 5):  # the loaders outlive the first
            made.set_epoch(epoch)
            sampler.set_epoch(epoch)
            expected = [make(paths, epoch=epoch, policy=policy).__getitems__(indices) for indices in sampler]
            sampler.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 2
            assert all(isinstance(batch, loading.Views) for batch in batches)
            assert all(same(*pair) for pair in zip(batches, expected, strict=True))
            found[-1] += batches
    assert not same(found[0][0], found[0][2])


class WhoReads(TrainViews):
    def __getitems__(self, indices):
        return os.getpid(), torch.get_num_threads()


def test_loaders_are_processes_of_one_thread_that_stay(paths):
    made = WhoReads(paths, LABELS, AugmentSettings(), 24, 0)
    loader = training_batches(made, [[0]] * 8, 2, False)
    first, second = set(loader), set(loader)
    assert first == second
    assert len(first) == 2
    assert all(process != os.getpid() and threads == 1 for process, threads in first)
    assert set(training_batches(made, [[0]], 0, False)) == {(os.getpid(), torch.get_num_threads())}


@pytest.mark.parametrize("loaders", [0, 2])
def test_evaluation_crops_are_batched_in_order(paths, loaders):
    batches = list(evaluation_batches(paths, "crop", 24, batch_size=3, loaders=loaders))
    assert [positions for positions, _ in batches] == [[0, 1, 2], [3]]
    shown = torch.cat([images for _, images in batches])
    assert same(shown, [evaluation_pixels(decode(path), "crop", 24) for path in paths])
    assert list(evaluation_batches([], "crop", 24)) == []


@pytest.mark.parametrize("loaders", [0, 2])
def test_whole_images_are_batched_by_shape_whatever_the_mixture(paths, loaders):
    mixed = [paths[number] for number in (0, 1, 0, 2, 3, 0, 1, 0)]
    batches = list(evaluation_batches(mixed, "rect", 32, batch_size=3, loaders=loaders))
    assert sorted(tuple(images.shape) for _, images in batches) == sorted(
        [(3, 3, 24, 32), (1, 3, 24, 32), (2, 3, 32, 24), (1, 3, 32, 32), (1, 3, 32, 15)]
    )
    assert sorted(position for positions, _ in batches for position in positions) == list(range(8))
    for positions, images in batches:
        assert same(images, [evaluation_pixels(decode(mixed[position]), "rect", 32) for position in positions])
    assert list(evaluation_batches([], "rect", 32)) == []


@pytest.mark.parametrize(("bound", "sizes"), [(4 * 32 * 32, [4, 4, 1]), (4 * 32 * 32 - 1, [3, 3, 3]), (5, [1] * 9)])
def test_evaluation_batches_hold_no_more_pixels_than_their_bound(paths, monkeypatch, bound, sizes):
    monkeypatch.setattr(loading, "BATCH_PIXELS", bound)
    assert [len(positions) for positions, _ in evaluation_batches([paths[2]] * 9, "crop", 32)] == sizes


def palette():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.new("L", (4, 3), 77), (77, 77, 77)),
        ("grey.jpg", Image.new("L", (4, 3), 77), (77, 77, 77)),
        ("two tones.png", Image.new("1", (4, 3), 1), (255, 255, 255)),
        ("palette.png", palette(), (10, 200, 30)),
        ("colour.bmp", Image.new("RGB", (4, 3), (10, 200, 30)), (10, 200, 30)),
        ("colour.jpg", Image.new("RGB", (4, 3), (10, 200, 30)), (10, 200, 30)),
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


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def jpeg(mode="RGB", **options):
    pixels = random.Random(1).randbytes(33 * 21 * len(mode))
    buffer = io.BytesIO()
    Image.frombytes(mode, (33, 21), pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"quality": 95, "subsampling": 0}, {"quality": 30}, {"progressive": True}])
def test_a_jpeg_is_read_as_pillow_reads_it(tmp_path, mode, options):
    content = jpeg(mode, **options)
    (tmp_path / "x.JPEG").write_bytes(content)
    expected = by_pillow(content).int()
    for file in (tmp_path / "x.JPEG", io.BytesIO(content)):
        # Two builds of one library may round differently.
        assert (decode(file).int() - expected).abs().max() <= 1


def test_only_what_torchvision_reads_right_is_left_to_it(monkeypatch):
    asked = []
    read = loading._decode_jpeg
    monkeypatch.setattr(loading, "_decode_jpeg", lambda *arguments: asked.append(0) or read(*arguments))
    for mode in ("RGB", "L", "CMYK"):
        decode(io.BytesIO(jpeg(mode)))
    assert len(asked) == 2


def refuse(*arguments):
    raise RuntimeError("unsupported")


@pytest.mark.parametrize("reader", [refuse, None])
def test_pillow_reads_what_torchvision_refuses(monkeypatch, reader):
    monkeypatch.setattr(loading, "_decode_jpeg", reader)
    assert torch.equal(decode(io.BytesIO(jpeg())), by_pillow(jpeg()))


def test_a_name_does_not_decide_the_format(tmp_path):
    Image.new("RGB", (4, 3), (10, 200, 30)).save(tmp_path / "photo.jpg", "PNG")
    assert decode(tmp_path / "photo.jpg")[:, 0, 0].tolist() == [10, 200, 30]


def test_a_cut_jpeg_is_an_error_with_the_reason():
    with pytest.raises(OSError, match="truncated"):
        decode(io.BytesIO(jpeg()[:-200]))


def test_a_header_that_would_fill_the_memory_is_refused():
    content = jpeg()
    sides = content.index(struct.pack(">HH", 21, 33))
    bomb = content[:sides] + struct.pack(">HH", 65000, 65000) + content[sides + 4 :]
    with pytest.raises(ValueError, match="is 65,000 x 65,000 pixels, but at most 89,478,485 are read"):
        decode(io.BytesIO(bomb))


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png"])
def test_the_orientation_of_a_camera_is_followed_in_training(tmp_path, name):
    tag = Image.Exif()
    tag[0x0112] = 6
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 255  # the left half, which is the upper half when turned clockwise
    Image.fromarray(stored).save(tmp_path / name, exif=tag)
    still = AugmentSettings(policy="torch", crop=1.0, flip=0.0)
    (view,) = TrainViews([tmp_path / name], [0], still, 32, 0).__getitems__([0]).images
    assert view[:, :14].float().mean() > 240
    assert view[:, 18:].float().mean() < 15


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_file_that_broke_after_it_was_checked_is_named_in_training(tmp_path, loaders):
    (tmp_path / "photo.jpg").write_bytes(jpeg()[:-200])
    views = TrainViews([tmp_path / "photo.jpg"], [0], AugmentSettings(), 24, 0)
    with pytest.raises(DataError, match=r"photo\.jpg is cut short or damaged"):
        [*training_batches(views, [[0]], loaders, pin=False)]
