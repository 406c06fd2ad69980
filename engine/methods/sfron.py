"""SFR-on (Huang et al., NeurIPS 2024, "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement",
arXiv 2409.19732): salient forgetting steps, each followed by repair on retain samples.

Before the first step, with F the mean over batches of the squared gradient of the original's batch cross-entropy:

    M = [F_forget / F_retain >= g]                                    a mask over the weights; g = 1

Forget step t of T, on forget samples i with cross-entropy l_i, ascent along

    M * grad( A_t sum_i c_i l_i / sum_i c_i ),  c_i = l_i^-q (a constant),  A_t = A (1 + cos(pi t/T)) / 2

then `repair_steps` steps of cross-entropy on retain samples, and so on. So the samples with the smallest loss are
pushed hardest, and only weights that matter more to the forget set than to the retain set are changed.

As in the authors' setting for transformers, AdamW takes all steps and both kinds share its moments (they use SGD for
ResNets). Their code also interpolates weights after each step, with a coefficient that leaves them as they are: left
out. Our choices: A, `repair_steps` and the rate, found for ViTs; the training loop's clipping, which they have on
forget steps alone, at 7; l_i no smaller than 1e-6 in c_i, since a loss that rounds to zero would take all the weight.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.methods.common.gradients import mean_importance
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

LR_PER_WIDTH = 0.064
# Smallest cross-entropy in c_i.
_LEAST_LOSS = 1e-6
# Added to both squared gradients: 0/0 counts as 1, as in the authors' code.
_EPS = 1e-15


@dataclasses.dataclass(frozen=True, kw_only=True)
class SfronConfig:
    """Options of SFR-on.

    Attributes:
        epochs: Optimizer steps of both kinds, in passes over the retain set.
        lr: Peak learning rate; null: 0.064 / width.
        ascent: A, the weight of a forget step.
        exponent: q; 0: all forget samples weigh the same.
        repair_steps: Steps on retain samples after each forget step.
        saliency_threshold: g; 0: all weights may change.
    """

    epochs: float = tunable(9.0, Range(1, 10, step=1))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    ascent: float = tunable(0.1, Range(0.01, 1.0, log=True))
    exponent: float = 0.5
    repair_steps: int = 1
    saliency_threshold: float = 1.0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")
        require(self.ascent > 0, "ascent", self.ascent, "above 0")
        require(self.exponent >= 0, "exponent", self.exponent, "0 or more")
        require(self.repair_steps >= 1, "repair_steps", self.repair_steps, "at least 1")
        require(self.saliency_threshold >= 0, "saliency_threshold", self.saliency_threshold, "0 or more")


@register
class Sfron(Method):
    name = "sfron"
    summary = "SFR-on: weighted ascent on salient weights, alternating with repair on the retained samples"
    Config = SfronConfig
    one_process = "it masks gradients weight by weight before each step, and DeepSpeed partitions them"

    def __init__(self, config: SfronConfig, context: Context) -> None:
        super().__init__(config, context)
        self.mask: dict[str, Tensor] = {}

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, LR_PER_WIDTH)
        return [paired_phase(self.config.epochs, lr, turns=self.config.repair_steps)]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        both = len(self.context.forget) + len(self.context.retain)
        return [ExtraPasses(name="importance of the weights", images=both, backward=1, kind="training")]

    def prepare(self, phase: Phase) -> None:
        context, threshold = self.context, self.config.saliency_threshold
        original = copy.deepcopy(context.original).requires_grad_(True)  # the original itself may be frozen
        forget, retain = (
            mean_importance(
                original,
                context.loader(samples, "none"),
                cross_entropy,
                size=context.run.batch_size,
                power=2,
                autocast=context.autocast,
            )
            for samples in (context.forget, context.retain)
        )
        names = [name for name, _ in original.named_parameters()]
        salient = ((f + _EPS) / (r + _EPS) >= threshold for f, r in zip(forget, retain, strict=True))
        self.mask = dict(zip(names, salient, strict=True))

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {name: mask.cpu() for name, mask in self.mask.items()}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.mask = {name: mask.to(self.context.device) for name, mask in prepared.items()}

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        losses = F.cross_entropy(outputs(model, batch.images).float(), batch.labels, reduction="none")
        coefficients = losses.detach().clamp_min(_LEAST_LOSS) ** -self.config.exponent
        return {"forget_ascent": -self._ascent() * (coefficients * losses).sum() / coefficients.sum()}

    def _ascent(self) -> float:
        """Return A_t, which falls to zero over the steps of the phase."""
        return self.config.ascent * (1 + math.cos(math.pi * self.step / self.total_steps)) / 2

    def before_step(self, model: nn.Module, phase: Phase) -> None:
        if not phase.takes(self.step)[1]:  # a step of repair
            return
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                weight.grad.mul_(self.mask[name])
