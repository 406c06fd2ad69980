"""SCRUB and SCRUB+R (Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880).

The model is a student that follows the original on the retain set and departs from it on the forget set. Epochs
alternate, with f_o the original, f_u the model, d = KL_t (see `distillation`):

    max epoch, forget set:    maximise  mean d(f_o(x) || f_u(x))
    min epoch, retain set:    minimise  alpha mean d(f_o(x) || f_u(x)) + gamma mean CE(f_u(x), y)

A max epoch comes before each of the first `forget_epochs` min epochs; the other min epochs follow. The paper writes d
without a temperature; its code has t = 4.

SCRUB+R (`scrub_r`) keeps the weights after every min epoch. It ends with those whose error on the forget set is nearest
to the error of the last ones on held-out samples of the same classes (`engine.core.heldout`).

Departures. AdamW in place of SGD; each epoch is a phase of its own with fresh moments, at a constant rate if it
maximises and through one cycle if it minimises, so that all weights that SCRUB+R may choose are annealed. For a class
without held-out samples, SCRUB+R takes the error over all held-out samples.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.heldout import ACCURACY_PASSES, matched_accuracy, predictions_of
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import rate, tunable
from engine.data import Batch
from engine.methods.common.distillation import Distillation, divergence
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.vit import outputs

logger = logging.getLogger(__name__)

# Learning rate of the max epochs times the width of the model.
FORGET_LR_PER_WIDTH = 1.28e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScrubConfig:
    """Options of SCRUB.

    Attributes:
        forget_epochs: Max epochs, each a pass over the forget set.
        retain_epochs: Min epochs, at least as many.
        lr: Peak learning rate of the min epochs; null: 0.192 / width.
        forget_lr: Constant learning rate of the max epochs; null: 1.28e-3 / width.
        alpha, gamma: Weights of the divergence and of cross-entropy in the min epochs.
        temperature: t in KL_t.
        augment_forget: Augment forget images too; the original then runs on every batch instead of once per image.
    """

    forget_epochs: int = 2
    retain_epochs: int = 8
    lr: float | None = tunable(None, rate(RETAIN_LR_PER_WIDTH))
    forget_lr: float | None = tunable(None, rate(FORGET_LR_PER_WIDTH))
    alpha: float = 0.001
    gamma: float = 0.99
    temperature: float = 4.0
    augment_forget: bool = False

    def __post_init__(self) -> None:
        require(self.forget_epochs >= 1, "forget_epochs", self.forget_epochs, "at least 1")
        require(self.retain_epochs >= self.forget_epochs, "retain_epochs", self.retain_epochs, "forget_epochs or more")
        positive_or_null(self, "lr", "forget_lr")
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")
        require(self.gamma >= 0, "gamma", self.gamma, "0 or more")
        require(self.alpha + self.gamma > 0, "gamma", self.gamma, "above 0 where alpha is 0")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


@register
class Scrub(Distillation):
    name = "scrub"
    summary = "SCRUB: away from the original on forget samples, towards it on retained ones, in turns"
    Config = ScrubConfig

    def phases(self) -> list[Phase]:
        config = self.config
        forget = Phase(
            name="forget",
            samples="forget",
            epochs=1,
            lr=self.learning_rate(config.forget_lr, FORGET_LR_PER_WIDTH),
            schedule="constant",
            augment=config.augment_forget,
            guarded=True,
        )
        lr = self.learning_rate(config.lr, RETAIN_LR_PER_WIDTH)
        retain = Phase(name="retain", samples="retain", epochs=1, lr=lr)
        # Phases of one name are summed in the reported seconds and samples.
        return [forget, retain] * config.forget_epochs + [retain] * (config.retain_epochs - config.forget_epochs)

    def uses_teachers(self, phase: Phase) -> bool:
        return phase.samples == "forget" or self.config.alpha > 0

    def teacher_forward(self, batch: Batch, phase: Phase) -> Tensor:
        return outputs(self.context.original, batch.images)

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        config = self.config
        logits = outputs(model, batch.images).float()
        if phase.name == "forget":
            return {"forget_ascent": -self._divergence(logits, batch, phase)}
        terms = {}
        if config.alpha > 0:
            terms["retain_kl"] = config.alpha * self._divergence(logits, batch, phase)
        if config.gamma > 0:
            terms["retain_ce"] = config.gamma * F.cross_entropy(logits, batch.labels)
        return terms

    def _divergence(self, logits: Tensor, batch: Batch, phase: Phase) -> Tensor:
        return divergence(logits, self.teacher(batch, phase), self.config.temperature).mean()


@register
class ScrubRewind(Scrub):
    """SCRUB with a choice among the weights after each min epoch.

    A copy of all weights for every min epoch is kept in host memory, and in every checkpoint of the run folder.
    """

    name = "scrub_r"
    summary = "SCRUB+R: SCRUB, with the weights of the epoch whose forget error is nearest to that on held-out samples"
    one_process = "it restores whole weights of an earlier epoch"

    def __init__(self, config: ScrubConfig, context: Context) -> None:
        super().__init__(config, context)
        self._held_out = self.held_out("to choose the epoch to restore")
        self._last = ""  # name of the previous phase
        self._kept: list[dict[str, Tensor]] = []
        self._accuracies: list[float] = []

    def phases(self) -> list[Phase]:
        rewind = Phase(name="rewind", samples="forget", epochs=0, lr=0.0, schedule="constant", augment=False)
        return [*super().phases(), rewind]

    def uses_teachers(self, phase: Phase) -> bool:
        return phase.name != "rewind" and super().uses_teachers(phase)

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        found = super().passes(phases, number, taken)
        if phases[number].name == "rewind":  # accuracy on the forget set after each min epoch
            images = self.config.retain_epochs * len(self.context.forget) + taken.held_out
            found.append(ExtraPasses(name=ACCURACY_PASSES, images=images))
        return found

    def edit(self, model: nn.Module, phase: Phase) -> None:
        if self._last == "retain":
            self._kept.append({name: value.detach().cpu().clone() for name, value in model.state_dict().items()})
            self._accuracies.append(predictions_of(model, self.context.forget, self.context).accuracy)
        self._last = phase.name
        if phase.name == "rewind":
            unseen = predictions_of(model, self._held_out, self.context)
            target = matched_accuracy(unseen, self.context.forget.labels)
            distances = [abs(accuracy - target) for accuracy in self._accuracies]
            chosen = distances.index(min(distances))
            model.load_state_dict(self._kept[chosen])
            logger.info(
                "scrub_r: back to min epoch %d of %d: forget accuracy %.1f%%, held-out %.1f%%",
                chosen + 1,
                len(self._kept),
                100 * self._accuracies[chosen],
                100 * target,
            )

    def state(self) -> dict[str, Any]:
        return {"last": self._last, "kept": self._kept, "accuracies": self._accuracies}

    def load_state(self, state: dict[str, Any]) -> None:
        self._last, self._kept, self._accuracies = state["last"], state["kept"], state["accuracies"]
