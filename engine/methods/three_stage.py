"""Adaptive reweighting with three-stage gradients (Lu et al., CVPR 2026, "Machine Unlearning via Adaptive Gradient
Reweighting and Multi-stage Objective Optimization"; its code is not public).

Two losses at every step, on a batch of forget samples i and one of retain samples, K classes, p the prediction:

    H_i = -sum_k p_k(x_i) log p_k(x_i) / log K                         entropy, in [0, 1]
    L_f = -sum_i w_i H_i / sum_i w_i,   w_i = sigmoid(a_i)             one learned number a_i for each forget sample
    L_r = cross-entropy

Their gradients, each over all weights as one vector, become one direction d in three stages:

    rectify     f = g_f/|g_f|, r = g_r/|g_r|;  if f.r < 0: f' = f - (f.r) r, r' = r - (f.r) f;  else f' = f, r' = r
    stabilise   m_f = e m_f + (1 - e) f',  m_r = e m_r + (1 - e) r',  e = 0.9; both start as the first f' and r'
    combine     d = l m_f + (1 - l) m_r, l in [0, 1] such that cos(d, m_f) = cos(d, m_r): l = |m_r| / (|m_f| + |m_r|)

Known to us from summaries alone: the roles of entropy and sigmoid weights, the rectification, the average with 0.9, and
that l balances the cosines. Not published: how a_i is learned. Our choices: a_i climbs L_f,
a_i += weight_lr * B * dL_f/da_i for a batch of B, so that weight moves to the samples that are least forgotten; the
cosines are those with the averages, for which l has the closed form above; the factors 1 / log K and 1 / sum_i w_i,
which do not change f. The weights of vulnerable retain classes, which the paper has for forgetting whole classes, are
left out. Departure: AdamW takes the step along d, so that it is smoothed and scaled once more.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import Phase, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.errors import UserError
from engine.methods.common.gradients import dot, norm
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

LR_PER_WIDTH = 3.84e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeStageConfig:
    """Options of the three-stage method.

    Attributes:
        epochs: Passes over the retain set; every step also takes a forget batch, so a pass costs about two.
        lr: Peak learning rate; null: 3.84e-3 / width.
        forget_share: Size of the forget batch relative to the retain batch.
        ema: e, decay of the averages at each step.
        weight_lr: Rate of a_i; 0: all samples weigh the same.
    """

    epochs: float = tunable(5.0, Range(1, 8, step=1))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    forget_share: float = 1.0
    ema: float = 0.9
    weight_lr: float = 1.0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")
        require(self.forget_share > 0, "forget_share", self.forget_share, "above 0")
        require(0 <= self.ema < 1, "ema", self.ema, "0 or more, below 1")
        require(self.weight_lr >= 0, "weight_lr", self.weight_lr, "0 or more")


@register
class ThreeStage(Method):
    name = "three_stage"
    summary = "weighted entropy of forget samples raised, its gradient and the retained ones' balanced"
    Config = ThreeStageConfig
    one_process = "it projects the whole gradients of two losses onto each other, and DeepSpeed has no such step"

    def __init__(self, config: ThreeStageConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.num_classes < 2:
            raise UserError("three_stage: a model with one class has no entropy to raise; use another method")
        # a_i, by position in the forget set.
        self.logits = torch.zeros(len(context.forget), device=context.device)
        self.averages: list[list[Tensor]] = []  # m_f and m_r, after the first step

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, LR_PER_WIDTH)
        return [paired_phase(self.config.epochs, lr, paired_share=self.config.forget_share, combined=True)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        log_p = outputs(model, batch.images).float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1) / math.log(log_p.shape[1])
        index = batch.index.to(self.logits.device)
        logits = self.logits[index].requires_grad_()
        weights = logits.sigmoid()
        loss = -(weights.detach() * entropy).sum() / weights.detach().sum()
        (slope,) = torch.autograd.grad(-(weights * entropy.detach()).sum() / weights.sum(), logits)
        if batch.weight:  # else the images are placeholders for unreadable ones
            self.logits[index] += self.config.weight_lr * len(batch) * slope
        return {"forget_entropy": loss}

    @torch.no_grad()
    def combine(self, model: nn.Module, main: list[Tensor], paired: list[Tensor], phase: Phase) -> list[Tensor]:
        tiny = torch.finfo(torch.float32).tiny  # a gradient of zero stays zero
        retain = torch._foreach_div(main, norm(main).clamp_min(tiny))
        forget = torch._foreach_div(paired, norm(paired).clamp_min(tiny))
        conflict = dot(forget, retain).clamp_max(0)
        rectified = [
            torch._foreach_sub(forget, torch._foreach_mul(retain, conflict)),
            torch._foreach_sub(retain, torch._foreach_mul(forget, conflict)),
        ]
        if self.averages:
            for average, new in zip(self.averages, rectified, strict=True):
                torch._foreach_lerp_(average, new, 1 - self.config.ema)
        else:
            self.averages = [list(each) for each in rectified]
        sizes = [norm(average) for average in self.averages]
        share = sizes[1] / (sizes[0] + sizes[1]).clamp_min(tiny)
        weighted = (torch._foreach_mul(m, part) for m, part in zip(self.averages, (share, 1 - share), strict=True))
        return list(torch._foreach_add(*weighted))

    def state(self) -> dict[str, Any]:
        return {"logits": self.logits, "averages": self.averages}

    def load_state(self, state: dict[str, Any]) -> None:
        device = self.context.device
        self.logits = state["logits"].to(device)
        self.averages = [[each.to(device) for each in average] for average in state["averages"]]
