"""Membership inference: attacks that try to find whether the forget samples were in the training set.

Efficacy follows the public code of SalUn and l1-sparse ("confidence"): an SVC (C=3, rbf, gamma=auto) learns to separate
retain samples (members) from test samples (non-members) by the probability of the true class; efficacy is the share of
forget samples that it calls non-members. **Higher means better forgotten**, and the target is the retrained model's
value, not 1. LetheViT's paper reads the number the other way round.

The other attacks give every sample a score, **higher = more like a member**, and measure how well it separates forget
samples from test samples. A model that was not trained on the forget set has AUC 0.5, TPR equal to the FPR and balanced
accuracy 0.5. So has a retrained model, except for the draw of the samples, and it is the one to compare with if forget
and test samples differ in kind (a whole class, hard samples).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata  # type: ignore[import-untyped,unused-ignore]
from sklearn.svm import SVC

from engine.errors import UserError
from engine.evaluate.intervals import Interval, percentiles, stated
from engine.models.predict import Predictions

# Fitting the SVC takes time with the square of the samples: 3 s for 8,000 + 8,000 on one core.
MOST_SAMPLES = 10_000

# False-positive rates at which the true-positive rate is reported (Carlini et al. 2022): an attack that finds a few
# members with certainty matters more than one that is a little better than chance on all.
RATES = (0.001, 0.01)

# The attack by the loss relative to retrained models, in addition to those of `scores`.
CALIBRATED = "calibrated_loss"

DIRECTION = {
    "efficacy": "share of forget samples called non-members by the confidence SVC; higher = better forgotten; "
    "target: the retrained model's",
    "auc": "loss attack, forget against test; 0.5 = indistinguishable, above = forget samples are still fitted better",
    "attack_auc": "forget against test; 0.5 = indistinguishable, above = forget samples are still fitted better, "
    "below = they are fitted less than held-out samples (over-forgotten); target: the retrained model's",
    "tpr_at_fpr": "share of forget samples called members by a threshold that calls at most this share of test "
    "samples members; equal to the rate = no power, above = some forget samples are detected with certainty; target: "
    "the retrained model's",
    "balanced_accuracy": "mean of the shares of forget samples called members and of test samples called non-members, "
    "thresholds per class learned on retained and other test samples; 0.5 = no power, above = forget samples still "
    "look learned; target: the retrained model's",
}

# Rows whose probabilities are in memory at once: 33 MB for 1,000 classes.
_BLOCK = 4096


def non_member_calls(forget: Predictions, retain: Predictions, test: Predictions, seed: int = 0) -> np.ndarray:
    """Return which forget samples [n] (bool) the confidence SVC calls non-members: efficacy, sample by sample."""
    rng = np.random.default_rng(seed)
    count = min(len(retain), len(test), MOST_SAMPLES)
    members = retain.confidence[rng.permutation(len(retain))[:count]]
    others = test.confidence[rng.permutation(len(test))[:count]]
    features = np.concatenate([members, others])[:, None]
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(features, np.repeat([1, 0], count))
    return np.asarray(attack.predict(forget.confidence[:, None]) == 0)


def mia_efficacy(forget: Predictions, retain: Predictions, test: Predictions, seed: int = 0) -> float:
    """Return the share [0, 1] of forget samples called non-members, with equal numbers of members and test samples."""
    return float(non_member_calls(forget, retain, test, seed).mean())


def loss_auc(forget: Predictions, test: Predictions) -> float:
    """Return the AUC [0, 1] of the loss attack."""
    return auc(-forget.losses, -test.losses)


def scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return the attacks' scores [n] by name, higher = more like a member (Song and Mittal 2021).

    loss: minus cross-entropy. entropy: minus -sum_i p_i log p_i; needs no label. modified_entropy: minus -(1 - p_y) log
    p_y - sum_{i != y} p_i log(1 - p_i), which unlike entropy is high for a confident wrong prediction. confidence: p_y;
    it ranks as the loss does, and is reported because it is the SVC's input.
    """
    starts = range(0, len(predictions), _BLOCK)
    blocks = [predictions.take(np.arange(s, min(s + _BLOCK, len(predictions)))) for s in starts]
    each = [_scores(block) for block in blocks]
    return {name: np.concatenate([block[name] for block in each]) for name in each[0]}


def _scores(predictions: Predictions) -> dict[str, np.ndarray]:
    log_p = predictions.log_probabilities
    p = np.exp(log_p)
    true = np.arange(len(predictions)), predictions.labels
    others = p * np.log(np.maximum(1 - p, 1e-30))  # 1 - p may round to 0
    others[true] = 0
    return {
        "loss": log_p[true],
        "entropy": (p * log_p).sum(1),
        "modified_entropy": -np.expm1(log_p[true]) * log_p[true] + others.sum(1),
        "confidence": p[true],
    }


def calibrated_scores(model: Predictions, references: Sequence[Predictions]) -> np.ndarray:
    """Return scores [n] of the loss attack without the samples' difficulty (Watson et al. 2022).

    The score is the mean loss of the references (models not trained on the samples) minus the model's own, in nats.
    Higher: the model predicts the sample better than a retrained model does.

    Args:
        model: Predictions of the model.
        references: Predictions of the references, for the same samples in the same order.

    Raises:
        UserError: There are no references, or their samples differ.
    """
    if not references:
        raise UserError("calibrated_scores: no references; give the predictions of at least one retrained model")
    for number, reference in enumerate(references, 1):
        if not np.array_equal(reference.labels, model.labels):
            raise UserError(
                f"calibrated_scores: reference {number} has predictions of other samples ({len(reference)}, the model "
                f"{len(model)}, or other labels); evaluate all models on the same samples"
            )
    return np.asarray(np.mean([reference.losses for reference in references], axis=0) - model.losses)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Return the chance [0, 1] that a random member has a higher score than a random other sample; ties count half.

    Args:
        members, others: Scores [m], [n], higher = more like a member. 0.5: they cannot be separated.
    """
    return float(_placements(members, others)[0].mean())


def auc_interval(members: np.ndarray, others: np.ndarray, level: float = 0.95) -> Interval:
    """Return the AUC with the interval of DeLong, DeLong and Clarke-Pearson 1988, by ranks (Sun and Xu 2014).

    With a single sample on a side the interval is [0, 1]. If all members lie on one side of all others there is no
    variance to measure; the far end is then the Clopper-Pearson limit of min(m, n) successes in as many trials.
    """
    above, below = _placements(members, others)
    value, fewest = float(above.mean()), min(len(above), len(below))
    if fewest < 2:
        return Interval(value, 0.0, 1.0)
    tail = (1 - level) / 2
    if value in (0.0, 1.0):
        limit = tail ** (1 / fewest)
        return Interval(value, min(value, limit), max(value, 1 - limit))
    error = math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
    reach = float(norm.ppf(1 - tail)) * error
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach))


def _placements(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of others below each member [m], and of members above each other [n]; ties count half."""
    members, others = _scored(members, others)
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[: len(members)] - rankdata(members)) / len(others)
    below = 1 - (ranks[len(members) :] - rankdata(others)) / len(members)
    return above, below


def _scored(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    for name, values in (("members", members), ("others", others)):
        if values.ndim != 1 or not len(values):
            raise UserError(f"attack: {name} have shape {values.shape}, expected the scores [n] of 1 or more samples")
        if np.isnan(values).any():
            raise UserError(f"attack: {name} have a score that is not a number; the model's output is broken")
    return members, others


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float) -> float:
    """Return the share [0, 1] of members above the lowest threshold that at most the share `fpr` of the others exceeds.

    Equal to fpr: the attack has no power. Scores at the threshold count as non-members.

    Raises:
        UserError: There are fewer others than 1 / fpr, so no threshold has that rate.
    """
    members, others = _scored(members, others)
    threshold = np.sort(others)[len(others) - 1 - _false_positives(len(others), fpr)]
    return float((members > threshold).mean())


