"""SeTa (Zhou, Gao and Wang, "Scale Efficient Training for Large Datasets", CVPR 2025, arXiv 2503.13385): every epoch on
the retain set takes a part of it, chosen by the loss that each sample had when it was last trained on.

With n samples, r = keep, k = groups, w = round(window k) and E epochs in all, epoch t = 0, 1, ... takes

    t = 0, the last ceil(anneal E)      m = round(r n) samples at random
    the others                          of m at random, in k groups by k-means of their losses, easiest group first:
                                        round(m w / k) samples from where group s begins,  s = (t - 1) mod (k - w + 1)

so easy samples come first, then harder ones, and then easy ones again. No extra pass computes the losses: they are
those of the training batches.

Difference from the paper: its window holds w groups of any size, so the number of samples is known only during the run.
Here the window holds the share w / k of the samples, in random order within a group, and is moved back if too few
samples follow its start. So every epoch's size is known in advance, as needed for steps, schedule, progress and
`lethe plan`. A consequence: losses are skewed, so the first group often holds most samples, and every window except the
first then ends at the hardest sample.

A sample that was not trained on yet has the mean loss of the others. The losses are the cross-entropy with the labels,
for every method. Epochs are counted over all phases, so the window continues to slide in a method of many short phases.

Defaults: groups and window of the authors' ImageNet script, anneal as theirs, keep as in their CIFAR example.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import RunConfig, SetaConfig
from engine.data import Batch
from engine.errors import UserError
from engine.methods import Phase
from engine.models.info import num_classes_of
from engine.runtime.process_group import ProcessGroup

# Separates these draws from the other draws of a run's seed.
_DRAWS = 2503
# Largest number of rounds of k-means; on sorted numbers it converges long before.
_ROUNDS = 100


class Seta:
    """Losses and choices for one set of retain samples, over all epochs of the run on it.

    Args:
        config: Options of SeTa.
        count: n.
        epochs: E.
        seed: Seed of the run.

    Attributes:
        losses: Last loss of each sample, float64 [n]; NaN for a sample that was not trained on yet.
        epoch: Epoch of the last choice; -1 before the first.
        chosen: Positions that this epoch takes, ascending.
        width: w.
    """

    def __init__(self, config: SetaConfig, count: int, epochs: int, seed: int) -> None:
        self.config, self.count, self.epochs, self.seed = config, count, epochs, seed
        self.losses = np.full(count, np.nan)
        self.epoch, self.chosen = -1, np.arange(0)
        self.width = max(1, round(config.window * config.groups))

    @property
    def kept(self) -> int:
        """m, the number of samples that an epoch draws at random."""
        return max(1, round(self.config.keep * self.count))

    def size(self, epoch: int) -> int:
        """Return the number of samples that an epoch takes."""
        return max(1, round(self.kept * self.width / self.config.groups)) if self._slides(epoch) else self.kept

    def _slides(self, epoch: int) -> bool:
        return 0 < epoch < self.epochs - math.ceil(round(self.config.anneal * self.epochs, 6))

    def positions(self, epoch: int) -> np.ndarray:
        """Return the positions [size] that an epoch takes, ascending; chosen at its first call, by the losses then."""
        if epoch != self.epoch:
            self.epoch, self.chosen = epoch, np.sort(self._choose(epoch))
        return self.chosen

    def _choose(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, _DRAWS, self.count, epoch])
        drawn = rng.permutation(self.count)[: self.kept]
        if not self._slides(epoch):
            return drawn
        known = ~np.isnan(self.losses)
        mean = self.losses[known].mean() if known.any() else 0.0
        groups = grouped(np.where(known, self.losses, mean)[drawn], self.config.groups)
        order = np.argsort(groups, kind="stable")  # random within a group, as drawn
        start = (epoch - 1) % (self.config.groups - self.width + 1)
        size = self.size(epoch)
        first = min(int((groups < start).sum()), len(drawn) - size)
        return drawn[order[first : first + size]]


def grouped(values: np.ndarray, groups: int) -> np.ndarray:
    """Group values by k-means (Lloyd's algorithm), started at quantiles.

    Args:
        values: [n].
        groups: Number of groups.

    Returns:
        Group of each value, [n]; 0 is the group of the lowest values. If all values are equal, they are assigned to the
        groups in turn.
    """
    values = values.astype(np.float64)
    ordered = np.sort(values)
    if ordered[0] == ordered[-1]:
        return np.arange(len(values)) % groups
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.quantile(ordered, (np.arange(groups) + 0.5) / groups)
    for _ in range(_ROUNDS):
        ends = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
        edges = np.concatenate([[0], ends, [len(ordered)]])
        sizes = np.diff(edges)
        means = np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), centres)  # an empty group stays
        if (means == centres).all():
            break
        centres = means
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side="left")


class PrunedPhase:
    """The samples that each epoch of a phase takes, and the losses of its batches.

    Args:
        seta: Losses and choices for the phase's retain samples.
        first: Number of epochs of earlier phases on the same retain samples.
        before: Number of forget samples that precede the retain samples in the phase; every epoch takes all of them.
        epochs: Epochs of the phase.

    Attributes:
        counts: Samples of each epoch.
        grown: Factor on the size of paired batches, so that an epoch has as many paired samples as without pruning.
    """

    def __init__(self, seta: Seta, first: int, before: int, epochs: float) -> None:
        self.seta, self.first, self.before = seta, first, before
        self.counts = tuple(before + seta.size(first + epoch) for epoch in range(math.ceil(epochs)))
        whole = int(epochs)
        taken = sum(self.counts[:whole]) + (self.counts[whole] * (epochs - whole) if epochs > whole else 0)
        self.grown = epochs * (before + seta.count) / taken
        self._seen: list[tuple[Tensor, Tensor]] = []

    def positions(self, epoch: int) -> np.ndarray:
        """Return the positions [counts[epoch]] in the phase's samples that an epoch takes, ascending."""
        return np.concatenate([np.arange(self.before), self.before + self.seta.positions(self.first + epoch)])

    @contextlib.contextmanager
    def watching(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Record the losses of a batch: the first logits of the model in this context with the batch's size."""
        seen = len(self._seen)

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            fits = isinstance(output, Tensor) and output.shape == (len(batch), num_classes_of(module))
            if fits and batch.weight and len(self._seen) == seen:
                losses = F.cross_entropy(output.detach().float(), batch.labels, reduction="none")
                self._seen.append((batch.index, losses))

        hook = model.register_forward_hook(record)
        try:
            yield
        finally:
            hook.remove()

    def settle(self, world: ProcessGroup) -> None:
        """Store the recorded losses of all ranks in `Seta.losses`; every rank calls it."""
        index = torch.cat([index for index, _ in self._seen] or [torch.zeros(0, dtype=torch.int64)])
        losses = torch.cat([losses for _, losses in self._seen] or [torch.zeros(0)])
        self._seen.clear()
        places = world.gather_rows(index).numpy() - self.before
        values = world.gather_rows(losses).double().numpy()
        self.seta.losses[places[places >= 0]] = values[places >= 0]


def pruned_phases(run: RunConfig, phases: Sequence[Phase], forget: int, retain: int) -> dict[int, PrunedPhase]:
    """Return the phases with steps on retain samples, by number; empty if the run does not prune.

    Args:
        run: Options of the run.
        phases: Phases of the run in order.
        forget, retain: Number of samples of the forget set and of the retain set.
    """
    if run.retain_pruning == "none":
        return {}
    counts = {number: phase.retained(retain) for number, phase in enumerate(phases) if phase.epochs > 0}
    counts = {number: count for number, count in counts.items() if count}
    epochs: dict[int, int] = {}  # by the number of samples: phases with equal numbers have the same samples
    firsts = {}
    for number, count in counts.items():
        firsts[number] = epochs.get(count, 0)
        epochs[count] = firsts[number] + math.ceil(phases[number].epochs)
    setas = {count: Seta(run.seta, count, total, run.seed) for count, total in epochs.items()}
    return {
        number: PrunedPhase(
            setas[count], firsts[number], forget if phases[number].samples == "all" else 0, phases[number].epochs
        )
        for number, count in counts.items()
    }


def check_pruning(run: RunConfig, method: str, pruned: dict[int, PrunedPhase]) -> None:
    """Check that `retain_pruning` fits the run.

    Raises:
        UserError: No phase has retain samples, or the model is compiled, so that its losses cannot be recorded.
    """
    if run.retain_pruning == "none":
        return
    if not pruned:
        raise UserError(
            f"option retain_pruning={run.retain_pruning!r}: {method} makes no passes over retained samples with these "
            "options, so there is nothing to prune; leave it out"
        )
    if run.compile:
        raise UserError(
            f"option retain_pruning={run.retain_pruning!r} reads losses of the forward pass, which compile=true "
            "removes; leave out one of the two"
        )


def state_of(pruned: dict[int, PrunedPhase]) -> dict[int, dict[str, Any]]:
    """Return the state for a resume, by number of samples."""
    return {
        each.seta.count: {
            "losses": torch.from_numpy(each.seta.losses.copy()),
            "epoch": each.seta.epoch,
            "chosen": torch.from_numpy(each.seta.chosen.copy()),
        }
        for each in pruned.values()
    }


def load_state(pruned: dict[int, PrunedPhase], state: dict[int, dict[str, Any]]) -> None:
    """Load what `state_of` returned."""
    for each in pruned.values():
        kept = state[each.seta.count]
        each.seta.losses, each.seta.epoch = kept["losses"].numpy().copy(), kept["epoch"]
        each.seta.chosen = kept["chosen"].numpy().copy()
