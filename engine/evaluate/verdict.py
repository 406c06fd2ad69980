"""Verdict on whether a model has forgotten: gates over evidence, and a result that fails if one of them fails.

Every gate has one question, one statistic with an interval, and a limit. It passes if the whole interval is within the
limit (a test of equivalence: two one-sided tests, Schuirmann 1987), fails if the whole interval is outside, and is
undecided in between: too little evidence never counts as a pass.

The membership gates use one attack. With f the log-odds of the true class (the logit-scaled confidence of Carlini et
al. 2022), a sample's score is f of the model minus the mean f of the references, which were trained without the forget
set: the difficulty of the sample is removed (Watson et al. 2022). A model that was not trained on the forget set
differs from the references on it as it differs on test samples, so the AUC of forget against test is 0.5 for any
forget set. Above 0.5 the model predicts them better than a retrained model does; below, it is worse on them than a
model that was not trained on them, which reveals them as well. Without references f itself is the score, and 0.5 holds
for forget sets drawn at random alone.

The same attack on the original is the positive control: if it does not detect even that model, a pass of the model
proves nothing, and the verdict is INSUFFICIENT EVIDENCE.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import norm

from engine.evaluate.agreement import kl, margins
from engine.evaluate.gates import FAIL, INSUFFICIENT, MORE, PASS, Gate, Gates, Verdict, decide, undecided
from engine.evaluate.intervals import Interval, bootstrap_means, percentiles
from engine.evaluate.membership import auc, auc_interval, tpr_interval
from engine.evaluate.spread import MISSED, PRIOR_AUC, PRIOR_RATIO, Variation, prior_points, variation
from engine.models.predict import Predictions

# Log-odds beyond this are confident predictions, and differ by float32's rounding alone.
_CLIP = 100.0
# Simulated models without knowledge of the members, for the limit of true positives.
_SIMULATED = 400
# Smallest noise floor in nats, for references that never differ.
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """Predictions of one model.

    Attributes:
        predictions: Predictions for forget, retain and test set.
        relearned: Predictions for held_back (forget samples that the attacker did not train on) and test set after the
            relearning attack; empty if it was not run.
        shifted: Predictions for forget and test images moved by a pixel or more; empty if they were not computed.
    """

    predictions: Mapping[str, Predictions]
    relearned: Mapping[str, Predictions]
    shifted: Mapping[str, Predictions] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a verdict is based on.

    Attributes:
        repeated: The model's predictions for the forget set, computed a second time.
        changed: Share [0, 1] of the weights, outside the head, that differ from the original's; None for another
            architecture.
        partial: Whether the references were trained on a part of the retained samples (`engine.pool`). Their accuracy
            is lower than a retrained model's: test and retain accuracy are compared with the original's, and the
            difference on test samples is subtracted from that on forget samples. There is no relearning attack.
        expected_test: float64 [test samples], with `partial`: share of all models of the pool that are right.
    """

    model: ModelOutputs
    original: ModelOutputs
    references: Sequence[ModelOutputs]
    repeated: Predictions
    changed: float | None
    partial: bool = False
    expected_test: np.ndarray | None = None


def judge(evidence: Evidence, gates: Gates) -> Verdict:
    """Return the verdict on a model from outputs alone; it does not depend on how the model was made."""
    samples = {name: len(p) for name, p in evidence.model.predictions.items()}
    too_few = [name for name in ("forget", "test") if samples[name] < gates.minimum_samples]
    if too_few:
        found = [
            undecided(
                "samples",
                "Are there enough samples to decide?",
                f"at least {gates.minimum_samples} forget and test samples",
                f"{' and '.join(f'{samples[name]} {name}' for name in too_few)} samples",
            ),
            _changed(evidence),
        ]
    else:
        found = [gate for group in _GROUPS for gate in group(evidence, gates)]
        found.append(_joint(found, gates))
    return Verdict(found, len(evidence.references), samples)


# --- the gates --------------------------------------------------------------------------------------------------------


def _weights(evidence: Evidence, gates: Gates) -> list[Gate]:
    return [_changed(evidence), _repeatable(evidence)]


