"""Relearning attack: does the model learn forgotten samples again faster, or further, than a model not trained on them?

An attacker who holds some of the forget samples fine-tunes the model on them and measures it on the others. The forget
set is split at random into an attacked share and a held-back rest. A copy of the model trains on the attacked share,
and is measured on the attacked, the held-back and the test samples after 0, 1, 2, 4, 8, ... steps. In a second attack
the copy trains on unrelated data (such as validation samples), and all forget samples are held back.

The number that counts is the **excess**: accuracy on held-back forget samples minus accuracy on test samples. Accuracy
on the attacked share means nothing, since every model learns what it is trained on. Accuracy on the held-back samples
alone means little: fine-tuning teaches the task, and raises it (or, too fast, lowers it) on all samples of the kind.
But a model that was never trained on the held-back samples cannot separate them from test samples, whatever it learned
from the attacked ones. For it the two accuracies change together, and the excess stays what it is by chance. Only what
was learned from the held-back samples themselves, and is still in the model, can separate them. An excess before the
first step was never forgotten; one that appears with the steps was hidden, and returns.

That holds if forget samples are like test samples, so the test set is reduced to the classes of the forget set. A
forget set that was chosen (the hardest, the most memorised) is unlike any test set, and even a retrained model has an
excess there, above or below 0. So that of the retrained models is subtracted: **advantage** is the model's excess minus
theirs, mean over the steps, and 0 is the target for any forget set. The same for losses, in place of correctness, is
**auc**: of the loss attack calibrated by the retrained models' losses after as many steps
(`engine.evaluate.membership`), held-back against test samples; 0.5 is the target.

The learning rate is that of the engine's fine-tuning (AdamW, one cycle to a peak of 0.192 / width, see
`engine.methods.finetune`), the same for every model; so are the samples of each step. Images are not augmented, since
traces of these very images are measured.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from engine.config import RunConfig, require
from engine.data import Batch, Loader, Samples
from engine.data.samples import evenly_spaced
from engine.errors import RunStopped, UserError
from engine.evaluate.intervals import Interval, bootstrap, percentiles
from engine.evaluate.membership import auc_interval, calibrated_scores
from engine.evaluate.options import MOST_SAMPLES
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.info import model_info
from engine.models.losses import cross_entropy
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.run.train_engine import TrainEngine
from engine.runtime.device import autocast, resolve_device, resolve_precision

STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
BATCH_SIZE = 50


@dataclass(frozen=True)
class RelearningCurve:
    """Accuracy [0, 1] of one model under attack, after each number of optimizer steps.

    Attributes:
        steps: Numbers of steps.
        attacked: Accuracy on the samples that it is trained on.
        held_back: Accuracy on forget samples that the attack is not trained on.
        test: Accuracy on test samples of the classes of the forget set.
        losses: Mean cross-entropy in nats, by the same names.
        predictions: Predictions that all of this is computed from, one entry for each number of steps, by the same
            names.
    """

    steps: list[int]
    attacked: list[float]
    held_back: list[float]
    test: list[float]
    losses: dict[str, list[float]] = field(default_factory=dict)
    predictions: list[dict[str, Predictions]] = field(default_factory=list, repr=False, compare=False)

    @property
    def excess(self) -> list[float]:
        """Accuracy on held-back samples minus that on test samples, see the top of this file."""
        return [held - test for held, test in zip(self.held_back, self.test, strict=True)]


def steps_of(samples: int, epochs: float, batch_size: int = BATCH_SIZE) -> tuple[int, ...]:
    """Return 0, 1, 2, 4, ... and last the steps of `epochs` passes over the attacked samples, rounded, at least 1."""
    last = max(1, round(epochs * -(-samples // batch_size)))
    return (0, *(2**i for i in range(last.bit_length()) if 2**i < last), last)


def split_forget(forget: Samples, share: float, seed: int = 0) -> tuple[Samples, Samples]:
    """Split the forget set at random into attacked samples, a `share`, and held-back samples, each at least one."""
    require(0 < share < 1, "share", share, "between 0 and 1")
    if len(forget) < 2:
        raise UserError(f"relearning: {len(forget)} forget samples cannot be split; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(len(forget))
    count = min(max(1, round(share * len(forget))), len(forget) - 1)
    return (
        forget.subset(np.sort(order[:count]), "forget (attacked)"),
        forget.subset(np.sort(order[count:]), "forget (held back)"),
    )


def relearning_curve(
    model: nn.Module,
    forget: Samples,
    test: Samples,
    *,
    share: float = 0.5,
    unrelated: Samples | None = None,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    lr: float | None = None,
    batch_size: int = BATCH_SIZE,
    max_samples: int = MOST_SAMPLES,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    **loading: Any,
) -> RelearningCurve:
    """Fine-tune a copy of the model on a share of the forget set, and measure it after each number of steps.

    The model itself is not changed. The last number of steps sets the length of the one-cycle schedule, so points of
    two curves can be compared only if their steps are the same.

    Args:
        model: The model to attack.
        forget, test: Forget set and test set.
        share: Share (0, 1) of the forget set that is attacked.
        unrelated: Train on these instead, which must be neither forget nor test samples; all forget samples are then
            held back.
        steps: Numbers of optimizer steps, from 0, increasing.
        seed: Seed of the split and of the order of samples, which are the same for every model.
        lr: Peak learning rate; None: 0.192 / width.
        batch_size: Samples of a step.
        max_samples: Most samples of each set that are measured, at equal distances.
        device, precision: Of the training and the measurement.
        **loading: Further options of `engine.data.Loader`.

    Raises:
        UserError: An option is wrong, or a set is empty.
        RunStopped: The loss is not finite.
    """
    steps = _checked(steps)
    require(lr is None or lr > 0, "lr", lr, "above 0, or null")
    attacked, held_back = split_forget(forget, share, seed) if unrelated is None else (unrelated, forget)
    if not len(attacked):
        raise UserError(f"relearning: {attacked.name} has no samples to train on")
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    preprocessing = preprocessing_of(model)
    watched = {"attacked": attacked, "held_back": held_back, "test": of_classes(test, forget)}
    loaders = {
        name: Loader(evenly_spaced(samples, max_samples, name), preprocessing, batch_size=250, device=where, **loading)
        for name, samples in watched.items()
    }
    loader = Loader(attacked, preprocessing, batch_size=batch_size, seed=seed, device=where, **loading)
    changed = copy.deepcopy(model).to(where).float().requires_grad_(True)
    lr = peak_lr(changed) if lr is None else lr
    predictions: list[dict[str, Predictions]] = []
    for step in _trained(changed, loader, steps[-1], lr, seed, precision):
        if step in steps:
            predictions.append({name: predict(changed, each, precision) for name, each in loaders.items()})
    accuracy, losses = (
        {name: [of(each[name]) for each in predictions] for name in watched} for of in (_accuracy, _mean_loss)
    )
    return RelearningCurve(list(steps), **accuracy, losses=losses, predictions=predictions)


def peak_lr(model: nn.Module) -> float:
    """Return the peak learning rate of the attack if none is given: 0.192 / width."""
    return RETAIN_LR_PER_WIDTH / model_info(model).width


def _checked(steps: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(step) for step in steps)
    rising = all(a < b for a, b in itertools.pairwise(found))
    require(len(found) > 1 and found[0] == 0 and rising, "steps", steps, "numbers of steps that rise from 0")
    return found


def _trained(model: nn.Module, loader: Loader, steps: int, lr: float, seed: int, precision: str) -> Iterator[int]:
    """Train a model in place, and yield the number of steps taken, from 0."""
    train_engine = TrainEngine(model, RunConfig())
    train_engine.begin_phase(lr)
    # As in the engine's fine-tuning: warm-up over 15%, then a cosine to zero.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(train_engine.optimizer, lr, total_steps=steps + 1, pct_start=0.15)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    yield 0
    for step in range(1, steps + 1):
        loss = _loss(model.train(), next(batches), seed * 1_000_003 + step, loader.device, precision)
        if not torch.isfinite(loss):
            raise RunStopped(f"relearning, step {step}: the loss is not finite; lower lr, or check the checkpoint")
        train_engine.backward(loss)
        train_engine.step()
        scheduler.step()
        yield step


def _loss(model: nn.Module, batch: Batch, seed: int, device: torch.device, precision: str) -> torch.Tensor:
    # Dropout, if a model has it, depends on seed and step; the caller's generator is unchanged.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast(device, precision):
        torch.manual_seed(seed)
        return cross_entropy(model, batch)


def _accuracy(p: Predictions) -> float:
    return p.accuracy


def _mean_loss(p: Predictions) -> float:
    return float(p.losses.mean())


def of_classes(test: Samples, forget: Samples) -> Samples:
    """Return the test samples of the classes of the forget set.

    Raises:
        UserError: There are none.
    """
    kept = test.of_classes(forget.labels)
    if not len(kept):
        raise UserError(f"relearning: {test.name} has no samples of the classes that are forgotten; give some")
    return kept


def steps_to(curve: RelearningCurve, level: float) -> int | None:
    """Return the first measured number of steps with accuracy `level` or more on held-back samples, or None."""
    return next((step for step, held in zip(curve.steps, curve.held_back, strict=True) if held >= level), None)


def advantage(
    curve: RelearningCurve, references: Sequence[RelearningCurve], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the excess of a model minus that of the references, mean over all steps after 0.

    0 is the target; above: knowledge of the held-back samples. Bootstrapped over held-back and over test samples, each
    with the predictions of all models.
    """
    held, test = (
        _share_correct(curve, name) - np.mean([_share_correct(reference, name) for reference in references], axis=0)
        for name in ("held_back", "test")
    )
    return bootstrap(_difference, held, test, level=level, seed=seed)


