"""GS-LoRA (Zhao et al., Continual Forgetting for Pre-trained Vision Models, CVPR 2024, arXiv 2403.11530): low-rank
updates of the MLPs of few blocks, which keep the retain set and raise the loss on the forget set up to a bound.

    L = CE_r + beta ReLU(BND - CE_f) + alpha sum_blocks sqrt(sum ||A||^2 + ||B||^2)

CE_r and CE_f are means over a retain batch and a forget batch of the same step. A and B are the updates W + B A, rank
8, of both linear layers of a block's MLP; nothing else is trained. The last term, a group lasso, drives the updates of
whole blocks towards zero; it is left out of the first epochs (the public code's warm-up). The result is merged.

Our choices, because the published numbers hold for CosFace losses of scale 64 and for forgetting whole classes:
- BND. Published: 105 to 110. Here, by default, the mean over the forget set of the loss to expect of a model that was
  not trained on it: the original's cross-entropy on held-out samples if the retain set has the same class, else
  2 ln(classes), twice that of a uniform prediction.
- alpha, beta, the rate, a forget batch that is a fraction of the retain batch, and epochs over the whole retain set.
- LoRA's scale is 1 (engine.models.trainable), and there is no moving average of the weights.
On several ranks, and with accumulation, ReLU is taken of each micro-batch's mean.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.heldout import predictions_of
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch, Samples
from engine.errors import UserError
from engine.models.losses import cross_entropy
from engine.models.trainable import LowRank, low_ranks, restrict

# Peak rate of the low-rank updates times the width of the model.
LORA_LR_PER_WIDTH = 0.64


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSLoRAConfig:
    """Options of GS-LoRA.

    Attributes:
        retain_epochs: Passes over the retain set.
        lr: Peak learning rate; null: 0.64 / width.
        rank: Rank of the updates.
        beta: Weight of the bounded forget loss.
        bound: Value in nats up to which the forget loss is raised; null: that of held-out samples.
        alpha: Weight of the group lasso.
        warmup: Epochs without the group lasso.
        forget_share: Size of the forget batch relative to the retain batch.
    """

    retain_epochs: float = tunable(5.0, Range(1, 8, step=1))
    lr: float | None = tunable(None, rate(LORA_LR_PER_WIDTH))
    rank: int = 8
    beta: float = tunable(0.2, Range(0.02, 2.0, log=True))
    bound: float | None = None
    alpha: float = tunable(1e-3, Range(1e-5, 1e-2, log=True))
    warmup: int = 1
    forget_share: float = 0.5

    def __post_init__(self) -> None:
        require(self.retain_epochs > 0, "retain_epochs", self.retain_epochs, "above 0")
        positive_or_null(self, "lr")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.beta >= 0, "beta", self.beta, "0 or more")
        positive_or_null(self, "bound")
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(0 < self.forget_share <= 1, "forget_share", self.forget_share, "in (0, 1]")


@register
class GSLoRA(Method):
    name = "gs_lora"
    summary = "low-rank updates of few MLPs: keep the retained samples, raise the forget loss to a bound"
    Config = GSLoRAConfig

    def __init__(self, config: GSLoRAConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.run.trainable != "all":
            raise UserError(
                f"option trainable={context.run.trainable!r}: {self.name} trains low-rank updates of its own (option "
                "rank); leave trainable out"
            )
        self.bound, self._epochs = config.bound, 0
        self._groups: list[list[LowRank]] = []

    def initial_model(self, model: nn.Module) -> nn.Module:
        restrict(model, f"lora:{self.config.rank}", self.context.run.seed, parts=("mlp",))
        self._groups = low_ranks(model)
        return model

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, LORA_LR_PER_WIDTH)
        return [paired_phase(self.config.retain_epochs, lr, paired_share=self.config.forget_share)]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        bound = taken.held_out if self.config.bound is None else 0
        return [ExtraPasses(name="bounds by held-out samples", images=bound)]

    def prepare(self, phase: Phase) -> None:
        if self.bound is None:
            self.bound = self._bound()

    def _bound(self) -> float:
        unknown = 2 * math.log(self.context.num_classes)
        if not self.known.any():
            return unknown
        held_out = predictions_of(self.context.original, self.compared(), self.context)
        return self.matched(held_out.losses, held_out.labels, unknown)

    @property
    def known(self) -> np.ndarray:
        """Whether the retain set has the class of each forget sample, bool [n]."""
        return np.isin(self.context.forget.labels, np.unique(self.context.retain.labels))

    def compared(self) -> Samples:
        """Return the held-out samples that the forget samples are compared with."""
        return self.held_out("which the forget samples are compared with, or set the bounds")

    def matched(self, values: np.ndarray, labels: np.ndarray, unknown: float) -> float:
        """Return the mean over the forget set of a value that is known for held-out samples.

        A forget sample counts with the mean of its class, or with the mean of all values if no held-out sample has the
        class.

        Args:
            values: float [n], values of held-out samples.
            labels: int [n], their labels.
            unknown: Value of a forget sample whose class the retain set does not have.
        """
        of_class = {label: values[labels == label].mean() for label in np.unique(labels)}
        known = [of_class.get(label, values.mean()) for label in self.context.forget.labels]
        return float(np.where(self.known, known, unknown).mean())

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {"bound": torch.tensor(self.bound, dtype=torch.float64)}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.bound = float(prepared["bound"])

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch), **self.group_lasso()}

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"forget_bounded": self.bounded(cross_entropy(model, batch))}

    def bounded(self, forget_ce: Tensor) -> Tensor:
        """Return the bounded forget loss of a batch, from its mean cross-entropy."""
        assert self.bound is not None  # prepared
        return self.config.beta * F.relu(self.bound - forget_ce)

    def group_lasso(self) -> dict[str, Tensor]:
        """Return the weighted sum over blocks of the norm of all their updates; empty during the warm-up."""
        if self._epochs < self.config.warmup or not self.config.alpha:
            return {}
        weights = [
            torch.cat([w.float().flatten() for each in group for w in (each.A, each.B)]) for group in self._groups
        ]
        return {"group_lasso": self.config.alpha * torch.stack([torch.linalg.vector_norm(w) for w in weights]).sum()}

    def should_stop(self, model: nn.Module, phase: Phase, epoch: int) -> str | None:
        self._epochs = epoch + 1
        return None

    def state(self) -> dict[str, int]:
        return {"epochs": self._epochs}

    def load_state(self, state: dict[str, int]) -> None:
        self._epochs = state["epochs"]
