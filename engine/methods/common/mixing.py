"""Mixup, CutMix and label smoothing of a batch, as in timm.

Mixup: Zhang et al., ICLR 2018, arXiv 1710.09412. CutMix: Yun et al., ICCV 2019, arXiv 1905.04899. There is one draw for
each batch; each image is mixed with the image at the mirrored position of the batch. The draw comes from torch's
generator on the CPU, which the training loop seeds by seed and step, so a resumed run has the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mixed(
    images: Tensor, labels: Tensor, num_classes: int, *, mixup: float, cutmix: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return mixed images [B, C, H, W] and soft targets [B, classes].

    Args:
        images: Images [B, C, H, W].
        labels: Labels [B].
        num_classes: Number of classes.
        mixup, cutmix: Parameter of the Beta distribution of the mixing share; 0: off. If both are on, each is drawn
            half of the time.
        smoothing: Share of a target that is spread over all classes.
    """
    share = 1.0
    if mixup or cutmix:
        draws = np.random.default_rng(int(torch.randint(2**62, ())))
        cut = bool(cutmix) and (not mixup or draws.random() < 0.5)
        share = float(draws.beta(cutmix, cutmix) if cut else draws.beta(mixup, mixup))
        if cut:
            images, share = _cut(images, share, draws)
        else:
            images = images * share + images.flip(0) * (1 - share)
    targets = F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    return images, targets * share + targets.flip(0) * (1 - share)


def _cut(images: Tensor, share: float, draws: np.random.Generator) -> tuple[Tensor, float]:
    """Return images with a box of their partners pasted in, and the share of the image that is left."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    box_height, box_width = int(height * side), int(width * side)
    y, x = int(draws.integers(height)), int(draws.integers(width))
    top, bottom = max(0, y - box_height // 2), min(height, y + (box_height + 1) // 2)
    left, right = max(0, x - box_width // 2), min(width, x + (box_width + 1) // 2)
    images = images.clone()
    images[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
