"""LetheViT (arXiv 2508.01569): contrast on masked and unmasked forget images, then repair on the retain set.

Forget phase, on each forget image x, with f_u the model being changed and f_o the frozen original:

    x_masked = x with the k most attended patches (5%) set to a constant
    Z = f_u(x),  Z_p = f_o(x_masked),  Z_n = f_o(x)
    L = -log( e^{s(Z, Z_p)/t} / (e^{s(Z, Z_p)/t} + sum_n e^{s(Z, Z_n)/t}) )

Retain phase: cross-entropy on the retain set.

Known from the paper: two epochs, then eight; 5%; zeroed pixels; the roles of Z, Z_p, Z_n; logits. Not published, so
options here: s, t, the attention source, one or in-batch negatives, learning rates. docs/lab has the choice of
the defaults.

f_o runs once for each forget image and its masked copy: forget images are not augmented by default, so both outputs
are cached before the phase (2 x forget samples x classes floats, in host memory). If the model supports it, the masked
copy is not computed: its patch tokens are those of the image, except the masked ones (`engine.models.masked_tokens`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.errors import UserError
from engine.methods.common.cached_teachers import CachedTeachers
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.attention_masking import HeadFusion, MaskSource, count_masked, mask_and_outputs, random_masks
from engine.models.losses import cross_entropy
from engine.models.masked_tokens import capture_patch_tokens, masked_outputs, masked_patch_token, supports_tokens
from engine.models.vit import outputs
from lethe_kernels import info_nce, mask_patches

# Learning rate of the forget phase times the width of the model: 3e-5 at width 128. See docs/lab/2026-11-21.md.
FORGET_LR_PER_WIDTH = 3.84e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LetheConfig:
    """Options of LetheViT.

    Attributes:
        forget_epochs, retain_epochs: Passes over the forget set and over the retain set; 0 leaves a phase out.
        lr: Peak learning rate of the retain phase; null: 0.192 / width.
        forget_lr: Constant learning rate of the forget phase; null: 3.84e-3 / width.
        mask_source: Patches to mask: the most attended by rollout | last | mean attention, or lowest | random
            (controls).
        head_fusion: How attention heads are combined: mean | max | min.
        mask_share: Share of patches that is masked, at least one patch.
        mask_value: zero (after normalisation) | black (before it) | mean (of the forget images, for each channel).
        contrast: Outputs that are compared: logits | features.
        similarity: s: cosine | dot.
        temperature: t.
        negatives: paired (Z_n of the same image) | in_batch (every Z_n of the batch).
        augment_forget: Augment forget images too; the original then runs on every batch instead of once.
    """

    forget_epochs: float = tunable(2.0, Range(0.5, 4, step=0.5))
    retain_epochs: float = tunable(8.0, Range(1, 10, step=1))
    lr: float | None = tunable(None, rate(RETAIN_LR_PER_WIDTH))
    forget_lr: float | None = tunable(None, rate(FORGET_LR_PER_WIDTH))
    mask_source: MaskSource = "rollout"
    head_fusion: HeadFusion = "mean"
    mask_share: float = tunable(0.05, Range(0.02, 0.5, log=True))
    mask_value: Literal["zero", "black", "mean"] = "black"
    contrast: Literal["logits", "features"] = "logits"
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = tunable(0.1, Range(0.02, 1.0, log=True))
    negatives: Literal["paired", "in_batch"] = "paired"
    augment_forget: bool = False

    def __post_init__(self) -> None:
        require(self.forget_epochs >= 0, "forget_epochs", self.forget_epochs, "0 or more")
        require(self.retain_epochs >= 0, "retain_epochs", self.retain_epochs, "0 or more")
        require(
            self.forget_epochs + self.retain_epochs > 0,
            "retain_epochs",
            self.retain_epochs,
            "at least one stage to run",
        )
        positive_or_null(self, "lr", "forget_lr")
        require(0 < self.mask_share < 1, "mask_share", self.mask_share, "between 0 and 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


@register
class Lethe(CachedTeachers):
    name = "lethe"
    summary = "LetheViT: contrast on attention-masked forget images, then repair on the retained ones"
    Config = LetheConfig
    needs = frozenset({"logits", "attention"})
    cache_names = ("positives", "negatives")

    def __init__(self, config: LetheConfig, context: Context) -> None:
        super().__init__(config, context)
        if config.negatives == "in_batch" and context.run.accumulation_steps > 1:
            raise UserError(
                "option negatives='in_batch' takes its negatives from the whole step, and accumulation_steps="
                f"{context.run.accumulation_steps} splits a step; use negatives=paired, or a larger batch_size"
            )
        self.k = count_masked(context.patches, config.mask_share)
        self._fill: Tensor | None = None
        self._by_tokens = supports_tokens(context.original)
        self._token: Tensor | None = None

    def phases(self) -> list[Phase]:
        config = self.config
        forget = Phase(
            name="forget",
            samples="forget",
            epochs=config.forget_epochs,
            schedule="constant",
            lr=self.learning_rate(config.forget_lr, FORGET_LR_PER_WIDTH),
            augment=config.augment_forget,
            guarded=True,
        )
        retain = Phase(
            name="retain",
            samples="retain",
            epochs=config.retain_epochs,
            lr=self.learning_rate(config.lr, RETAIN_LR_PER_WIDTH),
        )
        return [phase for phase in (forget, retain) if phase.epochs > 0]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config = self.config
        if phases[number].name != "forget":
            return []
        images = taken.images if config.augment_forget else len(self.context.forget)
        rollouts = float(config.mask_source == "rollout")
        # The original on each forget image and on its masked copy, and the class row of the rollout between them.
        return [
            ExtraPasses(name="masks and teacher outputs", images=images, forward=2, rollouts=rollouts, kind="teacher")
        ]

    def uses_teachers(self, phase: Phase) -> bool:
        return phase.name == "forget"

    def run_teachers(self, batch: Batch, phase: Phase) -> tuple[Tensor, ...]:
        return self.teacher(batch)

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        if phase.name == "retain":
            return {"retain_ce": cross_entropy(model, batch)}
        config = self.config
        positives, negatives = self.teacher_outputs(batch, phase)
        loss = info_nce(
            outputs(model, batch.images, config.contrast).float(),
            positives,
            negatives[:, None] if config.negatives == "paired" else self._of_all_ranks(negatives, batch),
            temperature=config.temperature,
            similarity=config.similarity,
            backend=self.context.run.kernels.backend,
        )
        return {"contrast": loss}

    def _of_all_ranks(self, negatives: Tensor, batch: Batch) -> Tensor:
        """Return the negatives [M, D] of the whole step: of every rank, without placeholders of empty ranks."""
        world = self.context.world
        if world.size == 1:
            return negatives
        return world.gather_rows(negatives[: len(batch) if batch.weight else 0]).to(negatives.device)

    @torch.no_grad()
    def teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (Z_p, Z_n) [B, D] float32: the original's outputs for the masked images and for the images."""
        config, context = self.config, self.context
        # Capture the first pass only; the pass on masked tokens must not be captured.
        capture: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        if self._by_tokens:
            capture = capture_patch_tokens(context.original)
        with context.autocast():
            with capture as tokens:
                if config.mask_source == "random":
                    negatives = outputs(context.original, batch.images, config.contrast)
                    mask = random_masks(batch.index, context.patches, self.k, context.run.seed).to(batch.images.device)
                else:
                    mask, negatives = mask_and_outputs(
                        context.original,
                        batch.images,
                        context.patches,
                        self.k,
                        source=config.mask_source,
                        head_fusion=config.head_fusion,
                        what=config.contrast,
                        backend=context.run.kernels.backend,
                    )
            positives = self._outputs_when_masked(batch, mask, tokens)
        return positives.float(), negatives.float()

    def _outputs_when_masked(self, batch: Batch, mask: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the original's outputs for masked images, from the tokens of the images if the model supports it."""
        original, what, backend = self.context.original, self.config.contrast, self.context.run.kernels.backend
        if not self._by_tokens:
            patch_size = self.context.patches.patch_size
            masked = mask_patches(batch.images, mask, patch_size=patch_size, value=self.fill(batch), backend=backend)
            return outputs(original, masked, what)
        if self._token is None:
            self._token = masked_patch_token(original, self.fill(batch))
        return masked_outputs(original, tokens[0], mask, self._token, what=what, backend=backend)

    def fill(self, batch: Batch) -> Tensor:
        """Return the value [C] of a masked pixel, in normalised units."""
        if self._fill is None:
            self._fill = self._mask_fill()
        return self._fill.to(batch.images)

    def _mask_fill(self) -> Tensor:
        preprocessing = self.context.preprocessing
        zero = torch.zeros(len(preprocessing.mean))
        if self.config.mask_value == "zero":
            return zero
        if self.config.mask_value == "black":
            return (zero - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)
        loader = self.context.loader(self.context.forget, "none")
        means, present = loader.rows(lambda batch: (batch.images.double().mean((2, 3)), torch.ones(len(batch))))
        return (means.sum(0) / present.sum()).float()
