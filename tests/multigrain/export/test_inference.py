"""What a trained network answers to a table of encoded images."""

import io
import math
from types import NoneType

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CLASSES, SETTINGS, made, save, whitening_of
from PIL import Image
from safetensors import safe_open

from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_view
from multigrain.export import inference
from multigrain.models import checkpoint
from multigrain.models.multigrain import MultiGrain
from multigrain.models.served_setting import ServedSetting, read, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("run"), made(0)
    save(folder, 1, network=network)
    return network, inference.load(folder)


def table(paths, **settings):
    return pd.DataFrame({"image": [path.read_bytes() for path in paths]}, **settings)


def test_answers_are_the_networks_own_on_the_evaluation_crop(trained, image_files):
    network, predictor = trained
    answers = predictor(table(image_files))
    assert list(answers.columns) == ["embedding", "class_id", "class_name", "score", "error"]
    assert len(answers) == len(image_files)
    for path, answer in zip(image_files, answers.itertuples(), strict=True):
        with torch.no_grad():
            output = network(evaluation_view(decode(path), "crop", 32)[None])
        probabilities = (output.logits[0] - output.logits[0].max()).exp()
        probabilities = (probabilities / probabilities.sum()).tolist()
        assert answer.embedding == pytest.approx(output.descriptor[0].tolist(), abs=1e-5)
        assert np.linalg.norm(answer.embedding) == pytest.approx(1, abs=1e-5)
        assert answer.score == pytest.approx(max(probabilities), abs=1e-5)
        assert answer.class_id == probabilities.index(max(probabilities))
        assert answer.class_name == CLASSES[answer.class_id]
        assert [type(value) for value in answer[2:]] == [int, str, float, NoneType]
    assert len(set(answers["class_id"])) > 1, "the images must tell classes apart"


def test_rows_keep_their_order_and_do_not_depend_on_their_neighbours(trained, image_files):
    _, predictor = trained
    forward = predictor(table(image_files))
    backward = predictor(table(image_files[::-1], index=[9, 5, 7, 1, 3, 2]))
    assert list(backward["class_id"]) == list(forward["class_id"])[::-1]
    alone = [predictor(table([path])) for path in image_files]
    for number, answer in enumerate(alone):
        descriptors = (answer["embedding"][0], forward["embedding"][number], list(backward["embedding"])[5 - number])
        np.testing.assert_allclose(descriptors[1], descriptors[0], atol=1e-5)
        np.testing.assert_allclose(descriptors[2], descriptors[0], atol=1e-5)


def test_other_columns_are_passed_over(trained, image_files):
    _, predictor = trained
    content = table(image_files[:1])
    pd.testing.assert_frame_equal(predictor(content.assign(name="x")), predictor(content))


def test_what_is_no_image_has_a_row_with_the_reason_and_the_others_are_answered(trained, image_files):
    _, predictor = trained
    wrong = [
        b"<html>",
        image_files[0].read_bytes()[:2000],
        b"",
        image_files[0].parent / "none.png",
        "0.png",
        None,
        np.zeros((2, 2)),
    ]
    mixed = [*image_files[:2], *wrong, *image_files[2:]]
    answers = predictor(pd.DataFrame({"image": pd.Series(mixed, dtype=object)}))
    good = [0, 1, *range(2 + len(wrong), len(mixed))]
    pd.testing.assert_frame_equal(answers.iloc[good].reset_index(drop=True), predictor(table(image_files)))
    bad = answers.iloc[2 : 2 + len(wrong)]
    assert bad.drop(columns="error").isna().all(axis=None)
    said = [
        "is a web page",
        "is cut short",
        "is empty",
        "cannot be read (No such",
        "not str",
        "not NoneType",
        "float64",
    ]
    for error, part in zip(bad["error"], said, strict=True):
        assert part in error


def test_an_empty_table_has_an_empty_answer(trained):
    _, predictor = trained
    answers = predictor(pd.DataFrame({"image": []}))
    assert list(answers.columns) == ["embedding", "class_id", "class_name", "score", "error"]
    assert len(answers) == 0


