"""SalUn (Fan et al., SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency, ICLR 2024, arXiv
2310.12508): random labels, trained into the salient weights alone.

    m = 1[ |grad CE(D_f; theta_o)| >= gamma ]        theta = m * (theta_o + d) + (1 - m) * theta_o

theta_o is the original, d the change by training on relabelled forget samples and on the retain set (`random_labels`).
gamma is one threshold over all weights of the model; it keeps `saliency_share` of them, half by default.

Our choices: of n weights exactly floor(share x n) are salient, at least one; among equal gradients, the first in the
order of the model's parameters. The gradient is that of the mean over the whole forget set at theta_o, as in the paper.
Labels are drawn once, among the wrong ones; the paper's code draws them anew in every epoch, and the true label may be
drawn. Weights that are not salient get no gradient, and weight decay is undone after each step, so they keep their
bits. AdamW and one cycle replace the paper's SGD. Epochs are half of random labels', and the rate a third: with those
of random labels the wrong labels are memorised, and accuracy on the forget set ends far below that on held-out samples.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import require
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, rate, tunable
from engine.data import Loader
from engine.errors import UserError
from engine.methods.random_labels import RandomLabels, RandomLabelsConfig

# Peak learning rate times the width of the model: 5e-4 at width 128.
LR_PER_WIDTH = 0.064


@dataclasses.dataclass(frozen=True, kw_only=True)
class SalUnConfig(RandomLabelsConfig):
    """Options of SalUn.

    Attributes:
        epochs: Passes over forget set and retain set together.
        lr: Peak learning rate; null: 0.064 / width.
        saliency_share: Share of all weights that may change.
    """

    epochs: float = tunable(5.0, Range(1, 10, step=1))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    saliency_share: float = tunable(0.5, Range(0.1, 0.9))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.saliency_share <= 1, "saliency_share", self.saliency_share, "in (0, 1]")


@register
class SalUn(RandomLabels):
    name = "salun"
    summary = "random labels, trained into the weights with the largest gradients on the forget samples, 5 epochs"
    Config = SalUnConfig
    one_process = "it masks single weights, which needs each of them and its gradient whole"

    def __init__(self, config: SalUnConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.run.trainable.startswith("lora"):
            raise UserError("salun: masks the model's own weights, and trainable=lora trains others; use all or last:N")
        self.masks: list[Tensor] = []

    def phases(self) -> list[Phase]:
        (phase,) = super().phases()
        return [dataclasses.replace(phase, lr=self.learning_rate(self.config.lr, LR_PER_WIDTH))]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        gradient = ExtraPasses(
            name="importance of the weights", images=len(self.context.forget), backward=1, kind="training"
        )
        return [gradient]

    def prepare(self, phase: Phase) -> None:
        context = self.context
        gradient = self.forget_gradient(context.loader(context.forget, "none"))
        mask = largest(torch.cat([g.flatten() for g in gradient]).abs(), self.config.saliency_share)
        self.load_cache_state(phase, {"mask": mask})

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {"mask": torch.cat([mask.flatten() for mask in self.masks]).cpu()}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        weights = list(self.context.original.parameters())
        parts = prepared["mask"].to(self.context.device).split([w.numel() for w in weights])
        self.masks = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return True  # `after_step` restores weights from it

    def before_step(self, model: nn.Module, phase: Phase) -> None:
        for weight, mask in zip(model.parameters(), self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, model: nn.Module, phase: Phase) -> None:
        for weight, kept, mask in zip(model.parameters(), self.context.original.parameters(), self.masks, strict=True):
            weight.copy_(torch.where(mask, weight, kept))

    def forget_gradient(self, loader: Loader) -> list[Tensor]:
        """Return the gradient of the mean cross-entropy over samples, one tensor for each weight of the original."""
        original = self.context.original
        # The original is frozen, and may be the caller's own model, so the gradient is taken by detached views.
        weights = {name: weight.detach().requires_grad_() for name, weight in original.named_parameters()}
        total = [torch.zeros_like(weight) for weight in weights.values()]
        for batch in loader.ordered():
            with self.context.autocast():
                logits = torch.func.functional_call(original, weights, (batch.images,))
            loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum") / len(loader.samples)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, found)
        return total


def largest(values: Tensor, share: float) -> Tensor:
    """Return a mask of the floor(share x n) largest values, at least one.

    Args:
        values: Values [n]; among equal ones, those that come first are marked.
        share: Share (0, 1] of the values.
    """
    count = max(1, math.floor(share * len(values)))
    threshold = values.kthvalue(len(values) - count + 1).values
    mask = values > threshold
    ties = (values == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask
