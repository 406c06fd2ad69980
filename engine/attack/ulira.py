"""U-LiRA, an attack on the unlearning *procedure*: can unlearned models be distinguished from retrained ones?

Hayes et al. 2024, "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy"
(arXiv 2403.01218), with the likelihood ratio of Carlini et al. 2022 (LiRA, arXiv 2112.03570). For each target x of its
own, with the margin m = log(p / (1 - p)) of its true class:

    m | trained with x, then unlearned it  ~  N(mu_u, var_u)      over models U(A(D + F), F), x in F
    m | retrained without x                ~  N(mu_r, var_r)      over models A(D)
    score = log N(m; mu_u, var_u) - log N(m; mu_r, var_r)         higher = unlearned rather than retrained

An attacker with the sample, the procedure and the data thus detects what an average over samples hides. It finds
samples that the procedure forgot too much as well as those it forgot too little: the score separates both.

**Design** (`engine.attack.ensemble`): each of K pairs has an original, trained on parts A and B of the targets, and a
retrained model, trained on part C; every original forgets A in one run of the method and B in another, so each run has
a random forget set F of its own, a third of the targets. A target outside C gives one unlearned and one retrained
margin in each pair: 2K/3 of both kinds on average. The two models of a pair are attacked by Gaussians that were fitted
to the other pairs (leave-one-pair-out): no attacked model is among those that fitted them, and both kinds have the same
count. If the method is exact, the two are drawn alike and every figure here is 0.5 on average, for any K; retraining
with another seed is such a method.

**Variances** are pooled over samples, one for each kind, if a target has fewer than 32 margins of a kind (64 models in
LiRA's setting, below which Carlini et al. found one variance for all samples the better estimate).

**AUC** is the mean over pairs of each pair's own (its unlearned margins against its retrained ones, all targets, one
threshold). Its interval is over pairs, because the scores of one model err together and samples are not independent
draws: Student's with the variance of Nadeau & Bengio 2003 ("Inference for the Generalization Error"), since pairs share
the models that attack them. An attack without power proves nothing: the originals, which unlearned nothing, are
attacked in the same way, and their AUC is what could have been found.

RMIA (Zarifzadeh et al. 2024, arXiv 2312.03262) needs fewer models in its own setting. On the same models of digits
(untouched originals, 2 to 15 pairs to fit to) it found no more than this attack with any number of them, so it is not
cheaper at equal power here and is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from engine.attack.ensemble import (
    FEWEST_PAIRS,
    OUT,
    Ensemble,
    EnsembleSpec,
    content_key,
    holding,
    in_processes,
    memorisation,
    open_data,
    read_margins,
    train_ensemble,
    what_counts,
)
from engine.config import split_options
from engine.core.result import Progress
from engine.errors import UserError
from engine.evaluate.intervals import Interval, bootstrap, stated
from engine.evaluate.membership import RATES, auc, tpr_at_fpr
from engine.methods import get_method
from engine.models.checkpoint import load_checkpoint
from engine.run.unlearn import unlearn
from engine.runtime.files import write_json

POOLED_BELOW = 32
# A variance below this is rounding: the resolution of margins in float32 is about as fine.
SMALLEST_VARIANCE = 1e-6
# Unlearning seeds start here, above those of all models, so that unlearning by retraining never copies one of them.
UNLEARNING_SEEDS = 1 << 20

DIRECTION = {
    "auc": "unlearned against retrained models, sample by sample; 0.5 = indistinguishable, 1 = always distinguished",
    "balanced_accuracy": "mean share of unlearned and of retrained models that are classified rightly; 0.5 = chance",
    "tpr_at_fpr": "share of (sample, unlearned model) recognised by a threshold that at most this share of (sample, "
    "retrained model) exceeds; equal to the rate = no power, above = some samples are detected with certainty",
    "score": "mean log-likelihood ratio of the sample's unlearned models less that of its retrained ones, nats; 0 or "
    "below = cannot be told apart, higher = this sample is detected",
    "memorisation": "probability of the true label when trained on the sample less when not; higher = more "
    "memorised; null = not known",
    "untouched": "the same attack on the originals, which unlearned nothing: what the attack can find here; near 0.5 = "
    "it has no power on these data, and nothing follows from the method's figures",
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """Result of the attack; DIRECTION has the meaning of each number.

    Attributes:
        unlearned, retrained: float64 [K, t], the scores of both models of each pair, NaN if the pair has none, or no
            other pair has any to fit to.
        pair_aucs: float64 [K], AUC of each pair.
        auc, balanced_accuracy: Means over pairs, with intervals.
        tpr: By rate, or why there is none.
        pooled: The variances were pooled.
    """

    unlearned: np.ndarray
    retrained: np.ndarray
    pair_aucs: np.ndarray
    auc: Interval
    balanced_accuracy: Interval
    tpr: dict[float, Interval | str]
    pooled: bool

    @property
    def per_sample(self) -> np.ndarray:
        """Mean score of the unlearned models minus that of the retrained ones, float64 [t], nats; NaN without any."""
        return mean_over_pairs(self.unlearned - self.retrained)

    def to_dict(self) -> dict[str, Any]:
        return {
            "auc": stated(self.auc, DIRECTION["auc"]),
            "balanced_accuracy": stated(self.balanced_accuracy, DIRECTION["balanced_accuracy"]),
            "tpr_at_fpr": {f"{rate:g}": stated(value, DIRECTION["tpr_at_fpr"]) for rate, value in self.tpr.items()},
            "pair_aucs": self.pair_aucs.tolist(),
            "variance": "pooled over samples" if self.pooled else "of each sample",
        }


@dataclasses.dataclass(frozen=True)
class Unlearned:
    """Margins of the unlearned models for the targets that they forgot.

    Attributes:
        margins: float64 [K, t], NaN for targets that the pair's original was not trained on.
        collapsed: Number of runs that collapsed.
        unlearn_seconds: float64 [2K], wall-clock time of each run, which may be an earlier one.
        seconds: Wall-clock time of this call.
    """

    margins: np.ndarray
    collapsed: int
    unlearn_seconds: np.ndarray
    seconds: float


def attack(unlearned: np.ndarray, retrained: np.ndarray) -> Attack:
    """Attack the margins of K pairs of models.

    A target with fewer than two margins of a kind is left out.

    Args:
        unlearned, retrained: Margins [K, t]; NaN (in both) if a pair has none for a target.

    Raises:
        UserError: The margins do not belong together, or there are too few pairs.
    """
    scores_u, scores_r, pooled = likelihood_ratios(unlearned, retrained)
    there = ~np.isnan(scores_u)
    pairs = [(scores_u[p, there[p]], scores_r[p, there[p]]) for p in range(len(there))]
    aucs = np.array([auc(u, r) for u, r in pairs])
    # A score of exactly 0 is neither: half correct.
    accuracies = np.array([0.5 + (np.sign(u).mean() - np.sign(r).mean()) / 4 for u, r in pairs])
    count = len(there) * int(there.sum(1).min())  # scores in the smallest resample of pairs
    return Attack(
        scores_u,
        scores_r,
        aucs,
        over_pairs(aucs),
        over_pairs(accuracies),
        {rate: _tpr(scores_u, scores_r, rate) if count * rate >= 1 else _too_few(count, rate) for rate in RATES},
        pooled,
    )


def likelihood_ratios(unlearned: np.ndarray, retrained: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the scores of unlearned and of retrained margins [K, t], in nats, and whether variances are pooled."""
    there = ~np.isnan(unlearned)
    if unlearned.shape != retrained.shape or unlearned.ndim != 2 or not np.array_equal(there, ~np.isnan(retrained)):
        raise UserError(
            f"ulira: unlearned margins {unlearned.shape} and retrained ones {retrained.shape} are not of the same "
            "targets in the same pairs"
        )
    counts = there.sum(0)
    if len(unlearned) < FEWEST_PAIRS or not (counts > 1).any():
        raise UserError(
            f"ulira: {len(unlearned)} pairs of models are too few to fit distributions; take more, better 16"
        )
    pooled = bool(counts[counts > 1].min() < POOLED_BELOW)
    scores = np.full((2, *unlearned.shape), np.nan)
    for pair in range(len(unlearned)):
        others = np.arange(len(unlearned)) != pair
        as_unlearned, as_retrained = (_gaussians(each[others], pooled) for each in (unlearned, retrained))
        for kind, margins in enumerate((unlearned[pair], retrained[pair])):
            scores[kind, pair] = _log_density(margins, *as_unlearned) - _log_density(margins, *as_retrained)
    return scores[0], scores[1], pooled


