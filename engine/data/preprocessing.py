"""Resizing, cropping and normalisation of images for a model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from engine.errors import UserError

logger = logging.getLogger(__name__)

INTERPOLATIONS = {
    "nearest": InterpolationMode.NEAREST,
    "nearest-exact": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
# center: shorter side to size / crop_pct, then the centre. squash: both sides to size / crop_pct, for any shape.
CROP_MODES = ("center", "squash")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a model's images, from its pretrained_cfg (timm's keys).

    Attributes:
        size: (height, width) in pixels.
        mean, std: One value for each channel, of pixels scaled to [0, 1].
        crop_pct: Size of the centre crop relative to the resized image.
        interpolation: Interpolation of the resizing.
        crop_mode: See `CROP_MODES`.
        unknown: Why mean and std are not known, empty if they are; if not, only normalised images are accepted.
        crop_rounds_down: The position of the crop is rounded down, as in Hugging Face's processors, not to the nearest
            even number of pixels as in torchvision.
        crop_fitting: uint8 images of exactly `size` are resized and cropped too, as in timm and Hugging Face. False
            leaves them unchanged, since crop_pct is then timm's default and was not chosen for such images.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: InterpolationMode
    crop_mode: str = "center"
    unknown: str = ""
    crop_rounds_down: bool = False
    crop_fitting: bool = False

    def check(self, samples: Any) -> None:
        """Check that the samples can be normalised, and warn about floats that do not look normalised.

        Args:
            samples: `engine.data.Samples`.

        Raises:
            UserError: mean and std are not known, and the samples are not normalised.
        """
        if self.unknown and len(samples) and samples.tensor(0, len(self.mean)).dtype == torch.uint8:
            raise UserError(self.unknown)
        values = self._unlike_normalised(samples)
        if values:
            logger.warning(
                "%s: its images are floats from %g to %g, which are taken as normalised (mean %s, std %s) and not "
                "changed; if they are not, normalise them in the dataset, or let it give PIL images or uint8 tensors",
                samples.name,
                *values,
                short(self.mean),
                short(self.std),
            )

    def _unlike_normalised(self, samples: Any) -> tuple[float, float] | None:
        """Return the least and greatest value of some float images that are probably pixels, not normalised.

        These lie in [0, 1] or [0, 255]. None for other images, and if normalising would leave them in [0, 1].
        """
        if not any(self.mean) and all(each == 1 for each in self.std):
            return None
        least, greatest = math.inf, -math.inf
        for index in np.unique(np.linspace(0, len(samples) - 1, min(len(samples), 16)).astype(np.int64)).tolist():
            try:
                image = samples.tensor(index, len(self.mean))
            except UserError:  # the loader reports it
                continue
            if image.dtype == torch.uint8:
                return None
            least, greatest = min(least, float(image.min())), max(greatest, float(image.max()))
        # Normalised pixels of 16 images have negative ones among them, and none as great as 20.
        return (least, greatest) if 0 <= least <= greatest and (greatest <= 1 or greatest > 20) else None

    def resize(self, image: Tensor) -> Tensor:
        """Apply timm's evaluation transform: resize by `crop_mode`, then crop the centre. Exception: see
        `crop_fitting`.
        """
        if tuple(image.shape[-2:]) == self.size and not (self.crop_fitting and image.dtype == torch.uint8):
            return image
        target = self._target(*image.shape[-2:])
        resized = TF.resize(image, target, self.interpolation, antialias=True)
        if not self.crop_rounds_down:
            return TF.center_crop(resized, list(self.size))
        top, left = ((t - s) // 2 for t, s in zip(target, self.size, strict=True))
        return TF.crop(resized, top, left, *self.size)

    def reduction(self, height: int, width: int) -> int:
        """Return by which factor an image may be decoded smaller without `resize` having to enlarge it."""
        target = self._target(height, width)
        return min(height // target[0], width // target[1])

    def _target(self, height: int, width: int) -> list[int]:
        """Return (height, width) to resize to before the crop, rounded as in timm's evaluation transform."""
        wanted = [int(s / self.crop_pct) for s in self.size]
        if self.crop_mode == "squash":
            return wanted
        if wanted[0] == wanted[1]:  # torchvision's Resize(int) truncates the longer side
            longer = int(wanted[0] * max(height, width) / min(height, width))
            return [wanted[0], longer] if height <= width else [longer, wanted[1]]
        ratio = min(height / wanted[0], width / wanted[1])  # timm's ResizeKeepRatio rounds both sides
        return [round(height / ratio), round(width / ratio)]

    def normalise(self, images: Tensor) -> Tensor:
        """Return normalised float images; float images are normalised already.

        Raises:
            UserError: mean and std are not known.
        """
        if images.dtype != torch.uint8:
            return images.float()
        if self.unknown:
            raise UserError(self.unknown)
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Return the values by timm's keys, for YAML and JSON."""
        return {
            "input_size": [len(self.mean), *self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "interpolation": next(name for name, mode in INTERPOLATIONS.items() if mode is self.interpolation),
            "crop_mode": self.crop_mode,
        }

    def line(self) -> str:
        """Return the values as text on one line."""
        named = self.to_dict()
        size = f"{self.size[0]} x {self.size[1]}"
        crop = f"crop {self.crop_pct:g}{' (squash)' if self.crop_mode == 'squash' else ''}"
        if self.crop_pct < 1 and not self.crop_fitting:
            crop += f" (not of images of {size}; --crop-pct {self.crop_pct:g} crops them too)"
        return f"{size} pixels, mean {short(self.mean)}, std {short(self.std)}, {crop}, {named['interpolation']}"


def short(numbers: Sequence[float]) -> str:
    """Return `0.5` if all numbers are equal, else all of them."""
    shown = [f"{each:.4g}" for each in numbers]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)
