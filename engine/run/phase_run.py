"""State of a phase while it runs: batches, learning-rate schedule, collapse guard, and the numbers of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engine.core.phase import Phase
from engine.data import Loader
from engine.run.collapse_guard import CollapseGuard


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """A phase while it runs.

    Attributes:
        number: Position of the phase in the run.
        phase: The phase.
        loader: Batches of `Phase.samples`.
        paired: Batches of `Phase.paired`; None if the phase has none.
        total: Steps of the phase.
        scheduler: Learning-rate schedule.
        guard: Collapse guard; None if the phase is not guarded.
    """

    number: int
    phase: Phase
    loader: Loader
    paired: Loader | None
    total: int
    scheduler: Any
    guard: CollapseGuard | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A step whose numbers are not read from the device yet.

    Attributes:
        step: Step of the phase, from 0.
        lr: Learning rate.
        terms: Weighted loss terms of this rank by name.
        norm: Global norm of the gradient before clipping.
    """

    step: int
    lr: float
    terms: dict[str, Tensor]
    norm: Tensor | float


def schedule(phase: Phase, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Return the learning-rate schedule of a phase of `total` steps."""
    if phase.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # One step more than the phase takes: the scheduler raises an error if it is stepped past its end.
    rates = [phase.lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total + 1, pct_start=0.15)
