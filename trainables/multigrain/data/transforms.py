"""Transforms of training and evaluation images (paper Table C.1), from uint8 to float in [0, 1].

A training view is made in two steps. `TrainTransform` runs in the process that reads the files, on uint8, and draws all
random numbers. `colour` does the operations on floats, for a whole batch on the network's device.
"""

import io
from itertools import permutations
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from multigrain.config.training import AugmentSettings
from multigrain.data.decoding import scaled_shape

# PCA of ImageNet's colours (AlexNet's lighting noise): standard deviations, and one row per channel.
_COLOUR_STD = torch.tensor([0.2175, 0.0188, 0.0045])
_COLOUR_AXES = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

EvaluationTransform = Literal["crop", "rect"]

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_ORDERS = list(permutations((_BRIGHTNESS, _CONTRAST, _SATURATION)))
# Columns of the parameters of `colour`, which have one row for each view.
_FACTORS, _ORDER, _GREY, _SHIFT, _DIVISOR = slice(0, 3), slice(3, 6), 6, slice(7, 10), 10
NEUTRAL = torch.tensor([1.0, 1, 1, _BRIGHTNESS, _CONTRAST, _SATURATION, 0, 0, 0, 0, 1])
"""(11,), the parameters of `colour` that change nothing: factors of brightness, contrast and saturation; the order of
these three; 1 for a grey view; the shifts of red, green and blue; their divisor."""


def scale(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def lighting(alpha: Tensor) -> Tensor:
    """Return the shift (3,) of red, green and blue for lighting noise `alpha` (3,), one draw for each axis."""
    return (_COLOUR_AXES * alpha * _COLOUR_STD).sum(dim=1)


def _grey(images: Tensor) -> Tensor:
    """Convert colour (B, 3, H, W) to grey (B, 1, H, W)."""
    return torch.add(0.2989 * images[:, 0:1], images[:, 1:2], alpha=0.587).add_(images[:, 2:3], alpha=0.114)


def colour(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply jitter, grey and lighting to training views, on their device and without waiting for it.

    Brightness, contrast and saturation are those of torchvision's ColorJitter, with a clamp to [0, 1] after each.
    Lighting is (x + shift) / divisor, clamped.

    Args:
        images: (B, 3, H, W) uint8.
        parameters: (B, 11) on the same device, rows like `NEUTRAL`; `NEUTRAL` itself gives images / 255 exactly.
    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """
    x = scale(images)
    for which in parameters[:, _ORDER].long().unbind(dim=1):
        factor = parameters[:, _FACTORS].gather(1, which[:, None])[:, :, None, None]
        contrast, saturation = ((which == kind)[:, None, None, None] for kind in (_CONTRAST, _SATURATION))
        grey = _grey(x)
        # The view is blended with black, its mean grey, or its grey version.
        other = torch.addcmul(contrast * grey.mean(dim=(2, 3), keepdim=True), saturation, grey)
        x = torch.lerp(other, x, factor).clamp_(0, 1)
    x = torch.where(parameters[:, _GREY, None, None, None] > 0, _grey(x), x)
    gain = 1 / parameters[:, _DIVISOR, None, None, None]
    return torch.addcmul(parameters[:, _SHIFT, None, None] * gain, x, gain).clamp_(0, 1)


_JITTER = {"full": 1.0, "copy": 1.0, "senet": 2 / 3}
"""Policies with jitter and lighting -> factor on the strengths of the jitter."""


def paints(settings: AugmentSettings) -> bool:
    """Return whether `colour` does more than `scale`."""
    return settings.policy in _JITTER or settings.grey > 0


class _Compression(torch.nn.Module):
    """JPEG compression of random quality from 10 to 90, by Pillow, because torchvision's is deprecated."""

    def forward(self, image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        quality = int(torch.randint(10, 91, ()))
        v2.functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as compressed:
            return v2.functional.pil_to_tensor(compressed)


class TrainTransform:
    """Random transform of one view: (3, H, W) uint8 -> (3, size, size) uint8, and the view's parameters of `colour`.

    Random numbers come from torch's global generator. `autoaugment` is torchvision's policy for ImageNet, which differs
    from the authors': 25 pairs of operations instead of 24, rotation in both directions instead of counter-clockwise,
    solarisation from 255 instead of 256, shear by the nearest pixel instead of bicubic.
    """

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        self.size, self.settings = size, settings
        ratio = (1 / settings.ratio, settings.ratio)
        self._crop = v2.RandomResizedCrop(size, scale=(settings.crop, 1.0), ratio=ratio)
        self._before: list[torch.nn.Module] = []
        self._after: list[torch.nn.Module] = []
        grey_level = 128
        if settings.policy == "copy":
            self._before = [v2.RandomRotation(settings.rotation, v2.InterpolationMode.BILINEAR)]
            blur = v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=(0.1, 2.0))], p=settings.blur)
            self._after = [blur, v2.RandomApply([_Compression()], p=settings.jpeg)]
        elif settings.policy == "autoaugment":
            self._after = [v2.AutoAugment(fill=grey_level)]
        if settings.randaugment:
            self._after.append(v2.RandAugment(2, settings.randaugment, fill=grey_level))
        share = _JITTER.get(settings.policy, 0.0)
        self._strengths = [share * x for x in (settings.brightness, settings.contrast, settings.saturation)]
        self._lighting = settings.lighting if share else 0.0

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        for step in self._before:
            image = step(image)
        box = self._crop.make_params([image])
        top, left = box["top"], box["left"]
        crop = image[None, :, top : top + box["height"], left : left + box["width"]]
        # torchvision's modules do the same in twice the time.
        view = interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)[0]
        flip, grey, order, *factors = torch.rand(6).tolist()  # in one call: single tensors take longer
        if flip < self.settings.flip:
            view = view.flip(-1)
        for step in self._after:
            view = step(view)
        shift = lighting(self._lighting * torch.randn(3))
        return view, torch.tensor(
            [
                *(1 + strength * (2 * drawn - 1) for strength, drawn in zip(self._strengths, factors, strict=True)),
                *_ORDERS[int(order * len(_ORDERS))],
                grey < self.settings.grey,
                *shift.tolist(),
                1 + self._lighting,
            ]
        )


def rect_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width of an image whose larger side is scaled to `size`: rounded down, but at least 1."""
    longer = max(height, width)
    return max(1, height * size // longer), max(1, width * size // longer)


def evaluation_pixels(image: Tensor, transform: EvaluationTransform, size: int) -> Tensor:
    """Resize a held-out image for the network: (3, H, W) uint8 -> (3, h, w) uint8.

    `crop` scales the smaller side to int(256/224 size) and cuts out the central square of `size`. `rect` scales the
    larger side to `size` and keeps the proportions.

    Raises:
        ImageError: the image is so narrow that it would have more than `MOST_PIXELS` when scaled.
    """
    if transform == "rect":
        return v2.functional.resize(image, list(rect_shape(image.shape[1], image.shape[2], size)), antialias=True)
    side, (height, width) = int(size * 256 / 224), image.shape[1:]
    resized = v2.functional.resize(image, list(scaled_shape(height, width, side)), antialias=True)
    return v2.functional.center_crop(resized, [size, size])


def evaluation_view(image: Tensor, transform: EvaluationTransform, size: int) -> Tensor:
    """Return `evaluation_pixels` as float in [0, 1]."""
    return scale(evaluation_pixels(image, transform, size))