def tpr_interval(
    members: np.ndarray, others: np.ndarray, fpr: float, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return `tpr_at_fpr` with an interval over the threshold's and the members' variation.

    The threshold is that of the others drawn again with replacement: its place among them, an order statistic, is drawn
    directly (Beta). The share of members above it is drawn from its Jeffreys posterior, since resampling would give 0
    of 100 no width.
    """
    value = tpr_at_fpr(members, others, fpr)
    members, others = np.sort(members), np.sort(others)
    count, allowed = len(others), _false_positives(len(others), fpr)
    rng = np.random.default_rng(seed)
    place = np.minimum((count * rng.beta(count - allowed, allowed + 1, draws)).astype(int), count - 1)
    hits = len(members) - np.searchsorted(members, others[place], side="right")
    return percentiles(value, rng.beta(hits + 0.5, len(members) - hits + 0.5), level)


def _false_positives(count: int, fpr: float) -> int:
    """Return how many of `count` non-members may be called members."""
    if not 0 < fpr < 1:
        raise UserError(f"tpr_at_fpr: fpr is {fpr}; give a share between 0 and 1, such as 0.01")
    allowed = math.floor(count * fpr + 1e-9)  # 100 * 0.29 is a little less than 29
    if not allowed:
        raise UserError(
            f"tpr_at_fpr: {count} non-members are too few for a false-positive rate of {fpr:g}; "
            f"give {math.ceil(1 / fpr - 1e-9):,} or more, or a higher rate"
        )
    return allowed


def balanced_accuracy(
    name: str,
    forget: Predictions,
    retain: Predictions,
    test: Predictions,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the balanced accuracy [0, 1] of an attack of `scores` with thresholds per class (Song and Mittal 2021).

    0.5 = no power, above = the forget samples are still recognised as training samples. The thresholds are learned from
    samples with known membership: retain samples (members) and half of the test samples, by chance and within classes
    (non-members). They are then applied to forget samples (are they called members?) and to the other half of the test
    samples. Song and Mittal learn them on a shadow model; here the model itself has known members. A class without
    known members or non-members (a class that is forgotten as a whole) has the threshold of all classes together.
    Interval: Jeffreys posteriors of the two shares, with fixed thresholds.
    """
    return _balanced_accuracy(
        *((scores(p)[name], p.labels) for p in (forget, retain, test)), draws=draws, level=level, seed=seed
    )


def _balanced_accuracy(
    forget: tuple[np.ndarray, np.ndarray],
    retain: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return `balanced_accuracy` from scores [n] and labels [n]."""
    values, labels = test
    if len(values) < 2:
        raise UserError("balanced_accuracy: the test set has 1 sample; thresholds need one and their trial another")
    rng = np.random.default_rng(seed)
    by_class = np.lexsort((rng.random(len(values)), labels))  # every second sample of a class, in random order
    known, tried = by_class[::2], by_class[1::2]
    overall = _threshold(retain[0], values[known])
    classes = max(int(part[1].max()) for part in (forget, retain, test)) + 1
    thresholds = np.full(classes, overall)
    for label in np.intersect1d(retain[1], labels[known]):
        thresholds[label] = _threshold(retain[0][retain[1] == label], values[known][labels[known] == label])
    hits = forget[0] >= thresholds[forget[1]]
    passes = values[tried] < thresholds[labels[tried]]
    shares = [rng.beta(x.sum() + 0.5, len(x) - x.sum() + 0.5, draws) for x in (hits, passes)]
    return percentiles(float(hits.mean() + passes.mean()) / 2, (shares[0] + shares[1]) / 2, level)


def _threshold(members: np.ndarray, others: np.ndarray) -> float:
    """Return the score from which to call samples members by the best balanced accuracy; the highest of several."""
    values = np.concatenate([members, others])
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(order < len(members)) / len(members)
    alarms = np.cumsum(order >= len(members)) / len(others)
    last = np.append(np.diff(values[order]) != 0, True)  # equal scores get the same call
    return float(values[order][last][np.argmax((hits - alarms)[last])])


def attacks(
    forget: Predictions,
    retain: Predictions,
    test: Predictions,
    references: Sequence[Mapping[str, Predictions]] = (),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all attacks on one model: {attack: {number: {"value", "low", "high", "direction"}}}, ready for JSON.

    Attacks: those of `scores`, and with references `calibrated_loss`. Numbers: auc, tpr_at_fpr_0.001, tpr_at_fpr_0.01
    and balanced_accuracy, each with its 95% interval and its direction; a number that needs more samples has the value
    None and a "reason". The calibrated attack has no balanced accuracy: references were trained on the retain set too,
    so retain samples are no example of samples that the model alone was trained on.

    Args:
        forget, retain, test: Predictions of the model.
        references: Predictions of models retrained without the forget set, by set (forget, test).
    """
    by_set = [scores(p) for p in (forget, retain, test)]
    labels = [p.labels for p in (forget, retain, test)]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in by_set[0]:
        members, _, others = values = [each[name] for each in by_set]
        accuracy: Interval | str = (
            f"the test set has {len(test)} sample; fitting and testing thresholds needs 2 or more"
        )
        if len(test) > 1:
            accuracy = _balanced_accuracy(*zip(values, labels, strict=True))
        found[name] = {
            **_numbers(members, others),
            "balanced_accuracy": stated(accuracy, DIRECTION["balanced_accuracy"]),
        }
    if references:
        members, others = (
            calibrated_scores(p, [reference[name] for reference in references])
            for name, p in (("forget", forget), ("test", test))
        )
        found[CALIBRATED] = _numbers(members, others)
    return found


def _numbers(members: np.ndarray, others: np.ndarray) -> dict[str, dict[str, Any]]:
    numbers = {"auc": stated(auc_interval(members, others), DIRECTION["attack_auc"])}
    for rate in RATES:
        try:
            number: Interval | str = tpr_interval(members, others, rate)
        except UserError as error:
            number = str(error)
        numbers[f"tpr_at_fpr_{rate:g}"] = stated(number, DIRECTION["tpr_at_fpr"])
    return numbers


def attack_report(
    model: Mapping[str, Predictions],
    original: Mapping[str, Predictions] | None,
    references: Sequence[Mapping[str, Predictions]],
) -> dict[str, Any]:
    """Return `attacks` on a model, on the original if given, and (means) on the references if given.

    A reference is calibrated by the others, not by itself.

    Args:
        model, original, references: Predictions by set (forget, retain, test).
    """

    def on(held: Mapping[str, Predictions], others: Sequence[Mapping[str, Predictions]]) -> dict[str, Any]:
        return attacks(held["forget"], held["retain"], held["test"], others)

    found = {"model": on(model, references)}
    if original is not None:
        found["original"] = on(original, references)
    if references:
        each = [on(held, [*references[:i], *references[i + 1 :]]) for i, held in enumerate(references)]
        found["reference"] = mean_attacks(each)
    return found


def mean_attacks(each: Sequence[dict[str, dict[str, dict[str, Any]]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the mean of every number, and of its interval's ends, over results of `attacks` on models of one kind.

    So the interval is that of one such model. With several models, "spread" is the largest value minus the smallest.
    """
    mean: dict[str, dict[str, dict[str, Any]]] = {}
    for attack, numbers in each[0].items():
        mean[attack] = {}
        for name, number in numbers.items():
            merged = dict(number)
            if number["value"] is not None:
                same = [model[attack][name] for model in each]
                merged.update({key: float(np.mean([n[key] for n in same])) for key in ("value", "low", "high")})
                if len(each) > 1:
                    merged["spread"] = float(np.ptp([n["value"] for n in same]))
            mean[attack][name] = merged
    return mean
