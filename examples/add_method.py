"""Add a method of your own: forget samples are pulled to the uniform distribution, retained ones to their labels.

    L = CE(f(x), y)                        retained samples
    L = weight * CE(f(x), 1 / classes)     forget samples

It is a short example, not a good method: a retrained model is sure of most samples that it never saw.
"""

from __future__ import annotations

import dataclasses

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from engine.data import Batch, open_source, read_forget_request
from engine.methods import Method, Phase, register


# --8<-- [start:method]
@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformConfig:
    """Options of `uniform`.

    epochs: passes over forget and retained samples together.
    lr: peak learning rate of AdamW; null: 0.064 / width of the model.
    weight: of a forget sample's loss relative to a retained sample's.
    """

    epochs: float = 3.0
    lr: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise engine.UserError(f"option weight={self.weight!r}: expected 0 or more")


@register
class Uniform(Method):
    """Pull the answers on forget samples to the uniform distribution."""

    name = "uniform"
    summary = "forget samples to the uniform distribution, retained samples to their labels"
    Config = UniformConfig

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, 0.064)
        return [Phase(name="forget", samples="all", epochs=self.config.epochs, lr=lr, guarded=True)]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = model(batch.images).float()
        # In samples="all" the forget samples come first: `batch.index` says which of the two a sample is.
        forget = (batch.index < len(self.context.forget)).to(logits.device)
        labels = F.cross_entropy(logits, batch.labels, reduction="none")
        uniform = -F.log_softmax(logits, dim=1).mean(dim=1)
        return {
            "retain_ce": (labels * ~forget).mean(),
            "forget_uniform": self.config.weight * (uniform * forget).mean(),
        }


# --8<-- [end:method]


def main() -> None:
    """Train a small ViT on digits and unlearn a tenth of them by the new method."""
    options = {"batch_size": 50, "precision": "fp32"}
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 2}
    data = open_source("digits")
    forget, retain = read_forget_request("random:0.1@0", data.train).split(data.train)
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    original = engine.train(fresh, data.train, config={**options, "epochs": 20, "lr": 2e-3}).model
    # --8<-- [start:use]
    result = engine.unlearn(
        original, forget, retain, method="uniform", validation=data.validation, config={**options, "weight": 0.5}
    )
    metrics = engine.evaluate(result.model, forget, retain, data.test, original=original)
    # --8<-- [end:use]
    for name in ("forget", "retain", "test"):
        before, after = metrics["original"]["accuracy"][name], metrics["accuracy"][name]
        print(f"{name:>6} accuracy: {100 * before:.1f}% before, {100 * after:.1f}% after")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
