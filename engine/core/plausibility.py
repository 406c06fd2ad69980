"""Is an accuracy plausible? Tests for a model that is fed wrongly: near chance, below what is known, labels permuted.

All of them are on one sample of retained images, each with the label that the data gives it. They hold at the level
`SIGNIFICANCE`, so that a sound model is refused about once in a thousand runs by each test at most.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from scipy.stats import binom, binomtest  # type: ignore[import-untyped,unused-ignore]

SIGNIFICANCE = 1e-3
# Share of the way from chance to all correct that counts as near chance, however many samples show it: a tenth. A
# trained model is far above it on samples that it was trained on; a misread one of 1000 classes can be at 1%.
NEAR = 0.1
# Difference in accuracy, [0, 1], that matters: 5 points.
MARGIN = 0.05
_EXPLAINED = 0.5  # share of the answers that an exchange has to explain: a constant answer is no exchange
_FEW = 20  # samples of one class of which a trained model has to answer some rightly
_EACH = 5  # samples a class that a permutation is read from, on average


def chance_of(labels: np.ndarray) -> float:
    """Accuracy of the best constant answer: the share of the largest class."""
    return float(np.bincount(labels).max() / len(labels))


def can_tell(labels: np.ndarray) -> bool:
    """Whether so few samples could show that a model is better than chance at all."""
    return len(labels) > 0 and chance_of(labels) ** len(labels) <= SIGNIFICANCE


def is_near_chance(correct: int, labels: np.ndarray) -> bool:
    """Whether so many correct answers are what a model that was not trained on such samples could give.

    True if at least as many correct answers come by chance with a probability above 0.001 (binomial, one-sided), or if
    the accuracy is less than a tenth of the way from chance to 1. Where `can_tell` is false, as for samples of one
    class: True if less than a tenth of `_FEW` samples or more are correct, which a trained model is far above.
    """
    if not can_tell(labels):
        return len(labels) >= _FEW and correct / len(labels) < NEAR
    chance = chance_of(labels)
    compatible = binom.sf(correct - 1, len(labels), chance) > SIGNIFICANCE
    return bool(compatible or correct / len(labels) < chance + NEAR * (1 - chance))


def is_far_below(correct: np.ndarray, expected: float) -> bool:
    """Whether an accuracy is at least 5 points below `expected`, and by more than the sample explains (binomial)."""
    count = int(correct.sum())
    return bool(
        len(correct)
        and expected - correct.mean() >= MARGIN
        and binom.cdf(count, len(correct), min(expected, 1.0)) < SIGNIFICANCE
    )


def is_clearly_better(other: np.ndarray, own: np.ndarray) -> bool:
    """Whether bool [n] `other` has at least 5 points more than `own` on the same samples, by McNemar's exact test."""
    gained, lost = int((other & ~own).sum()), int((own & ~other).sum())
    if not len(own) or gained - lost < MARGIN * len(own):
        return False
    return bool(binomtest(gained, gained + lost, alternative="greater").pvalue < SIGNIFICANCE)


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Labels that are answered as others. moved: answered label by the data's label. correct: bool [n], answers that
    are right if the data's labels are exchanged so."""

    moved: dict[int, int]
    correct: np.ndarray


def permutation(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Permutation | None:
    """The exchange of labels that explains the answers clearly better than the labels do; None if there is none.

    Only classes more than half of whose samples are answered as one other class are exchanged.

    Args:
        predicted: int64 [n], answered labels.
        labels: int64 [n], the data's labels.
        classes: number of classes of the model.
    """
    present = np.unique(labels)
    if len(labels) < _EACH * len(present):
        return None
    row = np.searchsorted(present, labels)
    counts = np.zeros((len(present), classes), dtype=np.int64)
    np.add.at(counts, (row, predicted), 1)
    rows, columns = linear_sum_assignment(-counts)
    majority = 2 * counts[rows, columns] > counts.sum(1)
    answered = np.where(majority, columns, present)
    correct = predicted == answered[row]
    if correct.mean() < _EXPLAINED or not is_clearly_better(correct, predicted == labels):
        return None
    moved = {int(a): int(b) for a, b in zip(present, answered, strict=True) if a != b}
    return Permutation(moved, correct)
