"""Which samples a step takes, and which of them a rank.

The order of an epoch depends on the seed and the epoch alone. A step takes the next `batch_size x ranks x micro`
samples of it, and each micro-batch of each rank is a contiguous slice of those; so ranks see disjoint samples, an epoch
is the whole set exactly once, and N ranks with b samples each do the mathematics of one process with N b.

What is left for the last step is sliced in the same way, never padded. The slices then differ in size, and a slice may
be empty; so each carries a weight, what the mean of its losses counts in the mean over the step:
weight = slices x samples of the slice / samples of the step, and mean over slices (weight x mean loss) = mean loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Slice:
    """index: int64 [b], positions in the samples. weight: see above; 0 for a slice that keeps a rank in step.

    total: samples of the whole step. An empty slice holds the step's first sample, with weight 0, because a rank
    without any would leave the others waiting in their collectives.
    """

    index: np.ndarray
    weight: float
    total: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Deals the samples of each step out to ranks and micro-batches.

    count: samples in all. batch_size: of one rank and micro-batch. micro: micro-batches a step.
    """

    count: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    micro: int = 1

    @property
    def per_step(self) -> int:
        """Samples that a full step takes, over all ranks and micro-batches."""
        return self.batch_size * self.ranks * self.micro

    def steps(self) -> int:
        return -(-self.count // self.per_step)

    def slices(
        self,
        order: np.ndarray,
        start: int = 0,
        stop: int | None = None,
        wanted: Callable[[int], bool] = lambda step: True,
    ) -> Iterator[Slice]:
        """This rank's micro-batches of the steps [start, stop) of an order that are wanted, `micro` of them a step."""
        parts, steps = self.ranks * self.micro, -(-len(order) // self.per_step)
        for step in filter(wanted, range(start, steps if stop is None else min(stop, steps))):
            samples = order[step * self.per_step : (step + 1) * self.per_step]
            for micro in range(self.micro):
                part = micro * self.ranks + self.rank
                mine = samples[part * len(samples) // parts : (part + 1) * len(samples) // parts]
                yield Slice(mine if len(mine) else samples[:1], parts * len(mine) / len(samples), len(samples))


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The epochs of a phase, in steps and samples.

    counts: samples of each epoch, more than none; those beyond are like the last. per_step: samples of a full step.
    """

    counts: tuple[int, ...]
    per_step: int

    def count(self, epoch: int) -> int:
        """Samples of an epoch."""
        return self.counts[min(epoch, len(self.counts) - 1)]

    def steps_in(self, epoch: int) -> int:
        return -(-self.count(epoch) // self.per_step)

    def steps(self, epochs: float) -> int:
        """Steps of the first `epochs`; a part of a step is one."""
        whole = int(epochs)
        before = sum(self.steps_in(epoch) for epoch in range(whole))
        return math.ceil(round(before + (epochs - whole) * self.steps_in(whole), 6))

    def place(self, step: int) -> tuple[int, int, int]:
        """(epoch, its first step, the first step after it) of the epoch in which a step lies."""
        epoch = first = 0
        while step >= first + self.steps_in(epoch):
            first += self.steps_in(epoch)
            epoch += 1
        return epoch, first, first + self.steps_in(epoch)

    def samples(self, steps: int) -> int:
        """Samples that the first `steps` steps take."""
        epoch, first, _ = self.place(steps)
        return sum(self.count(each) for each in range(epoch)) + (steps - first) * self.per_step


def epoch_order(seed: int, epoch: int, count: int, draws: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """(order [count], table [count, draws]) of an epoch: a permutation, and uniform draws of each sample."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    return order, rng.random((count, draws), dtype=np.float32) if draws else None
