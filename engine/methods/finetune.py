"""Fine-tuning: cross-entropy on the retain set alone. The baseline that every method must beat."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Method, register
from engine.core.phase import Phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.models.losses import cross_entropy

# Peak learning rate of all retain stages times the width of the model: 1.5e-3 at width 128. See docs/lab/2026-11-21.md.
RETAIN_LR_PER_WIDTH = 0.192


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of fine-tuning.

    Attributes:
        retain_epochs: Passes over the retain set.
        lr: Peak learning rate; null: 0.192 / width.
    """

    retain_epochs: float = tunable(10.0, Range(1, 10, step=1))
    lr: float | None = tunable(None, rate(RETAIN_LR_PER_WIDTH))

    def __post_init__(self) -> None:
        require(self.retain_epochs > 0, "retain_epochs", self.retain_epochs, "above 0")
        positive_or_null(self, "lr")


@register
class Finetune(Method):
    name = "finetune"
    summary = "cross-entropy on the retained samples, 10 epochs"
    Config = FinetuneConfig

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, RETAIN_LR_PER_WIDTH)
        return [Phase(name="retain", samples="retain", epochs=self.config.retain_epochs, lr=lr)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}
