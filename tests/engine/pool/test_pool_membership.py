"""Which models of a pool lack a sample."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UserError
from engine.pool.membership import digests_of, lacking, lacking_count

IDS = [f"train/{i}.jpg" for i in range(4000)]


def _lacking(ids: list[str] = IDS, key: str = "k", count: int = 2, first: int = 8, models: int = 8) -> np.ndarray:
    return lacking(digests_of(ids, key), count, first, models)


def test_every_sample_is_lacked_by_the_same_number_of_models() -> None:
    assert (_lacking().sum(1) == 2).all()


def test_every_model_lacks_its_share() -> None:
    assert np.abs(_lacking().mean(0) - 0.25).max() < 4 * (0.25 * 0.75 / len(IDS)) ** 0.5


def test_pairs_of_models_are_drawn_evenly() -> None:
    pairs = np.array([np.flatnonzero(row) for row in _lacking()])
    counts = np.bincount(8 * pairs[:, 0] + pairs[:, 1])
    counts = counts[counts > 0]
    assert len(counts) == 28
    assert ((counts - 4000 / 28) ** 2 / (4000 / 28)).sum() < 55  # chi-squared of 27 degrees of freedom, 0.1%


def test_the_draw_of_a_sample_does_not_depend_on_the_others() -> None:
    assert (_lacking(IDS[:10]) == _lacking()[:10]).all()
    assert (_lacking(IDS[::-1])[::-1] == _lacking()).all()


def test_another_key_is_another_draw() -> None:
    same = (_lacking(key="k") == _lacking(key="l")).all(1).mean()
    assert same < 0.1


def test_a_model_that_joins_changes_nothing_for_the_others() -> None:
    joined = _lacking(models=10)
    assert (joined[:, :8] == _lacking()).all()
    assert np.abs(joined[:, 8:].mean(0) - 0.25).max() < 0.03
    assert (joined[:, 8] != joined[:, 9]).any()


@pytest.mark.parametrize(("models", "share", "count"), [(8, 0.25, 2), (4, 0.5, 2), (10, 0.3, 3)])
def test_number_of_models_without_a_sample(models: int, share: float, count: int) -> None:
    assert lacking_count(models, share) == count


@pytest.mark.parametrize(
    ("models", "share", "message"),
    [(3, 0.5, "4 to 64"), (8, 0.2, "0.25"), (8, 0.125, "0.25"), (8, 1.0, "0.25"), (8, 0.0, "0.25")],
)
def test_a_share_that_gives_no_whole_number_is_refused(models: int, share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lacking_count(models, share)
