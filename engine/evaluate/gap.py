"""Average gap to the mean of the references with an interval, and what retrained models have of it (the noise floor).

The field's gap compares a model with one reference at a time. The mean of R references is a better estimate of what a
retrained model gives, so the gap to it is smaller and does not grow with the references' own differences. The noise
floor is the same figure of each reference against the others. Intervals are percentile bootstraps over the samples of
each set, drawn jointly for all models, and over the references; that of the noise floor is over samples alone, since a
reference that is drawn twice has no distance to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.evaluate.agreement import SETS
from engine.evaluate.intervals import bootstrap_means, percentiles, stated
from engine.models.predict import Predictions

# Predictions by set, and the calls of the membership attack for the forget samples (True: non-member).
Measured = tuple[Mapping[str, Predictions], np.ndarray]

_DRAWS = 1000
_LEVEL = 0.95
_DIRECTION = "percentage points; lower = nearer to a retrained model"


def gap_report(
    model: Measured, references: Sequence[Measured], original: Measured | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the average gap to the mean of the references, with 95% intervals.

    Args:
        model: The model.
        references: Retrained models, at least one.
        original: The original.
        seed: Seed of the draws of references.

    Returns:
        {"average": {value, low, high, direction}, and, with two references or more, "noise_floor": the same of each
        reference against the others, mean, and with an original "share_of_untouched": the model's average gap over the
        original's}.
    """
    models = [model, *references, *([original] if original is not None else [])]
    values, drawn = _four(models)
    count = len(references)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, count, (_DRAWS, count)) + 1
    mean = np.take_along_axis(drawn, chosen[:, None, :], axis=2).mean(2)  # [draws, 4]
    known = values[:, 1 : 1 + count].mean(1)

    def average(column: int) -> tuple[float, np.ndarray]:
        return float(np.abs(values[:, column] - known).mean()), np.abs(drawn[:, :, column] - mean).mean(1)

    mine, draws = average(0)
    found = {"average": stated(percentiles(mine, draws, _LEVEL), _DIRECTION)}
    if original is not None:
        untouched, others = average(-1)
        if untouched > 0:
            ratios = draws / np.maximum(others, 1e-9)
            direction = "the model's average gap over the original's; lower = nearer to a retrained model"
            found["share_of_untouched"] = stated(percentiles(mine / untouched, ratios, _LEVEL), direction)
    if count > 1:
        left_out, left_out_draws = [], []
        for one in range(1, 1 + count):
            rest = [other for other in range(1, 1 + count) if other != one]
            left_out.append(np.abs(values[:, one] - values[:, rest].mean(1)).mean())
            left_out_draws.append(np.abs(drawn[:, :, one] - drawn[:, :, rest].mean(2)).mean(1))
        floor = percentiles(float(np.mean(left_out)), np.mean(left_out_draws, axis=0), _LEVEL)
        found["noise_floor"] = stated(floor, "the average gap of a reference to the mean of the others")
    return found


def _four(models: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """Return forget, retain and test accuracy and MIA efficacy in points, [4, models], and draws [draws, 4, models].

    Accuracy and efficacy are of the same forget samples, so both are drawn by the same rows.
    """
    sets = {name: np.stack([p[name].correct for p, _ in models], axis=1) for name in SETS}
    calls = np.stack([non_members for _, non_members in models], axis=1)
    count = len(models)
    forget = np.concatenate([sets["forget"], calls], axis=1)
    drawn = bootstrap_means(forget, draws=_DRAWS)
    draws = {"forget": drawn[:, :count], "mia": drawn[:, count:]}
    for seed, name in enumerate(("retain", "test"), 1):
        draws[name] = bootstrap_means(sets[name], draws=_DRAWS, seed=seed)
    means = {**{name: sets[name].mean(0) for name in SETS}, "mia": calls.mean(0)}
    order = [*SETS, "mia"]
    return 100 * np.stack([means[name] for name in order]), 100 * np.stack([draws[name] for name in order], axis=1)
