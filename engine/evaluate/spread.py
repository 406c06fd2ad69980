"""How far a retrained model may be from the references: variation by samples, and variation between training runs.

A verdict compares a statistic of a model with the same statistic of R references. If the model is a retrained model
as well, the difference T is 0 in expectation and varies for two reasons: the samples are finite, and two training runs
of one recipe differ. The first is known from the samples. The second has to be estimated from the references alone,
R - 1 degrees of freedom, so it is combined with a prior: the variation between runs that was measured on ensembles of
retrained models (`python -m bench calibration`). This is the shrinkage of Smyth 2004 ("Linear Models and Empirical
Bayes Methods", moderated t): with two references the prior has most of the weight, with eight the references have.

With d_r the deviation of reference r when the other references judge it, the variance of a run is estimated by
(R - 1) / R * mean(d_r^2), and that of T is (1 + 1/R) times the combined variance, and at least the sampling variance.
The degrees of freedom are those of the part that was estimated (Satterthwaite 1946).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from engine.evaluate.intervals import Interval

# Weight of the prior, in degrees of freedom.
PRIOR_DOF = 4.0
# Standard deviation between training runs that samples do not explain. Of accuracies in log-odds, in which runs differ
# as much near 60% as near 95%: 0.02 is half a point at 55%, and a tenth at 95%. Models fit the samples that they are
# trained on to a degree that varies more.
PRIOR_LOG_ODDS = {"test": 0.02, "forget": 0.02, "retain": 0.08}
PRIOR_AUC = 0.003
PRIOR_RATIO = 0.05  # of the divergence to the references over that between them
# How often a retrained model may miss a gate: with some ten gates it then passes all of them about nine times in ten.
MISSED = 0.01
# Degrees of freedom from which t is normal.
_NORMAL = 1e6


@dataclasses.dataclass(frozen=True)
class Variation:
    """Variation of a statistic about its expectation, for a retrained model.

    Attributes:
        deviation: Standard deviation, in the unit of the statistic.
        dof: Degrees of freedom of its estimate.
    """

    deviation: float
    dof: float

    def half_width(self, level: float) -> float:
        """Return the half of an interval with the probability `level`."""
        return self._quantile((1 + level) / 2) * self.deviation

    def reach(self, level: float) -> float:
        """Return the distance from its expectation that the interval of a retrained model exceeds in MISSED of cases.

        Half of the interval, plus the variation by chance.
        """
        return self.half_width(level) + self._quantile(1 - MISSED) * self.deviation

    def _quantile(self, probability: float) -> float:
        return float(t.ppf(probability, min(self.dof, _NORMAL)))

    def widen(self, found: Interval, level: float) -> Interval:
        """Return the interval, at least as wide as this variation."""
        half = self.half_width(level)
        return Interval(found.value, min(found.low, found.value - half), max(found.high, found.value + half))


def prior_points(name: str, accuracy: float) -> float:
    """Return the prior of an accuracy in percentage points.

    Args:
        name: test, retain or forget.
        accuracy: The accuracy about which it varies, [0, 1].
    """
    return 100 * PRIOR_LOG_ODDS[name] * accuracy * (1 - accuracy)


def variation(error: float, deviations: Sequence[float], prior: float) -> Variation:
    """Return the variation of a model's statistic against R references, if the model is a retrained model.

    Args:
        error: Standard error of the statistic by sampling.
        deviations: Deviation from the expected value of each reference [R] judged by the other references; empty if
            there are too few to judge one by the others.
        prior: Standard deviation between training runs, beyond that by sampling.
    """
    references = max(1, len(deviations))
    alone = error**2 * references / (references + 1) + prior**2
    known = references - 1
    found = known / references * float(np.mean(np.square(deviations))) if known else 0.0
    run = (PRIOR_DOF * alone + known * found) / (PRIOR_DOF + known)
    total = max(error**2, (1 + 1 / references) * run)
    estimated = total - error**2
    dof = np.inf if estimated <= 0 else (PRIOR_DOF + known) * (total / estimated) ** 2
    return Variation(float(np.sqrt(total)), float(dof))
