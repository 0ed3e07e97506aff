import copy
import math

import pytest
import timm
import torch
import torchvision

from multigrain.config.training import TRUNKS
from multigrain.models.multigrain import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MultiGrain,
    build_trunk,
    freeze_batchnorm,
    l2_normalise,
)


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
    trunk = build_trunk("narrow")
    assert trunk.channels == 128
    assert trunk.module.eval()(images(2, 32, 32)).shape == (2, 128, 4, 4)


@pytest.mark.parametrize("name", TRUNKS)
def test_every_trunk_gives_a_map_of_its_channels(name):
    # Shapes without numbers: no weights are drawn.
    with torch.device("meta"):
        trunk = build_trunk(name)
        shape = trunk.module(torch.empty(2, 3, 64, 96)).shape
    # A ResNet halves the side five times, `narrow` three times.
    assert shape == (2, trunk.channels, *((8, 12) if name == "narrow" else (2, 3)))
    assert (trunk.mean, trunk.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", TRUNKS[1:])
def test_a_trunk_has_the_names_and_shapes_of_torchvisions_network(name):
    with torch.device("meta"):
        found = build_trunk(name).module.state_dict()
        published = torchvision.models.get_model(name).state_dict()
    del published["fc.weight"], published["fc.bias"]
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in published.items()}


def test_a_trunk_computes_what_torchvision_pools():
    torch.manual_seed(0)
    published = torchvision.models.resnet18().eval()
    trunk = build_trunk("resnet18").module.eval()
    trunk.load_state_dict({key: t for key, t in published.state_dict().items() if not key.startswith("fc.")})
    with torch.no_grad():
        batch = images(2, 40, 64)
        assert torch.allclose(published.fc(trunk(batch).mean(dim=(2, 3))), published(batch), atol=1e-5)


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "channels", "mean", "std"),
    [
        ("timm/senet154", 2048, IMAGENET_MEAN, IMAGENET_STD),
        ("timm/legacy_senet154", 2048, IMAGENET_MEAN, IMAGENET_STD),
        ("timm/pnasnet5large", 4320, HALF, HALF),
        ("timm/nasnetalarge", 4032, HALF, HALF),
        # Its last convolution is wider than what timm calls its features; so is that of VGG.
        ("timm/mobilenetv3_small_100", 1024, IMAGENET_MEAN, IMAGENET_STD),
        ("timm/vgg11", 4096, IMAGENET_MEAN, IMAGENET_STD),
        ("timm/mobilevit_xxs", 320, (0, 0, 0), (1, 1, 1)),
    ],
)
def test_a_trunk_of_timm_gives_a_map_with_its_own_names_mean_and_deviation(name, channels, mean, std):
    with torch.device("meta"):
        trunk = build_trunk(name)
        published = timm.create_model(name.removeprefix("timm/"))
        shape = trunk.module.eval()(torch.empty(2, 3, 128, 192)).shape
    assert (trunk.channels, trunk.mean, trunk.std) == (channels, mean, std)
    assert shape[:2] == (2, channels)
    assert shape[2] < shape[3] or name == "timm/vgg11"  # which pads small maps to one position
    classifier = published.pretrained_cfg["classifier"]
    names = [key for key in published.state_dict() if not key.startswith(f"{classifier}.")]
    assert list(trunk.module.state_dict()) == names
    assert len(names) < len(published.state_dict())