def _changed(evidence: Evidence) -> Gate:
    question, limit = "Was anything but the head changed?", "some weight outside the head differs from the original's"
    if evidence.changed is None:
        return Gate("changed", question, PASS, None, limit, "another architecture than the original's")
    value = Interval(evidence.changed, evidence.changed, evidence.changed)
    if evidence.changed > 0:
        return Gate("changed", question, PASS, value, limit, f"{100 * evidence.changed:.1f}% of them differ")
    reason = "all of them are the original's, so the features still hold what was learned from the forget samples"
    return Gate("changed", question, FAIL, value, limit, reason)


def _repeatable(evidence: Evidence) -> Gate:
    question, limit = "Are the model's outputs the same twice?", "no class differs"
    first, second = evidence.model.predictions["forget"], evidence.repeated
    differing = float((first.logits.argmax(1) != second.logits.argmax(1)).mean())
    value = Interval(differing, differing, differing)
    if differing == 0 and np.allclose(first.logits, second.logits, rtol=1e-3, atol=1e-3):
        return Gate("repeatable", question, PASS, value, limit, "the same logits")
    reason = "its outputs are random: noise hides what was learned from a single pass, not from many"
    return Gate("repeatable", question, FAIL, value, limit, reason)


def accuracy_gates(evidence: Evidence, gates: Gates) -> list[Gate]:
    compared = evidence.references and not evidence.partial
    others = list(evidence.references) if compared else [evidence.original]
    whom = f"the {len(others)} references'" if compared else "the original's"
    found = []
    for name in ("test", "retain"):
        limits = (gates.accuracy_points, gates.accuracy_points_few)
        change, least = _accuracy_change(evidence.model, others, name, limits, gates.level)
        found.append(
            decide(
                f"{name} accuracy",
                f"Is {name} accuracy kept?",
                change,
                low=-least,
                high=None,
                limit=f"at most {least:.1f} points below {whom}",
                shown=f"{change.value:+.1f} points",
            )
        )
    return [*found, *_forget_accuracy(evidence.model, evidence, gates)]


def _forget_accuracy(subject: ModelOutputs, evidence: Evidence, gates: Gates, above_alone: bool = False) -> list[Gate]:
    """Return the gate; none without references, since the accuracy to expect is then not known.

    above_alone: Only a higher accuracy fails it: a lower one does not show that the samples were memorised.
    """
    if not evidence.references:
        return []
    limits = (gates.forget_points, gates.forget_points_few)
    change, most = _accuracy_change(
        subject, evidence.references, "forget", limits, gates.level, less=evidence.expected_test
    )
    relative = ", relative to that on test samples" if evidence.partial else ""
    return [
        decide(
            "forget accuracy",
            "Is accuracy on the forget samples that of a retrained model?",
            change,
            low=None if above_alone else -most,
            high=most,
            limit=f"within {most:.1f} points of the {len(evidence.references)} references'{relative}",
            shown=f"{change.value:+.1f} points",
        )
    ]


def _accuracy_change(
    model: ModelOutputs,
    others: Sequence[ModelOutputs],
    name: str,
    limits: Limits,
    level: float,
    less: np.ndarray | None = None,
) -> tuple[Interval, float]:
    """Return accuracy minus the mean of the others', in points, with its interval, and the limit of its size.

    Samples are resampled for all models together.

    Args:
        less: Expected correctness on test samples, from which the difference is subtracted; None: nothing is.
    """
    mine, theirs = model.predictions[name].correct, np.stack([each.predictions[name].correct for each in others])
    change = 100 * (mine - theirs.mean(0))
    value, drawn = change.mean(), bootstrap_means(change[:, None])[:, 0]
    if less is not None:
        apart = 100 * (model.predictions["test"].correct - less)
        value, drawn = value - apart.mean(), drawn - bootstrap_means(apart[:, None], seed=1)[:, 0]
    found = percentiles(float(value), drawn, level)
    error = (found.high - found.low) / (2 * float(norm.ppf((1 + level) / 2)))
    accuracies = 100 * theirs.mean(1)
    varies = variation(error, _left_out(accuracies), prior_points(name, float(theirs.mean())))
    return varies.widen(found, level), _limit(varies, limits, level)


def _left_out(values: np.ndarray) -> list[float]:
    """Return each value [R] less the mean of the others; none of a single value."""
    count = len(values)
    return [] if count < 2 else list((values - values.mean()) * count / (count - 1))


