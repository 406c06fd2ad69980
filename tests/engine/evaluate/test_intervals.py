"""Intervals hold the truth as often as they say, and refuse what has none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.errors import UserError
from engine.evaluate import intervals
from engine.evaluate.intervals import Interval, bootstrap, bootstrap_means, percentiles, proportion, stated


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_bootstrap_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(mean, values)
    assert found.value == pytest.approx(values.mean())
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    narrower = bootstrap(mean, values, level=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * 0.6745 * error, rel=0.15)


def test_bootstrap_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(1.0, 1.0, 100)
        found = bootstrap(mean, values, draws=200, seed=seed)
        held += found.low <= 1.0 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    assert bootstrap(mean, values, draws=50) == bootstrap(mean, values, draws=50)
    assert bootstrap(mean, values, draws=50) != bootstrap(mean, values, draws=50, seed=1)


def test_bootstrap_takes_paired_samples_by_the_same_rows_and_others_each_on_its_own() -> None:
    values = np.random.default_rng(0).normal(size=60)

    def difference(first: np.ndarray, second: np.ndarray) -> float:
        return float(second.mean() - first.mean())

    paired = bootstrap(difference, values, values + 1, paired=True, draws=200)
    assert paired == pytest.approx((1, 1, 1))
    apart = bootstrap(difference, values, values + 1, draws=200)
    error = values.std() * np.sqrt(2 / 60)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    uneven = bootstrap(difference, values, values[:20], draws=20)
    assert uneven.low < uneven.high


def test_bootstrap_refuses_what_has_no_interval() -> None:
    values = np.arange(5.0)
    with pytest.raises(UserError, match="no samples"):
        bootstrap(mean)
    with pytest.raises(UserError, match="sample 1 is empty"):
        bootstrap(lambda a, b: 0.0, values, values[:0])
    with pytest.raises(UserError, match="paired samples have 5, 4 rows"):
        bootstrap(lambda a, b: 0.0, values, values[:4], paired=True)
    with pytest.raises(UserError, match="draws is 0"):
        bootstrap(mean, values, draws=0)
    with pytest.raises(UserError, match=r"level is 1\.5"):
        bootstrap(mean, values, level=1.5)
    with pytest.raises(UserError, match="not finite"):
        bootstrap(lambda v: float("nan"), values, draws=3)
    with pytest.raises(UserError, match="not finite"):
        bootstrap(lambda v: 1.0 if len(set(v)) == 5 else float("inf"), values, draws=30)


def test_means_of_resampled_rows_are_those_of_the_bootstrap() -> None:
    rows = np.random.default_rng(0).normal(size=(80, 1)) ** 2
    both = np.concatenate([rows, rows + 1], axis=1)
    means = bootstrap_means(both, draws=2000)
    assert means.shape == (2000, 2)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)  # columns are resampled by the same rows
    slow, fast = bootstrap(mean, rows, draws=2000), percentiles(mean(rows), means[:, 0])
    width = slow.high - slow.low
    assert fast.value == slow.value
    assert fast.low == pytest.approx(slow.low, abs=0.06 * width)
    assert fast.high == pytest.approx(slow.high, abs=0.06 * width)


def test_means_do_not_depend_on_how_many_draws_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    whole = bootstrap_means(rows, draws=50)
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 7 * 30)
    np.testing.assert_allclose(bootstrap_means(rows, draws=50), whole)
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 1)
    np.testing.assert_allclose(bootstrap_means(rows, draws=50), whole)


def test_means_refuse_rows_without_a_shape() -> None:
    for rows in (np.zeros(4), np.zeros((0, 2)), np.zeros((2, 0))):
        with pytest.raises(UserError, match="rows have shape"):
            bootstrap_means(rows)


def test_percentiles_hold_the_value_even_where_resamples_lie_to_one_side() -> None:
    assert percentiles(0.0, np.linspace(1, 2, 101)) == pytest.approx((0, 0, 1.975))
    assert percentiles(3.0, np.linspace(1, 2, 101)) == pytest.approx((3, 1.025, 3))


def test_proportions_are_those_of_the_published_table() -> None:
    # Brown, Cai and DasGupta 2001, table 5 (Jeffreys, n = 10): x = 5 is [0.224, 0.776], x = 0 ends at 0.217.
    assert proportion(5, 10) == pytest.approx((0.5, 0.224, 0.776), abs=5e-4)
    none, all_of_them = proportion(0, 10), proportion(10, 10)
    assert none == pytest.approx((0, 0, 0.217), abs=5e-4)
    assert all_of_them == pytest.approx((1, 1 - 0.217, 1), abs=5e-4)
    assert proportion(4.5, 10).value == 0.45
    for successes, count in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(UserError, match="successes of"):
            proportion(successes, count)


def test_a_stated_number_can_be_written_as_json() -> None:
    number = stated(Interval(0.5, 0.4, 0.6), "higher = better")
    assert json.loads(json.dumps(number)) == {"value": 0.5, "low": 0.4, "high": 0.6, "direction": "higher = better"}
    missing = stated("too few samples", "higher = better")
    assert missing["value"] is missing["low"] is missing["high"] is None
    assert missing["reason"] == "too few samples"
    assert missing["direction"] == "higher = better"
