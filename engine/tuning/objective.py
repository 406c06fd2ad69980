"""Objective of a search: the score of `engine.evaluate.indistinguishable` on two halves of the held-out set.

Trials are chosen by the first half, which the runs also use as the watched samples of the collapse guard. The lowest of
many scores is biased: it is low by luck as well. So the score that is reported of the chosen trial is that on the
second half, which neither a run nor the choice has used. The forget and retain samples are the same in both scores:
they are the sets in question, not a draw.
"""

from __future__ import annotations

import copy
import hashlib

import numpy as np
from torch import nn

from engine.config import RunConfig
from engine.data import Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.indistinguishable import Score, Views, indistinguishability
from engine.evaluate.metrics import Evaluator
from engine.forget_sets.pool import READING_KEYS

# Largest number of samples of a set that a trial is measured on, at equal distances: measuring a trial should cost
# little compared with its run.
MOST = 5_000


class Objective:
    """Scores models compared with the original on the same samples.

    Args:
        original: The model before unlearning.
        forget, retain: Forget set and retain set.
        validation: Held-out set, which is halved.
        run: Options of the run, for reading images.

    Attributes:
        choosing, reporting: Halves of the held-out set.
        before: Scores of the original itself on both halves, in the form of `__call__`.

    Raises:
        UserError: The outputs of the original are not finite, or there are fewer than 4 held-out samples.
    """

    def __init__(
        self, original: nn.Module, forget: Samples, retain: Samples, validation: Samples, run: RunConfig
    ) -> None:
        self.choosing, self.reporting = halves(validation)
        options = {key: getattr(run, key) for key in READING_KEYS}
        forget, some = evenly_spaced(forget, MOST), evenly_spaced(retain, MOST)
        self._evaluators = [
            Evaluator(forget, some, evenly_spaced(half, MOST), **options) for half in (self.choosing, self.reporting)
        ]
        self._retained = np.unique(retain.labels)
        self._original = self._views(copy.deepcopy(original))  # the evaluator moves the model to the device
        if not all(views.finite for views in self._original):
            raise UserError("tune: the original's outputs are not finite; the checkpoint is broken")
        self.before = self._scores(self._original)

    def __call__(self, model: nn.Module) -> tuple[Score, Score] | None:
        """Return the scores of a model on the choosing and on the reporting half; None if an output is not finite."""
        views = self._views(model)
        return self._scores(views) if all(each.finite for each in views) else None

    def _scores(self, views: tuple[Views, Views]) -> tuple[Score, Score]:
        choosing, reporting = (
            indistinguishability(model, original, self._retained)
            for model, original in zip(views, self._original, strict=True)
        )
        return choosing, reporting

    def _views(self, model: nn.Module) -> tuple[Views, Views]:
        first, second = self._evaluators
        forget, retain = (first.predictions(model, name) for name in ("forget", "retain"))
        choosing, reporting = (
            Views(forget, retain, evaluator.predictions(model, "test")) for evaluator in (first, second)
        )
        return choosing, reporting


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Split samples into two halves by a hash of the ids, each class evenly; the halves are the same every time.

    The hash is not the one by which `engine.data.sources` separates validation samples from the test samples.

    Raises:
        UserError: There are fewer than 4 samples.
    """
    if len(samples) < 4:
        raise UserError(
            f"tune: {samples.name} has {len(samples)} samples, too few for two halves; give a "
            "data source with more held-out samples"
        )
    hashes = np.array([hashlib.sha256(f"halves\0{each}".encode()).digest()[:8] for each in samples.ids], dtype="S8")
    order = np.lexsort((hashes, samples.labels))
    return (
        samples.subset(np.sort(order[::2]), f"{samples.name} (choosing)"),
        samples.subset(np.sort(order[1::2]), f"{samples.name} (reporting)"),
    )
