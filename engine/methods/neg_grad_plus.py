"""NegGrad+ (Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv 2302.09880): every step descends
on retained samples and ascends on forget samples.

    L = CE(D_r) - beta * CE(D_f)

The paper writes b CE(D_r) - (1 - b) CE(D_f). Adam does not see the scale of a loss, so beta = (1 - b) / b is the same
method but for clipping; b = 0.95, the paper's for small models, is beta = 0.053. The default is lower: with 0.05 forget
samples of digits ended well below held-out ones.

Ours: a forget sample counts min(CE, bound), so that beyond ln(classes), the loss of a uniform guess, it is left alone;
without a bound L has no minimum. `bound=inf` is the published loss. AdamW and one cycle stand for the paper's SGD; the
forget batch is a quarter of the retain batch, because the forget set is the smaller one, and a step then costs 1.25 of
fine-tuning's, not 2.
"""

from __future__ import annotations

import dataclasses
import math

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import register
from engine.core.phase import Phase
from engine.core.search_space import Range, tunable
from engine.data import Batch
from engine.methods.finetune import Finetune, FinetuneConfig
from engine.models.vit import outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegGradPlusConfig(FinetuneConfig):
    """retain_epochs: passes over the retained samples. lr: peak rate; null: as fine-tuning's.

    beta: weight of the forget samples' cross-entropy, which is maximised; that of the retained samples' is 1.
    bound: nats of cross-entropy at which a forget sample is left alone; null: ln(classes); inf: never.
    forget_share: forget samples a step, relative to the retained ones.
    """

    retain_epochs: float = tunable(8.0, Range(1, 10, step=1))
    beta: float = tunable(0.02, Range(0.002, 0.5, log=True))
    bound: float | None = None
    forget_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, "beta", self.beta, "0 or more")
        positive_or_null(self, "bound")
        require(0 < self.forget_share <= 1, "forget_share", self.forget_share, "in (0, 1]")


@register
class NegGradPlus(Finetune):
    name = "neg_grad_plus"
    summary = "down on the retained samples and up on the forget samples in each step, 8 epochs"
    Config = NegGradPlusConfig

    def phases(self) -> list[Phase]:
        (phase,) = super().phases()
        share = self.config.forget_share
        return [dataclasses.replace(phase, name="forget", paired="forget", paired_share=share, guarded=True)]

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        bound = math.log(self.context.num_classes) if self.config.bound is None else self.config.bound
        losses = F.cross_entropy(outputs(model, batch.images).float(), batch.labels, reduction="none")
        return {"forget_ascent": -self.config.beta * losses.clamp(max=bound).mean()}
