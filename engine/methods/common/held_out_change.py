"""How far training has moved the predictions for held-out samples, measured a few times during a phase."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.core.method import Context
from engine.data import Samples

# Measurements, at equal distances over the steps; samples of each; weight of the newest in the moving mean.
MEASUREMENTS, SAMPLES, NEWEST = 16, 200, 0.4


class HeldOutChange:
    """Moving mean, over measurements, of a score of held-out samples now less that of the original.

    Classes count as often as in the forget set. Samples of a class of which nothing is forgotten, or nothing is
    retained, are left out.

    Args:
        context: The run, with held-out samples.
        held_out: The held-out samples.
        scores: Score [n] of the original for each of them.

    Attributes:
        value: The moving mean; None before the first measurement, and without a held-out sample that counts.
    """

    def __init__(self, context: Context, held_out: Samples, scores: Tensor) -> None:
        labels = held_out.labels
        count = np.bincount(context.forget.labels, minlength=context.num_classes)[labels]
        kept = np.flatnonzero(count * np.isin(labels, context.retain.labels))
        kept = np.random.default_rng(context.run.seed).permutation(kept)
        weights = count[kept] / np.bincount(labels, minlength=context.num_classes)[labels[kept]]
        self._samples, self._before = held_out.subset(kept), scores[torch.from_numpy(kept)]
        self._weights = torch.from_numpy(weights)
        self.value: float | None = None

    @staticmethod
    def images(steps: int, held_out: int) -> int:
        """Return the number of images that a phase of `steps` measures, at most."""
        return min(MEASUREMENTS, steps) * min(SAMPLES, held_out)

    def after_step(self, step: int, steps: int, score: Callable[[Samples], Tensor]) -> None:
        """Measure, if it is due after this step.

        Args:
            step, steps: The step, from 0 on, and the number of steps.
            score: Returns the score [m] of samples, by the model as it is now.
        """
        number = min(MEASUREMENTS, steps)
        taken = (step + 1) * number // steps
        if taken == step * number // steps or not len(self._samples):
            return
        count = min(SAMPLES, len(self._samples))
        rows = np.sort(np.arange((taken - 1) * count, taken * count) % len(self._samples))
        chosen = torch.from_numpy(rows)
        weights = self._weights[chosen]
        apart = score(self._samples.subset(rows)) - self._before[chosen]
        newest = float((apart * weights).sum() / weights.sum())
        self.value = newest if self.value is None else self.value + NEWEST * (newest - self.value)
