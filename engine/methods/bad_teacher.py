"""Bad teacher (Chundawat et al., "Can Bad Teaching Induce Forgetting? Unlearning in Deep Neural Networks using an
Incompetent Teacher", AAAI 2023, arXiv 2205.08096): distil an untrained model's predictions on the forget set, and the
original's on retain samples.

T_s is the original, T_d a model of the same architecture with random weights that was never trained, f_u the model,
KL_t as in `distillation`. On the forget set (l = 1) together with a part of the retain set (l = 0):

    L = mean (1 - l) KL_t(T_s(x) || f_u(x)) + l KL_t(T_d(x) || f_u(x))

As published: 30% of the retain set, drawn once; t = 1; no labels. The paper's code also divides by the number of
classes; under AdamW that changes only the clipping of gradients.

The paper does not define the untrained model further, and its initialisation matters: a ViT's own initial weights
give nearly uniform predictions, those of torch's layers less so, with a larger effect on the model (`untrained`).

Departures: one cycle of the learning rate in place of a constant one, a rate that follows the width, and images that
are not augmented by default, so that each teacher runs once per image.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, register
from engine.core.phase import Phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.methods.common.distillation import Distillation, divergence
from engine.models.spec import spec_of
from engine.models.vit import outputs

# Peak rate times the width of the model.
LR_PER_WIDTH = 0.0128


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadTeacherConfig:
    """Options of bad teacher.

    Attributes:
        epochs: Passes over the forget set and the part of the retain set.
        lr: Peak learning rate; null: 0.0128 / width.
        retain_part: Share (0, 1] of the retain set that is used.
        temperature: t in KL_t.
        untrained: Initial weights of T_d: architecture, its own initialisation; layers, torch's `reset_parameters` of
            each layer that has it, as in torchunlearn.
        augment_images: Augment the images; both teachers then run on every batch instead of once per image.
    """

    epochs: float = tunable(3.0, Range(1, 8, step=1))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    retain_part: float = 0.3
    temperature: float = 1.0
    untrained: Literal["architecture", "layers"] = "architecture"
    augment_images: bool = False

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")
        require(0 < self.retain_part <= 1, "retain_part", self.retain_part, "in (0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


@register
class BadTeacher(Distillation):
    name = "bad_teacher"
    summary = "towards an untrained model on forget samples, towards the original on a part of the retained ones"
    Config = BadTeacherConfig
    teachers = 2.0  # both run on every image

    def __init__(self, config: BadTeacherConfig, context: Context) -> None:
        super().__init__(config, context)
        self._untrained: nn.Module | None = None

    def phases(self) -> list[Phase]:
        config = self.config
        lr = self.learning_rate(config.lr, LR_PER_WIDTH)
        return [
            Phase(
                name="forget",
                samples="all",
                epochs=config.epochs,
                lr=lr,
                augment=config.augment_images,
                retain_part=config.retain_part,
            )
        ]

    def prepare(self, phase: Phase) -> None:
        super().prepare(phase)
        if not self.needs_original(phase, prepared=True):
            self._untrained = None  # all its outputs are cached

    def teacher_forward(self, batch: Batch, phase: Phase) -> Tensor:
        # The original runs on every image, so that ranks that share its weights make the same calls.
        logits = outputs(self.context.original, batch.images)
        return torch.where(self._to_forget(batch)[:, None], outputs(self.untrained, batch.images), logits)

    @property
    def untrained(self) -> nn.Module:
        """The untrained teacher; built at its first use from the run's seed."""
        if self._untrained is None:
            seed = self.context.run.seed
            fresh = spec_of(self.context.original).build(seed=seed)
            if self.config.untrained == "layers":
                _reset_layers(fresh, seed)
            self._untrained = fresh.to(self.context.device).requires_grad_(False).eval()
        return self._untrained

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = outputs(model, batch.images)
        distances = divergence(logits, self.teacher(batch, phase), self.config.temperature)
        forget = self._to_forget(batch)
        return {"forget_kl": (distances * forget).mean(), "retain_kl": (distances * ~forget).mean()}

    def _to_forget(self, batch: Batch) -> Tensor:
        return (batch.index < len(self.context.forget)).to(batch.images.device)


def _reset_layers(model: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
