"""Fixtures: folders of images."""

import random

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """Folder of 40 drawn images of 32 pixels in 8 classes, 26 of them for training, with copies. Tests only read it."""
    from multigrain.config.data import DataSettings
    from multigrain.data.builtin import write_builtin
    from multigrain.hooks import no_progress

    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    return write_builtin(settings, tmp_path_factory.mktemp("builtin"), no_progress)


@pytest.fixture(scope="session")
def image_files(tmp_path_factory):
    """Paths of images of different formats, colour modes, sizes and aspect ratios. Tests only read them."""
    folder, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    paths = []
    for name, mode, bytes_per_pixel, size in [
        ("0.png", "RGB", 3, (40, 30)),
        ("1.jpg", "RGB", 3, (64, 90)),
        ("2.png", "L", 1, (32, 32)),
        ("3.webp", "RGB", 3, (17, 100)),
        ("4.png", "RGBA", 4, (50, 50)),
        ("5.jpg", "CMYK", 4, (33, 31)),
    ]:
        paths.append(folder / name)
        Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * bytes_per_pixel)).save(paths[-1])
    return paths
