"""Lists of benchmark cases, from which the commands of `python -m bench` and `pytest --benchmark` choose."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from engine.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A timm architecture under the name that tables give it."""

    name: str
    architecture: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_classes: int = 1000

    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture=self.architecture, num_classes=self.num_classes, model_args=self.arguments, pretrained_cfg={}
        )


def _vit(size: str, pixels: int = 224, **arguments: Any) -> Model:
    name = f"ViT-{size[0].upper()}/16 {pixels}"
    arguments = {"img_size": pixels, **arguments} if pixels not in (224, 384) else arguments
    return Model(name=name, architecture=f"vit_{size}_patch16_{pixels if pixels == 384 else 224}", arguments=arguments)


VIT_S, VIT_B, VIT_L = (_vit(size) for size in ("small", "base", "large"))
# The yardstick's architecture, and one for smoke tests.
YARDSTICK = Model(
    name="ViT 128x6/4 32",
    architecture="vit_tiny_patch16_224",
    arguments={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    num_classes=10,
)
TINY = Model(
    name="ViT 64x3/4 32",
    architecture="vit_tiny_patch16_224",
    arguments={"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2},
    num_classes=10,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase:
    """Optimizer steps of LetheViT on one model. phase: forget | retain. batch: images a step."""

    model: Model
    phase: Literal["forget", "retain"]
    precision: Literal["fp32", "bf16"]
    batch: int
    compile: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        extras = [text for on, text in ((self.compile, "compiled"), (self.checkpointing, "checkpointing")) if on]
        return ", ".join([f"{self.phase} step, {self.model.name}", self.precision, f"batch {self.batch}", *extras])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingCase:
    """Sizes at which `python -m bench unlearn` measures a cost: numbers, or models; quick: toy sizes.

    rounds: measurements of each size, all sizes in every round. batch: images or rows at a time; cuda_batch: on CUDA,
    where a small one would measure kernel launches.
    """

    sizes: tuple[Any, ...]
    quick: tuple[Any, ...]
    rounds: int = 5
    batch: int = 50
    cuda_batch: int = 50


SCALING = {
    "forget": ScalingCase(sizes=(250, 500, 1_000, 2_000), quick=(20, 40)),
    "retain": ScalingCase(sizes=(500, 1_000, 2_000, 4_000), quick=(40, 80)),
    # Samples of a run's data set, of which its `max_steps` read few: beyond ImageNet's 1.28 million.
    "dataset": ScalingCase(sizes=(250_000, 500_000, 1_000_000, 2_000_000), quick=(2_000, 4_000)),
    # The smallest model, so that attention, which is quadratic, has the largest share.
    "resolution": ScalingCase(
        sizes=tuple(_vit("tiny", pixels) for pixels in (224, 384, 512)),
        quick=tuple(_vit("tiny", pixels) for pixels in (64, 128)),
        batch=2,
        cuda_batch=64,
    ),
    "model": ScalingCase(sizes=(_vit("tiny"), VIT_S, VIT_B), quick=(TINY, YARDSTICK), rounds=3, batch=2, cuda_batch=64),
    "info_nce": ScalingCase(sizes=(2_048, 4_096, 8_192, 16_384), quick=(256, 512), rounds=3),
    "ranks": ScalingCase(sizes=(1, 2), quick=(), rounds=2, batch=64, cuda_batch=64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCase:
    """Loops that `python -m bench train` compares: this project's with the others.

    against: all (this project's loop in the other precision and compiled, plain loops in both, compiled ones, the loops
    of other libraries), uncompiled (the same without what is compiled), plain (uncompiled plain loops in the same
    precision), compiled (plain and compiled ones in the same precision), checkpointing (this project's and the plain
    loop, with and without it).
    """

    step: StepCase
    against: Literal["all", "uncompiled", "plain", "compiled", "checkpointing"]

    @property
    def name(self) -> str:
        return f"{self.step.name}, against {self.against}"


def _train(
    model: Model, phase: Literal["forget", "retain"], precision: Literal["fp32", "bf16"], batch: int, against: Any
) -> TrainCase:
    checkpointing = against == "checkpointing"
    step = StepCase(model=model, phase=phase, precision=precision, batch=batch, checkpointing=checkpointing)
    return TrainCase(step=step, against=against)


# In the order of their weight: a run that is cut short has the first ones.
TRAIN_CPU = (
    _train(VIT_S, "retain", "bf16", 16, "all"),
    _train(VIT_S, "forget", "bf16", 16, "all"),
    _train(YARDSTICK, "retain", "bf16", 100, "uncompiled"),
    _train(YARDSTICK, "forget", "bf16", 100, "uncompiled"),
    _train(VIT_S, "retain", "bf16", 4, "plain"),
    _train(VIT_S, "retain", "bf16", 64, "plain"),
    _train(VIT_B, "retain", "bf16", 8, "plain"),
    _train(VIT_S, "retain", "bf16", 16, "checkpointing"),
)
TRAIN_CUDA = (
    _train(VIT_B, "retain", "bf16", 128, "all"),
    _train(VIT_B, "forget", "bf16", 128, "all"),
    _train(VIT_L, "retain", "bf16", 256, "checkpointing"),
    _train(VIT_L, "retain", "bf16", 128, "plain"),
    _train(VIT_S, "retain", "bf16", 128, "plain"),
    *(_train(model, "retain", "bf16", batch, "plain") for model in (VIT_S, VIT_B, VIT_L) for batch in (32, 256)),
    _train(VIT_S, "forget", "bf16", 128, "plain"),
    _train(VIT_L, "forget", "bf16", 128, "plain"),
    _train(VIT_S, "retain", "fp32", 128, "plain"),
    _train(VIT_L, "retain", "fp32", 32, "plain"),
    _train(VIT_S, "retain", "bf16", 128, "compiled"),
    _train(VIT_L, "retain", "bf16", 128, "compiled"),
)
TRAIN_QUICK = (
    _train(TINY, "retain", "bf16", 8, "uncompiled"),
    _train(TINY, "forget", "bf16", 8, "uncompiled"),
    _train(TINY, "retain", "fp32", 8, "compiled"),
    _train(TINY, "retain", "bf16", 8, "checkpointing"),
)
