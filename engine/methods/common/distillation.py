"""Distillation from frozen teachers: a divergence between outputs, and a base class of methods.

    KL_t(p || q) = t^2 sum_c p_c (log p_c - log q_c),  p = softmax(teacher / t),  q = softmax(student / t)

The factor t^2 keeps the size of the gradient from falling with the temperature (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.data import Batch
from engine.methods.common.cached_teachers import CachedTeachers


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL_t [B] of the student's logits [B, C] from the teacher's logits [B, C], in nats.

    Args:
        student: Logits [B, C] that the gradient flows through.
        teacher: Logits [B, C] to match.
        temperature: t in the formula on top of this file; 1 is the plain divergence.
    """
    p, q = (F.log_softmax(logits.float() / temperature, 1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(1)


class Distillation(CachedTeachers):
    """Base class of methods that compare a model's outputs with one teacher output, which `teacher_forward` returns.

    Attributes:
        teachers: Forward passes per image that `teacher_forward` takes.
    """

    teachers = 1.0

    def teacher_forward(self, batch: Batch, phase: Phase) -> Tensor:
        """Return the teacher outputs [B, D] for a batch.

        Runs without gradients, under the run's autocast.
        """
        raise NotImplementedError

    @torch.no_grad()
    def run_teachers(self, batch: Batch, phase: Phase) -> tuple[Tensor, ...]:
        with self.context.autocast():
            return (self.teacher_forward(batch, phase).float(),)

    def teacher(self, batch: Batch, phase: Phase) -> Tensor:
        """Return the teacher outputs [B, D], float32, for a batch of `phase.samples`; see `teacher_outputs`."""
        (output,) = self.teacher_outputs(batch, phase)
        return output

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        phase = phases[number]
        if not self.uses_teachers(phase):
            return []
        cached = [each.samples for each in phases[:number] if self.uses_teachers(each) and not each.augment]
        if phase.augment:
            images = taken.images
        elif phase.samples in cached:
            images = 0
        else:
            images = phase.retained(len(self.context.retain))
            images += 0 if phase.samples == "retain" else len(self.context.forget)
        return [ExtraPasses(name="teacher outputs", images=images, forward=self.teachers)]
