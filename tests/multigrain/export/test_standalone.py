"""The reader of exported models, without a network: pixels, shapes, and what is refused."""

import io
import json
import random
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_pixels
from multigrain.export import standalone

RNG = np.random.default_rng(3)


def pixels(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


SHAPES = [(1, 1), (1, 90), (90, 1), (2, 3), (32, 32), (37, 224), (300, 200), (641, 17), (255, 256)]


@pytest.mark.parametrize("scale", [standalone.scale_by_torch, standalone.scale_by_numpy])
@pytest.mark.parametrize("transform", ["crop", "rect"])
@pytest.mark.parametrize("size", [16, 32, 75])
def test_images_are_shown_bit_for_bit_as_in_evaluation(scale, transform, size):
    for height, width in SHAPES:
        image = pixels(height, width)
        expected = evaluation_pixels(torch.tensor(image).permute(2, 0, 1), transform, size).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(standalone.prepare(image, transform, size, scale), expected)


def test_scaling_without_torch_is_bit_for_bit_that_of_torch():
    draw = random.Random(0)
    for _ in range(60):
        image = pixels(draw.randint(1, 400), draw.randint(1, 400))
        height, width = draw.randint(1, 300), draw.randint(1, 300)
        np.testing.assert_array_equal(
            standalone.scale_by_numpy(image, height, width), standalone.scale_by_torch(image, height, width)
        )


def shown(image, orientation="exif"):
    """Return the pixels that a network is shown, of the size of the image."""
    seen = []

    def run(images):
        seen.append(images)
        return np.ones((1, 2)), np.ones((1, 2))

    facts = {"transform": "rect", "size": 40, "classes": ["a", "b"], "orientation": orientation}
    ((error,),) = (
        [answer["error"]] for answer in standalone.Model(facts, run, standalone.scale_by_numpy).answers([image])
    )
    assert error is None
    return seen[0][0].transpose(1, 2, 0)


def test_arrays_are_pixels():
    image = pixels(30, 40)
    np.testing.assert_array_equal(shown(image), image)
    np.testing.assert_array_equal(shown(image[:, :, 0]), np.stack([image[:, :, 0]] * 3, axis=2))


@pytest.mark.parametrize("source", [bytes, bytearray, memoryview])
def test_files_are_decoded_as_in_training(tmp_path, source):
    (tmp_path / "file").write_bytes(content := encoded(pixels(30, 40)))
    expected = decode(tmp_path / "file").permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown(source(content)), expected)
    np.testing.assert_array_equal(shown(tmp_path / "file"), expected)


def test_images_are_turned_only_for_models_that_were_trained_so():
    image, tag = pixels(20, 40), Image.Exif()
    tag[0x0112] = 3
    content = encoded(image, exif=tag)
    np.testing.assert_array_equal(shown(content), image[::-1, ::-1])
    np.testing.assert_array_equal(shown(content, "stored"), image)
    np.testing.assert_array_equal(shown(content, None), image)


def encoded(image, **settings):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 5), np.float32), np.zeros((4, 5, 4), np.uint8), np.zeros((0, 5), np.uint8), np.zeros(3, np.uint8)],
)
def test_arrays_of_other_kinds_are_refused(array):
    (answer,) = model()[0].answers([array])
    assert "has to be uint8" in answer["error"]


def test_a_line_of_pixels_does_not_fill_the_memory():
    with pytest.raises(ValueError, match="too narrow"):
        standalone.prepare(pixels(1, 60_000), "crop", 224, standalone.scale_by_torch)


def model(transform="rect", size=16):
    """Embeds an image as its mean colour."""
    shapes = []

    def run(images):
        shapes.append(images.shape)
        means = images.reshape(len(images), 3, -1).mean(axis=2) / 255
        return means / np.linalg.norm(means, axis=1, keepdims=True), means / means.sum(axis=1, keepdims=True)

    facts = {"transform": transform, "size": size, "classes": ["red", "green", "blue"]}
    return standalone.Model(facts, run, standalone.scale_by_numpy), shapes


def flat(colour, height=16, width=16):
    return np.full((height, width, 3), colour, np.uint8)


def test_answers_keep_their_order_over_shapes_and_errors():
    made, shapes = model()
    red, blue = flat([200, 0, 0]), flat([0, 0, 100], 8)
    answers = list(made.answers([blue, red, b"none", blue, red, red]))
    assert [answer["class_name"] for answer in answers] == ["blue", "red", None, "blue", "red", "red"]
    assert [answer["error"] is None for answer in answers] == [True, True, False, True, True, True]
    assert answers[1] == {"embedding": [1, 0, 0], "class_id": 0, "class_name": "red", "score": 1.0, "error": None}
    assert sorted(shapes) == [(2, 3, 8, 16), (3, 3, 16, 16)]