def test_a_trunk_of_timm_trains_without_its_dropout_and_its_check_leaves_no_trace():
    torch.manual_seed(0)
    trunk = build_trunk("timm/ghostnet_050").module
    assert all(module.training for module in trunk.modules())
    assert all(tensor.device.type == "cpu" for tensor in trunk.state_dict().values())
    assert not any(t.any() for key, t in trunk.state_dict().items() if key.endswith("num_batches_tracked"))
    with torch.no_grad():
        assert torch.equal(trunk(images(2, 64, 64)), trunk(images(2, 64, 64)))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("timm/vit_tiny_patch16_224", "refuses images of 96 x 128"),
        ("timm/xcit_nano_12_p16_224", r"gives \(2, 49, 128\)"),  # a class token and 6 x 8 patches
        ("timm/hieradet_small", r"gives \(2, 3, 4, 768\)"),
        ("timm/coatnet_0_rw_224", "refuses images of 96 x 128"),
        ("timm/crossvit_9_240", r"is not \(Only token"),
        ("timm/resnet50.nothing", "Invalid pretrained tag"),
    ],
)
def test_a_network_of_timm_that_gives_no_map_is_refused(name, found):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^model.trunk must .*{name}.*{found}.*; name a"):
        build_trunk(name)


def test_a_network_of_timm_that_pools_nevertheless_is_refused(monkeypatch):
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_options: build(name, num_classes=0))
    with pytest.raises(ValueError, match=r"^model\.trunk must .* gives \(2, \d+\) for two images"):
        build_trunk("timm/test_resnet")


def test_the_network_reads_pixels_in_the_units_of_its_trunk():
    network = MultiGrain("timm/test_resnet", num_classes=2).eval()
    seen = []
    network.trunk.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network.embed(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32))
    assert [image.mean().item() for image in seen[0]] == [-1, 0, 1]  # mean and deviation 0.5


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


def test_the_network_is_its_head_after_its_embedding(network):
    batch = images(3, 32, 32)
    embedding = network.embed(batch)
    assert embedding.shape == (3, 128)
    for whole, part in zip(network(batch), network.head(embedding), strict=True):
        assert torch.equal(whole, part)


@pytest.mark.parametrize("p", [1.0, 3.0, 100.0, math.inf])
def test_only_the_trunk_follows_autocast(p):
    torch.manual_seed(0)
    network = MultiGrain("narrow", num_classes=5, p=p)
    maps = []
    network.trunk.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(images(4, 32, 32))
    assert maps[0].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in output} == {torch.float32}
    # Exactly, not to the three digits of bf16.
    for tensor, expected in zip(output, network.head(network.pool(maps[0])), strict=True):
        assert torch.equal(tensor, expected)
    output.logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_a_learnable_p_belongs_to_the_network():
    network = MultiGrain("narrow", num_classes=2, p=2.0, learn_p=True)
    assert network.state_dict()["pool.p"] == 2
    network(images(2, 32, 32)).logits.sum().backward()
    assert network.pool.p.grad.abs() > 0
    assert "pool.p" not in MultiGrain("narrow", num_classes=2, p=2.0).state_dict()


def test_frozen_batchnorm_reads_and_keeps_its_statistics_and_learns_the_rest():
    torch.manual_seed(0)
    network = MultiGrain("narrow", num_classes=2)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 2)
    batch = images(4, 32, 32)
    expected = copy.deepcopy(network).eval()(batch).embedding
    freeze_batchnorm(network.trunk)
    before = {key: tensor.clone() for key, tensor in network.trunk.named_buffers()}
    for one in (network, copy.deepcopy(network)):
        one.train()
        assert one.trunk[3].training
        output = one(batch)
        assert torch.allclose(output.embedding, expected, atol=1e-6)
        for key, tensor in one.trunk.named_buffers():
            assert torch.equal(tensor, before[key])
        output.logits.sum().backward()
        assert one.trunk[1].weight.grad.abs().sum() > 0
        assert one.trunk[1].bias.grad.abs().sum() > 0


def test_a_copy_of_a_frozen_network_answers_for_itself():
    network = MultiGrain("narrow", num_classes=2)
    freeze_batchnorm(network)
    twin = copy.deepcopy(network)
    assert twin.trunk[1].train() is twin.trunk[1]
    assert not twin.train().trunk[1].training


def test_synchronised_batchnorm_can_be_frozen_too():
    trunk = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build_trunk("narrow").module)
    freeze_batchnorm(trunk)
    assert isinstance(trunk[1], torch.nn.SyncBatchNorm)
    assert not trunk.train()[1].training
