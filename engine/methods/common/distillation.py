"""Distillation from frozen teachers: a divergence between outputs, and a cache of the teachers' outputs.

    KL_t(p || q) = t^2 sum_c p_c (log p_c - log q_c),  p = softmax(teacher / t),  q = softmax(student / t)

The factor t^2 keeps the size of the gradient from falling with the temperature (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core.method import Context, Method
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.data import Batch


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL_t [B] of the student's logits [B, C] from the teacher's logits [B, C], in nats.

    Args:
        student: Logits [B, C] that the gradient flows through.
        teacher: Logits [B, C] to match.
        temperature: t in the formula on top of this file; 1 is the plain divergence.
    """
    p, q = (F.log_softmax(logits.float() / temperature, 1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(1)


class Distillation(Method):
    """Base class of methods that compare a model's outputs with teacher outputs, which a subclass defines in `taught`.

    A phase without augmentation shows the teachers the same image in every epoch. Their outputs for the samples of such
    a phase are computed once, before it, and cached in host memory (samples x outputs floats).

    Attributes:
        teachers: Forward passes per image that `taught` takes.
    """

    teachers = 1.0

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._rows: dict[str, Tensor] = {}

    def taught(self, batch: Batch, phase: Phase) -> Tensor:
        """Return the teacher outputs [B, D] for a batch.

        Runs without gradients, under the run's autocast.
        """
        raise NotImplementedError

    def teachers_run(self, phase: Phase) -> bool:
        """Return whether a phase uses teacher outputs."""
        return True

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        phase = phases[number]
        if not self.teachers_run(phase):
            return []
        known = [each.samples for each in phases[:number] if self.teachers_run(each) and not each.augment]
        if phase.augment:
            images = taken.images
        elif phase.samples in known:
            images = 0
        else:
            images = phase.retained(len(self.context.retain))
            images += 0 if phase.samples == "retain" else len(self.context.forget)
        return [ExtraPasses(name="teacher outputs", images=images, forward=self.teachers)]

    def prepare(self, phase: Phase) -> None:
        if self.teachers_run(phase) and not phase.augment and phase.samples not in self._rows:
            loader = self.context.loader(self.context.samples_of(phase), "none")
            (self._rows[phase.samples],) = loader.rows(lambda batch: (self._teacher_outputs(batch, phase),))

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        # Each phase returns the rows that it reads: a resumed run loads only the state of the phases that remain.
        return {"rows": self._rows[phase.samples]} if self._cached(phase) else {}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        if "rows" in prepared:
            self._rows[phase.samples] = prepared["rows"]

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return self.teachers_run(phase) and not self._cached(phase)

    def teacher(self, batch: Batch, phase: Phase) -> Tensor:
        """Return the teacher outputs [B, D], float32, for a batch of `phase.samples`.

        They come from the cache, or are computed if the phase augments its images.
        """
        if self._cached(phase):
            return self._rows[phase.samples][batch.index].to(batch.images.device)
        return self._teacher_outputs(batch, phase)

    def _cached(self, phase: Phase) -> bool:
        return self.teachers_run(phase) and not phase.augment and phase.samples in self._rows

    @torch.no_grad()
    def _teacher_outputs(self, batch: Batch, phase: Phase) -> Tensor:
        with self.context.autocast():
            return self.taught(batch, phase).float()
