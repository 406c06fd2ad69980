"""Outputs of frozen teachers for the samples of a phase, computed once and cached in host memory."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from engine.core.method import Context, Method
from engine.core.phase import Phase
from engine.data import Batch


class CachedTeachers(Method):
    """Base class of methods that compare a model's outputs with teacher outputs, which a subclass computes.

    A phase without augmentation shows the teachers the same image in every epoch. Their outputs for the samples of such
    a phase are computed once, before it, and cached (samples x outputs floats).

    Attributes:
        cache_names: Names of the tensors that `run_teachers` returns, in the saved state of a run.
    """

    cache_names: ClassVar[tuple[str, ...]] = ("rows",)

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._cache: dict[str, tuple[Tensor, ...]] = {}  # by `Phase.samples`

    def run_teachers(self, batch: Batch, phase: Phase) -> tuple[Tensor, ...]:
        """Return the teacher outputs [B, D], float32, for a batch, one tensor for each of `cache_names`."""
        raise NotImplementedError

    def uses_teachers(self, phase: Phase) -> bool:
        """Return whether a phase uses teacher outputs."""
        return True

    def prepare(self, phase: Phase) -> None:
        if self.uses_teachers(phase) and not phase.augment and phase.samples not in self._cache:
            loader = self.context.loader(self.context.samples_of(phase), "none")
            self._cache[phase.samples] = tuple(loader.rows(lambda batch: self.run_teachers(batch, phase)))

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        # Each phase returns the rows that it reads: a resumed run loads only the state of the phases that remain.
        return dict(zip(self.cache_names, self._cache[phase.samples], strict=True)) if self._is_cached(phase) else {}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        if self.cache_names[0] in prepared:
            self._cache[phase.samples] = tuple(prepared[name] for name in self.cache_names)

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return self.uses_teachers(phase) and not self._is_cached(phase)

    def teacher_outputs(self, batch: Batch, phase: Phase) -> tuple[Tensor, ...]:
        """Return the teacher outputs for a batch of `phase.samples`.

        They come from the cache, or are computed if the phase augments its images.
        """
        if self._is_cached(phase):
            return tuple(rows[batch.index].to(batch.images.device) for rows in self._cache[phase.samples])
        return self.run_teachers(batch, phase)

    def _is_cached(self, phase: Phase) -> bool:
        return self.uses_teachers(phase) and not phase.augment and phase.samples in self._cache
