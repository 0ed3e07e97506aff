"""Many images at once are answered as each would be by itself."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_predict import CLASSES, files, table, trained, whitening_of  # noqa: F401 - fixtures

from multigrain import bulk, predict
from multigrain.augment import evaluation_view
from multigrain.bulk import InBatches
from multigrain.views import decode


def alone(network, path, transform, size):
    with torch.no_grad():
        return network(evaluation_view(decode(path), transform, size)[None])


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("transform", ["crop", "rect"])
def test_each_row_is_what_the_network_says_of_its_image_alone(
    trained,  # noqa: F811
    files,  # noqa: F811
    monkeypatch,
    batch,
    transform,
):
    monkeypatch.setattr(bulk, "BATCH", batch)
    network = trained[0]
    answers = InBatches(predict.Predictor(network, CLASSES, transform, 32))(table([*files, *files]))
    assert list(answers.columns) == ["embedding", "class_id", "class_name", "score", "error"]
    for path, answer in zip([*files, *files], answers.itertuples(), strict=True):
        output = alone(network, path, transform, 32)
        assert answer.embedding == pytest.approx(output.descriptor[0].tolist(), abs=1e-5)
        probabilities = output.logits[0].softmax(dim=0)
        assert (answer.class_id, answer.class_name) == (int(probabilities.argmax()), CLASSES[answer.class_id])
        assert answer.score == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert answer.error is None


def test_bytes_paths_and_arrays_are_the_same_image(trained, files):  # noqa: F811
    path = files[0]
    with Image.open(path) as image:
        array = np.asarray(image)
    forms = [path.read_bytes(), path, str(path), array]
    answers = InBatches(trained[1])(pd.DataFrame({"image": pd.Series(forms, dtype=object)}))
    for embedding in answers["embedding"][1:]:
        assert embedding == pytest.approx(answers["embedding"][0], abs=1e-6)


def test_what_is_no_image_has_an_error_and_the_others_are_answered(trained, files):  # noqa: F811
    cut = files[1].read_bytes()[:200]
    forms = [b"<html>", files[0], cut, "nowhere.jpg", np.zeros((3, 3)), None, files[2]]
    answers = InBatches(trained[1])(pd.DataFrame({"image": pd.Series(forms, dtype=object)}))
    assert [error is None for error in answers["error"]] == [False, True, False, False, False, False, True]
    assert answers["error"][0] == "is not an image, or its first bytes are damaged"
    assert "nowhere.jpg" in answers["error"][3]
    assert "(H, W, 3) of uint8, got (3, 3) of float64" in answers["error"][4]
    assert [embedding is None for embedding in answers["embedding"]] == [bool(error) for error in answers["error"]]
    assert answers["embedding"][6] == pytest.approx(InBatches(trained[1])(table(files[2:3]))["embedding"][0], abs=1e-5)


def test_the_answers_of_no_images_are_an_empty_table(trained):  # noqa: F811
    answers = InBatches(trained[1])(pd.DataFrame({"image": pd.Series([], dtype=object)}))
    assert answers.shape == (0, 5)


def test_a_huge_image_is_shown_by_itself(trained, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bulk, "BATCH_PIXELS", 10)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    answers = InBatches(trained[1])(pd.DataFrame({"image": [buffer.getvalue()] * 3}))
    assert answers["error"].isna().all()


def test_embeddings_are_whitened_where_the_model_says_so(trained, files):  # noqa: F811
    network, whitening = trained[0], whitening_of(20)
    answers = InBatches(predict.Predictor(network, CLASSES, "crop", 32, whitening))(table(files))
    for path, embedding in zip(files, answers["embedding"], strict=True):
        v = torch.cat([alone(network, path, "crop", 32).embedding[0].double(), torch.ones(1)])
        z = (v / v.norm() - whitening.mean) @ whitening.projection
        assert embedding == pytest.approx((z / z.norm()).tolist(), abs=1e-4)
