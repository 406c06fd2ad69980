"""Agreement of the unlearned model with retrained models, sample by sample. Averages can agree if predictions do not.

Two retrained models differ too, by seed alone. So every number is reported with the same number between retrained
models, the noise floor. The target is to be no worse than that, not to be perfect.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluate.intervals import Interval, bootstrap, bootstrap_means, percentiles, proportion, stated
from engine.evaluate.membership import non_member_calls
from engine.models.predict import Predictions

SETS = ("forget", "retain", "test")

# Margins beyond this are confident predictions, and differ by float32's rounding alone.
CLIP = 100.0

DIRECTION = {
    "top1": "share of samples on which both give the same class; higher = more alike; target: the noise floor's",
    "kl_from_reference": "KL(reference || model) in nats, mean over samples; 0 = the same answers, lower = more alike; "
    "large where the model rules out what the reference allows; target: the noise floor's",
    "kl_to_reference": "KL(model || reference) in nats, mean over samples; 0 = the same answers, lower = more alike; "
    "large where the model allows what the reference rules out; target: the noise floor's",
    "margin_gap": "absolute difference of the true class's log-odds, mean over samples; 0 = as confident in each "
    "sample, lower = more alike; target: the noise floor's",
    "tow": "product of 1 - |difference of accuracy| over forget, retain and test; 1 = the reference's accuracies, "
    "higher = better; target: the noise floor's",
    "tow_mia": "tow with the membership efficacy in the place of forget accuracy; 1 = the reference's figures, "
    "higher = better; target: the noise floor's",
    "rf_jsd": "Jensen-Shannon divergence in nats, 0 to 0.693, of class-mean probabilities: the model's on forget, "
    "the original's on test samples; 0 = its outputs for forget samples are those of the original for held-out ones, "
    "lower = better; target: the retrained model's",
    "klom_mean": "KL divergence of margins in nats, mean over samples; 0 = the margins of unlearned and retrained "
    "models are distributed alike, lower = better; target: the noise floor's",
    "klom_95th": "KL divergence of margins in nats, the 95th percentile of samples; 0 = the same, lower = better; "
    "target: the noise floor's",
}

# Rows whose probabilities are in memory at once, for all models that are compared.
_BLOCK = 4096
# Draws times classes times classes of the bootstrap of rf_jsd: a second or so.
_MOST_DRAWN = 20_000_000

_COLUMNS = ("top1", "kl_from_reference", "kl_to_reference", "margin_gap")

Pairs = Sequence[tuple[int, int]]


def top1_agreement(first: Predictions, second: Predictions) -> float:
    """Return the share [0, 1] of samples for which both models predict the same class."""
    return float((first.logits.argmax(1) == second.logits.argmax(1)).mean())


def mean_kl(reference: Predictions, model: Predictions) -> float:
    """Return the mean over samples of KL(reference || model), in nats."""
    return float(kl(reference.log_probabilities, model.log_probabilities).mean())


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) [n] of log-probabilities [n, classes]."""
    return (np.exp(p) * (p - q)).sum(1)


def margins(predictions: Predictions) -> np.ndarray:
    """Return the margin [n], z_y - logsumexp of the other logits: the log-odds of the true class, not clipped."""
    logits = predictions.logits.astype(np.float64)
    true = np.arange(len(predictions)), predictions.labels
    mine = logits[true].copy()
    logits[true] = -np.inf
    most = logits.max(1)
    return mine - most - np.log(np.exp(logits - most[:, None]).sum(1))


