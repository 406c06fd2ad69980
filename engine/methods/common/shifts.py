"""Small shifts of images, whose predictions rest less on the exact pixels that were trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor


def one_shift(images: Tensor, view: int) -> Tensor:
    """Return the copies of images [B, C, H, W] that `shifts` yields as number `view`."""
    return next(itertools.islice(shifts(images), view, None))


def shifts(images: Tensor) -> Iterator[Tensor]:
    """Yield copies [B, C, H, W] moved by 1/16 and 1/8 of the side along an axis, or 3/32 along both; edges mirrored."""
    height, width = images.shape[-2:]
    down, across = _max_shift(height), _max_shift(width)
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    for i, j in offsets(height, width):
        yield padded[..., down + i : down + i + height, across + j : across + j + width]


def offsets(height: int, width: int) -> list[tuple[int, int]]:
    """Return the (vertical, horizontal) shifts in pixels for a size of image, without repeats of small images."""
    steps = [(i * size, j * size) for size in (1 / 16, 1 / 8) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    steps += [(i * 3 / 32, j * 3 / 32) for i in (1, -1) for j in (1, -1)]
    return list(
        dict.fromkeys(
            (_shift_in_pixels(i, height, _max_shift(height)), _shift_in_pixels(j, width, _max_shift(width)))
            for i, j in steps
        )
    )


def _max_shift(side: int) -> int:
    """Return the largest shift along a side, in pixels."""
    return max(1, side // 8)


def _shift_in_pixels(share: float, side: int, most: int) -> int:
    """Return a shift in whole pixels: 0 for a share of 0, else at least one pixel and at most `most`."""
    count = min(most, max(1, round(abs(share) * side))) if share else 0
    return count if share > 0 else -count
