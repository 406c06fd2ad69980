"""Natural gradient steps (Amari 1998) whose length is found by a probe of the curvature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.errors import RunStopped
from engine.methods.common.kronecker import KroneckerFisher

# Share of the step to the minimum of the quadratic model of the loss that is taken: another batch of views follows.
_SHARE = 0.7
# m: share of the last step that is taken again.
_MOMENTUM = 0.5
# Mean KL divergence (nats) between predictions before and after, by the Fisher matrix: of a probe, and of a step at
# most.
_PROBE_KL, _MOST_KL = 2.5e-5, 0.05

# Returns the loss of a step and its gradients by parameter name.
Gradients = Callable[[int], tuple[float, dict[str, Tensor]]]


@torch.no_grad()
def descend(
    model: nn.Module,
    fisher: KroneckerFisher,
    gradients: Gradients,
    steps: int,
    damping: float,
    report: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Lower a loss by natural gradient steps on the weights that a Fisher matrix covers.

        d = F^-1 g        c = d^T (g - g(theta - e d)) / e
        u <- m u + min(0.7 d^T g / c, r) d               theta <- theta - u

    m is 0.5. c is the curvature of the loss along d. The probe e and the longest step r change the predictions of the
    samples of F by a mean KL divergence of 2.5e-5 and 0.05 nats: x d changes them by x^2 d^T g / 2. r is taken if
    c <= 0.

    Args:
        model: The model to change, in eval mode.
        fisher: F.
        gradients: Computes the loss of a step, by the same samples at each call, and its gradients.
        steps: Number of steps.
        damping: See `KroneckerFisher.solve`.
        report: Called with the step, the number of steps, and loss, length and divergence of the step.

    Raises:
        RunStopped: The loss or its gradient is not finite.
    """
    weights = {name: dict(model.named_parameters())[name] for name in fisher.names}

    def move(direction: dict[str, Tensor], length: float) -> None:
        for name, weight in weights.items():
            weight.add_(direction[name].to(weight.dtype), alpha=-length)

    velocity: dict[str, Tensor] = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(steps):
        loss, gradient = gradients(step)
        direction = fisher.solve(gradient, damping)
        slope = _dot(direction, gradient)
        if not (math.isfinite(loss) and math.isfinite(slope)):
            raise RunStopped(
                f"step {step}: the loss or its gradient is not finite; raise the damping (--set damping=...)"
            )
        if slope <= 0:  # the loss is at its minimum
            report(step, steps, {"loss": loss, "length": 0.0, "kl": 0.0})
            continue
        probe, most = (math.sqrt(2 * kl / slope) for kl in (_PROBE_KL, _MOST_KL))
        kept = {name: weight.clone() for name, weight in weights.items()}
        move(direction, probe)
        curvature = (slope - _dot(direction, gradients(step)[1])) / probe
        for name, weight in weights.items():
            weight.copy_(kept[name])
        length = min(_SHARE * slope / curvature, most) if curvature > 0 else most
        for name, each in direction.items():
            velocity[name] = _MOMENTUM * velocity[name] + length * each
        move(velocity, 1.0)
        report(step, steps, {"loss": loss, "length": length, "kl": length**2 * slope / 2})


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))
