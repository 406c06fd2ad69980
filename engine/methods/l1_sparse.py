"""l1-sparse unlearning (Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv 2304.04934):
fine-tuning on the retain set with an l1 penalty that pulls weights to zero and fades out.

    L = CE(D_r) + alpha * (1 - e / E) * ||theta||_1        e = 0 .. E - 1, the epoch

theta: every weight that is trained, including biases, norms and embeddings, as in the paper's code. Of the paper's
three schedules this, the decreasing one, is what it recommends and its code runs. Key biases have no gradient in this
engine (`engine.models.attention.zero_key_bias_grads`), so the penalty has no effect on them.

AdamW and one cycle replace the paper's SGD. Under Adam the penalty is a part of one normalised step: a weight whose
loss gradient is well below alpha shrinks at about the full rate, whatever alpha is. So alpha sets how many weights
shrink rather than how fast. The default alpha is ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import require
from engine.core.method import Context, register
from engine.core.phase import Phase
from engine.core.search_space import Range, tunable
from engine.data import Batch
from engine.methods.finetune import Finetune, FinetuneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1SparseConfig(FinetuneConfig):
    """Options of l1-sparse unlearning.

    Attributes:
        retain_epochs: Passes over the retain set, E.
        lr: Peak learning rate; null: as in fine-tuning.
        alpha: Weight of the l1 norm in the first epoch.
    """

    alpha: float = tunable(1e-4, Range(1e-6, 1e-3, log=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")


@register
class L1Sparse(Finetune):
    name = "l1_sparse"
    summary = "cross-entropy on the retained samples with an l1 penalty that fades out, 10 epochs"
    Config = L1SparseConfig
    one_process = "its penalty needs every weight whole, outside the forward pass"

    def __init__(self, config: L1SparseConfig, context: Context) -> None:
        super().__init__(config, context)
        self.epoch = 0

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        weights = [p for p in model.parameters() if p.requires_grad]
        norm = torch.stack([p.abs().sum(dtype=torch.float32) for p in weights]).sum()
        fading = 1 - self.epoch / self.config.retain_epochs
        return {**super().loss(model, batch, phase), "l1": self.config.alpha * fading * norm}

    def should_stop(self, model: nn.Module, phase: Phase, epoch: int) -> str | None:
        self.epoch = epoch + 1
        return None

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
