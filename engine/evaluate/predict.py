"""What a model says of some samples: the raw material of every question asked afterwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from engine.data import Loader
from engine.device import autocast


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


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader, precision: str = "fp32") -> Predictions:
    """Runs the model in eval mode over all samples of a loader, in order."""
    model.eval()
    logits, labels = [], []
    for batch in loader.ordered():
        with autocast(loader.device, precision):
            logits.append(model(batch.images).float().cpu())
        labels.append(batch.labels.cpu())
    return Predictions(torch.cat(logits).numpy(), torch.cat(labels).numpy())
