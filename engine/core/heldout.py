"""Accuracy to expect on the forget set of a model that was not trained on it, estimated on the held-out set."""

from __future__ import annotations

import numpy as np
from torch import nn

from engine.core.method import Context
from engine.data import Samples
from engine.models.predict import Predictions, predict

# Name in `lethe plan` of the passes that measure both accuracies.
ACCURACY_PASSES = "accuracy on forget and held-out samples"


def predictions_of(model: nn.Module, samples: Samples, context: Context) -> Predictions:
    """Return the predictions for samples without augmentation, under the run's precision; call it on every rank."""
    return predict(model, context.loader(samples, "none"), context.run.precision)


def matched_accuracy(held_out: Predictions, forget_labels: np.ndarray) -> float:
    """Return the accuracy [0, 1] on held-out samples, weighted so that their classes have the shares of the forget
    set's.

    A class without held-out samples counts with the accuracy over all of them.
    """
    hits = held_out.correct
    of_class = {int(label): float(hits[held_out.labels == label].mean()) for label in np.unique(held_out.labels)}
    return float(np.mean([of_class.get(int(label), held_out.accuracy) for label in forget_labels]))


def unseen_accuracy(held_out: Predictions, forget_labels: np.ndarray, retain_labels: np.ndarray) -> float:
    """Return `matched_accuracy`, counting 0 for forget samples of a class without retain samples.

    A model that was trained without a class does not predict it.

    Args:
        held_out: Predictions of the original for the held-out set.
        forget_labels, retain_labels: int64 [n], labels of the forget set and of the retain set.
    """
    seen = np.isin(forget_labels, retain_labels)
    return matched_accuracy(held_out, forget_labels[seen]) * float(seen.mean()) if seen.any() else 0.0


def format_accuracies(forget: float, unseen: float) -> str:
    """Return the reason for which a run or a phase stops at these accuracies [0, 1]."""
    return f"forget accuracy {100 * forget:.1f}%, held-out accuracy {100 * unseen:.1f}%"
