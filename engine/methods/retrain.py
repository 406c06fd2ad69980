"""Retraining: the same architecture, trained on the retain set alone. Exact, and the cost that other methods must beat.

The default recipe is that of a small ViT on small images from fresh weights (AdamW 1e-3, one cycle, 30 epochs). A model
trained by another recipe is retrained by that recipe. A model that was fine-tuned is retrained from the same base
(`lethe train --init`), which must not have been trained on the forget set.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import require
from engine.core.method import Context, Method, register
from engine.core.phase import Phase
from engine.data import Batch
from engine.errors import UserError
from engine.methods.common.mixing import mixed
from engine.models.losses import cross_entropy
from engine.models.spec import spec_of
from engine.models.vit import outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Options of retraining.

    Attributes:
        epochs: Passes over the retain set.
        lr: Peak learning rate of the one-cycle schedule.
        base: Initial weights: fresh (drawn from the seed) | given (those of the model passed in; `lethe train --init`).
        layer_decay: Factor (0, 1] on the rate of each layer, counted from the head; 1: one rate for all. Which layers
            are frozen is set by the run's option `trainable`.
        mixup, cutmix: Parameter of the Beta distribution of the share of the mixed image; 0: off.
        label_smoothing: Share [0, 1) of a target that is spread over all classes.
    """

    epochs: float = 30.0
    lr: float = 1e-3
    base: Literal["fresh", "given"] = "fresh"
    layer_decay: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        require(self.mixup >= 0, "mixup", self.mixup, "0 or more")
        require(self.cutmix >= 0, "cutmix", self.cutmix, "0 or more")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")


@register
class Retrain(Method):
    name = "retrain"
    summary = "fresh weights, trained on the retained samples: the reference"
    Config = RetrainConfig
    exact = True
    is_training = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        if config.base == "given" and len(context.forget):
            raise UserError(
                "retrain: base=given would start from the model trained on the forget samples; start from its base: "
                "lethe train --init BASE --forget FILE"
            )
        if config.layer_decay < 1 and context.run.trainable.startswith("lora"):
            raise UserError("retrain: layer_decay is for whole weights; leave it or trainable=lora:R out")
        if (config.mixup or config.cutmix) and context.run.retain_pruning != "none":
            raise UserError(
                "retrain: the loss of a mixed image is not that of one sample; leave mixup or retain_pruning out"
            )

    def initial_model(self, model: nn.Module) -> nn.Module:
        return model if self.config.base == "given" else spec_of(model).build(seed=self.context.run.seed)

    def lr_scales(self, model: nn.Module) -> dict[int, float]:
        decay = self.config.layer_decay
        if decay == 1:
            return {}
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # its stubs leave it out

        groups = param_groups_layer_decay(model, layer_decay=decay)
        return {id(parameter): float(group["lr_scale"]) for group in groups for parameter in group["params"]}

    def phases(self) -> list[Phase]:
        return [Phase(name="retain", samples="retain", epochs=self.config.epochs, lr=self.config.lr)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        config = self.config
        if not (config.mixup or config.cutmix or config.label_smoothing):
            return {"retain_ce": cross_entropy(model, batch)}
        images, targets = mixed(
            batch.images,
            batch.labels,
            self.context.num_classes,
            mixup=config.mixup,
            cutmix=config.cutmix,
            smoothing=config.label_smoothing,
        )
        return {"retain_ce": F.cross_entropy(outputs(model, images).float(), targets)}
