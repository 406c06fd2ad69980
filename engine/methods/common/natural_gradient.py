"""Natural gradient steps (Amari 1998) whose length is found by a line search."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.errors import RunStopped
from engine.methods.common.kronecker import KroneckerFisher

# Share of the step to the minimum of the parabola that is taken: other samples and views follow.
_SHARE = 0.7
# Mean KL divergence (nats), by the Fisher matrix, between predictions before and after the first length that is tried.
_FIRST_KL = 1e-5
# A step is at most so many times the length that was tried; one that is too long is shortened to a tenth at least.
_GROWTH, _SHRINKAGE, _TRIALS = 4.0, 0.1, 12


@torch.no_grad()
def descend(
    model: nn.Module,
    fisher: KroneckerFisher,
    gradients: Callable[[int], tuple[float, dict[str, Tensor]]],
    value: Callable[[int], float],
    steps: int,
    damping: float,
    report: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Lower a loss L by natural gradient steps on the weights that a Fisher matrix covers.

        d = F^-1 g(theta)        theta <- theta - a d

    A length t is tried, the last a or, at first, one that changes the predictions of the samples of F by a mean KL
    divergence of 1e-5 nats by F (t d changes them by t^2 d^T g / 2). If L does not fall, t is shortened and tried
    again: F is estimated, and its layers are not independent. If it falls, a is 0.7 of the length at the minimum of the
    parabola through L(theta), its slope -d^T g and L(theta - t d), and at most 4 t.

    Args:
        model: The model to change, in eval mode.
        fisher: F.
        gradients: Returns L of a step, whose samples may differ from those of others, and its gradients by name of the
            parameter.
        value: Returns L of a step, by the same samples.
        steps: Number of steps.
        damping: See `KroneckerFisher.solve`.
        report: Called with the step, the number of steps, and loss, length and trials of the step.

    Raises:
        RunStopped: The loss or its gradient is not finite.
    """
    named = dict(model.named_parameters())
    weights = {name: named[name] for name in fisher.names}
    trial = 0.0

    def move(direction: dict[str, Tensor], by: float) -> None:
        for name, weight in weights.items():
            weight.add_(direction[name].to(weight.dtype), alpha=-by)

    def at(direction: dict[str, Tensor], step: int, length: float) -> float:
        """Return the loss after a step of this length, and take it back."""
        kept = {name: weight.clone() for name, weight in weights.items()}
        move(direction, length)
        after = value(step)
        for name, weight in weights.items():
            weight.copy_(kept[name])
        return after

    for step in range(steps):
        loss, gradient = gradients(step)
        direction = fisher.solve(gradient, damping)
        slope = _dot(direction, gradient)
        if not (math.isfinite(loss) and math.isfinite(slope)):
            raise RunStopped(
                f"step {step}: the loss or its gradient is not finite; raise the damping (--set damping=...)"
            )
        length, trials = 0.0, 0
        if slope > 0:  # else the loss is at its minimum
            first = trial or math.sqrt(2 * _FIRST_KL / slope)
            length, trials = _search(loss, slope, first, functools.partial(at, direction, step))
            trial = length
        move(direction, length)
        report(step, steps, {"loss": loss, "length": length, "trials": float(trials)})


def _search(loss: float, slope: float, trial: float, at: Callable[[float], float]) -> tuple[float, int]:
    """Return a length at which the loss is lower, 0 if none was found, and the number of lengths that were tried.

    Args:
        loss, slope: The loss at 0, and how fast it falls there.
        trial: Length to try first.
        at: Returns the loss at a length.
    """
    for number in range(1, _TRIALS + 1):
        after = at(trial)
        lowest = _minimum(loss, slope, after, trial)
        if after < loss:
            return min(_SHARE * lowest, _GROWTH * trial), number
        trial = min(max(lowest, _SHRINKAGE * trial), trial / 2)
    return 0.0, _TRIALS


def _minimum(loss: float, slope: float, after: float, length: float) -> float:
    """Return where the parabola through `loss` at 0, of slope -`slope`, and `after` at `length` is lowest; inf if it
    bends down; 0 for a value that is not finite."""
    if not math.isfinite(after):
        return 0.0
    bend = after - loss + slope * length
    return slope * length**2 / (2 * bend) if bend > 0 else math.inf


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))
