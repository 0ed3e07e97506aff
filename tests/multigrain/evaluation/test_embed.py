"""Embeddings of a grid of exponents: against one forward of the whole network for each picture and exponent."""

import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ranks import start_ranks
from torch import distributed

from multigrain import Whitening
from multigrain.data import loading
from multigrain.data.loading import decode, evaluation_batches
from multigrain.data.picture import Picture
from multigrain.data.transforms import evaluation_pixels, evaluation_view
from multigrain.errors import DataError
from multigrain.evaluation import embed as grid
from multigrain.evaluation.embed import descriptors, embed
from multigrain.models.multigrain import MultiGrain
from multigrain.models.pooling import gem, gem_all

CPU = torch.device("cpu")
GRID = (3.0, 1.0, 2.5, 4.7, math.inf)
SIZES = [(40, 30), (30, 40), (64, 64), (40, 30), (21, 90), (80, 60), (64, 48)]


def network_of(p, seed=3):
    torch.manual_seed(seed)
    return MultiGrain("narrow", 2, p).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven files of noise, of several shapes, and parts of them: cropped, turned, and both."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(len(SIZES))]
    for file, size in zip(files, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file)
    parts = [(1, (3, 4, 33.6, 20.4), 0), (2, None, 90), (4, None, 180), (4, None, 270), (5, (10, 0, 30, 70), 90)]
    return (*(Picture(file, None, 0) for file in files), *(Picture(files[n], box, turn) for n, box, turn in parts))


def slow_part(picture):
    """By Pillow, which turns counter-clockwise and puts the turned image on a canvas of its own size."""
    with Image.open(picture.path) as image:
        part = image.crop(picture.box) if picture.box else image
        return torch.from_numpy(np.array(part.rotate(-picture.turn, expand=True))).permute(2, 0, 1).contiguous()


def slow(pictures, size, transform, exponents):
    found = {}
    for p in exponents:
        network = network_of(p)
        with torch.no_grad():
            images = [evaluation_view(slow_part(picture), transform, size)[None] for picture in pictures]
            found[p] = torch.cat([network(image).embedding for image in images]).numpy()
    return found


def same(found, expected, tolerance=1e-5):
    assert list(found) == list(expected)
    for p, embeddings in expected.items():
        assert found[p].dtype == np.float32
        np.testing.assert_allclose(found[p], embeddings, rtol=tolerance, atol=tolerance)


@given(
    st.integers(0, 99),
    st.lists(
        st.floats(1, 100) | st.sampled_from([1, 1.5, 2, 3, 7.5, 15.5, 16.0, 16.5, math.inf]), min_size=1, max_size=9
    ),
    st.sampled_from([1e-6, 1e-2]),
)
@settings(deadline=None, max_examples=60)
def test_all_exponents_at_once_are_each_alone(seed, exponents, eps):
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    found = gem_all(x, exponents, eps)
    assert found.shape == (len(exponents), 2, 5)
    for pooled, p in zip(found, exponents, strict=True):
        # The plain mean of p = 1 may come close to 0.
        near = 1e-6 * float(x.abs().max()) if p == 1 else 0
        torch.testing.assert_close(pooled.double(), gem(x.double(), p, eps), rtol=1e-5, atol=near)


