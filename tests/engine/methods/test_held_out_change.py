"""The change of held-out predictions: when it is measured, on which samples, and what it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.data import Samples, open_source
from engine.methods.common.held_out_change import MEASUREMENTS, NEWEST, SAMPLES, HeldOutChange


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def made(train: Samples, forgotten: list[int], retained: list[int], count: int) -> HeldOutChange:
    labels = train.labels
    context: Any = SimpleNamespace(
        forget=train.subset(np.flatnonzero(np.isin(labels, forgotten))),
        retain=train.subset(np.flatnonzero(np.isin(labels, retained))),
        num_classes=10,
        run=SimpleNamespace(seed=3),
    )
    return HeldOutChange(context, train.subset(range(count)), torch.zeros(count))


@pytest.mark.parametrize("steps", [5, 16, 50, 203])
def test_it_measures_so_many_images_at_equal_distances_and_after_the_last_step(train: Samples, steps: int) -> None:
    change = made(train, list(range(10)), list(range(10)), 700)
    asked: list[tuple[int, list[Any]]] = []

    def score(samples: Samples, step: int) -> torch.Tensor:
        asked.append((step, list(samples.ids[:])))
        return torch.zeros(len(samples))

    for step in range(steps):
        change.after_step(step, steps, lambda samples, step=step: score(samples, step))  # type: ignore[misc]
    assert sum(len(ids) for _, ids in asked) == HeldOutChange.images(steps, 700)
    assert all(len(set(ids)) == SAMPLES for _, ids in asked)
    at = [step for step, _ in asked]
    assert len(at) == min(MEASUREMENTS, steps)
    assert at[-1] == steps - 1
    assert max(np.diff(at)) - min(np.diff(at)) <= 1
    seen = {each for _, ids in asked for each in ids}
    assert len(seen) == min(700, SAMPLES * len(asked)), "other samples each time, until all were taken"


def test_it_is_the_moving_mean_with_the_classes_of_the_forget_set(train: Samples) -> None:
    """Nothing of class 3 is retained, and of class 4 nothing is forgotten."""
    change = made(train, [1, 2, 3], [1, 2, 4], 150)
    counts = {y: int((train.labels == y).sum()) for y in (1, 2)}
    values = {1: 2.0, 2: -1.0}
    expected = sum(values[y] * counts[y] for y in values) / sum(counts.values())

    def score(samples: Samples) -> torch.Tensor:
        assert set(samples.labels) == {1, 2}
        return torch.tensor([values[int(y)] for y in samples.labels])

    assert change.value is None
    change.after_step(0, 2, score)
    assert change.value == pytest.approx(expected)
    change.after_step(1, 2, lambda samples: score(samples) + 1)
    assert change.value == pytest.approx(expected + NEWEST)


def test_without_a_class_that_is_retained_nothing_is_measured(train: Samples) -> None:
    change = made(train, [3], [0, 1], 100)
    change.after_step(0, 1, lambda samples: pytest.fail("measured"))
    assert change.value is None
