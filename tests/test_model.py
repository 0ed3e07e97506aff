import math

import pytest
import torch

from multigrain.model import IMAGENET_MEAN, IMAGENET_STD, MultiGrain, build_trunk, l2_normalise


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = MultiGrain("narrow", num_classes=5).eval()
    # A fresh bias is small; a large one shows whether it is added at all.
    torch.nn.init.normal_(network.classifier.bias, std=3)
    return network.requires_grad_(False)


def images(batch, height, width, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_l2_normalise_divides_by_the_norm_and_a_millionth():
    # 3 / 5.000001 and 4 / 5.000001
    descriptor = l2_normalise(torch.tensor([[3.0, 4.0]], dtype=torch.float64))[0]
    assert descriptor.tolist() == pytest.approx([0.59999988, 0.79999984], abs=1e-8)
    assert descriptor.norm().item() == pytest.approx(0.9999998, abs=1e-8)


def test_l2_normalise_keeps_a_zero_vector_with_a_finite_gradient():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    y = l2_normalise(x)
    assert y[0].tolist() == [0, 0]
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_the_narrow_trunk_maps_32_pixels_to_4_by_4():
    trunk, channels = build_trunk("narrow")
    assert channels == 128
    assert trunk.eval()(images(2, 32, 32)).shape == (2, 128, 4, 4)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048)])
def test_a_resnet_trunk_ends_before_its_pooling(name, channels):
    # Shapes without numbers: no weights are drawn.
    with torch.device("meta"):
        trunk, given = build_trunk(name)
        assert given == channels
        # A ResNet halves the side five times: 64 x 96 becomes 2 x 3.
        assert trunk(torch.empty(2, 3, 64, 96)).shape == (2, channels, 2, 3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32), (17, 63), (8, 8), (1, 1)])
def test_any_height_and_width_gives_one_embedding_an_image(network, height, width):
    output = network(images(3, height, width))
    assert output.embedding.shape == output.descriptor.shape == (3, 128)
    assert output.logits.shape == (3, 5)
    assert all(tensor.isfinite().all() for tensor in output)


def test_the_descriptor_is_the_embedding_with_norm_1(network):
    output = network(images(4, 32, 40))
    for embedding, descriptor in zip(output.embedding, output.descriptor, strict=True):
        norm = math.sqrt(sum(value**2 for value in embedding.tolist()))
        # Else the test could not tell the two apart.
        assert abs(norm - 1) > 0.1
        assert descriptor.norm().item() == pytest.approx(1, abs=1e-5)
        assert descriptor.tolist() == pytest.approx([value / norm for value in embedding.tolist()], abs=1e-5)


def test_the_classifier_reads_the_embedding_before_it_is_normalised(network):
    output = network(images(4, 32, 32))
    weight, bias = network.classifier.weight.double(), network.classifier.bias.double()
    for embedding, logits in zip(output.embedding.double(), output.logits, strict=True):
        expected = [(weight[k] * embedding).sum().item() + bias[k].item() for k in range(5)]
        assert logits.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("p", [1.0, 3.0, 6.0])
def test_the_embedding_is_the_generalised_mean_of_the_trunks_map(p):
    torch.manual_seed(0)
    network = MultiGrain("narrow", num_classes=2, p=p).eval().requires_grad_(False)
    maps = []
    network.trunk.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    embedding = network(images(2, 32, 32)).embedding
    powers = maps[0].double().clamp(min=1e-6).flatten(2) ** p
    expected = (powers.sum(dim=2) / 16) ** (1 / p)
    # Unclamped, p = 1 is smaller by a millionth at most: the map ends in a ReLU.
    assert torch.allclose(embedding.double(), expected, rtol=1e-4, atol=2e-6)


def test_the_trunk_reads_pixels_in_units_of_imagenets_mean_and_deviation(network):
    seen = []
    hook = network.trunk.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    network((mean + torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1, 1) * std).expand(3, 3, 8, 8))
    hook.remove()
    for image, expected in zip(seen[0], (0, 1, -2), strict=True):
        assert torch.allclose(image, torch.full_like(image, expected), atol=1e-5)


def test_the_constants_are_those_of_imagenet():
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_STD == (0.229, 0.224, 0.225)


def test_a_state_dict_carries_the_network_over_to_a_fresh_one(network):
    torch.manual_seed(1)
    fresh = MultiGrain("narrow", num_classes=5).eval()
    batch = images(2, 32, 32)
    before = fresh(batch)
    fresh.load_state_dict(network.state_dict())
    for restored, expected, first in zip(fresh(batch), network(batch), before, strict=True):
        assert torch.equal(restored, expected)
        assert not torch.equal(first, expected)


def test_a_state_dict_holds_no_constants(network):
    assert not {"mean", "std"} & set(network.state_dict())


@pytest.mark.parametrize("name", ["logits", "descriptor"])
def test_gradients_of_either_output_reach_every_parameter_before_it(name):
    torch.manual_seed(0)
    network = MultiGrain("narrow", num_classes=3)
    getattr(network(images(4, 32, 32)), name)[:, 0].sum().backward()
    for parameter in (network if name == "logits" else network.trunk).parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
