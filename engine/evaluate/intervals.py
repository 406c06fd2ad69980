"""How sure a number is: intervals from the samples that it was measured on.

They tell what other samples of the same kind would have given, not what another training run would: for that, compare
with the spread between retrained models (the noise floor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta  # type: ignore[import-untyped,unused-ignore]

from engine.errors import UserError

# Of the resampled counts that are held at once: 32 MB.
_MOST_COUNTS = 4_000_000


class Interval(NamedTuple):
    """A statistic on all samples, and the ends of its interval; low <= value <= high."""

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
    """Percentile interval of `statistic(*samples)` (Efron 1979): each sample is drawn again with replacement.

    samples: arrays [n, ...], resampled along axis 0, each on its own; with `paired` all by the same rows, and then of
    one length. The statistic must be finite on every resample. A statistic that is the same on every resample (a share
    of exactly 0 or 1) gets an interval without width, which is too narrow: use `proportion` for a share.
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
    """Means [draws, k] of the rows [n, k] drawn again with replacement.

    The bootstrap of means and of what follows from them: a thousand times faster than a statistic called per draw, and
    all columns are resampled by the same rows, so that differences between them are paired.
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
    """The interval that holds the middle `level` of the resampled results [draws], widened to hold the value.

    A statistic that resampling pushes to one side (a divergence near 0) can have all its resamples above its value.
    """
    if not (np.isfinite(value) and np.isfinite(results).all()):
        raise UserError("interval: the statistic is not finite on the samples or on a resample; look at the samples")
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def proportion(successes: float, count: int, level: float = 0.95) -> Interval:
    """Jeffreys interval of a share (Brown, Cai and DasGupta 2001): 0 of 100 is not known to be exactly 0.

    successes may be a fraction: a mean of values in [0, 1], whose variance is at most that of a share.
    """
    if count < 1 or not 0 <= successes <= count:
        raise UserError(f"proportion: {successes} successes of {count}; give 0 to count successes of 1 or more")
    _check(1, level)
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], successes + 0.5, count - successes + 0.5)
    value = successes / count
    return Interval(value, float(min(low, value)), float(max(high, value)))


def stated(number: Interval | str, direction: str) -> dict[str, Any]:
    """JSON-ready number with its interval and what it means. A text in place of the number: why there is none."""
    if isinstance(number, str):
        return {"value": None, "low": None, "high": None, "reason": number, "direction": direction}
    return {**number.to_dict(), "direction": direction}


def _check(draws: int, level: float) -> None:
    if draws < 1:
        raise UserError(f"bootstrap: draws is {draws}; give 1 or more (1000 is usual)")
    if not 0 < level < 1:
        raise UserError(f"interval: level is {level}; give a share between 0 and 1, such as 0.95")
