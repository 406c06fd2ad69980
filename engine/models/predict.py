"""What a model says of some samples: the raw material of every question asked afterwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from engine.data import Batch, Loader
from engine.models.vit import outputs
from engine.runtime.device import autocast


@dataclasses.dataclass(frozen=True)
class Predictions:
    """logits: float32 [n, classes]. labels: int64 [n]. In the order of the samples."""

    logits: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Top-1, a fraction in [0, 1]."""
        return float((self.logits.argmax(1) == self.labels).mean())

    @property
    def log_probabilities(self) -> np.ndarray:
        """float64 [n, classes]."""
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


@torch.no_grad()  # not inference_mode: ZeRO-3 may keep what it gathers here for the next step
def predict(model: nn.Module, loader: Loader, precision: str = "fp32") -> Predictions:
    """Runs the model in eval mode over all samples of a loader, in order; each rank takes its share of them.

    Images that the loader leaves out as bad are left out. precision: of autocast, for a model whose weights are
    float32; others keep their own.
    """
    model.eval()
    if next(model.parameters()).dtype.itemsize < 4:
        precision = "fp32"

    def answer(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast(loader.device, precision):
            return outputs(model, batch.images).float(), batch.labels

    logits, labels = loader.rows(answer)
    found = labels >= 0
    return Predictions(logits[found].numpy(), labels[found].numpy())
