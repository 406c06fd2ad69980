"""Retraining: the same architecture from fresh weights, on the retained samples alone. Exact, and the cost to beat.

The default recipe is that of a small ViT on small images (AdamW 1e-3, one cycle, 30 epochs); a model trained by
another recipe is retrained by that one.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from engine.config import require
from engine.data import Batch
from engine.methods.base import Method, Phase, cross_entropy, register
from engine.models.checkpoint import spec_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """epochs: passes over the retained samples. lr: peak rate of the one-cycle schedule."""

    epochs: float = 30.0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.lr > 0, "lr", self.lr, "above 0")


@register
class Retrain(Method):
    name = "retrain"
    summary = "fresh weights, trained on the retained samples: the reference"
    Config = RetrainConfig
    exact = True

    def initial_model(self, model: nn.Module) -> nn.Module:
        return spec_of(model).build(seed=self.context.run.seed)

    def phases(self) -> list[Phase]:
        return [Phase(name="retain", samples="retain", epochs=self.config.epochs, lr=self.config.lr)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}