def test_many_images_are_read_a_block_at_a_time():
    made, shapes = model()
    taken = []

    def images():
        for number in range(100):
            taken.append(number)
            yield flat([0, 9, 0])

    answers = made.answers(images())
    next(answers)
    assert len(taken) == standalone.BATCH
    assert len(list(answers)) == 99
    assert [shape[0] for shape in shapes] == [32, 32, 32, 4]


@pytest.fixture
def folder(tmp_path):
    """Sealed, but without networks."""
    (tmp_path / "model.json").write_text("{}")
    seal(tmp_path)
    return tmp_path


def seal(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}
    manifest = {name: {"bytes": len(x), "sha256": sha256(x).hexdigest()} for name, x in files.items()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "model.json").write_text("{ }"), "model.json was changed"),
        (lambda f: (f / "model.json").unlink(), "model.json is missing"),
        (lambda f: (f / "more").touch(), "more is not listed"),
        (lambda f: (f / "more").symlink_to("/etc"), "more is not listed"),
        (lambda f: (f / "MANIFEST.json").write_text("["), "readable MANIFEST.json"),
        (lambda f: (f / "MANIFEST.json").unlink(), "readable MANIFEST.json"),
    ],
)
def test_a_folder_that_is_not_as_it_was_exported_is_refused(folder, damage, told):
    standalone.check(folder)
    damage(folder)
    with pytest.raises(ValueError, match=told):
        standalone.load(folder)


def archive(folder, **entries):
    with zipfile.ZipFile(folder / "model.pt2", "w") as file:
        for name, content in entries.items():
            file.writestr(f"model/{name}", content)
    return folder / "model.pt2"


PLAIN = {"config": {"w": {"use_pickle": False}}}
PICKLED = {"config": {"w": {"use_pickle": True}}}


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"data/sample_inputs/model.pt": "x"}, "data/sample_inputs/model.pt"),
        ({"data/weights/model_weights_config.json": json.dumps(PICKLED)}, "names pickled tensors"),
        ({"data/weights/model.pt": "x"}, "data/weights/model.pt"),
        ({"data/constants/custom_obj_0": "x"}, "custom_obj_0"),
        ({"data/constants/opaque_obj_0": "x"}, "opaque_obj_0"),
        ({"data/aotinductor/model/a.so": "x"}, "a.so"),
        ({"other": "x"}, "other"),
        ({"data/weights/weight_0/x": "x"}, "weight_0/x"),
    ],
)
def test_a_program_with_a_pickle_or_a_library_in_it_is_not_opened(folder, entries, fault, monkeypatch):
    file = archive(folder, **{"byteorder": "little", "models/model.json": "{}"}, **entries)
    seal(folder)
    monkeypatch.setattr(torch.export, "load", lambda _: pytest.fail("was opened"))
    with pytest.raises(ValueError, match="must not hold a pickle") as caught:
        standalone.load(folder, "torch")
    assert fault in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_program_of_the_format_before_is_not_opened(folder):
    with zipfile.ZipFile(folder / "model.pt2", "w") as file:
        file.writestr("serialized_constants.json", b"x")  # a pickle, whatever its name
    assert standalone._pickled(folder / "model.pt2") == "serialized_constants.json"


def test_a_program_with_an_entry_behind_another_of_its_name_is_not_opened(folder):
    with zipfile.ZipFile(folder / "model.pt2", "w") as file:
        file.writestr("model/byteorder", b"little")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("model/byteorder", b"big")
    assert standalone._pickled(folder / "model.pt2") == "two entries of one name"


def test_a_plain_program_is_opened(folder):
    config = {"data/weights/model_weights_config.json": json.dumps(PLAIN), "data/weights/weight_0": "\x80\x04."}
    assert standalone._pickled(archive(folder, **config, **{"data/sample_inputs/model.pt": ""})) is None


@pytest.mark.parametrize("before", [b"#!", b"\x80\x04K\x03.", "another"], ids=ascii)
@pytest.mark.parametrize("behind", [b"", b"\n"], ids=ascii)
def test_a_program_that_can_be_read_in_two_ways_is_not_opened(folder, before, behind):
    file = archive(folder, byteorder="little")
    content = file.read_bytes()
    assert standalone._pickled(file) is None
    file.write_bytes((content if before == "another" else before) + content + behind)
    assert standalone._pickled(file) == "it can be read in two ways"


def test_a_program_of_torch_has_one_directory(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "file")
    assert standalone._has_one_directory(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    for place in (-98 + 48, -42 + 8, -98 + 4):  # of the directory and of the ZIP64 record, and its length
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "file").write_bytes(changed)
        assert not standalone._has_one_directory(tmp_path / "file")
