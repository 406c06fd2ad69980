"""Projection onto the box-capped simplex, {w in [0, 1]^n, sum w = m}: relaxed choices of m out of n samples."""

from __future__ import annotations

import numpy as np


def project(point: np.ndarray, total: float) -> np.ndarray:
    """Return the nearest w (Euclidean) to a point with 0 <= w_i <= 1 and sum w = total; float64 [n].

    w = clip(point - t, 0, 1). Its sum falls with t, is linear between the knots {point_i, point_i - 1}, is n at the
    first knot and 0 at the last. The piece that holds `total` is found by bisection over the sorted knots, and t within
    it in closed form: exact except for rounding.

    Args:
        point: Point [n].
        total: m, in (0, n].

    Raises:
        ValueError: A value is not finite, or the total is out of range.
    """
    if not 0 < total <= len(point) or not np.isfinite(point).all():
        raise ValueError(f"project: expected finite values and a total in (0, {len(point)}], got total {total}")
    # A constant added to all values does not change the result, and values around 0 are the most exact.
    centred = np.asarray(point, dtype=np.float64) - np.median(point)
    knots = np.sort(np.concatenate([centred, centred - 1]))
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if _clipped(centred, knots[middle]).sum() >= total:
            low = middle
        else:
            high = middle
    above, below = (float(_clipped(centred, knots[i]).sum()) for i in (low, high))
    shift = knots[low] + (knots[high] - knots[low]) * (above - total) / (above - below)
    return _clipped(centred, shift)


def _clipped(values: np.ndarray, shift: float) -> np.ndarray:
    return np.clip(values - shift, 0, 1)
