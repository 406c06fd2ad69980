"""Membership inference: can it be told that the forget samples were in the training set?

Efficacy follows the public code of SalUn and l1-sparse ("confidence"): an SVC (C=3, rbf, gamma=auto) learns to tell
retained samples (members) from test samples (non-members) by the probability of the true class; efficacy is the
share of forget samples that it calls non-members. **Higher means better forgotten**, and the target is the retrained
model's value, not 1. LetheViT's paper reads the number the other way round.

AUC is that of the loss attack, forget against test: the chance that a random forget sample has a lower loss than a
random test sample. **0.5 means indistinguishable**, above 0.5 means that the forget samples still look learned.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from engine.evaluate.predict import Predictions

# Fitting the SVC takes time with the square of the samples: 3 s for 8,000 + 8,000 on one core.
MOST_SAMPLES = 10_000

DIRECTION = {
    "efficacy": "share of forget samples called non-members by the confidence SVC; higher = better forgotten; "
    "target: the retrained model's",
    "auc": "loss attack, forget against test; 0.5 = indistinguishable, above = forget samples still look learned",
}


def mia_efficacy(forget: Predictions, retain: Predictions, test: Predictions, seed: int = 0) -> float:
    """Share [0, 1] of forget samples called non-members; as many members as test samples, at most 10,000 of each."""
    rng = np.random.default_rng(seed)
    count = min(len(retain), len(test), MOST_SAMPLES)
    members = retain.confidence[rng.permutation(len(retain))[:count]]
    others = test.confidence[rng.permutation(len(test))[:count]]
    features = np.concatenate([members, others])[:, None]
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(features, np.repeat([1, 0], count))
    return float(1.0 - attack.predict(forget.confidence[:, None]).mean())


def loss_auc(forget: Predictions, test: Predictions) -> float:
    """AUC [0, 1] of the loss attack."""
    member = np.repeat([1, 0], [len(forget), len(test)])
    return float(roc_auc_score(member, -np.concatenate([forget.losses, test.losses])))
