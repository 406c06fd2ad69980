"""Does the unlearned model answer like the retrained one, sample by sample? Averages can agree where answers do not."""

from __future__ import annotations

import numpy as np

from engine.evaluate.predict import Predictions


def top1_agreement(first: Predictions, second: Predictions) -> float:
    """Share [0, 1] of samples on which both models give the same class."""
    return float((first.logits.argmax(1) == second.logits.argmax(1)).mean())


def mean_kl(reference: Predictions, model: Predictions) -> float:
    """Mean over samples of KL(reference || model), in nats."""
    p, q = reference.log_probabilities, model.log_probabilities
    return float((np.exp(p) * (p - q)).sum(1).mean())
