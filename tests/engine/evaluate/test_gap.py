"""Gap to the mean of the references, the noise floor and the share of the untouched gap, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.evaluate.gap import Measured, gap_report
from engine.models.predict import Predictions

SIZES = {"forget": 400, "retain": 2000, "test": 1000}


def model(number: int, accuracies: Sequence[float], called: float) -> Measured:
    """A model with these accuracies on forget, retain and test set, and this share of calls as non-members."""
    rng = np.random.default_rng(number)
    sets = {}
    for (name, size), accuracy in zip(SIZES.items(), accuracies, strict=True):
        right = rng.permutation(size) < round(accuracy * size)
        sets[name] = Predictions(np.stack([right, ~right], 1).astype(np.float32), np.zeros(size, dtype=np.int64))
    return sets, rng.permutation(SIZES["forget"]) < round(called * SIZES["forget"])


def test_values_are_those_by_hand() -> None:
    references = [model(1, (0.60, 0.80, 0.60), 0.40), model(2, (0.62, 0.84, 0.60), 0.40)]
    mine, before = model(3, (0.65, 0.80, 0.58), 0.30), model(4, (0.81, 0.82, 0.60), 0.20)
    found = gap_report(mine, references, before)
    # To the mean (61, 82, 60, 40): 4, 2, 2, 10 points, and the original 20, 0, 0, 20.
    assert found["average"]["value"] == pytest.approx((4 + 2 + 2 + 10) / 4)
    assert found["share_of_untouched"]["value"] == pytest.approx(4.5 / 10)
    assert found["noise_floor"]["value"] == pytest.approx((2 + 4 + 0 + 0) / 4)
    for numbers in found.values():
        assert numbers["low"] <= numbers["value"] <= numbers["high"]
        assert numbers["low"] < numbers["high"]


def test_an_interval_holds_the_gap_of_all_samples_in_most_draws() -> None:
    """The truth is a gap of 5 points in forget accuracy and efficacy, and none elsewhere."""
    inside = 0
    for draw in range(40):
        rng = np.random.default_rng(draw)

        references = [_drawn(rng, 0.6, 0.4) for _ in range(4)]
        average = gap_report(_drawn(rng, 0.65, 0.35), references)["average"]
        # Absolute differences are never negative, so that two sets without a gap add up to 0.8 points by chance.
        inside += average["low"] <= 2.5 + 0.8 and average["high"] >= 2.5
    assert inside >= 36


def _drawn(rng: np.random.Generator, forget: float, called: float) -> Measured:
    shares = (forget, 0.8, 0.6)
    found = [rng.binomial(size, share) / size for share, size in zip(shares, SIZES.values(), strict=True)]
    return model(int(rng.integers(2**31)), found, rng.binomial(SIZES["forget"], called) / SIZES["forget"])


def test_one_reference_has_no_floor_and_no_original_no_share() -> None:
    found = gap_report(model(3, (0.65, 0.8, 0.58), 0.3), [model(1, (0.6, 0.8, 0.6), 0.4)])
    assert set(found) == {"average"}
