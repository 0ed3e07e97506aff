"""What a trained network answers to a table of encoded images."""

import io
import random

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from multigrain import checkpoint, predict
from multigrain.augment import evaluation_crop
from multigrain.checkpoint import Checkpoint
from multigrain.fit import Objective
from multigrain.model import MultiGrain
from multigrain.spec import LossSettings, MultiGrainSpec
from multigrain.views import decode

CLASSES = ["ant", "bee", "cat"]
SPEC = MultiGrainSpec.model_validate({"image_size": 32, "model": {"trunk": "narrow", "p": 2.5}})


def save(folder, epoch, seed=0):
    """A checkpoint as training leaves it, of a network whose BatchNorm has seen something."""
    torch.manual_seed(seed)
    objective = Objective(MultiGrain("narrow", 3, 2.5), LossSettings())
    objective.network.train()(torch.rand(8, 3, 32, 32))
    torch.nn.init.normal_(objective.network.classifier.weight)
    state = {"epoch": epoch, "metrics": {}, "spec": SPEC.model_dump(), "classes": CLASSES}
    checkpoint.save(folder, Checkpoint(objective.state_dict(), {}, state))
    return objective.network.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save(folder, 1), predict.load(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of different formats, colour modes, sizes and proportions."""
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


def table(paths, **settings):
    return pd.DataFrame({"image": [path.read_bytes() for path in paths]}, **settings)


def test_answers_are_the_networks_own_on_the_evaluation_crop(trained, files):
    network, predictor = trained
    answers = predictor(table(files))
    assert list(answers.columns) == ["descriptor", "class_id", "class_name", "score"]
    assert len(answers) == len(files)
    for path, answer in zip(files, answers.itertuples(), strict=True):
        with torch.no_grad():
            output = network(evaluation_crop(decode(path), 32)[None])
        probabilities = (output.logits[0] - output.logits[0].max()).exp()
        probabilities = (probabilities / probabilities.sum()).tolist()
        assert answer.descriptor == pytest.approx(output.descriptor[0].tolist(), abs=1e-5)
        assert np.linalg.norm(answer.descriptor) == pytest.approx(1, abs=1e-5)
        assert answer.score == pytest.approx(max(probabilities), abs=1e-5)
        assert answer.class_id == probabilities.index(max(probabilities))
        assert answer.class_name == CLASSES[answer.class_id]
        assert [type(value) for value in answer[2:]] == [int, str, float]
    assert len(set(answers["class_id"])) > 1, "the images must tell classes apart"


def test_rows_keep_their_order_and_do_not_depend_on_their_neighbours(trained, files):
    _, predictor = trained
    forward = predictor(table(files))
    backward = predictor(table(files[::-1], index=[9, 5, 7, 1, 3, 2]))
    assert list(backward["class_id"]) == list(forward["class_id"])[::-1]
    alone = [predictor(table([path])) for path in files]
    for number, answer in enumerate(alone):
        descriptors = (answer["descriptor"][0], forward["descriptor"][number], list(backward["descriptor"])[5 - number])
        np.testing.assert_allclose(descriptors[1], descriptors[0], atol=1e-5)
        np.testing.assert_allclose(descriptors[2], descriptors[0], atol=1e-5)


def test_other_columns_are_passed_over(trained, files):
    _, predictor = trained
    content = table(files[:1])
    pd.testing.assert_frame_equal(predictor(content.assign(name="x")), predictor(content))


def test_predicting_leaves_the_network_as_it_was(trained, files):
    _, predictor = trained
    before = {name: tensor.clone() for name, tensor in predictor.network.state_dict().items()}
    predictor(table(files))
    assert not predictor.network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in predictor.network.state_dict().items())


def test_a_network_given_in_training_mode_answers_in_evaluation_mode(trained, files):
    network, predictor = trained
    made = predict.Predictor(network.train(), CLASSES, 32)
    np.testing.assert_array_equal(made(table(files))["score"], predictor(table(files))["score"])


def test_bytes_that_are_no_image_are_an_error(trained):
    _, predictor = trained
    with pytest.raises(UnidentifiedImageError):
        predictor(pd.DataFrame({"image": [b"<html>"]}))


def test_an_empty_table_has_an_empty_answer(trained):
    _, predictor = trained
    answers = predictor(pd.DataFrame({"image": []}))
    assert list(answers.columns) == ["descriptor", "class_id", "class_name", "score"]
    assert len(answers) == 0


def test_sixteen_bit_images_are_read_as_in_training(trained, tmp_path):
    _, predictor = trained
    grey = (np.arange(40 * 40).reshape(40, 40) * 40).astype(np.uint16)
    answers = []
    for pixels in (grey, (grey // 257).astype(np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        answers.append(predictor(pd.DataFrame({"image": [buffer.getvalue()]}))["descriptor"][0])
    assert np.dot(*answers) > 0.99


def test_the_newest_intact_checkpoint_is_loaded(tmp_path, files):
    older, newer = save(tmp_path, 1, seed=1), save(tmp_path, 2, seed=2)
    crop = evaluation_crop(decode(files[0]), 32)[None]
    with torch.no_grad():
        expected = [network(crop).descriptor[0].tolist() for network in (older, newer)]
    loaded = predict.load(tmp_path)
    assert loaded(table(files[:1]))["descriptor"][0] == pytest.approx(expected[1], abs=1e-6)
    assert (loaded.classes, loaded.size) == (tuple(CLASSES), 32)
    (tmp_path / "epoch-0002/model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="epoch-0002"):
        loaded = predict.load(tmp_path)
    assert loaded(table(files[:1]))["descriptor"][0] == pytest.approx(expected[0], abs=1e-6)


def test_a_folder_without_a_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        predict.load(tmp_path)
