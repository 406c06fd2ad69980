"""Predictions drawn at random, for tests of measures."""

from __future__ import annotations

import numpy as np

from engine.models.predict import Predictions


def drawn(count: int, sharpness: float, seed: int, classes: int = 5) -> Predictions:
    """Return predictions of a model that is `sharpness` sure of the true class, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += sharpness
    return Predictions(logits, labels)
