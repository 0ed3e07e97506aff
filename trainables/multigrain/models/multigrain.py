"""The MultiGrain network: trunk -> GeM pooling -> embedding -> descriptor and logits, after the paper."""

from collections import OrderedDict
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock

from multigrain.config.training import TIMM, MultiGrainSpec
from multigrain.models import checkpoint
from multigrain.models.pooling import GeM

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Trunk(NamedTuple):
    """A network without pooling and classifier: (B, 3, H, W) -> (B, C, h, w)."""

    module: nn.Module
    channels: int
    """C."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each colour channel, in [0, 1], that the network expects its input to be normalised by."""
    std: tuple[float, ...] = IMAGENET_STD


class Output(NamedTuple):
    """Results of the network for B images."""

    embedding: Tensor
    """(B, C), pooled and not normalised: input of the classifier."""
    descriptor: Tensor
    """(B, C), embedding of unit L2 norm: for retrieval and the margin loss."""
    logits: Tensor
    """(B, K), one for each class."""


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (|x| + eps) along the last axis; a zero vector stays zero, with a finite gradient."""
    # norm() has no gradient at zero, nor has the square root.
    norm = (x.square().sum(dim=-1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt()
    return x / (norm + eps)


def _narrow_trunk() -> Trunk:
    """A residual trunk of three stages for images of about 32 pixels: (B, 3, 32, 32) -> (B, 128, 4, 4)."""

    def stage(channels_in: int, channels: int, stride: int) -> BasicBlock:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
        return BasicBlock(channels_in, channels, stride=stride, downsample=shortcut)

    trunk = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        stage(32, 64, stride=2),
        stage(64, 128, stride=2),
    )
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Trunk(trunk, 128)


def _channels(module: nn.Module, name: str) -> int:
    """Number of channels of a trunk's feature maps, found from shapes alone.

    Raises:
        ValueError: the network returns no feature maps, or takes images of one size only.
    """
    height, width = 96, 128  # hardly any network's own size, so that one bound to its size fails
    tensors = (*module.named_parameters(), *module.named_buffers())
    try:
        images = torch.empty(2, 3, height, width, device="meta")
        shape = functional_call(module, {key: tensor.to("meta") for key, tensor in tensors}, (images,)).shape
    except Exception as error:  # networks raise errors of all types
        found = f"refuses images of {height} x {width} pixels ({error})"
    else:
        # Some transformers put the channels last.
        if len(shape) == 4 and shape[2] <= height and shape[3] <= width:
            return shape[1]
        found = f"gives {tuple(shape)} for two images of {height} x {width} pixels"
    raise ValueError(
        f"model.trunk must be a network that gives a map (B, C, h, w) of images of any size, but {name} {found}; "
        "name a convolutional one"
    )


def _timm_trunk(name: str) -> Trunk:
    import timm

    try:
        # No dropout: some networks would drop single positions of the map, before the pooling.
        module = timm.create_model(name.removeprefix(TIMM), num_classes=0, global_pool="", drop_rate=0.0)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model.trunk must be a network that timm builds without its pooling, but {name} is not ({error}); "
            "name another"
        ) from error
    pixels = timm.data.resolve_model_data_config(module)
    return Trunk(module, _channels(module, name), tuple(pixels["mean"]), tuple(pixels["std"]))


def build_trunk(name: str) -> Trunk:
    """Build a trunk with random weights, whose parameters have the names of torchvision or timm.

    Images may have any height and width, though some networks of timm take multiples of 32 only.

    Args:
        name: `narrow`, another name in `config.training.TRUNKS`, or `timm/<name>`.
    Raises:
        ValueError: the network of timm returns no feature map.
    """
    if name == "narrow":
        return _narrow_trunk()
    if name.startswith(TIMM):
        return _timm_trunk(name)
    resnet = torchvision.models.get_model(name, weights=None)
    children = OrderedDict((key, child) for key, child in resnet.named_children() if key not in {"avgpool", "fc"})
    return Trunk(nn.Sequential(children), resnet.fc.in_features)


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    return module


def freeze_batchnorm(module: nn.Module) -> None:
    """Make batch normalisation use its running statistics and keep them, also after `train()`.

    Scales and shifts can still be learnt.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
            # A bound method, so that a deep copy is bound to itself.
            layer.train = MethodType(_stay, layer)  # type: ignore[method-assign]


class MultiGrain(nn.Module):
    """Network whose one embedding serves classification, object retrieval and copy detection.

    The classifier reads the pooled embedding; margin loss and retrieval read its normalised copy, so that neither task
    fixes the scale of the other. The trunk may run under autocast; all that follows it computes in fp32 or wider.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: str, num_classes: int, p: float = 3.0, learn_p: bool = False) -> None:
        """
        Args:
            trunk: name of the trunk, as in `build_trunk`.
            num_classes: K, at least 1.
            p: GeM exponent, at least 1.
            learn_p: makes p a parameter.
        """
        super().__init__()
        self.trunk, channels, mean, std = build_trunk(trunk)
        self.pool = GeM(p, learn_p)
        self.classifier = nn.Linear(channels, num_classes)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (B, C) of images (B, 3, H, W): RGB in [0, 1], of any size that the trunk takes."""
        return self.pool(self.trunk((images - self.mean) / self.std))

    def head(self, embedding: Tensor) -> Output:
        """Descriptors and logits of embeddings (B, C)."""
        # Autocast would run the classifier in half precision.
        with torch.autocast(embedding.device.type, enabled=False):
            return Output(embedding, l2_normalise(embedding), self.classifier(embedding))

    def forward(self, images: Tensor) -> Output:
        """Embeddings, descriptors and logits of images, as `embed` takes them."""
        return self.head(self.embed(images))


def network_of(saved: checkpoint.Checkpoint) -> tuple[MultiGrain, MultiGrainSpec]:
    """The network of a checkpoint, with averaged weights if it has them, and its settings."""
    spec = MultiGrainSpec.model_validate(saved.state["spec"])
    network = MultiGrain(spec.model.trunk, len(saved.state["classes"]), spec.model.p, spec.model.learn_p)
    network.load_state_dict(saved.part(checkpoint.AVERAGED) or saved.part(checkpoint.NETWORK))
    return network, spec


def load_network(folder: Path) -> tuple[MultiGrain, MultiGrainSpec]:
    """The network of the newest intact checkpoint below a folder, in evaluation mode on the CPU, and its settings.

    Raises:
        FileNotFoundError: the folder holds no intact checkpoint.
    """
    if (saved := checkpoint.latest(folder)) is None:
        raise FileNotFoundError(f"{folder} must hold a checkpoint, but holds no intact one; name a training's folder")
    network, spec = network_of(saved)
    return network.eval(), spec
