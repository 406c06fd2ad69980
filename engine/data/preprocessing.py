"""How images are resized, cropped and normalised for a model."""

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
# center: shorter side to size / crop_pct, then the centre. squash: both sides to size / crop_pct, whatever the shape.
CROP_MODES = ("center", "squash")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a model takes its images, from its pretrained_cfg (timm's keys).

    size: (height, width) in pixels. mean, std: a value a channel, of pixels scaled to [0, 1]. crop_pct: size of the
    centre crop by that of the resized image. crop_mode: see `CROP_MODES`. crop_rounds_down: the place of the crop is
    rounded down, as Hugging Face's processors do, not to the nearest even number of pixels as torchvision does.
    crop_fitting: uint8 images of exactly `size` are resized and cropped too, as timm and Hugging Face do; False leaves
    them as they are, since crop_pct is then timm's default and was not chosen for such images.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: InterpolationMode
    crop_mode: str = "center"
    unknown: str = ""  # why mean and std are not known; then only images that are already normalised are taken
    crop_rounds_down: bool = False
    crop_fitting: bool = False

    def check(self, samples: Any) -> None:
        """Raises UserError where mean and std are not known and the samples (`engine.data.Samples`) not normalised."""
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
        """(least, greatest) value of some float images that lie in [0, 1] or [0, 255], as pixels do that were not
        normalised; None for others, and where normalising would leave them in [0, 1]."""
        if not any(self.mean) and all(each == 1 for each in self.std):
            return None
        least, greatest = math.inf, -math.inf
        for index in np.unique(np.linspace(0, len(samples) - 1, min(len(samples), 16)).astype(np.int64)).tolist():
            try:
                image = samples.tensor(index, len(self.mean))
            except UserError:  # the loader names it
                continue
            if image.dtype == torch.uint8:
                return None
            least, greatest = min(least, float(image.min())), max(greatest, float(image.max()))
        # Normalised pixels of 16 images have negative ones among them, and none as great as 20.
        return (least, greatest) if 0 <= least <= greatest and (greatest <= 1 or greatest > 20) else None

    def resize(self, image: Tensor) -> Tensor:
        """timm's evaluation transform: resized by `crop_mode`, then the centre. Exception: see `crop_fitting`."""
        if tuple(image.shape[-2:]) == self.size and not (self.crop_fitting and image.dtype == torch.uint8):
            return image
        target = self._target(*image.shape[-2:])
        resized = TF.resize(image, target, self.interpolation, antialias=True)
        if not self.crop_rounds_down:
            return TF.center_crop(resized, list(self.size))
        top, left = ((t - s) // 2 for t, s in zip(target, self.size, strict=True))
        return TF.crop(resized, top, left, *self.size)

    def reduction(self, height: int, width: int) -> int:
        """How many times smaller an image may be decoded, so that `resize` still makes it no larger."""
        target = self._target(height, width)
        return min(height // target[0], width // target[1])

    def _target(self, height: int, width: int) -> list[int]:
        """(height, width) to resize to before the crop, rounded as timm's evaluation transform rounds."""
        wanted = [int(s / self.crop_pct) for s in self.size]
        if self.crop_mode == "squash":
            return wanted
        if wanted[0] == wanted[1]:  # torchvision's Resize(int) cuts the fraction of the longer side off
            longer = int(wanted[0] * max(height, width) / min(height, width))
            return [wanted[0], longer] if height <= width else [longer, wanted[1]]
        ratio = min(height / wanted[0], width / wanted[1])  # timm's ResizeKeepRatio rounds both sides
        return [round(height / ratio), round(width / ratio)]

    def normalise(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images.float()
        if self.unknown:
            raise UserError(self.unknown)
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """For YAML and JSON, by timm's keys."""
        return {
            "input_size": [len(self.mean), *self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "interpolation": next(name for name, mode in INTERPOLATIONS.items() if mode is self.interpolation),
            "crop_mode": self.crop_mode,
        }

    def line(self) -> str:
        """In words, on one line."""
        named = self.to_dict()
        size = f"{self.size[0]} x {self.size[1]}"
        crop = f"crop {self.crop_pct:g}{' (squash)' if self.crop_mode == 'squash' else ''}"
        if self.crop_pct < 1 and not self.crop_fitting:
            crop += f" (not of images of {size}; --crop-pct {self.crop_pct:g} crops them too)"
        return f"{size} pixels, mean {short(self.mean)}, std {short(self.std)}, {crop}, {named['interpolation']}"


def short(numbers: Sequence[float]) -> str:
    """`0.5` where all are equal, else all of them."""
    shown = [f"{each:.4g}" for each in numbers]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)
