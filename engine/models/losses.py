"""Loss functions that several methods share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.data import Batch
from engine.models.vit import outputs


def cross_entropy(model: nn.Module, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of a batch.

    Args:
        model: The model.
        batch: The batch.
        labels: Labels [B] in place of those of the batch.
    """
    return F.cross_entropy(outputs(model, batch.images).float(), batch.labels if labels is None else labels)
