"""Variation between training runs: what references show of it, what the prior adds, and the limits that follow."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from engine.evaluate.intervals import Interval
from engine.evaluate.spread import PRIOR_DOF, variation


def test_sampling_alone_gives_normal_limits() -> None:
    varies = variation(1.0, [0.0] * 8, prior=0.0)
    assert varies.deviation == 1.0
    assert varies.half_width(0.9) == pytest.approx(norm.ppf(0.95), rel=1e-4)
    assert varies.reach(0.9) == pytest.approx(norm.ppf(0.95) + norm.ppf(0.99), rel=1e-4)


def test_without_sampling_errors_it_is_the_moderated_t() -> None:
    deviations = [2.0, -1.0, 0.5, -1.5]
    run = (PRIOR_DOF * 0.8**2 + 3 * (3 / 4) * np.mean(np.square(deviations))) / (PRIOR_DOF + 3)
    varies = variation(0.0, deviations, prior=0.8)
    assert varies.deviation == pytest.approx((run * 5 / 4) ** 0.5)
    assert varies.dof == pytest.approx(PRIOR_DOF + 3)
    assert varies.half_width(0.9) == pytest.approx(t.ppf(0.95, PRIOR_DOF + 3) * varies.deviation)


def test_one_reference_has_the_prior_alone() -> None:
    assert variation(0.0, [], prior=0.8).deviation == pytest.approx(0.8 * 2**0.5)
    assert variation(0.0, [], prior=0.8).dof == PRIOR_DOF


def test_deviations_left_out_estimate_the_variance_of_a_run() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        values = rng.normal(0, 3.0, 4)
        deviations = [value - np.delete(values, i).mean() for i, value in enumerate(values)]
        found.append(variation(0.0, deviations, prior=3.0).deviation ** 2)
    assert np.mean(found) == pytest.approx(9.0 * 5 / 4, rel=0.03)


@pytest.mark.parametrize("references", [1, 2, 4, 8])
def test_a_retrained_model_is_beyond_the_reach_of_its_interval_once_in_a_hundred(references: int) -> None:
    """With a spread between runs that is the prior's, and with sampling errors."""
    rng, beyond, draws = np.random.default_rng(references), 0, 2000
    for _ in range(draws):
        runs, samples = rng.normal(0, 1.0, references + 1), rng.normal(0, 0.5, references + 1)
        values = runs + samples
        mine, others = values[0], values[1:]
        deviations = [v - np.delete(others, i).mean() for i, v in enumerate(others)] if references > 1 else []
        error = 0.5 * (1 + 1 / references) ** 0.5
        varies = variation(error, deviations, prior=1.0)
        difference = mine - others.mean()
        beyond += difference + varies.half_width(0.9) > varies.reach(0.9)
    assert beyond / draws < 0.016


def test_an_interval_is_widened_and_never_narrowed() -> None:
    varies = variation(1.0, [], prior=1.0)
    half = varies.half_width(0.9)
    assert varies.widen(Interval(5.0, 4.9, 5.1), 0.9) == Interval(5.0, 5.0 - half, 5.0 + half)
    assert varies.widen(Interval(5.0, -50.0, 5.1), 0.9) == Interval(5.0, -50.0, 5.0 + half)