def test_sixteen_bit_images_are_read_as_in_training(trained, tmp_path):
    _, predictor = trained
    grey = (np.arange(40 * 40).reshape(40, 40) * 40).astype(np.uint16)
    answers = []
    for pixels in (grey, (grey // 257).astype(np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        answers.append(predictor(pd.DataFrame({"image": [buffer.getvalue()]}))["embedding"][0])
    assert np.dot(*answers) > 0.99


@pytest.mark.parametrize("recorded", [True, False])
def test_a_network_is_shown_images_as_it_was_in_training(tmp_path, recorded):
    network, tag = made(3), Image.Exif()
    save(tmp_path, 1, network=network)
    if recorded:
        saved = checkpoint.latest(tmp_path)
        checkpoint.save(tmp_path, saved._replace(state=saved.state | {"steps": 2, "orientation": "exif"}))
    tag[0x0112] = 3
    file = tmp_path / "camera.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, exif=tag)
    loaded = inference.load(tmp_path)
    assert loaded.facts["orientation"] == ("exif" if recorded else "stored")
    expected = [described(network, file, upright=upright) for upright in (recorded, not recorded)]
    found = loaded(table([file]))["embedding"][0]
    assert found == pytest.approx(expected[0], abs=1e-6)
    assert found != pytest.approx(expected[1], abs=1e-4)


def described(network, path, transform="crop", size=32, upright=True):
    with torch.no_grad():
        return network(evaluation_view(decode(path, upright), transform, size)[None]).descriptor[0].tolist()


def test_the_newest_intact_checkpoint_is_loaded(tmp_path, image_files):
    older, newer = made(1), made(2)
    save(tmp_path, 1, network=older)
    save(tmp_path, 2, network=newer)
    loaded = inference.load(tmp_path)
    assert loaded(table(image_files[:1]))["embedding"][0] == pytest.approx(described(newer, image_files[0]), abs=1e-6)
    assert [loaded.facts[name] for name in ("classes", "transform", "size")] == [CLASSES, "crop", 32]
    (tmp_path / "step-00000002/model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000002"):
        loaded = inference.load(tmp_path)
    assert loaded(table(image_files[:1]))["embedding"][0] == pytest.approx(described(older, image_files[0]), abs=1e-6)


@pytest.mark.parametrize(
    ("evaluation", "transform", "size"),
    [({"transform": "rect"}, "rect", 32), ({"size": 40}, "crop", 40), ({"transform": "rect", "size": 64}, "rect", 64)],
)
def test_images_are_shown_as_the_evaluation_showed_them(tmp_path, image_files, evaluation, transform, size):
    network = made(1)
    save(tmp_path, 1, {**SETTINGS, "evaluation": evaluation}, network=network)
    answers = inference.load(tmp_path)(table(image_files))
    for path, descriptor in zip(image_files, answers["embedding"], strict=True):
        assert descriptor == pytest.approx(described(network, path, transform, size), abs=1e-5)


def test_averaged_weights_are_preferred(tmp_path, image_files):
    averaged = made(2)
    save(tmp_path, 1, network=made(1), ema=averaged)
    answers = inference.load(tmp_path)(table(image_files[:1]))
    assert answers["embedding"][0] == pytest.approx(described(averaged, image_files[0]), abs=1e-6)


def test_a_learnt_exponent_is_loaded(tmp_path, image_files):
    torch.manual_seed(0)
    network = MultiGrain("narrow", 3, 2.5, learn_p=True).eval()
    with torch.no_grad():
        network.pool.p.add_(1.5)
    settings = {"image_size": 32, "model": {"trunk": "narrow", "p": 2.5, "learn_p": True}}
    save(tmp_path, 1, settings, network=network)
    answers = inference.load(tmp_path)(table(image_files[:1]))
    assert answers["embedding"][0] == pytest.approx(described(network, image_files[0]), abs=1e-6)


def test_a_folder_without_a_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        inference.load(tmp_path)


# A model that serves a setting of its own


def model_that_serves(folder, settings=SETTINGS, **serving):
    """Written beside a checkpoint of another folder; returns the network and its predictor."""
    network = made(1)
    save(folder / "trained", 3, settings, network=network)
    write(folder / "model", checkpoint.latest(folder / "trained"), ServedSetting(**serving))
    return network, inference.load(folder / "model")


def pooled_with(network, path, transform, size, p):
    """By a network whose exponent it is."""
    other = MultiGrain("narrow", 3, p).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        return other(evaluation_view(decode(path), transform, size)[None])


@pytest.mark.parametrize("dimension", [None, 20, 129])
@pytest.mark.parametrize(("size", "transform"), [(32, "crop"), (48, "rect")])
@pytest.mark.parametrize("p", [1.0, 4.25, math.inf])
def test_a_model_answers_at_the_setting_it_serves(tmp_path, image_files, size, transform, p, dimension):
    whitening = whitening_of(dimension) if dimension else None
    network, predictor = model_that_serves(tmp_path, size=size, p=p, whitening=whitening)
    answers = predictor(table(image_files))
    assert list(answers.columns) == ["embedding", "class_id", "class_name", "score", "error"]
    for path, answer in zip(image_files, answers.itertuples(), strict=True):
        output = pooled_with(network, path, transform, size, p)
        expected = output.descriptor[0]
        if whitening:
            v = torch.cat([output.embedding[0].double(), torch.ones(1)])
            z = (v / v.norm() - whitening.mean) @ whitening.projection
            expected = z / z.norm()
        assert answer.embedding == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(answer.embedding) == (dimension or 128)
        assert np.linalg.norm(answer.embedding) == pytest.approx(1, abs=1e-5)
        assert answer.class_id == int(output.logits[0].argmax())
        assert answer.score == pytest.approx(float(output.logits[0].softmax(0).max()), abs=1e-5)
        assert [type(value) for value in answer[2:]] == [int, str, float, NoneType]


def test_at_its_own_size_a_network_sees_images_as_its_settings_say(tmp_path):
    settings = {**SETTINGS, "evaluation": {"transform": "crop", "size": 40}}
    for size, transform in ((40, "crop"), (32, "rect")):
        _, predictor = model_that_serves(tmp_path / str(size), settings, size=size, p=3.0, whitening=None)
        assert (predictor.facts["transform"], predictor.facts["size"]) == (transform, size)


def test_a_learnt_exponent_gives_way_to_the_one_to_serve(tmp_path, image_files):
    network = MultiGrain("narrow", 3, 2.5, learn_p=True).eval()
    settings = {**SETTINGS, "model": {"trunk": "narrow", "p": 2.5, "learn_p": True}}
    save(tmp_path / "trained", 1, settings, network=network)
    write(tmp_path / "model", checkpoint.latest(tmp_path / "trained"), ServedSetting(32, 1.5, None))
    predictor = inference.load(tmp_path / "model")
    assert predictor.facts["p"] == inference.read(tmp_path / "model").answers.network.pool.p == 1.5
    assert predictor(table(image_files[:1]))["embedding"][0] != described(network, image_files[0])


def test_a_whitening_is_kept_in_fp64_and_none_is_kept_as_none(tmp_path):
    whitening = whitening_of()
    saved = checkpoint.Checkpoint({"network.x": torch.zeros(1)}, {}, {"steps": 1})
    write(tmp_path / "white", saved, ServedSetting(500, 2.2, whitening))
    found = read(tmp_path / "white")
    assert found[:2] == (500, 2.2)
    for name, tensor in whitening.state_dict().items():
        assert found.whitening.state_dict()[name].dtype == torch.float64
        assert torch.equal(found.whitening.state_dict()[name], tensor)
    write(tmp_path / "plain", saved, ServedSetting(224, math.inf, None))
    assert read(tmp_path / "plain") == (224, math.inf, None)
    with safe_open(tmp_path / "plain/serving.safetensors", "pt") as file:
        assert [*file.keys()] == []
        assert file.metadata() == {"size": "224", "p": "inf"}
    assert read(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "no content", "no seal", "other seal", "seal no JSON"])
@pytest.mark.parametrize("dimension", [None, 20])
def test_a_damaged_setting_is_refused(tmp_path, damage, dimension):
    whitening = whitening_of(dimension) if dimension else None
    model_that_serves(tmp_path, size=48, p=4.0, whitening=whitening)
    content, seal = tmp_path / "model/serving.safetensors", tmp_path / "model/serving.json"
    whole = content.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    if damage in {"flipped", "cut", "empty"}:
        content.write_bytes({"flipped": flipped, "cut": whole[:-1], "empty": b""}[damage])
    elif damage == "no content":
        content.unlink()
    elif damage == "no seal":
        seal.unlink()
    else:
        seal.write_text({"other seal": '{"sha256": "0"}', "seal no JSON": "{"}[damage])
    told = r"serving\.safetensors must match serving\.json, but does not in .*model; evaluate again"
    with pytest.raises(ValueError, match=told):
        inference.load(tmp_path / "model")


def test_a_model_that_serves_needs_an_intact_checkpoint(tmp_path):
    model_that_serves(tmp_path, size=48, p=4.0, whitening=None)
    (tmp_path / "model/step-00000003/model.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="step-00000003"),
        pytest.raises(FileNotFoundError, match="none that is intact"),
    ):
        inference.load(tmp_path / "model")
