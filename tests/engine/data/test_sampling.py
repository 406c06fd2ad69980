"""Which samples a step takes, and which of them a rank: for every number of samples, batch, ranks and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.sampling import Sampler, epoch_order

COUNTS = {
    "count": st.integers(1, 120),
    "batch_size": st.integers(1, 40),
    "ranks": st.integers(1, 9),
    "micro": st.integers(1, 4),
    "seed": st.integers(0, 999),
    "epoch": st.integers(0, 50),
}


def steps_of(count: int, batch_size: int, ranks: int, micro: int, order: np.ndarray) -> list[list[tuple]]:
    """For each step the (index, weight, total) of all its slices, over ranks and micro-batches."""
    dealt = [list(Sampler(count, batch_size, rank, ranks, micro).slices(order)) for rank in range(ranks)]
    steps = Sampler(count, batch_size, 0, ranks, micro).steps()
    assert {len(slices) for slices in dealt} == {steps * micro}, "all ranks take the same number of micro-batches"
    return [
        [(s.index, s.weight, s.total) for m in range(micro) for s in (dealt[r][step * micro + m] for r in range(ranks))]
        for step in range(steps)
    ]


@given(**COUNTS)
def test_ranks_are_disjoint_and_an_epoch_is_every_sample_once(
    count: int, batch_size: int, ranks: int, micro: int, seed: int, epoch: int
) -> None:
    order, _ = epoch_order(seed, epoch, count)
    steps = steps_of(count, batch_size, ranks, micro, order)
    seen = np.concatenate([index for step in steps for index, weight, _ in step if weight])
    assert sorted(seen.tolist()) == list(range(count))


@given(**COUNTS)
def test_the_order_of_steps_is_that_of_one_process_with_as_many_samples(
    count: int, batch_size: int, ranks: int, micro: int, seed: int, epoch: int
) -> None:
    order, _ = epoch_order(seed, epoch, count)
    whole = list(Sampler(count, batch_size * ranks * micro).slices(order))
    steps = steps_of(count, batch_size, ranks, micro, order)
    assert len(whole) == len(steps)
    for one, step in zip(whole, steps, strict=True):
        together = np.concatenate([index for index, weight, _ in step if weight])
        assert together.tolist() == one.index.tolist()
        assert {total for *_, total in step} == {len(one.index)}


@given(**COUNTS)
def test_weighted_means_of_the_slices_are_the_mean_over_the_step(
    count: int, batch_size: int, ranks: int, micro: int, seed: int, epoch: int
) -> None:
    order, _ = epoch_order(seed, epoch, count)
    losses = np.random.default_rng(seed).random(count)
    for step in steps_of(count, batch_size, ranks, micro, order):
        mean = np.mean([weight * losses[index].mean() for index, weight, _ in step])
        samples = np.concatenate([index for index, weight, _ in step if weight])
        assert mean == pytest.approx(losses[samples].mean())


@given(**COUNTS, start=st.integers(0, 20))
def test_a_pass_can_begin_at_any_step(
    count: int, batch_size: int, ranks: int, micro: int, seed: int, epoch: int, start: int
) -> None:
    order, _ = epoch_order(seed, epoch, count)
    sampler = Sampler(count, batch_size, ranks - 1, ranks, micro)
    whole = [s.index.tolist() for s in sampler.slices(order)]
    assert [s.index.tolist() for s in sampler.slices(order, start)] == whole[start * micro :]
    assert [s.index.tolist() for s in sampler.slices(order, 0, start)] == whole[: start * micro]


@given(count=st.integers(2, 200), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_the_order_depends_on_seed_and_epoch(count: int, seed: int, epoch: int) -> None:
    order, table = epoch_order(seed, epoch, count, draws=3)
    assert np.array_equal(order, epoch_order(seed, epoch, count)[0]), "not on whether there are draws"
    assert table is not None
    assert table.shape == (count, 3)
    if count > 20:
        assert not np.array_equal(order, epoch_order(seed, epoch + 1, count)[0])
        assert not np.array_equal(order, epoch_order(seed + 1, epoch, count)[0])
