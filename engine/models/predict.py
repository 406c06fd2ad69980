"""Predictions of a model for a set of samples, the input of every measure."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.data import Batch, Loader
from engine.models.vit import outputs
from engine.runtime.device import autocast


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for samples, in their order.

    Attributes:
        logits: float32 [n, classes].
        labels: int64 [n].
    """

    logits: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """1.0 or 0.0 for each sample, float64 [n]: whether its class is predicted."""
        return (self.logits.argmax(1) == self.labels).astype(np.float64)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return float(self.correct.mean())

    @property
    def log_probabilities(self) -> np.ndarray:
        """Log-probabilities, float64 [n, classes]."""
        shifted = self.logits.astype(np.float64) - self.logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    @property
    def losses(self) -> np.ndarray:
        """Cross-entropy [n] in nats."""
        return -self.log_probabilities[np.arange(len(self)), self.labels]

    @property
    def confidence(self) -> np.ndarray:
        """Probability [n] of the true class."""
        return np.exp(-self.losses)

    def take(self, indices: np.ndarray) -> Predictions:
        return Predictions(self.logits[indices], self.labels[indices])


# Images are moved by this share of their width, and at least by one pixel.
_MOVED = 1 / 64


@contextlib.contextmanager
def moved_images(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model see its input images [B, C, H, W] moved to the right and down, their edges repeated."""

    def move(_model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *others = inputs
        pixels = max(1, round(_MOVED * images.shape[-1]))
        height, width = images.shape[-2:]
        moved = nn.functional.pad(images, (pixels, 0, pixels, 0), mode="replicate")[..., :height, :width]
        return (moved, *others)

    handle = model.register_forward_pre_hook(move)
    try:
        yield model
    finally:
        handle.remove()


@torch.no_grad()  # not inference_mode: ZeRO-3 may reuse the weights gathered here in the next step
def predict(model: nn.Module, loader: Loader, precision: str = "fp32") -> Predictions:
    """Run the model in eval mode over all readable samples of a loader, in order; each rank computes its share.

    Args:
        model: The model.
        loader: Loader of the samples.
        precision: Autocast precision for a model with float32 weights; other models keep their own.
    """
    model.eval()
    if next(model.parameters()).dtype.itemsize < 4:
        precision = "fp32"

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast(loader.device, precision):
            return outputs(model, batch.images).float(), batch.labels

    logits, labels = loader.rows(compute)
    found = labels >= 0
    return Predictions(logits[found].numpy(), labels[found].numpy())
