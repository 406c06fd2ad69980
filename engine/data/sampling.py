"""Assignment of samples to steps, ranks and micro-batches.

The order of an epoch depends on the seed and the epoch alone. A step takes the next `batch_size x ranks x micro`
samples of it, and each micro-batch of each rank is a contiguous slice of those. So ranks have disjoint samples, an
epoch is the whole set exactly once, and N ranks with b samples each compute the same as one process with N b.

The rest of the last step is sliced in the same way, never padded. The slices then differ in size, and a slice may be
empty. So each has a weight, that of the mean of its losses in the mean over the step:
weight = slices x samples of the slice / samples of the step, and mean over slices (weight x mean loss) = mean loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Slice:
    """A micro-batch of one rank.

    An empty slice holds the step's first sample, with weight 0, because the other ranks would wait in their collectives
    for a rank without a batch.

    Attributes:
        index: int64 [b], positions in the samples.
        weight: Weight of its mean loss, see the top of this file; 0 for a placeholder.
        total: Samples of the whole step.
    """

    index: np.ndarray
    weight: float
    total: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Distributes the samples of each step over ranks and micro-batches.

    Attributes:
        count: Number of samples.
        batch_size: Samples of one rank and micro-batch.
        rank: This rank.
        ranks: Number of ranks.
        micro: Micro-batches in a step.
    """

    count: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    micro: int = 1

    @property
    def per_step(self) -> int:
        """Samples of a full step, over all ranks and micro-batches."""
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
        """Yield this rank's micro-batches, `micro` for each step.

        Args:
            order: Order of the samples, int64 [n].
            start, stop: Steps [start, stop).
            wanted: Returns whether a step's micro-batches are needed; others are skipped.
        """
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

    Attributes:
        counts: Samples of each epoch, at least one entry; later epochs have as many as the last entry.
        per_step: Samples of a full step.
    """

    counts: tuple[int, ...]
    per_step: int

    def count(self, epoch: int) -> int:
        """Return the number of samples of an epoch."""
        return self.counts[min(epoch, len(self.counts) - 1)]

    def steps_in(self, epoch: int) -> int:
        return -(-self.count(epoch) // self.per_step)

    def steps(self, epochs: float) -> int:
        """Return the number of steps of the first `epochs`; a part of a step counts as one."""
        whole = int(epochs)
        before = sum(self.steps_in(epoch) for epoch in range(whole))
        return math.ceil(round(before + (epochs - whole) * self.steps_in(whole), 6))

    def place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, the first step of the epoch, and the first step after it."""
        epoch = first = 0
        while step >= first + self.steps_in(epoch):
            first += self.steps_in(epoch)
            epoch += 1
        return epoch, first, first + self.steps_in(epoch)

    def samples(self, steps: int) -> int:
        """Return the number of samples of the first `steps` steps."""
        epoch, first, _ = self.place(steps)
        return sum(self.count(each) for each in range(epoch)) + (steps - first) * self.per_step


def epoch_order(seed: int, epoch: int, count: int, draws: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the order [count] of an epoch, a permutation, and uniform draws [count, draws] for each sample."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    return order, rng.random((count, draws), dtype=np.float32) if draws else None
