"""What a model that never saw the forget samples should know of them, estimated on held-out samples."""

from __future__ import annotations

import numpy as np
from torch import nn

from engine.core.method import Context
from engine.data import Samples
from engine.models.predict import Predictions, predict

# What a plan calls the passes that measure both.
LOOKS = "accuracy on forget and held-out samples"


def predictions_of(model: nn.Module, samples: Samples, context: Context) -> Predictions:
    """What a model says of samples as they are, under the run's precision; every rank calls it."""
    return predict(model, context.loader(samples, "none"), context.run.precision)


def matched_accuracy(held_out: Predictions, forget_labels: np.ndarray) -> float:
    """Accuracy [0, 1] on held-out samples, weighted so that their classes have the shares of the forget set's.

    A class that has no held-out samples counts with the accuracy over all of them.
    """
    hits = held_out.logits.argmax(1) == held_out.labels
    of_class = {int(label): float(hits[held_out.labels == label].mean()) for label in np.unique(held_out.labels)}
    return float(np.mean([of_class.get(int(label), held_out.accuracy) for label in forget_labels]))


def unseen_accuracy(held_out: Predictions, forget_labels: np.ndarray, retain_labels: np.ndarray) -> float:
    """The same, and 0 in classes of which nothing is retained: a model that never saw a class does not answer with it.

    held_out: what the original says of samples that it was not trained on.
    """
    seen = np.isin(forget_labels, retain_labels)
    return matched_accuracy(held_out, forget_labels[seen]) * float(seen.mean()) if seen.any() else 0.0


def format_accuracies(forget: float, unseen: float) -> str:
    """Why a run or a phase ends that stops by these accuracies."""
    return f"forget accuracy {100 * forget:.1f}%, of samples never seen {100 * unseen:.1f}%"
