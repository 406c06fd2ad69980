"""Predictions for any samples, counted: the cost of a proof is the number of images that models see for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from engine.config import RunConfig, build
from engine.data import Loader, Samples
from engine.data.readable import bad_images, without
from engine.jobs.task import EVALUATION_OPTIONS
from engine.models.huggingface import as_classifier
from engine.models.predict import Predictions, moved_images, predict
from engine.models.preprocessing import preprocessing_of
from engine.runtime.device import resolve_device, resolve_precision

_BATCH = 250


class Answers:
    """Computes predictions.

    Args:
        config: Options of the evaluation (precision, device, workers, ...), by name.

    Attributes:
        images: Images that models have seen, forward passes.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        options = {key: value for key, value in (config or {}).items() if key in EVALUATION_OPTIONS}
        self.run = build(RunConfig, options)
        self.device = resolve_device(self.run.device)
        self.precision = resolve_precision(self.run.precision, self.device)
        self.images = 0

    def __call__(self, model: nn.Module, samples: Samples, *, moved: bool = False) -> Predictions:
        """Return the predictions of a model for samples in their order; `moved`: for the images moved by a pixel."""
        model = as_classifier(model).to(self.device)
        loader = Loader(
            samples,
            preprocessing_of(model),
            batch_size=_BATCH,
            device=self.device,
            workers=self.run.workers,
            decode=self.run.decode,
        )
        self.images += len(samples)
        if not moved:
            return predict(model, loader, self.precision)
        with moved_images(model):
            return predict(model, loader, self.precision)

    def readable(self, samples: Samples, model: nn.Module) -> Samples:
        """Return the samples without those whose images cannot be read, if `on_bad_image` is skip."""
        if self.run.on_bad_image == "raise":
            return samples
        found = bad_images(
            samples,
            preprocessing_of(model),
            on_bad_image="skip",
            max_bad_share=self.run.max_bad_share,
            workers=self.run.workers,
            decode=self.run.decode,
        )
        return without(samples, found)


def joined(parts: list[Predictions]) -> Predictions:
    """Return the predictions of several sets, one after the other."""
    return Predictions(np.concatenate([p.logits for p in parts]), np.concatenate([p.labels for p in parts]))
