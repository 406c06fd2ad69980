"""Gradient ascent (Thudi et al. 2022, arXiv 2109.13398): maximise cross-entropy on the forget set.

L = -CE(f(x), y). It has no lower bound, so it destroys the model if it runs long; the collapse guard ends such a run.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Method, register
from engine.core.phase import Phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.models.losses import cross_entropy

# Learning rate times the width: 4e-5 at width 128. On real images 1e-5 does next to nothing, and 1e-4 costs a
# quarter of the retained accuracy (docs/lab/2026-11-22.md).
LR_PER_WIDTH = 5.12e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscentConfig:
    """Options of gradient ascent.

    Attributes:
        forget_epochs: Passes over the forget set.
        lr: Constant learning rate; null: 0.00512 / width (4e-5 at width 128).
    """

    forget_epochs: float = tunable(1.0, Range(0.25, 4, step=0.25))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH, times=32))

    def __post_init__(self) -> None:
        require(self.forget_epochs > 0, "forget_epochs", self.forget_epochs, "above 0")
        positive_or_null(self, "lr")


@register
class GradientAscent(Method):
    name = "gradient_ascent"
    summary = "cross-entropy on the forget samples, maximised"
    Config = GradientAscentConfig

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, LR_PER_WIDTH)
        return [
            Phase(
                name="forget",
                samples="forget",
                epochs=self.config.forget_epochs,
                lr=lr,
                schedule="constant",
                augment=False,
                guarded=True,
            )
        ]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"forget_ascent": -cross_entropy(model, batch)}
