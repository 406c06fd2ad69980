"""Statistical tests for a model that gets wrong input: accuracy near chance, far below a known one, or labels permuted.

Each test uses one sample of retain images with the labels of the data. Each has level `SIGNIFICANCE`, so it rejects a
sound model in at most about one of a thousand runs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from scipy.stats import binom, binomtest  # type: ignore[import-untyped,unused-ignore]

SIGNIFICANCE = 1e-3
# Share of the way from chance to all correct that counts as near chance, at any number of samples: a tenth. A trained
# model is far above it on its training samples; one of 1000 classes whose weights were read wrongly can be at 1%.
NEAR = 0.1
# Difference in accuracy, [0, 1], that matters: 5 points.
MARGIN = 0.05
_EXPLAINED = 0.5  # share of the predictions that a permutation has to explain: a constant prediction is no permutation
_FEW = 20  # samples of one class, of which a trained model predicts some correctly
_EACH = 5  # mean number of samples per class that a permutation is estimated from


def chance_of(labels: np.ndarray) -> float:
    """Return the accuracy of the best constant prediction: the share of the largest class."""
    return float(np.bincount(labels).max() / len(labels))


def can_differ(labels: np.ndarray) -> bool:
    """Return whether a sample of this size could show at all that a model is better than chance."""
    return len(labels) > 0 and chance_of(labels) ** len(labels) <= SIGNIFICANCE


def is_near_chance(correct: int, labels: np.ndarray) -> bool:
    """Return whether the number of correct predictions fits a model that was not trained on such samples.

    True if at least as many correct predictions occur by chance with a probability above 0.001 (binomial, one-sided),
    or if the accuracy is less than a tenth of the way from chance to 1. If `can_differ` is false, as for samples of one
    class: true if less than a tenth of at least `_FEW` samples are correct; a trained model is far above that.
    """
    if not can_differ(labels):
        return len(labels) >= _FEW and correct / len(labels) < NEAR
    chance = chance_of(labels)
    compatible = binom.sf(correct - 1, len(labels), chance) > SIGNIFICANCE
    return bool(compatible or correct / len(labels) < chance + NEAR * (1 - chance))


def is_far_below(correct: np.ndarray, expected: float) -> bool:
    """Return whether an accuracy is at least 5 points below `expected` and significantly so (binomial)."""
    count = int(correct.sum())
    return bool(
        len(correct)
        and expected - correct.mean() >= MARGIN
        and binom.cdf(count, len(correct), min(expected, 1.0)) < SIGNIFICANCE
    )


def is_clearly_better(other: np.ndarray, own: np.ndarray) -> bool:
    """Return whether bool [n] `other` has 5 points or more above `own` on the same samples (McNemar's exact test)."""
    gained, lost = int((other & ~own).sum()), int((own & ~other).sum())
    if not len(own) or gained - lost < MARGIN * len(own):
        return False
    return bool(binomtest(gained, gained + lost, alternative="greater").pvalue < SIGNIFICANCE)


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A permutation of labels that explains the predictions.

    Attributes:
        moved: Predicted label by the label of the data.
        correct: bool [n], predictions that are correct after the permutation of the data's labels.
    """

    moved: dict[int, int]
    correct: np.ndarray


def permutation(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Permutation | None:
    """Return the permutation of labels that explains the predictions clearly better than the labels do, or None.

    Only a class of which more than half of the samples are predicted as one other class is moved.

    Args:
        predicted: int64 [n], predicted labels.
        labels: int64 [n], labels of the data.
        classes: Number of classes of the model.
    """
    present = np.unique(labels)
    if len(labels) < _EACH * len(present):
        return None
    row = np.searchsorted(present, labels)
    counts = np.zeros((len(present), classes), dtype=np.int64)
    np.add.at(counts, (row, predicted), 1)
    rows, columns = linear_sum_assignment(-counts)
    majority = 2 * counts[rows, columns] > counts.sum(1)
    predicted_as = np.where(majority, columns, present)
    correct = predicted == predicted_as[row]
    if correct.mean() < _EXPLAINED or not is_clearly_better(correct, predicted == labels):
        return None
    moved = {int(a): int(b) for a, b in zip(present, predicted_as, strict=True) if a != b}
    return Permutation(moved, correct)