def test_the_grid_of_one_to_four_has_the_worked_figures():
    exponents = [4, 1, 2, 3, 10, 50, 100, math.inf]
    expected = [3.067156, 2.5, 2.738613, 2.924018, 3.501656, 3.890620, 3.944931, 4]
    found = gem_all(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), exponents)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    # p = 1 is the plain mean: it takes negative values as they are, the others do not.
    below = gem_all(torch.tensor([[-1.0, 0.0], [2.0, 3.0]]), [1, 3])
    torch.testing.assert_close(below, torch.tensor([1.0, 2.060643]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_are_pooled_in_fp32(dtype):
    x = (50 * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = gem_all(x, [3, 3.3])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([gem(x.float(), 3.0), gem(x.float(), 3.3)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("size", "transform"), [(32, "crop"), (48, "rect")])
@pytest.mark.parametrize("loaders", [0, 2])
def test_one_pass_gives_what_one_forward_for_each_exponent_gives(pictures, size, transform, loaders):
    expected = slow(pictures, size, transform, GRID)
    # Whatever exponent the network has, and whatever mode it is in.
    found = embed(network_of(7.0).train(), pictures, size, transform, GRID, CPU, loaders, None)
    same(found, expected)
    # No two of them are alike, so that the order is seen.
    for embeddings in expected.values():
        distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
        assert distances[~np.eye(len(pictures), dtype=bool)].min() > 1e-3


def test_an_exponent_that_is_asked_for_twice_is_there_once(pictures):
    found = embed(network_of(3.0), pictures[:2], 32, "crop", [3, 2, 3.0], CPU)
    assert list(found) == [3.0, 2.0]


def test_precision_is_that_of_fp32_whatever_surrounds_it(pictures):
    expected = embed(network_of(3.0), pictures, 32, "crop", GRID, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        same(embed(network_of(3.0), pictures, 32, "crop", GRID, CPU), expected, 0)


def test_each_shape_passes_through_the_trunk_once(pictures, monkeypatch):
    shapes = []
    through = grid.pooled
    monkeypatch.setattr(grid, "pooled", lambda net, images, p: shapes.append(images.shape) or through(net, images, p))
    embed(network_of(3.0), pictures, 48, "rect", GRID, CPU)
    # Heights and widths of the files, then of the parts: 16 x 31 of the second, the others turned, 70 x 20 turned.
    sides = [*SIZES, (16, 31), (64, 64), (21, 90), (90, 21), (20, 70)]
    expected = {}
    for height, width in sides:
        shape = (height * 48 // max(height, width), width * 48 // max(height, width))
        expected[shape] = expected.get(shape, 0) + 1
    assert [(shape[2:], shape[0]) for shape in shapes] == list(expected.items())


def test_blocks_are_shown_one_after_the_other(pictures):
    files = [pictures[number] for number in (0, 1, 3, 0, 2, 3, 1)]
    batches = evaluation_batches(files, "rect", 48, blocks=[[4, 5, 6], [0, 1, 2]])
    assert [positions for positions, _ in batches] == [[4], [5], [6], [0, 2], [1]]


def test_a_box_beyond_the_file_ends_with_it(pictures):
    beyond = Picture(pictures[0].path, (-5, 10, 100, 99), 0)
    assert torch.equal(loading.read(beyond), decode(pictures[0].path)[:, 10:])


@pytest.mark.parametrize("transform", ["crop", "rect"])
@pytest.mark.parametrize("upright", [True, False])
def test_a_box_is_cut_out_of_the_picture_as_it_is_shown(tmp_path, transform, upright):
    stored, tag = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8), Image.Exif()
    tag[0x0112] = 6  # a quarter clockwise
    Image.fromarray(stored).save(tmp_path / "camera.png", exif=tag)
    seen = torch.tensor((np.rot90(stored, -1) if upright else stored)[3:15, 4:18].copy()).permute(2, 0, 1)
    picture = Picture(tmp_path / "camera.png", (4, 3, 18, 15), upright=upright)
    assert torch.equal(loading.read(picture), seen)
    ((_, shown),) = evaluation_batches([picture], transform, 28)
    assert torch.equal(shown[0], evaluation_pixels(seen, transform, 28))


def test_pictures_of_a_camera_share_a_batch_by_the_shape_that_is_shown(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 8
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=tag)
    Image.new("RGB", (20, 40)).save(tmp_path / "upright.jpg")
    files = [tmp_path / "turned.jpg", tmp_path / "upright.jpg"]
    assert [tuple(shown.shape) for _, shown in evaluation_batches(files, "rect", 40)] == [(2, 3, 40, 20)]
    stored = [Picture(file, upright=False) for file in files]
    assert len([*evaluation_batches(stored, "rect", 40)]) == 2


def test_a_picture_too_narrow_to_be_scaled_is_named(tmp_path):
    Image.new("L", (60_000, 2)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match=r"line\.png is 60,000 x 2 pixels, too narrow to be scaled"):
        [*evaluation_batches([tmp_path / "line.png"], "crop", 224)]


@pytest.mark.parametrize("box", [(5, 5, 5, 20), (30, 0, 40, 9), (5, 20, 15, 5), (1.2, 3, 1.4, 9)])
@pytest.mark.parametrize("transform", ["crop", "rect"])
def test_a_box_without_a_pixel_is_refused(pictures, box, transform):
    with pytest.raises(DataError, match=r"0\.png must have a pixel in its box, but .* holds none of 30 x 40"):
        embed(network_of(3.0), [Picture(pictures[0].path, box, 0)], 32, transform, GRID, CPU)


def test_no_picture_has_no_embedding_and_one_has_one(pictures, tmp_path):
    for folder in (None, tmp_path):
        nothing = embed(network_of(3.0), [], 32, "rect", GRID, CPU, 0, folder)
        assert [(p, found.shape) for p, found in nothing.items()] == [(p, (0, 128)) for p in GRID]
        same(
            embed(network_of(3.0), pictures[7:8], 32, "rect", GRID, CPU, 0, folder),
            slow(pictures[7:8], 32, "rect", GRID),
        )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize("transform", ["crop", "rect"])
@pytest.mark.parametrize("fault", ["missing", "cut short", "no image"])
def test_a_picture_that_cannot_be_read_is_named(pictures, tmp_path, fault, transform, loaders):
    broken = tmp_path / "broken.png"
    whole = pictures[0].path.read_bytes()
    if fault != "missing":
        broken.write_bytes(whole[:-200] if fault == "cut short" else b"<html>")
    for folder in (None, tmp_path / "kept"):
        with pytest.raises(DataError, match=r"every image must be usable, but .*broken\.png (is|cannot)") as caught:
            embed(network_of(3.0), [*pictures[:3], Picture(broken, None, 0)], 32, transform, GRID, CPU, loaders, folder)
        assert "Traceback" not in str(caught.value)


@pytest.fixture
def read(monkeypatch):
    """The pictures that are read, in order."""
    found, reader = [], loading.read
    monkeypatch.setattr(loading, "read", lambda picture: found.append(picture) or reader(picture))
    return found


@pytest.mark.parametrize("done", [0, 1, 3])
def test_what_was_cut_goes_on_where_it_was(pictures, tmp_path, monkeypatch, read, done):
    monkeypatch.setattr(grid, "BLOCK", 3)  # four blocks
    expected = embed(network_of(3.0), pictures, 48, "rect", GRID, CPU)
    write, written = grid._BlockFile.write, []

    def cut(kept, embeddings):
        if len(written) == done:
            raise KeyboardInterrupt
        written.append(kept)
        write(kept, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(grid._BlockFile, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            embed(network_of(3.0), pictures, 48, "rect", GRID, CPU, 0, tmp_path)
    for left in (pictures[3 * done :], ()):
        read.clear()
        same(embed(network_of(3.0), pictures, 48, "rect", GRID, CPU, 0, tmp_path), expected, 0)
        assert sorted(read, key=str) == sorted(left, key=str)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_cannot_be_written_leaves_nothing(pictures, tmp_path, monkeypatch):
    def full(path, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        embed(network_of(3.0), pictures[:2], 32, "crop", GRID, CPU, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_made_again(pictures, tmp_path, monkeypatch, read, damage):
    monkeypatch.setattr(grid, "BLOCK", 6)
    expected = embed(network_of(3.0), pictures, 32, "crop", GRID, CPU, 0, tmp_path)
    victim, other = sorted(tmp_path.iterdir())
    whole = victim.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    victim.write_bytes({"flipped": flipped, "cut": whole[:-7], "empty": b""}[damage])
    read.clear()
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged; its embeddings are computed again"):
        same(embed(network_of(3.0), pictures, 32, "crop", GRID, CPU, 0, tmp_path), expected, 0)
    assert len(read) == 6
    assert victim.read_bytes() == whole
    assert sorted(tmp_path.iterdir()) == [victim, other]


def test_what_is_kept_serves_only_what_it_was_made_of(pictures, tmp_path, read):
    def pictures_read(pictures=pictures[:4], network=None, size=32, transform="crop", exponents=GRID):
        read.clear()
        network = network or network_of(3.0)
        same(
            embed(network, pictures, size, transform, exponents, CPU, 0, tmp_path),
            embed(network, pictures, size, transform, exponents, CPU),
        )
        return len(read) - len(pictures)  # without a folder, all are read

    assert pictures_read() == 4
    assert pictures_read() == 0
    assert pictures_read(network=network_of(7.0)) == 0  # its own exponent plays no part
    other = network_of(3.0)
    other.trunk[4].bn2.running_mean += 0.5
    assert pictures_read(network=other) == 4
    other = network_of(3.0)
    other.mean += 0.1
    assert pictures_read(network=other) == 4
    assert pictures_read(size=40) == 4
    assert pictures_read(transform="rect") == 4
    assert pictures_read(exponents=GRID[:2]) == 4
    assert pictures_read(exponents=GRID[::-1]) == 4
    assert pictures_read(pictures=pictures[3::-1]) == 4
    assert pictures_read(pictures=pictures[:3]) == 3
    assert pictures_read(pictures=[*pictures[:3], pictures[3]._replace(turn=90)]) == 4
    assert pictures_read(pictures=[*pictures[:3], pictures[3]._replace(box=(0, 0, 9, 9))]) == 4
    assert pictures_read() == 0


def test_a_file_that_has_changed_is_read_again(pictures, tmp_path, read):
    file = tmp_path / "changing.png"
    found = []
    for number in (0, 5):
        file.write_bytes(pictures[number].path.read_bytes())
        found.append(embed(network_of(3.0), [Picture(file, None, 0)], 32, "crop", GRID, CPU, 0, tmp_path / "kept"))
        same(found[-1], slow([pictures[number]], 32, "crop", GRID))
    assert len(read) == 2


def test_descriptors_are_the_embeddings_at_unit_length():
    embeddings = np.random.default_rng(0).random((5000, 4)).astype("f4")
    found = descriptors(embeddings, None)
    assert found.dtype == np.float32
    expected = [[x / (math.sqrt(sum(y * y for y in row)) + 1e-6) for x in row] for row in embeddings.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert descriptors(embeddings[:0], None).shape == (0, 4)


@pytest.mark.parametrize("whitening", [None, Whitening(torch.zeros(5).double(), torch.eye(5, 3).double())])
def test_with_a_folder_descriptors_and_embeddings_lie_in_files_without_a_name(pictures, tmp_path, whitening):
    embeddings = np.random.default_rng(0).random((3000, 4)).astype("f4")
    found = descriptors(embeddings, whitening, tmp_path)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, descriptors(embeddings, whitening))
    assert not [*tmp_path.iterdir()]
    assert descriptors(embeddings[:0], whitening, tmp_path).shape == (0, found.shape[1])
    for at in embed(network_of(3.0), pictures, 32, "rect", (1.0, 3.0), CPU, folder=tmp_path).values():
        assert isinstance(at, np.memmap)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}


def test_whitened_descriptors_are_those_of_the_whitening():
    embeddings = np.random.default_rng(0).random((5000, 4)).astype("f4")
    whitening = Whitening.fit(torch.from_numpy(embeddings[:100]), dimension=3)
    found = descriptors(embeddings, whitening)
    assert found.dtype == np.float32
    assert found.shape == (5000, 3)
    for row in (0, 1, 2047, 2048, 4999):
        z = (whitening.project(torch.from_numpy(embeddings[row : row + 1]).double()))[0]
        np.testing.assert_allclose(found[row], z / z.norm(), atol=1e-5)


def of_one_rank(rank, meeting, pictures):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    grid.BLOCK = 2
    kept = Path(meeting) / "kept"
    found = [embed(network_of(3.0), pictures[:7], 32, "rect", GRID, CPU, 0, kept) for _ in range(2)]
    found.append(embed(network_of(3.0), pictures[:1], 32, "rect", GRID, CPU))
    torch.save(found, Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(pictures, tmp_path):
    start_ranks(of_one_rank, (str(tmp_path), pictures))
    for rank in range(2):
        once, again, one = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        same(once, slow(pictures[:7], 32, "rect", GRID))
        same(again, once, 0)
        same(one, slow(pictures[:1], 32, "rect", GRID))
    assert len(list((tmp_path / "kept").iterdir())) == 4  # of four pictures two blocks, of three two