def _gaussians(margins: np.ndarray, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance [t] of each column's numbers; NaN for a column without any."""
    there = ~np.isnan(margins)
    count = there.sum(0)
    mean = mean_over_pairs(margins)
    squares = np.where(there, margins - mean, 0) ** 2
    if pooled:
        variance = np.full(len(mean), squares.sum() / np.maximum(count - 1, 0).sum())
    else:
        variance = squares.sum(0) / np.maximum(count - 1, 1)
    return mean, np.maximum(variance, SMALLEST_VARIANCE)


def mean_over_pairs(values: np.ndarray) -> np.ndarray:
    """Return the mean [t] of each column's numbers [K, t], NaN for a column without any."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, values, 0).sum(0) / there.sum(0))


def _log_density(margins: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return -0.5 * (np.log(2 * np.pi * variance) + (margins - mean) ** 2 / variance)


def over_pairs(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean of shares [K], one for each pair of models, with the corrected resampled t interval, cut to [0,
    1].

    Each pair is attacked by what was fitted to the K - 1 others, so the shares are correlated. Nadeau & Bengio 2003
    correct for it by the variance (1 / K + 1 / (K - 1)) s^2 in place of s^2 / K, which covers too seldom.
    """
    count, mean = len(values), float(values.mean())
    error = math.sqrt(1 / count + 1 / (count - 1)) * float(values.std(ddof=1))
    reach = float(student.ppf((1 + level) / 2, count - 1)) * error
    return Interval(mean, max(0.0, mean - reach), min(1.0, mean + reach))


def _tpr(unlearned: np.ndarray, retrained: np.ndarray, rate: float) -> Interval:
    """Return the TPR over all pairs at once, since one pair has too few samples; resampled by pairs."""
    return bootstrap(lambda u, r: tpr_at_fpr(u[~np.isnan(u)], r[~np.isnan(r)], rate), unlearned, retrained, paired=True)


def _too_few(count: int, rate: float) -> str:
    return f"{count} scores of retrained models; a rate of {rate:g} needs {math.ceil(1 / rate)}"


@dataclasses.dataclass(frozen=True)
class _Unlearning:
    """One run of the method.

    Attributes:
        included: bool [t], targets that the original was trained on.
        forgotten: bool [t], targets that the run forgets.
    """

    spec: EnsembleSpec
    original: Path
    included: np.ndarray
    forgotten: np.ndarray
    method: str
    options: dict[str, Any]
    file: Path


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Check a method and its options.

    Raises:
        UserError: There is no such method or option, or a seed is given.
    """
    if "seed" in options:
        raise UserError("ulira: each run of the method has a seed of its own; give --seed, the first of them")
    split_options(options, get_method(method).Config)


def unlearn_ensemble(
    ensemble: Ensemble,
    method: str,
    options: Mapping[str, Any],
    cache: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Unlearned:
    """Run the method twice on every original of an ensemble, and compute the margins of what each run forgot.

    The margins are kept in the cache under the content hash of all that they depend on; the unlearned models are not
    kept.

    Args:
        ensemble: The trained models.
        method, options: The method and its options.
        cache, workers, progress: As in `train_ensemble`.

    Raises:
        UserError, RunStopped: As in `train_ensemble`.
    """
    began = time.perf_counter()
    check_method(method, options)
    spec = ensemble.spec
    jobs: list[_Unlearning] = []
    for pair, parts in enumerate(ensemble.parts):
        for part in (part for part in range(3) if part != OUT):
            seed = spec.seed + UNLEARNING_SEEDS + 2 * pair + part
            facts = {
                "original": ensemble.keys[2 * pair],
                "options": what_counts(options, method),
                "forget": ensemble.targets.subset(np.flatnonzero(parts == part)).fingerprint(),
                "seed": seed,
            }
            jobs.append(
                _Unlearning(
                    spec,
                    ensemble.folders[2 * pair],
                    parts != OUT,
                    parts == part,
                    method,
                    {**options, "seed": seed},
                    cache / f"unlearned-{content_key(facts)}.json",
                )
            )
    with holding(cache):
        results = in_processes(_unlearned, jobs, workers, "unlearn", progress)
    margins = np.full(ensemble.parts.shape, np.nan)
    for number, (job, row) in enumerate(zip(jobs, results, strict=True)):
        margins[number // 2, job.forgotten] = row["margins"]
    return Unlearned(
        margins,
        sum(row["collapsed"] for row in results),
        np.array([row["seconds"] for row in results]),
        time.perf_counter() - began,
    )


def _unlearned(job: _Unlearning) -> dict[str, Any]:
    if not job.file.is_file():
        opened = open_data(job.spec.data, job.spec.targets)
        forget = opened.targets.subset(np.flatnonzero(job.forgotten), "forget")
        result = unlearn(
            load_checkpoint(job.original),
            forget,
            opened.without(job.forgotten | ~job.included, "retain"),
            method=job.method,
            config=job.options,
            validation=opened.source.validation,
        )
        row = {
            "margins": read_margins(result.model, forget, job.spec.run()).tolist(),
            "collapsed": result.collapsed,
            "seconds": result.seconds["unlearn"],
        }
        write_json(job.file, row)
    return dict(json.loads(job.file.read_text(encoding="utf-8")))


def attack_procedure(
    spec: EnsembleSpec,
    method: str,
    options: Mapping[str, Any],
    cache: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the ensemble, unlearn and attack; return everything as plain values.

    `seconds` has the wall-clock time of each stage of this call, and the time of all models (`train_models`,
    `unlearn_models`), which may come from an earlier call.

    Args:
        spec: The ensemble.
        method, options: The method and its options.
        cache, workers, progress: As in `train_ensemble`.

    Raises:
        UserError, RunStopped: As in `train_ensemble`.
    """
    check_method(method, options)  # before hours of training
    ensemble = train_ensemble(spec, cache, workers=workers, progress=progress)
    unlearned = unlearn_ensemble(ensemble, method, options, cache, workers=workers, progress=progress)
    began = time.perf_counter()
    forgettable = ensemble.parts != OUT
    originals, retrained = (np.where(forgettable, ensemble.margins[first::2], np.nan) for first in (0, 1))
    found, untouched = attack(unlearned.margins, retrained), attack(originals, retrained)
    counts = forgettable.sum(0)
    return {
        "attacked": "the procedure: models that were trained on the samples and unlearned them, against models that "
        "were not trained on them; not one checkpoint",
        "data": spec.data,
        "targets": {"spec": spec.targets, "count": len(ensemble.targets)},
        "architecture": spec.model.architecture,
        "model_args": spec.model.model_args,
        "recipe": what_counts(spec.recipe, "retrain"),
        "method": method,
        "options": what_counts(options, method),
        "seed": spec.seed,
        "models": {
            "with_each_target": spec.pairs,
            "without_each_target": spec.pairs,
            "unlearned": 2 * spec.pairs,
            "of_each_kind_a_target": {"fewest": int(counts.min()), "most": int(counts.max())},
            "collapsed": unlearned.collapsed,
        },
        "ulira": found.to_dict(),
        "untouched": {**untouched.to_dict(), "direction": DIRECTION["untouched"]},
        "per_sample": {
            "direction": {name: DIRECTION[name] for name in ("score", "memorisation")},
            "ids": list(ensemble.targets.ids),
            "score": _plain(found.per_sample),
            "memorisation": _plain(memorisation(ensemble)),
            "untouched_score": _plain(untouched.per_sample),
            "unlearned_margin": _plain(mean_over_pairs(unlearned.margins)),
            "retrained_margin": _plain(mean_over_pairs(retrained)),
        },
        "seconds": {
            "train": ensemble.seconds,
            "unlearn": unlearned.seconds,
            "attack": time.perf_counter() - began,
            "train_models": float(ensemble.train_seconds.sum()),
            "unlearn_models": float(unlearned.unlearn_seconds.sum()),
        },
        "workers": workers,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Return values for JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