def klom(
    unlearned: np.ndarray, retrained: np.ndarray, bins: int = 20, clip: float = 100.0, eps: float = 1e-5
) -> np.ndarray:
    """Return the KL divergence of margins [n] in nats (KLoM; Georgiev, Rinberg, Park et al. 2024, Attribute-to-Delete).

    For each sample it is KL(unlearned || retrained) between two histograms of equal bins over the joint range of the
    clipped margins, with shares of the retrained histogram of at least eps and then made to sum to 1. 0 = alike, at
    most ln(1 / eps) = 11.5; **lower is better**. The target is the value between two groups of as many retrained models
    (`klom_report`), which is far above 0 for few models.

    The definition is that of the authors' public code (data-unlearning-bench, compute_binned_KL_div: the direction, 20
    bins, clip at 100, eps 1e-5, one bin of width 1 for margins that are all equal, scipy's renormalising entropy), with
    one exception: there the bins are open on the right, so that the largest margin of each sample is outside the last
    bin; here the last bin is closed, as in numpy.histogram, and every model counts.

    Args:
        unlearned, retrained: Margins [N, n] and [M, n] of the same n samples under N unlearned and M retrained models.
        bins: Number of bins.
        clip: Margins are clipped to [-clip, clip].
        eps: Smallest share of a bin of the retrained histogram.

    Raises:
        UserError: The shapes do not match, or a margin is not a number.
    """
    unlearned, retrained = np.asarray(unlearned, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    if unlearned.ndim != 2 or retrained.ndim != 2 or unlearned.shape[1] != retrained.shape[1]:
        raise UserError(
            f"klom: margins have shapes {unlearned.shape} and {retrained.shape}, expected [models, n] of the same n "
            "samples"
        )
    if not (unlearned.size and retrained.size):
        raise UserError("klom: no margins; give those of at least one unlearned and one retrained model")
    if np.isnan(unlearned).any() or np.isnan(retrained).any():
        raise UserError("klom: a margin is not a number; the model's output is broken")
    unlearned, retrained = np.clip(unlearned, -clip, clip), np.clip(retrained, -clip, clip)
    low = np.minimum(unlearned.min(0), retrained.min(0))
    high = np.maximum(unlearned.max(0), retrained.max(0))
    width = np.where(high > low, high - low, 1.0) / bins
    p, q = (_histograms(values, low, width, bins) for values in (unlearned, retrained))
    q = np.where(p > 0, np.maximum(q, eps), q)
    q /= q.sum(1, keepdims=True)
    terms = p * (np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1)))
    return np.asarray(terms.sum(1))


def _histograms(values: np.ndarray, low: np.ndarray, width: np.ndarray, bins: int) -> np.ndarray:
    """Return shares [n, bins] of values [N, n]."""
    places = np.minimum(((values - low) / width).astype(int), bins - 1)  # the right edge belongs to the last bin
    samples = values.shape[1]
    counts = np.bincount((places + bins * np.arange(samples)).ravel(), minlength=bins * samples)
    return counts.reshape(samples, bins) / len(values)


