"""The worst-case forget set (Fan et al. 2024, "Challenging Forgets", arXiv 2403.07362): the samples that a model
predicts best after it has unlearned them.

Bi-level. Upper level, over weights w in S = {w in [0, 1]^n, sum w = m} of the n training samples:

    minimise over w in S   sum_i w_i l(theta(w); z_i) + gamma ||w||^2

Lower level: theta(w) is the result of unlearning from the original theta_0 when samples are forgotten by these weights;
here by fine-tuning, a number of steps theta <- theta - lr sign(grad sum_i (1 - w_i) l(theta; z_i)) from theta_0.
The sign has derivative 0 almost everywhere, so theta(w) is constant in w to first order, and the gradient of the upper
level is l(theta(w); z_i) + 2 gamma w_i: one forward pass. Alternate: unlearn from theta_0 with w, then
w <- project(w - weight_lr gradient). At the end the m samples with the largest weights are the set.

The sign is the lower level's. A step by the sign of the upper gradient would have no effect: losses are positive, so
all signs are the same, and the projection removes what is added to all weights alike.

Deviations from the paper's public code: the lower level changes the last layer alone by default, on features that are
computed once (layers=all: the whole model, as there); its steps are counted, not epochs, and are on the same batches
each time, so that objectives can be compared; dropout is off and images are not augmented; w is never rounded to 0 and
1 on the way; and it starts at m / n for all samples, not at 1 on a random m of them: weights of samples with a loss
near 0 hardly change, so those drawn first would stay. Rates are the engine's own.

The loss of a random set, before and after, shows how far the lower level unlearns; both are reported, with the share of
the worst case that the lowest-loss set has too. A last layer alone unlearns little, since memorisation is in its
features: the set is then near the lowest-loss one. layers=all is the paper's lower level.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.data import Batch
from engine.data.sampling import Sampler, epoch_order
from engine.errors import RunStopped
from engine.forget_sets.base import Selection, Strategy, highest, register, require_candidates
from engine.forget_sets.pool import Pool
from engine.forget_sets.projection import project
from engine.models.info import model_info
from engine.models.vit import outputs
from engine.runtime.device import autocast

# Samples of a forward pass of the last layer: all features are in memory, all logits need not be.
_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Options of adversarial.

    Attributes:
        iterations: Steps of the upper level, each with an unlearning of its own.
        layers: Layers that unlearning changes: last (on features that are computed once) or all (the whole model: each
            iteration costs its steps and a pass over the data).
        unlearn_steps: Steps of the lower level, each on a batch of batch_size; null: 400 for last, 100 for all.
        unlearn_lr: Change of every weight in a step; null: 1.28 / width for last, 0.0256 / width for all (1e-2 and 2e-4
            at width 128).
        weight_lr: Change of a sample's weight w for a nat of loss.
        gamma: Weight of the upper level's penalty; default of the public code.
    """

    iterations: int = 20
    layers: Literal["last", "all"] = "last"
    unlearn_steps: int | None = None
    unlearn_lr: float | None = None
    weight_lr: float = 5.0
    gamma: float = 1e-4

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(
            self.unlearn_steps is None or self.unlearn_steps >= 1,
            "unlearn_steps",
            self.unlearn_steps,
            "at least 1, or null",
        )
        positive_or_null(self, "unlearn_lr")
        require(self.weight_lr > 0, "weight_lr", self.weight_lr, "above 0")
        require(self.gamma >= 0, "gamma", self.gamma, "0 or more")


# The lower level: weights float64 [n] -> losses float64 [n] in nats of the model that was unlearned with them.
Unlearn = Callable[[np.ndarray], np.ndarray]


@register
class Adversarial(Strategy):
    name = "adversarial"
    summary = "worst case: the samples that the model still predicts best after unlearning them (bi-level)"
    score = "weight w in [0, 1] of the bi-level optimisation; highest first, of equal ones the lowest loss"
    Config = AdversarialConfig
    needs_model = True

    def select(self, pool: Pool) -> Selection:
        config, n = self.config, len(pool.samples)
        unlearn = (_LastLayer if config.layers == "last" else _WholeModel)(pool, config)
        candidates = pool.candidates
        require_candidates(len(candidates), pool.count)
        objectives: list[float] = []
        for weights, losses in optimise_weights(unlearn, n, candidates, pool.count, config):
            objectives.append(float(weights @ losses) / pool.count)
            pool.report_progress("weights", len(objectives), config.iterations, {"objective": objectives[-1]})
        # Ties in weight, caused by the caps of the box, go to the lowest loss.
        order = candidates[np.lexsort((losses[candidates], -weights[candidates]))[: pool.count]]
        drawn = np.random.default_rng([pool.seed, 1]).permutation(candidates)[: pool.count]
        easiest = highest(-pool.measurements.losses, candidates, pool.count).indices
        facts = {
            "loss_after_unlearning": set_objective(unlearn, order, n),
            "loss_of_lowest_loss_set_after_unlearning": set_objective(unlearn, easiest, n),
            "loss_of_random_set_after_unlearning": set_objective(unlearn, drawn, n),
            "loss_of_random_set_before": float(pool.measurements.losses[drawn].mean()),
            "share_among_lowest_loss": len(np.intersect1d(order, easiest)) / pool.count,
            "objective_by_iteration": objectives,
        }
        return Selection(order, weights[order], facts)


