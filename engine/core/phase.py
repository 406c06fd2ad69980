"""A phase of a run: a stretch of optimizer steps with one loss on one set of samples."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of optimizer steps. `Method.edit` runs before the first of them.

    Attributes:
        name: Name of the phase in history, timings and checkpoints.
        samples: Set whose batches go to `Method.loss`; "all" is the forget set followed by the retain set.
        epochs: Passes over those samples. A fraction is rounded up to whole steps; 0 runs `Method.edit` alone.
        lr: Peak learning rate of AdamW.
        schedule: "constant", or "one_cycle": warm-up over 15% of the steps, then a cosine to zero.
        augment: Augment as the run's option `augment` says; False: not at all.
        guarded: The phase may destroy the model, so the collapse guard measures the watched accuracy during it.
        share: Size of a batch of `samples` relative to the run's batch size.
        paired: Set of which each step takes a second batch, for `Method.paired_loss`. Passes over it are not counted.
        paired_share: Size of that batch relative to the run's batch size.
        augment_paired: Whether that batch is augmented; None: as `augment`.
        combined: Gradients of the two losses go to `Method.combine` instead of being added.
        retain_part: Share (0, 1] of the retain set that is among `samples`, drawn once by the run's seed.
        turns: 0: each step takes both batches. n: one step takes the paired batch alone, the next n steps the other
            batch alone; the batch that a step does not take is skipped.
    """

    name: str
    samples: Literal["forget", "retain", "all"]
    epochs: float
    lr: float
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    augment: bool = True
    guarded: bool = False
    share: float = 1.0
    paired: Literal["forget", "retain"] | None = None
    paired_share: float = 1.0
    augment_paired: bool | None = None
    combined: bool = False
    retain_part: float = 1.0
    turns: int = 0

    def retained(self, count: int) -> int:
        """Return how many of `count` retain samples are among `samples`."""
        return 0 if self.samples == "forget" else max(1, round(self.retain_part * count))

    def size(self, batch_size: int) -> int:
        """Return the size of a batch of `samples`."""
        return max(1, round(self.share * batch_size))

    def paired_size(self, batch_size: int, grown: float = 1.0) -> int:
        """Return the size of a paired batch; grown: factor by which it is larger than `paired_share` asks for."""
        return max(1, round(self.paired_share * grown * batch_size))

    def takes(self, step: int) -> tuple[bool, bool]:
        """Return whether a step takes a batch of `samples`, and whether it takes a paired batch."""
        turn = step % (1 + self.turns) == 0
        return not (self.turns and turn), self.paired is not None and turn


def paired_phase(epochs: float, lr: float, **more: Any) -> Phase:
    """Return a guarded phase of retain samples paired with forget samples. more: further fields of `Phase`."""
    return Phase(name="forget", samples="retain", paired="forget", guarded=True, epochs=epochs, lr=lr, **more)


def edit_phase(name: str = "edit") -> Phase:
    """Return a guarded phase of `Method.edit` alone."""
    return Phase(name=name, samples="forget", epochs=0, lr=0.0, schedule="constant", augment=False, guarded=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Size of a phase, for `Method.passes`.

    Attributes:
        steps: Optimizer steps.
        images: Images of `Phase.samples` that the steps take.
        paired: Images of `Phase.paired` that the steps take.
        held_out: Samples in the held-out set.
        image: (height, width) of the model's input in pixels.
    """

    steps: int
    images: int
    paired: int
    held_out: int
    image: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraPasses:
    """Passes through the model that a phase needs in addition to its steps.

    Attributes:
        name: What they are for, as `lethe plan` prints it.
        images: Number of images.
        forward, backward: Passes per image.
        rollouts: Attention rollouts per image.
        kind: Key of the measured rate that their time is estimated from.
    """

    name: str
    images: float
    forward: float = 1.0
    backward: float = 0.0
    rollouts: float = 0.0
    kind: str = "forward"