def calibrated_auc(
    curve: RelearningCurve, references: Sequence[RelearningCurve], *, level: float = 0.95
) -> list[Interval]:
    """Return the AUC [0, 1] of the calibrated loss attack after each number of steps, held-back against test samples.

    Each sample's difficulty is removed by the references' losses after as many steps. 0.5 is the target; above:
    knowledge of the held-back samples.
    """
    found = []
    for mine, *theirs in zip(*(each.predictions for each in (curve, *references)), strict=True):
        held, test = (calibrated_scores(mine[name], [each[name] for each in theirs]) for name in ("held_back", "test"))
        found.append(auc_interval(held, test, level))
    return found


def _share_correct(curve: RelearningCurve, name: str) -> np.ndarray:
    """Return for each sample [n] the share of measurements after the first in which it is predicted correctly."""
    return np.mean([each[name].correct for each in curve.predictions[1:]], axis=0)


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(first.mean() - second.mean())


def excess_interval(held_back: np.ndarray, test: np.ndarray, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Return the excess with a 95% interval, from which samples are predicted correctly [m], [n].

    The interval is the difference of two Jeffreys posteriors, since resampling would give 0 of 20 no width.
    """
    rng = np.random.default_rng(seed)
    first, second = (rng.beta(r.sum() + 0.5, len(r) - r.sum() + 0.5, draws) for r in (held_back, test))
    return percentiles(_difference(held_back, test), first - second)
