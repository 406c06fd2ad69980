"""Score of how far forget samples differ from held-out samples for a model, without a retrained model.

A retrained model was not trained on the forget set, so for it these are held-out samples of the same classes, and on
all other data it is as good as the original. The score is the distance of a model from that, in percentage points, 0
at best. Its four parts correspond to the four of the field's average gap (forget, MIA, test, retain), without the model
that this gap is measured to:

    score = (forget + membership + validation + retain) / 4

o is the original, u the model in question, F the forget set, R retain samples, H held-out ones, which neither model was
trained on. Class c has the share p_c of F. A held-out sample of class c counts w = p_c / (samples of c in H), so that H
has the classes of F; forget samples of a class that H lacks are left out (`covered` is the share of the others).

    forget      100 |acc_u(F) - sum_H w a|          a = 1 if o is correct; 0 in a class without retain samples
    membership  the mean of three distances between u's losses on F and on H (w-weighted):
        ks      100 max_t |P_F(loss <= t) - P_H(loss <= t)|     Kolmogorov-Smirnov: gain of the best threshold attack
        auc     200 |AUC - 1/2|                                 AUC of the loss attack, F against H
        mia     100 |E(F) - E(H)|       E: share that the confidence SVC (of metrics.json), fitted to R and H, calls
                                        non-members
    validation  100 max(0, acc_o(H') - acc_u(H'))   H': the held-out samples of classes with retain samples
    retain      100 max(0, acc_o(R) - acc_u(R))

Why acc_o in `forget`, and u's own losses in `membership`: the first stands for the retrained model's accuracy, and the
original's on held-out samples is the closest estimate of it. It does not depend on the trial, so a model cannot win by
ruining both sides alike. An attacker has u alone, and tries to distinguish F from H. A model that was not trained on
any sample of a class does not predict it, hence the 0; held-out samples of that class then do not have to be kept.

Our own choice: the four parts, their equal weights and the reweighting. Ideas: LoTUS (arXiv 2503.18314) stops when the
forget accuracy meets the original's on validation samples; the loss attack is Yeom et al. 2018 (arXiv 1709.01604).

All distances except `validation` and `retain` are above 0 for a perfect model too, by chance, the more so the fewer
samples there are (ks: about 0.87 sqrt(1/|F| + 1/|H|) x 100 on average). The noise is much the same for all models on
the same samples, so it hides small differences rather than favouring a model. Some hundreds of held-out samples are
needed to separate good settings: the 36 of a half of digits' are too few.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluate.membership import non_member_calls
from engine.models.predict import Predictions

PARTS = ("forget", "membership", "validation", "retain")


@dataclasses.dataclass(frozen=True)
class Views:
    """Predictions of one model.

    Attributes:
        forget, retain, held_out: Predictions for the forget set, for retain samples and for held-out samples.
    """

    forget: Predictions
    retain: Predictions
    held_out: Predictions

    @property
    def finite(self) -> bool:
        return all(np.isfinite(each.logits).all() for each in (self.forget, self.retain, self.held_out))


@dataclasses.dataclass(frozen=True)
class Score:
    """The parts of the score in percentage points, lower is better; see the top of the file.

    Attributes:
        forget, ks, auc, mia, validation, retain: The parts.
        numbers: What they are computed from: accuracy (forget, held_out of the same classes, validation, retain) and
            target in [0, 1], auc, covered, and the number of held-out samples.
    """

    forget: float
    ks: float
    auc: float
    mia: float
    validation: float
    retain: float
    numbers: dict[str, float]

    @property
    def membership(self) -> float:
        return (self.ks + self.auc + self.mia) / 3

    @property
    def total(self) -> float:
        return float(sum(getattr(self, part) for part in PARTS) / len(PARTS))

    def to_dict(self) -> dict[str, Any]:
        return {
            "score": self.total,
            **{part: getattr(self, part) for part in PARTS},
            "membership_parts": {"ks": self.ks, "auc": self.auc, "mia": self.mia},
            "numbers": self.numbers,
        }


def indistinguishability(model: Views, original: Views, retained: np.ndarray) -> Score:
    """Return the score of a model.

    Args:
        model: Predictions of the model.
        original: Predictions of the original.
        retained: Labels of the retain set.

    Raises:
        UserError: Held-out and forget samples have no class in common.
    """
    forget, weights, covered = same_classes(model.forget, model.held_out.labels)
    right, was_right = (each.held_out.correct for each in (model, original))
    kept = np.isin(model.held_out.labels, retained)
    target = float((weights * was_right * kept).sum())
    calls = non_member_calls(
        Predictions(
            np.concatenate([forget.logits, model.held_out.logits]),
            np.concatenate([forget.labels, model.held_out.labels]),
        ),
        model.retain,
        model.held_out,
    )
    area = loss_auc(forget.losses, model.held_out.losses, weights)
    # There is nothing to keep if the held-out samples are all of forgotten classes.
    validation, was = (float(each[kept].mean()) if kept.any() else 0.0 for each in (right, was_right))
    return Score(
        forget=100 * abs(forget.accuracy - target),
        ks=100 * kolmogorov_smirnov(forget.losses, model.held_out.losses, weights),
        auc=200 * abs(area - 0.5),
        mia=100 * abs(float(calls[: len(forget)].mean()) - float((weights * calls[len(forget) :]).sum())),
        validation=100 * max(0.0, was - validation),
        retain=100 * max(0.0, original.retain.accuracy - model.retain.accuracy),
        numbers={
            "forget_accuracy": forget.accuracy,
            "forget_target": target,
            "held_out_accuracy": float((weights * right).sum()),
            "validation_accuracy": validation,
            "validation_accuracy_before": was,
            "retain_accuracy": model.retain.accuracy,
            "retain_accuracy_before": original.retain.accuracy,
            "auc": area,
            "covered": covered,
            "held_out_samples": float(len(model.held_out)),
        },
    )


def same_classes(forget: Predictions, labels: np.ndarray) -> tuple[Predictions, np.ndarray, float]:
    """Return the forget samples of classes that are held out, the weights [n] of held-out samples, and the share of the
    former.

    The weights sum to 1, and within a class to its share of the forget samples.

    Args:
        forget: Predictions for the forget set.
        labels: Labels of the held-out samples.

    Raises:
        UserError: The two have no class in common.
    """
    found = np.isin(forget.labels, labels)
    if not found.any():
        raise UserError(
            f"tune: none of the {len(labels)} held-out samples has a class of the forget set, so there is nothing to "
            "compare it with; use a data source with validation samples of all classes"
        )
    covered = forget.take(np.flatnonzero(found))
    classes = max(int(labels.max()), int(covered.labels.max())) + 1
    wanted, there = (np.bincount(each, minlength=classes) for each in (covered.labels, labels))
    weights = wanted[labels] / len(covered) / there[labels]
    return covered, weights, float(found.mean())


def loss_auc(forget: np.ndarray, held_out: np.ndarray, weights: np.ndarray) -> float:
    """Return the chance [0, 1] that a forget sample has a lower loss than a weighted held-out one; ties count half."""
    order = np.argsort(held_out, kind="stable")
    ordered, below = held_out[order], np.concatenate([[0.0], np.cumsum(weights[order])])
    under, up_to = (below[np.searchsorted(ordered, forget, side=side)] for side in ("left", "right"))
    return float((1 - (under + up_to) / 2).mean())


def kolmogorov_smirnov(forget: np.ndarray, held_out: np.ndarray, weights: np.ndarray) -> float:
    """Return the largest distance [0, 1] of the two distribution functions, that of held-out losses weighted."""
    order = np.argsort(held_out, kind="stable")
    places = np.concatenate([forget, held_out])
    below = np.concatenate([[0.0], np.cumsum(weights[order])])[np.searchsorted(held_out[order], places, side="right")]
    share = np.searchsorted(np.sort(forget), places, side="right") / len(forget)
    return float(np.abs(share - below).max())
