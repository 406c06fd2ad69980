"""Intervals of a number from the samples that it was measured on.

They cover the variation over samples of the same kind, not over training runs: for that, compare with the spread
between retrained models (the noise floor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta  # type: ignore[import-untyped,unused-ignore]

from engine.errors import UserError

# Resampled counts in memory at once: 32 MB.
_MOST_COUNTS = 4_000_000


class Interval(NamedTuple):
    """A statistic on all samples, and its interval; low <= value <= high.

    Attributes:
        value: The statistic.
        low, high: Ends of the interval.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return self._asdict()


def bootstrap(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    paired: bool = False,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of `statistic(*samples)` (Efron 1979): each sample is drawn again with
    replacement.

    A statistic that is the same on every resample (a share of exactly 0 or 1) gets an interval without width, which is
    too narrow: use `proportion` for a share.

    Args:
        statistic: Must be finite on every resample.
        *samples: Arrays [n, ...], resampled along axis 0, each on its own.
        paired: Resample all arrays by the same rows; they must have one length.
        draws: Number of resamples.
        level: Share of the results in the interval.
        seed: Seed of the draws.

    Raises:
        UserError: A sample is empty, or paired samples differ in length.
    """
    arrays = [np.asarray(sample) for sample in samples]
    if not arrays:
        raise UserError("bootstrap: no samples; give at least one array")
    counts = [len(array) for array in arrays]
    if min(counts) == 0:
        raise UserError(f"bootstrap: sample {counts.index(0)} is empty; an interval needs at least one row")
    if paired and len(set(counts)) > 1:
        raise UserError(f"bootstrap: paired samples have {', '.join(map(str, counts))} rows; give as many rows of each")
    _check(draws, level)
    rng = np.random.default_rng(seed)
    results = np.empty(draws)
    for draw in range(draws):
        if paired:
            rows = rng.integers(0, counts[0], counts[0])
            results[draw] = statistic(*(array[rows] for array in arrays))
        else:
            results[draw] = statistic(*(array[rng.integers(0, len(array), len(array))] for array in arrays))
    return percentiles(float(statistic(*arrays)), results, level)


def bootstrap_means(rows: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Return the means [draws, k] of rows [n, k] drawn again with replacement.

    This is the bootstrap of means and of functions of them: a thousand times faster than a statistic called per draw.
    All columns are resampled by the same rows, so that differences between them are paired.

    Args:
        rows: Values [n, k].
        draws: Number of resamples.
        seed: Seed of the draws.

    Raises:
        UserError: There are no values.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"bootstrap_means: rows have shape {rows.shape}, expected [n, k] with n and k above 0")
    _check(draws, 0.5)
    rng = np.random.default_rng(seed)
    count = len(rows)
    means = np.empty((draws, rows.shape[1]))
    block = max(1, _MOST_COUNTS // count)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        drawn = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means[start : start + size] = times @ rows / count
    return means


def percentiles(value: float, results: np.ndarray, level: float = 0.95) -> Interval:
    """Return the interval of the middle `level` of the resampled results [draws], widened to include the value.

    A statistic that resampling moves to one side (a divergence near 0) can have all its resamples above its value.

    Raises:
        UserError: The value or a result is not finite.
    """
    if not (np.isfinite(value) and np.isfinite(results).all()):
        raise UserError("interval: the statistic is not finite on the samples or on a resample; check the samples")
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def proportion(successes: float, count: int, level: float = 0.95) -> Interval:
    """Return the Jeffreys interval of a share (Brown, Cai and DasGupta 2001): 0 of 100 is not known to be exactly 0.

    Args:
        successes: May be a fraction: a sum of values in [0, 1], whose variance is at most that of a share.
        count: Number of trials.
        level: Probability of the interval.

    Raises:
        UserError: The numbers are not a share.
    """
    if count < 1 or not 0 <= successes <= count:
        raise UserError(f"proportion: {successes} successes of {count}; give 0 to count successes of 1 or more")
    _check(1, level)
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], successes + 0.5, count - successes + 0.5)
    value = successes / count
    return Interval(value, float(min(low, value)), float(max(high, value)))


def stated(number: Interval | str, direction: str) -> dict[str, Any]:
    """Return a number ready for JSON, with its interval and its meaning.

    Args:
        number: The number; or a text, the reason why there is none.
        direction: What the number means, and which values are better.
    """
    if isinstance(number, str):
        return {"value": None, "low": None, "high": None, "reason": number, "direction": direction}
    return {**number.to_dict(), "direction": direction}


def _check(draws: int, level: float) -> None:
    if draws < 1:
        raise UserError(f"bootstrap: draws is {draws}; give 1 or more (1000 is usual)")
    if not 0 < level < 1:
        raise UserError(f"interval: level is {level}; give a share between 0 and 1, such as 0.95")
