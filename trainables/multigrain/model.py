"""The MultiGrain network: trunk -> GeM -> embedding -> (descriptor, logits), after the paper."""

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from multigrain.pooling import GeM

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Output(NamedTuple):
    """What the network says of B images."""

    embedding: Tensor
    """(B, C), pooled and not normalised: what the classifier reads."""
    descriptor: Tensor
    """(B, C), the embedding with unit L2 norm: what retrieval and the margin loss compare."""
    logits: Tensor
    """(B, K), one per class."""


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (|x| + eps) along the last axis; a zero vector stays zero, with a finite gradient."""
    # norm() has no gradient at zero: the square root is kept away from it.
    norm = (x.square().sum(dim=-1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt()
    return x / (norm + eps)


def _narrow_trunk() -> tuple[nn.Module, int]:
    """A three-stage residual trunk for images of about 32 pixels: (B, 3, 32, 32) -> (B, 128, 4, 4)."""

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
    return trunk, 128


def build_trunk(name: str) -> tuple[nn.Module, int]:
    """The network before the pooling, with random weights, and the number of channels C of its map.

    `narrow`, or the name of a torchvision ResNet. Input (B, 3, H, W), output (B, C, h, w).
    """
    if name == "narrow":
        return _narrow_trunk()
    resnet = torchvision.models.get_model(name, weights=None)
    return nn.Sequential(*list(resnet.children())[:-2]), resnet.fc.in_features


class MultiGrain(nn.Module):
    """One network for class, object and copy.

    The classifier reads the embedding as it is pooled; the margin loss and retrieval read its
    normalised copy, so that neither goal fixes the other's scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: str, num_classes: int, p: float = 3.0) -> None:
        """
        Args:
            trunk: a name that `build_trunk` knows.
            num_classes: K, at least 1.
            p: GeM exponent, at least 1.
        """
        super().__init__()
        self.trunk, channels = build_trunk(trunk)
        self.pool = GeM(p)
        self.classifier = nn.Linear(channels, num_classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Output:
        """
        Args:
            images: (B, 3, H, W), RGB in [0, 1]; any height and width that the trunk takes.
        """
        embedding = self.pool(self.trunk((images - self.mean) / self.std))
        return Output(embedding, l2_normalise(embedding), self.classifier(embedding))
