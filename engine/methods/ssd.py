"""Selective synaptic dampening, SSD (Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through
Selective Synaptic Dampening", AAAI 2024, arXiv 2308.07707), and its label-free form LFSSD (the same, "Loss-Free Machine
Unlearning", ICLR 2024 Tiny Papers, arXiv 2402.19308).

    F_S,i = mean over groups of S of (d CE / d theta_i)^2             S: the forget set (F_f), all samples (F_D)
    if F_f,i > a F_D,i:   theta_i <- theta_i min(l F_D,i / F_f,i, 1)

LFSSD has mean |d / d theta_i of the mean of |f(x)|^2| in place of F: the absolute gradient, as in the authors'
published change to their code, not its square. The other weights keep their bits.

alpha. F_D is a mean over the forget set too, so with one sample per group F_f / F_D is at most 1 / s, where s is the
share of the forget set, for any model: the published a = 10 (found for 0.2% of CIFAR) cannot select a single weight if
10% are forgotten. At null, a is that of the authors' adaptive form (Schoepf, Foster, Brintrup, arXiv 2402.10098): the
percentile 100 - ln(1 + 100 s) of all F_f / F_D, so that ln(1 + 100 s) percent of the weights are dampened.

Groups. The square of a group's mean gradient is the squared mean plus the variance / size. With large groups, of which
a small forget set has few, F_f is a noisy estimate, and so is the choice of weights; the authors have batches of 128.
Groups that differ in size between the two sets would scale F_f / F_D, so batches are cut evenly; the authors' end in a
short one. Gradients are taken in eval mode.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, tunable
from engine.data import Batch, Samples
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.methods.common.edits import Edit, EditConfig
from engine.methods.common.gradients import mean_importance, trainable
from engine.models.losses import cross_entropy
from engine.models.vit import outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SsdConfig(EditConfig):
    """Options of SSD, and of the repair that may follow it.

    Attributes:
        labels: true: SSD; false: LFSSD, which uses no labels.
        alpha: a, factor by which the importance of a weight for the forget set must exceed that for all samples; null:
            adaptive.
        dampening: l; null: 1 with labels, as published; 0.1 without, because the two importances then differ by so
            little that 1 has no effect.
        fisher_batch_size: Samples of a group, at most batch_size; 1 is the Fisher diagonal itself, with one backward
            pass per sample.
        retain_epochs: Passes over the retain set after the edit, to repair the model; 0: none, as published.
        lr: Peak learning rate of that repair; null: 0.192 / width.
    """

    labels: bool = True
    alpha: float | None = None
    dampening: float | None = tunable(None, Range(0.05, 2, log=True, auto=1.0))
    fisher_batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_or_null(self, "alpha")
        require(self.dampening is None or self.dampening >= 0, "dampening", self.dampening, "0 or more, or null")
        require(self.fisher_batch_size >= 1, "fisher_batch_size", self.fisher_batch_size, "at least 1")


@register
class Ssd(Edit):
    name = "ssd"
    summary = "selective synaptic dampening: weights that matter more to forget samples are scaled down; no training"
    Config = SsdConfig

    def __init__(self, config: SsdConfig, context: Context) -> None:
        super().__init__(config, context)
        if config.fisher_batch_size > context.run.batch_size:
            raise UserError(
                f"option fisher_batch_size={config.fisher_batch_size}: groups are cut from batches of "
                f"batch_size={context.run.batch_size}; raise that one too"
            )

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        if phases[number].name != "edit":
            return []
        images = 2 * len(self.context.forget) + len(self.context.retain)
        return [ExtraPasses(name="importance of the weights", images=images, backward=1, kind="training")]

    def change(self, model: nn.Module) -> None:
        context, config = self.context, self.config
        on_forget = self.importance(model, context.forget)
        on_all = self.importance(model, concatenate(context.forget, context.retain))
        alpha = config.alpha
        if alpha is None:
            share = len(context.forget) / (len(context.forget) + len(context.retain))
            alpha = adaptive_alpha(on_forget, on_all, share)
        dampening = config.dampening
        if dampening is None:
            dampening = 1.0 if config.labels else 0.1
        dampen(trainable(model), on_forget, on_all, alpha, dampening)

    def importance(self, model: nn.Module, samples: Samples) -> list[Tensor]:
        """Return F, or its label-free form, of every weight for a set of samples."""
        labels = self.config.labels
        return mean_importance(
            model,
            self.context.loader(samples, "none"),
            cross_entropy if labels else squared_length,
            size=self.config.fisher_batch_size,
            power=2 if labels else 1,
            autocast=self.context.autocast,
        )


def squared_length(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over a batch of |f(x)|^2, with f the logits."""
    return outputs(model, batch.images).float().square().sum(1).mean()


def adaptive_alpha(on_forget: list[Tensor], on_all: list[Tensor], share: float) -> float:
    """Return the percentile 100 - ln(1 + 100 share) of the ratios of two importances, over weights with an importance
    above 0.

    Args:
        on_forget, on_all: Importance of the weights for the forget set and for all samples.
        share: Share (0, 1) of the forget set in all samples.
    """
    ratios = torch.cat([(f[d > 0] / d[d > 0]).flatten() for f, d in zip(on_forget, on_all, strict=True)])
    if not len(ratios):
        return math.inf  # no sample has a gradient
    above = math.floor(math.log(1 + 100 * share) / 100 * len(ratios))
    return float(ratios.kthvalue(len(ratios) - above).values)


@torch.no_grad()
def dampen(
    weights: list[Tensor], on_forget: list[Tensor], on_all: list[Tensor], alpha: float, dampening: float
) -> None:
    """Scale down, in place, the weights whose importance for the forget set is above alpha times that for all samples.

    Args:
        weights: The weights to change.
        on_forget, on_all: Importance of each weight for the forget set and for all samples.
        alpha: a.
        dampening: l.
    """
    for weight, f, d in zip(weights, on_forget, on_all, strict=True):
        scale = (dampening * d / f).clamp_max(1)
        weight.copy_(torch.where(f > alpha * d, weight * scale, weight))
