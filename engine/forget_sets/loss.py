"""Forget sets by the loss of the model to be unlearned on its own training samples.

Samples with the lowest loss are predicted by the rest of the data too: a model retrained without them still predicts
them correctly, so that little has to change. Samples with the highest loss are ambiguous or mislabelled, and were
learned least, or memorised.
"""

from __future__ import annotations

from engine.forget_sets.base import Selection, Strategy, highest, register
from engine.forget_sets.pool import Pool


@register
class LowestLoss(Strategy):
    name = "lowest-loss"
    summary = "the samples that the model predicts best"
    score = "cross-entropy of the checkpoint in nats; lowest first"
    needs_model = True

    def select(self, pool: Pool) -> Selection:
        chosen = highest(-pool.measurements.losses, pool.candidates, pool.count)
        return Selection(chosen.indices, -chosen.scores)


@register
class HighestLoss(Strategy):
    name = "highest-loss"
    summary = "the samples that the model predicts worst"
    score = "cross-entropy of the checkpoint in nats; highest first"
    needs_model = True

    def select(self, pool: Pool) -> Selection:
        return highest(pool.measurements.losses, pool.candidates, pool.count)