def optimise_weights(
    unlearn: Unlearn, n: int, candidates: np.ndarray, count: int, config: AdversarialConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, after each step of the upper level, its weights [n] and the losses [n] that the step was computed from.

    Weights start equal, and are 0 on samples that are not candidates.

    Args:
        unlearn: The lower level.
        n: Number of samples.
        candidates: Positions that may be chosen.
        count: m.
        config: The options.
    """
    weights = np.zeros(n)
    weights[candidates] = count / len(candidates)
    for _ in range(config.iterations):
        losses = unlearn(weights)
        step = config.weight_lr * (losses + 2 * config.gamma * weights)
        moved, weights = (weights - step)[candidates], np.zeros(n)
        weights[candidates] = project(moved, count)
        yield weights, losses


def set_objective(unlearn: Unlearn, chosen: np.ndarray, n: int) -> float:
    """Return the mean loss in nats on a set after it was unlearned. Lower: predicted better, so harder to forget."""
    weights = np.zeros(n)
    weights[chosen] = 1
    return float(unlearn(weights)[chosen].mean())


class _LowerLevel:
    """Unlearning by signSGD of a copy of `original` on the weighted samples of `batches`."""

    default_steps: ClassVar[int]
    rate_per_width: ClassVar[float]

    def __init__(self, pool: Pool, config: AdversarialConfig, original: nn.Module) -> None:
        self.pool, self.original = pool, original
        width = model_info(pool.model).width
        self.rate = self.rate_per_width / width if config.unlearn_lr is None else config.unlearn_lr
        self.steps = config.unlearn_steps or self.default_steps

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        student = copy.deepcopy(self.original).requires_grad_(True)
        parameters = list(student.parameters())
        retained = 1 - torch.from_numpy(weights).float()
        for inputs, labels, index in self.batches():
            losses = self.losses(student, inputs, labels)
            loss = (retained[index].to(losses.device) * losses).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(gradient.sign(), alpha=self.rate)
        with torch.no_grad():
            after = self.losses_of_all(student).double().numpy()
        if not np.isfinite(after).all():
            raise RunStopped("strategy adversarial: unlearning gave losses that are not finite; lower unlearn_lr")
        return after

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs, labels, and positions in the samples, for each step."""
        raise NotImplementedError

    def losses(self, student: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the losses, float32 [B]."""
        raise NotImplementedError

    def losses_of_all(self, student: Any) -> Tensor:
        """Return the losses of all samples, float32 [n], on the CPU."""
        raise NotImplementedError


class _LastLayer(_LowerLevel):
    """Unlearning that changes the last layer alone, with fixed features as its input."""

    default_steps, rate_per_width = 400, 1.28

    def __init__(self, pool: Pool, config: AdversarialConfig) -> None:
        super().__init__(pool, config, pool.last_layer())
        self.features, self.labels = pool.features, torch.from_numpy(pool.samples.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        readable = self.pool.candidates
        sampler = Sampler(len(readable), self.pool.loader.sampler.batch_size)
        for number in range(self.steps):
            epoch, step = divmod(number, sampler.steps())
            if step == 0:
                order = readable[epoch_order(self.pool.seed, epoch, len(readable))[0]]
            index = torch.from_numpy(next(sampler.slices(order, step)).index)
            yield *self._part(index), index

    def losses(self, student: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student(inputs), labels, reduction="none")

    def losses_of_all(self, student: Any) -> Tensor:
        starts = range(0, len(self.features), _ROWS)
        return torch.cat([self.losses(student, *self._part(slice(i, i + _ROWS))).cpu() for i in starts])

    def _part(self, which: Any) -> tuple[Tensor, Tensor]:
        return self.features[which].to(self.pool.device), self.labels[which].to(self.pool.device)


class _WholeModel(_LowerLevel):
    """Unlearning that changes every weight of the model."""

    default_steps, rate_per_width = 100, 2.56e-2

    def __init__(self, pool: Pool, config: AdversarialConfig) -> None:
        super().__init__(pool, config, pool.model)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        left, epoch, loader = self.steps, 0, self.pool.loader
        while left > 0:
            for batch in loader.epoch(epoch, 0, min(left, loader.steps())):
                if batch.weight:  # 0: none of its images can be read
                    yield batch.images, batch.labels, batch.index
            left, epoch = left - loader.steps(), epoch + 1

    def losses(self, student: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.pool.device, self.pool.precision):
            logits = outputs(student, inputs)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def losses_of_all(self, student: Any) -> Tensor:
        def of(batch: Batch) -> tuple[Tensor]:
            return (self.losses(student, batch.images, batch.labels),)

        return self.pool.loader.rows(of)[0]
