"""Linear probe: a new head (logistic regression) on frozen features of retain samples, measured on the other sets.

A model whose head alone was changed has the original's excess: accuracy on forget samples minus that on test samples,
see `engine.evaluate.relearning`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from engine.data import Loader, Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.options import MeasureOptions
from engine.evaluate.relearning import excess_interval, of_classes
from engine.evaluate.representation import head_features
from engine.models.preprocessing import preprocessing_of
from engine.runtime.device import resolve_device, resolve_precision


def probe(
    retain: tuple[np.ndarray, np.ndarray],
    forget: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a linear probe on given features, see `linear_probe`.

    Args:
        retain, forget, test: Features [n, d] and labels [n] of each set.
        seed: Seed of the interval.

    Raises:
        UserError: The retain samples have one class alone.
    """
    if len(np.unique(retain[1])) < 2:
        raise UserError("linear probe: the retained samples are all of one class; nothing can be learned from them")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    classifier.fit(*retain)
    right = [(classifier.predict(features) == labels).astype(np.float64) for features, labels in (forget, test)]
    return {
        "accuracy": {name: float(each.mean()) for name, each in zip(("forget", "test"), right, strict=True)},
        "excess": excess_interval(*right, seed=seed).to_dict(),
    }


def linear_probe(
    model: nn.Module,
    retain: Samples,
    forget: Samples,
    test: Samples,
    *,
    batch_size: int = 250,
    options: MeasureOptions | None = None,
) -> dict[str, Any]:
    """Train a new head (logistic regression) on frozen features of retain samples, and measure it on the others.

    Classes without retain samples are never predicted, in either set.

    Args:
        model: The model.
        retain, forget, test: The sets; of each at most `options.max_samples` are used, at equal distances.
        batch_size: Samples of a forward pass.
        options: Options of the measurement; its seed is that of the interval. None: the defaults.

    Returns:
        accuracy of forget and test, and excess (with a 95% interval): forget minus test.
    """
    options = options or MeasureOptions()
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    model.to(device)
    preprocessing = preprocessing_of(model)

    def read(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        part = evenly_spaced(samples, options.max_samples)
        loader = Loader(part, preprocessing, batch_size=batch_size, device=device, **options.loading)
        return head_features(model, loader, precision)

    return probe(read(retain), read(forget), read(of_classes(test, forget)), seed=options.seed)