def _limit(varies: Variation, limits: Limits, level: float) -> float:
    """Return the limit of a distance: that of large sets, or a larger one that a retrained model passes often enough.

    The larger limit is what the interval of such a model stays within in all but 1% of the cases
    (`engine.evaluate.spread`). It is never above the second of the limits.
    """
    large, few = limits
    return min(max(large, varies.reach(level)), few)


def _membership(evidence: Evidence, gates: Gates) -> list[Gate]:
    """Return the gates of the attack on the model, and whether such gates detect the original."""
    found = _attacks(evidence.model, evidence, gates)
    control = [
        *_forget_accuracy(evidence.original, evidence, gates, above_alone=True),
        *_attacks(evidence.original, evidence, gates),
    ]
    question = "Would the attacks detect anything at all?"
    names = f"{', '.join(gate.name for gate in control[:-1])} or {control[-1].name}"
    limit = f"the untouched original is above a retrained model in {names}, and does not pass it"
    shown = "; ".join(f"{gate.name}: {gate.reason.removesuffix(f'; {MORE}')}" for gate in control)
    expected = _expected(gates)
    if any(_detects(gate, expected[gate.name]) for gate in control):
        return [Gate("power", question, PASS, None, limit, shown), *found]
    reason = f"it is not, so that a pass of the model proves nothing ({shown})"
    return [Gate("power", question, INSUFFICIENT, None, limit, reason), *found]


def _detects(gate: Gate, expected: float) -> bool:
    """Return whether a gate of the original shows its training on the forget samples.

    Its whole interval is above the value of a retrained model, and it does not pass: a model like the original would
    not pass either.
    """
    return gate.status != PASS and gate.value is not None and gate.value.low > expected


def _attacks(subject: ModelOutputs, evidence: Evidence, gates: Gates) -> list[Gate]:
    attack = "the attack calibrated by the references" if evidence.references else "the confidence attack"
    question = "Can an attack find that the forget samples were trained on?"
    references = [each.predictions for each in evidence.references]
    found = [_near_chance("membership", question, attack, subject.predictions, references, gates)]
    members, others = (_scores(subject, evidence.references, name) for name in ("forget", "test"))
    name, question = "sure members", "Are there forget samples that an attack finds with near certainty?"
    percent = f"{100 * gates.membership_fpr:g}% false positives"
    if len(others) * gates.membership_fpr < 1:
        reason = f"{len(others)} test samples cannot show a false positive rate of {gates.membership_fpr:g}"
        return [*found, undecided(name, question, f"few found at {percent}", reason)]
    rate = tpr_interval(members, others, gates.membership_fpr, level=gates.level)
    most = _tpr_limit(gates, len(members), len(others))
    limit, shown = f"at most {100 * most:.1f}% found at {percent}", f"share {rate.value:.3f}"
    return [*found, decide(name, question, rate, low=None, high=most, limit=limit, shown=shown)]


def _shifted(evidence: Evidence, gates: Gates) -> list[Gate]:
    """Return the gate of the attack on moved images: a model may know the exact images of the request and answer them
    as a retrained model does, without having forgotten anything."""
    name, question = "shifted images", "Does the attack find them on images that are moved by a pixel?"
    if not evidence.model.shifted:
        return [undecided(name, question, "AUC of the attack near 0.5", "moved images were not evaluated")]
    references = [each.shifted for each in evidence.references]
    return [_near_chance(name, question, "the attack on them", evidence.model.shifted, references, gates)]


Sets = Mapping[str, Predictions]
Limits = tuple[float, float]  # of a distance: for large sets, and at most for small ones


def _near_chance(
    name: str, question: str, attack: str, subject: Sets, references: Sequence[Sets], gates: Gates
) -> Gate:
    """Return the gate of an attack on the forget samples, whose AUC may be off 0.5 to neither side."""
    limits = (gates.membership_auc, gates.membership_auc_few)
    power, margin = _attack_auc(subject, references, "forget", limits, gates.level)
    limit, shown = f"AUC of {attack} within {margin:.3f} of 0.5", f"AUC {power.value:.3f}"
    return decide(name, question, power, low=0.5 - margin, high=0.5 + margin, limit=limit, shown=shown)


