"""Training and evaluation transforms: uint8 images in, float images in [0, 1] out (paper Table C.1)."""

import io

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from multigrain.spec import AugmentSettings

# PCA of ImageNet's colours (AlexNet's lighting noise): standard deviations, and one row per channel.
_COLOUR_STD = torch.tensor([0.2175, 0.0188, 0.0045])
_COLOUR_AXES = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def light(image: Tensor, alpha: Tensor, std: float) -> Tensor:
    """Lighting noise: shift a float image (3, H, W) along the colour axes, then divide by 1 + std, clamp to [0, 1].

    The division belongs to the published recipe, which evaluates without it.

    Args:
        alpha: (3,) noise, one draw per axis.
    """
    shift = (_COLOUR_AXES * alpha * _COLOUR_STD).sum(dim=1)
    return ((image + shift[:, None, None]) / (1 + std)).clamp(0, 1)


class _Compression(torch.nn.Module):
    """JPEG of a random quality from 10 to 90, by Pillow: torchvision's own is on its way out."""

    def forward(self, image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        quality = int(torch.randint(10, 91, ()))
        v2.functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as compressed:
            return v2.functional.pil_to_tensor(compressed)


class TrainTransform:
    """The random transform of one view: (3, H, W) uint8 -> (3, size, size) float in [0, 1].

    Draws from torch's global generator.
    """

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        flip = v2.RandomHorizontalFlip(settings.flip)
        crop = v2.RandomResizedCrop(size, scale=(settings.crop, 1.0), antialias=True)
        strength = settings.jitter
        jitter = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)
        steps: list[torch.nn.Module] = [crop, flip]
        if settings.policy == "copy":
            blur = v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=(0.1, 2.0))], p=0.3)
            jpeg = v2.RandomApply([_Compression()], p=0.3)
            steps = [
                v2.RandomRotation(settings.rotation, v2.InterpolationMode.BILINEAR),
                crop,
                flip,
                jitter,
                blur,
                jpeg,
            ]
        elif settings.policy == "full":
            steps += [jitter]
        self._uint8 = v2.Compose(steps)
        self._lighting = settings.lighting if settings.policy != "torch" else 0.0

    def __call__(self, image: Tensor) -> Tensor:
        view = v2.functional.to_dtype(self._uint8(image), torch.float32, scale=True)
        if self._lighting:
            view = light(view, torch.randn(3) * self._lighting, self._lighting)
        return view


def evaluation_crop(image: Tensor, size: int) -> Tensor:
    """The standard test crop: smaller side to int(256/224 size), the central square of `size` out of it.

    (3, H, W) uint8 -> (3, size, size) float in [0, 1].
    """
    resized = v2.functional.resize(image, [int(size * 256 / 224)], antialias=True)
    cropped = v2.functional.center_crop(resized, [size, size])
    return v2.functional.to_dtype(cropped, torch.float32, scale=True)
