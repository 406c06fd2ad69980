"""Report of relearning: the attacks of `engine.evaluate.relearning` and the linear probe, on every model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from engine.data import Samples
from engine.errors import UserError, nearest
from engine.evaluate.linear_probe import linear_probe
from engine.evaluate.options import MeasureOptions
from engine.evaluate.relearning import (
    BATCH_SIZE,
    STEPS,
    RelearningCurve,
    advantage,
    calibrated_auc,
    excess_interval,
    peak_lr,
    relearning_curve,
    steps_to,
)

DIRECTION = {
    "excess": "accuracy on held-back forget samples less that on test samples; target: the references'; above = "
    "memory of these samples",
    "advantage": "excess less the references', mean over the steps after the first evaluation; 0 = as for a retrained "
    "model, above = the samples were hidden, or never removed",
    "auc": "loss attack calibrated by the references after as many steps, held-back against test samples; 0.5 = as a "
    "retrained model, above = memory of these samples",
    "steps_to_original": "optimizer steps until accuracy on the held-back samples is the untouched original's; null = "
    "not within the steps; fewer than the references = relearns faster",
    "probe": "logistic regression on frozen features of retained samples; excess as above: what the features hold of "
    "the forget samples, independent of the head",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelearningSets:
    """Samples of the report.

    Attributes:
        forget, test: Forget set and test set.
        retain: Retain set for the probe; None: no probe.
        unrelated: Samples for the second attack; None: no second attack.
    """

    forget: Samples
    test: Samples
    retain: Samples | None = None
    unrelated: Samples | None = None

    def attacks(self) -> dict[str, Samples | None]:
        """Return the samples that each attack trains on, by its name; None: a share of the forget set."""
        return {"forget_share": None, **({} if self.unrelated is None else {"unrelated": self.unrelated})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelearningAttack:
    """Options of the attacks, as in `engine.evaluate.relearning.relearning_curve`.

    Attributes:
        share: Share (0, 1) of the forget set that is attacked.
        steps: Numbers of optimizer steps, from 0, increasing.
        lr: Peak learning rate; None: 0.192 / width.
        batch_size: Samples of a step.
    """

    share: float = 0.5
    steps: Sequence[int] = STEPS
    lr: float | None = None
    batch_size: int = BATCH_SIZE


def relearning_report(
    models: Mapping[str, nn.Module],
    sets: RelearningSets,
    *,
    original: str = "original",
    references: Sequence[str] = (),
    attack: RelearningAttack | None = None,
    options: MeasureOptions | None = None,
) -> dict[str, Any]:
    """Run the attacks and the probe on every model, and compare them with the references; ready for JSON.

    Args:
        models: Models by name.
        sets: The samples.
        original: Name of the original in `models`.
        references: Names of the references in `models`.
        attack: Options of the attacks; None: the defaults.
        options: Options of the measurement; None: the defaults.

    Returns:
        attack (steps, share, samples, rate), direction, and by model: by attack (forget_share, unrelated) accuracy and
            loss (lists over the steps, for attacked, held_back and test), excess (a list of intervals),
            steps_to_original, and, None without references other than itself, advantage and auc (a list of intervals);
            and probe. Intervals are 95%, over samples.

    Raises:
        UserError: A name is not in `models`.
    """
    attack, options = attack or RelearningAttack(), options or MeasureOptions()
    for name in (original, *references):
        if name not in models:
            raise UserError(f"relearning_report: no model {name!r}{nearest(name, models)}")
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    sizes: dict[str, dict[str, int]] = {}
    for attack_name, trained_on in sets.attacks().items():
        curves = _curves(models, sets, trained_on, attack, options)
        sizes[attack_name] = {name: len(each) for name, each in curves[original].predictions[0].items()}
        for name, curve in curves.items():
            others = [curves[reference] for reference in references if reference != name]
            found[name][attack_name] = _described(curve, curves[original].held_back[0], others, options.seed)
    if sets.retain is not None:
        for name, model in models.items():
            found[name]["probe"] = linear_probe(model, sets.retain, sets.forget, sets.test, options=options)
    return {
        "attack": {
            "share": attack.share,
            "steps": list(attack.steps),
            "samples": sizes,
            "batch_size": attack.batch_size,
            "lr": peak_lr(models[original]) if attack.lr is None else attack.lr,
        },
        "direction": DIRECTION,
        "models": found,
    }


def _curves(
    models: Mapping[str, nn.Module],
    sets: RelearningSets,
    trained_on: Samples | None,
    attack: RelearningAttack,
    options: MeasureOptions,
) -> dict[str, RelearningCurve]:
    """Return the relearning curve of each model in one attack, by name."""
    return {
        name: relearning_curve(
            model,
            sets.forget,
            sets.test,
            unrelated=trained_on,
            share=attack.share,
            steps=attack.steps,
            lr=attack.lr,
            batch_size=attack.batch_size,
            **options.keywords(),
        )
        for name, model in models.items()
    }


def _described(
    curve: RelearningCurve, level: float, references: Sequence[RelearningCurve], seed: int
) -> dict[str, Any]:
    return {
        "accuracy": {"attacked": curve.attacked, "held_back": curve.held_back, "test": curve.test},
        "loss": curve.losses,
        "excess": [
            excess_interval(each["held_back"].correct, each["test"].correct, seed=seed).to_dict()
            for each in curve.predictions
        ],
        "steps_to_original": steps_to(curve, level),
        "advantage": advantage(curve, references, seed=seed).to_dict() if references else None,
        "auc": [each.to_dict() for each in calibrated_auc(curve, references)] if references else None,
    }
