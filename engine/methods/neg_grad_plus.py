"""NegGrad+ (Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv 2302.09880): every step descends
on retain samples and ascends on forget samples.

    L = CE(D_r) - beta * CE(D_f)

The paper writes b CE(D_r) - (1 - b) CE(D_f). Adam does not depend on the scale of a loss, so beta = (1 - b) / b is the
same method except for clipping; b = 0.95, the paper's for small models, is beta = 0.053. The default is lower: with
0.05, accuracy on the forget set of digits ended well below that on held-out samples.

Ours: a forget sample counts min(CE, bound), so that it has no gradient beyond ln(classes), the loss of a uniform
prediction; without a bound L has no minimum. `bound=inf` is the published loss. AdamW and one cycle replace the paper's
SGD. The forget batch is a quarter of the retain batch, because the forget set is the smaller one, and a step then costs
1.25 of fine-tuning's, not 2.
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
    """Options of NegGrad+.

    Attributes:
        retain_epochs: Passes over the retain set.
        lr: Peak learning rate; null: as in fine-tuning.
        beta: Weight of the forget samples' cross-entropy, which is maximised; that of the retain samples is 1.
        bound: Cross-entropy in nats beyond which a forget sample has no gradient; null: ln(classes); inf: none.
        forget_share: Size of the forget batch relative to the retain batch.
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