def _attack_auc(
    subject: Sets, references: Sequence[Sets], name: str, limits: Limits, level: float
) -> tuple[Interval, float]:
    """Return the AUC of the attack with its interval, and the limit of its distance from 0.5.

    name: The set of the members; the others are the test samples.
    """
    members, others = (calibrated_margins(subject[each], [r[each] for r in references]) for each in (name, "test"))
    varies = variation(chance_error(len(members), len(others)), left_out_aucs(references, name), PRIOR_AUC)
    found = varies.widen(auc_interval(members, others, level=level), level)
    return found, _limit(varies, limits, level)


def chance_error(members: int, others: int) -> float:
    """Return the standard error of an AUC if both sets have one distribution (Mann and Whitney 1947)."""
    return ((members + others + 1) / (12 * members * others)) ** 0.5


def left_out_aucs(references: Sequence[Sets], name: str) -> list[float]:
    """Return the AUC, less 0.5, of the attack on each reference [R] calibrated by the others; none of a single one.

    name: The set of the members; the others are the test samples.
    """
    if len(references) < 2:
        return []
    return [
        auc(*(calibrated_margins(one[each], [r[each] for r in references if r is not one]) for each in (name, "test")))
        - 0.5
        for one in references
    ]


@functools.lru_cache  # the same for every model of a verifier, and its original
def _tpr_limit(gates: Gates, members: int, others: int) -> float:
    """Return the limit of true positives, by simulation, since it depends on the two counts alone."""
    rng = np.random.default_rng(0)
    highs = [
        tpr_interval(rng.random(members), rng.random(others), gates.membership_fpr, level=gates.level, draws=200).high
        for _ in range(_SIMULATED)
    ]
    return min(max(gates.membership_tpr, float(np.quantile(highs, 1 - MISSED))), gates.membership_tpr_few)


def attack_power(
    subject: ModelOutputs, references: Sequence[ModelOutputs], sets: tuple[str, str], level: float
) -> Interval:
    """Return the AUC of the calibrated attack on a model, the first of two sets against the second; see the top."""
    members, others = (_scores(subject, references, name) for name in sets)
    return auc_interval(members, others, level=level)


def _scores(subject: ModelOutputs, references: Sequence[ModelOutputs], name: str) -> np.ndarray:
    """Return the score [n] of each sample: higher = predicted better than by models not trained on it."""
    return calibrated_margins(subject.predictions[name], [each.predictions[name] for each in references])


def calibrated_margins(mine: Predictions, others: Sequence[Predictions]) -> np.ndarray:
    """Return the log-odds [n] of the true class less the mean of the others'; higher = predicted better than there."""
    score = np.clip(margins(mine), -_CLIP, _CLIP)
    if others:
        score = score - np.mean([np.clip(margins(other), -_CLIP, _CLIP) for other in others], axis=0)
    return score


def _agreement(evidence: Evidence, gates: Gates) -> list[Gate]:
    name, question = "agreement", "Are its predictions those of a retrained model, sample by sample?"
    limit = (
        f"KL to the references on the forget samples at most {gates.agreement_ratio:g} times that between references"
    )
    references = [each.predictions["forget"] for each in evidence.references]
    if len(references) < 2:
        if gates.references == 0:
            return []
        return [
            undecided(name, question, limit, f"{len(references)} retrained references, {gates.references} required")
        ]
    mine = np.mean([_kl(each, evidence.model.predictions["forget"]) for each in references], axis=0)
    between = {pair: _kl(*pair_of) for pair, pair_of in _pairs(references)}
    floor = np.mean(list(between.values()), axis=0)
    drawn = bootstrap_means(np.stack([mine, floor], 1))
    ratio = percentiles(
        mine.mean() / max(floor.mean(), _TINY), drawn[:, 0] / np.maximum(drawn[:, 1], _TINY), gates.level
    )
    error = (ratio.high - ratio.low) / (2 * float(norm.ppf((1 + gates.level) / 2)))
    varies = variation(error, _ratios_left_out(between, len(references)), PRIOR_RATIO)
    ratio = varies.widen(ratio, gates.level)
    shown = f"{ratio.value:.2f} times ({mine.mean():.3f} against {floor.mean():.3f} nats)"
    found = [decide(name, question, ratio, low=None, high=gates.agreement_ratio, limit=limit, shown=shown)]
    if len(references) < gates.references:
        reason = f"{len(references)} retrained references, {gates.references} required"
        found.append(undecided("references", "Are there enough retrained references?", f"{gates.references}", reason))
    return found


