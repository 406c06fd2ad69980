"""Random labels (Golatkar et al. 2020, arXiv 1911.04933): train on the forget set with wrong labels and on the retain
set.

Each forget sample gets one wrong label, drawn once and uniformly among the other classes. SalUn's code draws labels
anew in every epoch or batch, and the true label may be drawn.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import Phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.errors import UserError
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.losses import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLabelsConfig:
    """Options of random labels.

    Attributes:
        epochs: Passes over forget set and retain set together.
        lr: Peak learning rate; null: as in fine-tuning.
    """

    epochs: float = tunable(10.0, Range(1, 10, step=1))
    lr: float | None = tunable(None, rate(RETAIN_LR_PER_WIDTH))

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")


@register
class RandomLabels(Method):
    name = "random_labels"
    summary = "forget samples with random wrong labels, and the retained ones, 10 epochs"
    Config = RandomLabelsConfig

    def __init__(self, config: RandomLabelsConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.num_classes < 2:
            raise UserError("random_labels: a model with one class has no wrong labels")
        rng = np.random.default_rng([context.run.seed, len(context.forget)])
        shift = rng.integers(1, context.num_classes, size=len(context.forget))
        wrong = (context.forget.labels + shift) % context.num_classes
        # Samples of "all" are the forget set followed by the retain set.
        self.labels = torch.from_numpy(np.concatenate([wrong, context.retain.labels])).to(context.device)

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, RETAIN_LR_PER_WIDTH)
        return [Phase(name="forget", samples="all", epochs=self.config.epochs, lr=lr)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"relabelled_ce": cross_entropy(model, batch, self.labels[batch.index.to(self.labels.device)])}