def klom_report(
    unlearned: np.ndarray, retrained: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return KLoM over samples and its noise floor: {"model": numbers, "noise_floor": numbers}, ready for JSON.

    KLoM of few models is large even if nothing differs, so both use groups of one size: the noise floor compares one
    half of the retrained models with the other, the model as many unlearned models with the same other half.

    Args:
        unlearned, retrained: Margins [N, n] and [M, n], M of 4 or more.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        klom_mean and klom_95th (that of the paper's figures), with the bootstrap interval over samples.

    Raises:
        UserError: There are too few models.
    """
    half = min(len(unlearned), len(retrained) // 2)
    if half < 2:
        raise UserError(
            f"klom_report: {len(unlearned)} unlearned and {len(retrained)} retrained models are too few; give 2 and 4 "
            "or more"
        )
    other = retrained[half : 2 * half]
    found = {"model": klom(unlearned[:half], other), "noise_floor": klom(retrained[:half], other)}
    return {
        name: {
            "klom_mean": stated(_mean(values, draws, seed), DIRECTION["klom_mean"]),
            "klom_95th": stated(_95th(values, draws, seed), DIRECTION["klom_95th"]),
        }
        for name, values in found.items()
    }


def _mean(values: np.ndarray, draws: int, seed: int) -> Interval:
    return percentiles(float(values.mean()), bootstrap_means(values[:, None], draws=draws, seed=seed)[:, 0])


def _95th(values: np.ndarray, draws: int, seed: int) -> Interval:
    return bootstrap(lambda drawn: float(np.quantile(drawn, 0.95)), values, draws=draws, seed=seed)


def tow(model: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the tug of war [...] in [0, 1], **higher is better**: prod of 1 - |a - a_reference| (Zhao et al. 2024,
    RUM).

    ToW-MIA is the same with the membership efficacy in place of forget accuracy: that of the confidence SVC, as in
    RUM's public code.

    Args:
        model, reference: Accuracies [..., 3] in [0, 1] on forget, retain and test set.
    """
    return np.asarray(np.prod(1 - np.abs(model - reference), axis=-1))


def rf_jsd(unlearned: Predictions, original: Predictions, *, draws: int = 1000, seed: int = 0) -> Interval:
    """Return the retrain-free JS divergence in nats, 0 to ln 2, **lower is better** (LoTUS, Spartalis et al. 2025).

    For each class of both sets, it is the divergence between the mean probabilities of the unlearned model's samples
    and of the original's; the result is the mean over those classes. LoTUS's public code divides by the number of
    classes once more and takes KL(mean || p) in place of KL(p || mean), so its figures are smaller. The interval draws
    samples again within their class; with hundreds of classes there are fewer draws. It is wide upward: the fewer
    samples of a class, the larger the divergence.

    Args:
        unlearned: Predictions of the unlearned model for the forget set.
        original: Predictions of the original for the test set.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        UserError: The sets have no class in common.
    """
    classes = np.intersect1d(unlearned.labels, original.labels)
    if not len(classes):
        raise UserError("rf_jsd: forget and test samples have no class in common; it compares them class by class")
    draws = min(draws, max(100, _MOST_DRAWN // (len(classes) * unlearned.logits.shape[1])))
    rng = np.random.default_rng(seed)
    value, drawn = 0.0, np.zeros(draws)
    for label in classes:
        p, q = (
            np.exp(predictions.take(np.flatnonzero(predictions.labels == label)).log_probabilities)
            for predictions in (unlearned, original)
        )
        value += float(_jsd(p.mean(0), q.mean(0)))
        seeds = rng.integers(0, 2**32, 2)
        drawn += _jsd(*(bootstrap_means(x, draws=draws, seed=int(s)) for x, s in zip((p, q), seeds, strict=True)))
    return percentiles(value / len(classes), drawn / len(classes))


def _jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence [...] of probabilities [..., classes], in nats."""
    mean = (p + q) / 2
    tiny = np.finfo(np.float64).tiny  # 0 log 0 is 0
    return np.asarray(
        sum((x * (np.log(np.maximum(x, tiny)) - np.log(np.maximum(mean, tiny)))).sum(-1) / 2 for x in (p, q))
    )


def agreement_report(
    model: Mapping[str, Predictions],
    original: Mapping[str, Predictions] | None,
    references: Sequence[Mapping[str, Predictions]],
    *,
    non_members: Sequence[np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the agreement of a model, the original and retrained references, ready for JSON.

    Args:
        model, original, references: Predictions by set (forget, retain, test), of the same samples in the same order.
        non_members: `membership.non_member_calls` of the model, of the original if there is one and of the references,
            in that order, if they are known; else they are computed, which takes seconds a model for thousands of
            samples.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        {"model": compared with the references, "original": compared with the references, "noise_floor": between
            references, "rf_jsd": {"model": number, "original": number, "reference": number}}. A part without a
            comparison is left out: the first two need a reference, the third two references, the last the original.
            Each of the first three is {"forget" | "retain" | "test": {top1, kl_from_reference, kl_to_reference,
            margin_gap}, "tow", "tow_mia"}, means over references or over pairs of them (KL then both ways). A number is
            {"value", "low", "high", "direction"}: a 95% bootstrap interval over samples (top1: `proportion`), with the
            same rows for all models.

    Raises:
        UserError: Predictions are missing, or of other samples or classes.
    """
    models = [model, *([original] if original is not None else []), *references]
    first = len(models) - len(references)
    _check(models)
    pairs: dict[str, Pairs] = {}
    if references:
        against = range(first, len(models))
        pairs["model"] = [(0, reference) for reference in against]
        if original is not None:
            pairs["original"] = [(1, reference) for reference in against]
        if len(references) > 1:
            pairs["noise_floor"] = list(itertools.permutations(against, 2))
    found: dict[str, Any] = {name: {} for name in pairs}
    if references:
        if non_members is None:
            non_members = [non_member_calls(each["forget"], each["retain"], each["test"]) for each in models]
        shares: dict[str, np.ndarray] = {}  # by set: all samples (first row), then each draw; [., models]
        for number, name in enumerate(SETS):
            predictions = [each[name] for each in models]
            parts = [np.stack([p.correct for p in predictions], 1)]
            if name == "forget":
                parts.append(np.stack(list(non_members), 1))
            parts += [_sample_columns(predictions, compared) for compared in pairs.values()]
            rows = np.concatenate(parts, axis=1, dtype=np.float64)
            means = np.concatenate([rows.mean(0)[None], bootstrap_means(rows, draws=draws, seed=seed + number)])
            groups = np.split(means, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
            shares[name] = groups.pop(0)
            if name == "forget":
                shares["efficacy"] = groups.pop(0)
            for comparison, group in zip(pairs, groups, strict=True):
                found[comparison][name] = _stated_columns(group, len(rows))
        for comparison, compared in pairs.items():
            for key, start in (("tow", "forget"), ("tow_mia", "efficacy")):
                products = _tow([shares[name] for name in (start, "retain", "test")], compared)
                found[comparison][key] = stated(percentiles(float(products[0]), products[1:]), DIRECTION[key])
    if original is not None:
        found["rf_jsd"] = _rf_jsd(model, original, references, draws, seed)
    return found


def _check(models: Sequence[Mapping[str, Predictions]]) -> None:
    for name in SETS:
        missing = [number for number, each in enumerate(models, 1) if name not in each]
        if missing:
            raise UserError(
                f"agreement: model {missing[0]} has no predictions of the {name} set; evaluate it on all sets"
            )
        labels, classes = models[0][name].labels, models[0][name].logits.shape[1]
        for each in models[1:]:
            if not np.array_equal(each[name].labels, labels) or each[name].logits.shape[1] != classes:
                raise UserError(
                    f"agreement: the models' predictions of the {name} set are of other samples or classes; evaluate "
                    "models with the same classes on the same samples"
                )


def _sample_columns(predictions: Sequence[Predictions], pairs: Pairs) -> np.ndarray:
    """Return _COLUMNS [n, 4] of each sample, means over pairs (model, reference)."""
    rows = np.empty((len(predictions[0]), len(_COLUMNS)))
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        taken = [p.take(block) for p in predictions]
        used = sorted({index for pair in pairs for index in pair})
        log_p = {index: taken[index].log_probabilities for index in used}
        margin = {index: np.clip(margins(taken[index]), -CLIP, CLIP) for index in used}
        columns = [
            (
                taken[mine].logits.argmax(1) == taken[theirs].logits.argmax(1),
                kl(log_p[theirs], log_p[mine]),
                kl(log_p[mine], log_p[theirs]),
                np.abs(margin[mine] - margin[theirs]),
            )
            for mine, theirs in pairs
        ]
        rows[block] = np.mean(columns, axis=0).T
    return rows


def _stated_columns(means: np.ndarray, count: int) -> dict[str, Any]:
    numbers = {
        name: percentiles(float(means[0, column]), means[1:, column]) for column, name in enumerate(_COLUMNS) if column
    }
    numbers["top1"] = proportion(
        min(float(means[0, 0]), 1.0) * count, count
    )  # resampling would give a share of 1 no width
    return {name: stated(numbers[name], DIRECTION[name]) for name in _COLUMNS}


def _tow(shares: Sequence[np.ndarray], pairs: Pairs) -> np.ndarray:
    """Return ToW [1 + draws], mean over pairs, of shares [1 + draws, models] of the three sets."""
    mine, theirs = (list(side) for side in zip(*pairs, strict=True))
    stacked = np.stack(shares, -1)
    return np.asarray(tow(stacked[:, mine], stacked[:, theirs]).mean(1))


def _rf_jsd(
    model: Mapping[str, Predictions],
    original: Mapping[str, Predictions],
    references: Sequence[Mapping[str, Predictions]],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Return rf_jsd of the model, of the original and, as the target, of the references (mean of their intervals)."""
    groups = {"model": [model], "original": [original], "reference": references}
    if not len(np.intersect1d(model["forget"].labels, original["test"].labels)):
        reason = "forget and test samples have no class in common"
        return {name: stated(reason, DIRECTION["rf_jsd"]) for name, group in groups.items() if group}
    return {
        name: stated(
            Interval(
                *np.mean([rf_jsd(e["forget"], original["test"], draws=draws, seed=seed) for e in group], 0).tolist()
            ),
            DIRECTION["rf_jsd"],
        )
        for name, group in groups.items()
        if group
    }