def _pairs(references: Sequence[Predictions]) -> list[tuple[tuple[int, int], tuple[Predictions, Predictions]]]:
    return [((a, b), (references[a], references[b])) for a, b in itertools.combinations(range(len(references)), 2)]


def _ratios_left_out(between: Mapping[tuple[int, int], np.ndarray], references: int) -> list[float]:
    """Return the ratio, less 1, of each reference judged by the others; none of two references."""
    if references < 3:
        return []
    means = {pair: float(values.mean()) for pair, values in between.items()}
    found = []
    for one in range(references):
        mine = [value for pair, value in means.items() if one in pair]
        floor = [value for pair, value in means.items() if one not in pair]
        found.append(float(np.mean(mine)) / max(float(np.mean(floor)), _TINY) - 1)
    return found


def _kl(reference: Predictions, model: Predictions) -> np.ndarray:
    """Return KL(reference || model) [n] in nats, symmetrised by the mean of both directions."""
    p, q = reference.log_probabilities, model.log_probabilities
    return 0.5 * (kl(p, q) + kl(q, p))


def _relearning(evidence: Evidence, gates: Gates) -> list[Gate]:
    if evidence.partial:
        return []
    name, question = "relearning", "Does training on some forget samples restore the others?"
    limit = "AUC of the attack on the others after it not above 0.5"
    if not evidence.model.relearned:
        return [undecided(name, question, limit, "the relearning attack was not run")]
    held_back = len(evidence.model.relearned["held_back"])
    if held_back < gates.minimum_samples // 2:
        return [undecided(name, question, limit, f"{held_back} forget samples held back")]
    references = [each.relearned for each in evidence.references]
    limits = (gates.relearning_auc, gates.relearning_auc_few)
    power, margin = _attack_auc(evidence.model.relearned, references, "held_back", limits, gates.level)
    limit, shown = f"AUC of the attack on the others after it at most {0.5 + margin:.3f}", f"AUC {power.value:.3f}"
    return [decide(name, question, power, low=None, high=0.5 + margin, limit=limit, shown=shown)]


def _joint(found: Sequence[Gate], gates: Gates) -> Gate:
    """Return the gate that counts signs of the forget samples, each of which may be within its own limit.

    A sign is an interval that is wholly above the value of a retrained model, around a distance of at least a share of
    the allowed one. Of a retrained model an interval of 90% is above once in twenty verdicts, so two of these six gates
    rarely are at once. The share keeps differences that do not matter from adding up in large sets.
    """
    question = "Do small signs of the forget samples add up?"
    expected = {**_expected(gates), "shifted images": 0.5, "agreement": 1.0, "relearning": 0.5}
    counted = [gate for gate in found if gate.name in expected]
    signs = [gate.name for gate in counted if _is_sign(gate, expected[gate.name], gates)]
    status = PASS if len(signs) <= gates.joint_signs else FAIL if len(signs) > gates.joint_signs + 1 else INSUFFICIENT
    limit = (
        f"at most {gates.joint_signs:g} of {len(counted)} clearly above a retrained model, by {gates.joint_share:.0%} "
        "of what is allowed or more"
    )
    value = Interval(len(signs), len(signs), len(signs))
    return Gate("joint", question, status, value, limit, f"{len(signs)} of them: {', '.join(signs) or 'none'}")


def _is_sign(gate: Gate, expected: float, gates: Gates) -> bool:
    if gate.value is None or gate.within is None or gate.within[1] is None:
        return False
    allowed = gate.within[1] - expected
    return gate.value.low > expected and gate.value.value - expected >= gates.joint_share * allowed


def _expected(gates: Gates) -> dict[str, float]:
    """Return the values of a retrained model in the gates that the original is evaluated by."""
    return {"forget accuracy": 0.0, "membership": 0.5, "sure members": gates.membership_fpr}


_GROUPS: Sequence[Callable[[Evidence, Gates], list[Gate]]] = (
    _weights,
    accuracy_gates,
    _membership,
    _shifted,
    _agreement,
    _relearning,
)
