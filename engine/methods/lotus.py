"""LoTUS (Spartalis et al., "LoTUS: Large-Scale Machine Unlearning with a Taste of Uncertainty", CVPR 2025,
arXiv 2503.18314): distil smoothed predictions of the original until accuracy on the forget set is as on held-out data.

f_o is the original, f_u the model, v the original's accuracy on held-out samples. At the start of each epoch

    d = accuracy of f_u on the forget set - v;   stop if d <= -0.01;   tau = exp(alpha d)

and in it, over the forget set and a part of the retain set, with fresh Gumbel noise g for every image,

    L = mean -sum_c p_c log softmax(f_u(x))_c,   p = softmax((f_o(x) + g) / tau)      on forget samples
                                                 p = one-hot argmax(f_o(x) + g)       on retain samples

So the method needs neither labels of the retain set nor a retrained model. As published: 30% of the retain set, drawn
once; Gumbel noise on both sides (`noise: none` leaves it out, as in the paper's ablation).

Departures. v is the accuracy on held-out samples weighted by the classes of the forget set, and 0 in classes that the
retain set does not have, since a model trained without a class does not predict it. The paper's code takes the plain
accuracy for random sets and 0 for whole classes; v equals it in both cases. One epoch runs even if the original already
has d <= -0.01. The constant rate follows the width. Images are not augmented by default, so that the original runs once
per image.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.heldout import ACCURACY_PASSES, format_accuracies, predictions_of, unseen_accuracy
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.methods.common.distillation import Distillation
from engine.models.vit import outputs

# Learning rate times the width of the model.
LR_PER_WIDTH = 0.0064


@dataclasses.dataclass(frozen=True, kw_only=True)
class LotusConfig:
    """Options of LoTUS.

    Attributes:
        epochs: Most passes over the forget set and the part of the retain set.
        lr: Constant learning rate; null: 0.0064 / width.
        retain_part: Share (0, 1] of the retain set that is used.
        alpha: Rate at which the temperature follows d.
        tolerance: Stop once the accuracy [0, 1] on the forget set is this far below that on held-out samples.
        noise: gumbel | none.
        augment_images: Augment the images; the original then runs on every batch.
    """

    epochs: int = 10
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    retain_part: float = 0.3
    alpha: float = tunable(2.0, Range(0.5, 16.0, log=True))
    tolerance: float = 0.01
    noise: Literal["gumbel", "none"] = "gumbel"
    augment_images: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        positive_or_null(self, "lr")
        require(0 < self.retain_part <= 1, "retain_part", self.retain_part, "in (0, 1]")
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "in [0, 1)")


@register
class Lotus(Distillation):
    name = "lotus"
    summary = (
        "LoTUS: the original's predictions, smoothed on forget samples until accuracy on them is as on held-out ones"
    )
    Config = LotusConfig

    def __init__(self, config: LotusConfig, context: Context) -> None:
        super().__init__(config, context)
        self._held_out = self.held_out("to find when accuracy on the forget samples is that on held-out ones")
        self._expected = self._distance = math.nan  # v and d; known once prepared

    def phases(self) -> list[Phase]:
        config = self.config
        return [
            Phase(
                name="forget",
                samples="all",
                epochs=config.epochs,
                lr=self.learning_rate(config.lr, LR_PER_WIDTH),
                schedule="constant",
                augment=config.augment_images,
                retain_part=config.retain_part,
            )
        ]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        images = self.config.epochs * len(self.context.forget)  # once before each epoch
        accuracies = ExtraPasses(name=ACCURACY_PASSES, images=images + taken.held_out)
        return [*super().passes(phases, number, taken), accuracies]

    def prepare(self, phase: Phase) -> None:
        super().prepare(phase)
        context = self.context
        unseen = predictions_of(context.original, self._held_out, context)
        self._expected = unseen_accuracy(unseen, context.forget.labels, context.retain.labels)
        self._measure_distance(context.original)

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {**super().cache_state(phase), "expected": torch.tensor(self._expected, dtype=torch.float64)}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        super().load_cache_state(phase, prepared)
        self._expected = float(prepared["expected"])

    def teacher_forward(self, batch: Batch, phase: Phase) -> Tensor:
        return outputs(self.context.original, batch.images)

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = self.teacher(batch, phase)
        if self.config.noise == "gumbel":
            # Drawn from the training loop's generator, which depends on seed, step and rank.
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = F.softmax(logits / math.exp(self.config.alpha * self._distance), 1)
        hard = F.one_hot(logits.argmax(1), logits.shape[1])
        forget = (batch.index < len(self.context.forget)).to(logits.device)
        targets = torch.where(forget[:, None], soft, hard)
        losses = F.cross_entropy(outputs(model, batch.images).float(), targets, reduction="none")
        return {"forget_soft_ce": (losses * forget).mean(), "retain_hard_ce": (losses * ~forget).mean()}

    def should_stop(self, model: nn.Module, phase: Phase, epoch: int) -> str | None:
        self._measure_distance(model)
        if self._distance > -self.config.tolerance:
            return None
        return format_accuracies(self._expected + self._distance, self._expected)

    def _measure_distance(self, model: nn.Module) -> None:
        """Measure d, the accuracy on the forget set above v."""
        self._distance = predictions_of(model, self.context.forget, self.context).accuracy - self._expected

    def state(self) -> dict[str, Any]:
        return {"distance": self._distance}

    def load_state(self, state: dict[str, Any]) -> None:
        self._distance = state["distance"]
