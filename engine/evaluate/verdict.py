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
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from engine.config import build, read_yaml
from engine.errors import UserError
from engine.evaluate.agreement import kl, margins
from engine.evaluate.intervals import Interval, bootstrap_means, percentiles
from engine.evaluate.membership import auc_interval, tpr_interval
from engine.models.predict import Predictions

Status = Literal["PASS", "FAIL", "INSUFFICIENT EVIDENCE"]
PASS: Status = "PASS"
FAIL: Status = "FAIL"
INSUFFICIENT: Status = "INSUFFICIENT EVIDENCE"

DEFAULTS = Path(__file__).with_name("gates.yaml")

# Log-odds beyond this are confident predictions, and differ by float32's rounding alone.
_CLIP = 100.0
# How often a retrained model may miss a gate: with some ten gates it then passes all of them about nine times in ten.
_MISSED = 0.01
# Simulated models without knowledge of the members, for the limit of true positives.
_SIMULATED = 400
# Smallest noise floor in nats, for references that never differ.
_TINY = 1e-12

DOES_NOT_PROVE = (
    "that no attack can find the samples: it was these attacks, at this strength, on this many samples",
    "anything of a single sample: the figures are of the forget set as a whole",
    "anything of the original, of earlier checkpoints, of backups or of models derived from them",
    "that the references were trained as their records state: they are checked only for signs of the contrary",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits of the gates, from gates.yaml, which has the meaning of each."""

    level: float
    minimum_samples: int
    references: int
    accuracy_points: float
    accuracy_points_few: float
    forget_points: float
    forget_points_few: float
    membership_auc: float
    membership_auc_few: float
    membership_fpr: float
    membership_tpr: float
    membership_tpr_few: float
    agreement_ratio: float
    relearning_share: float
    relearning_epochs: float
    relearning_auc: float
    relearning_auc_few: float

    @classmethod
    def read(cls, path: Path | None = None) -> Gates:
        """Return the defaults, tightened by a file.

        Raises:
            UserError: A gate is unknown, or looser than its default.
        """
        defaults = build(cls, read_yaml(DEFAULTS))
        if path is None:
            return defaults
        gates = build(cls, {**dataclasses.asdict(defaults), **read_yaml(path)})
        for name, is_looser in _LOOSER.items():
            mine, default = getattr(gates, name), getattr(defaults, name)
            if is_looser(mine, default):
                raise UserError(
                    f"gates file {path}: {name}: {mine} is looser than the default {default}; gates may be tightened"
                )
        if not 0 < gates.level < 1 or gates.membership_fpr <= 0 or not 0 < gates.relearning_share < 1:
            raise UserError(f"gates file {path}: level, membership_fpr and relearning_share lie between 0 and 1")
        if gates.references < 0 or gates.references == 1:
            raise UserError(f"gates file {path}: references: 2 or more for the noise floor between them, or 0 for none")
        return gates


def _less(mine: float, default: float) -> bool:
    return mine < default


def _more(mine: float, default: float) -> bool:
    return mine > default


# Direction in which each gate is looser. references may be 0 (the verdict then notes that it has held-out data alone).
_LOOSER: Mapping[str, Callable[[float, float], bool]] = {
    "level": _less,
    "minimum_samples": _less,
    "accuracy_points": _more,
    "accuracy_points_few": _more,
    "forget_points": _more,
    "forget_points_few": _more,
    "membership_auc": _more,
    "membership_auc_few": _more,
    "membership_fpr": _more,
    "membership_tpr": _more,
    "membership_tpr_few": _more,
    "agreement_ratio": _more,
    "relearning_share": _less,
    "relearning_epochs": _less,
    "relearning_auc": _more,
    "relearning_auc_few": _more,
}


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """Predictions of one model.

    Attributes:
        predictions: Predictions for forget, retain and test set.
        relearned: Predictions for held_back (forget samples that the attacker did not train on) and test set after the
            relearning attack; empty if it was not run.
    """

    predictions: Mapping[str, Predictions]
    relearned: Mapping[str, Predictions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a verdict is based on.

    Attributes:
        repeated: The model's predictions for the forget set, computed a second time.
        changed: Share [0, 1] of the weights, outside the head, that differ from the original's; None for another
            architecture.
    """

    model: ModelOutputs
    original: ModelOutputs
    references: Sequence[ModelOutputs]
    repeated: Predictions
    changed: float | None


@dataclasses.dataclass(frozen=True)
class Gate:
    """One question and its answer.

    Attributes:
        value: The statistic; None if nothing could be measured.
        limit, reason: The limit, and why the status is what it is, as text.
        within: Lowest and highest value that pass, None for an open side; None if no such limit applies.
    """

    name: str
    question: str
    status: Status
    value: Interval | None
    limit: str
    reason: str
    within: tuple[float | None, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "value": None if self.value is None else self.value._asdict(),
            "within": None if self.within is None else list(self.within),
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """FAIL if a gate fails; else INSUFFICIENT EVIDENCE if one is undecided; else PASS."""

    gates: Sequence[Gate]
    references: int
    samples: Mapping[str, int]

    @property
    def status(self) -> Status:
        statuses = {gate.status for gate in self.gates}
        return next((status for status in (FAIL, INSUFFICIENT) if status in statuses), PASS)

    @property
    def decided_by(self) -> list[str]:
        """Names of the gates for which it is not a PASS."""
        return [] if self.status == PASS else [gate.name for gate in self.gates if gate.status == self.status]

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "decided_by": self.decided_by,
            "gates": [gate.to_dict() for gate in self.gates],
            "references": self.references,
            "samples": dict(self.samples),
            "does_not_prove": list(DOES_NOT_PROVE),
        }


def judge(evidence: Evidence, gates: Gates) -> Verdict:
    """Return the verdict on a model from outputs alone; it does not depend on how the model was made."""
    samples = {name: len(p) for name, p in evidence.model.predictions.items()}
    too_few = [name for name in ("forget", "test") if samples[name] < gates.minimum_samples]
    if too_few:
        found = [
            _undecided(
                "samples",
                "Are there enough samples to decide?",
                f"at least {gates.minimum_samples} forget and test samples",
                f"{' and '.join(f'{samples[name]} {name}' for name in too_few)} samples",
            ),
            _changed(evidence),
        ]
    else:
        found = [gate for group in _GROUPS for gate in group(evidence, gates)]
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


def _accuracy(evidence: Evidence, gates: Gates) -> list[Gate]:
    others = list(evidence.references) or [evidence.original]
    whom = f"the {len(others)} references'" if evidence.references else "the original's"
    found = []
    for name in ("test", "retain"):
        change = _accuracy_change(evidence.model, others, name, gates.level)
        most = _margin(change, gates.accuracy_points, gates.accuracy_points_few, gates.level)
        found.append(
            _decide(
                f"{name} accuracy",
                f"Is {name} accuracy kept?",
                change,
                low=-most,
                high=None,
                limit=f"at most {most:.1f} points below {whom}",
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
    change = _accuracy_change(subject, evidence.references, "forget", gates.level)
    most = _margin(change, gates.forget_points, gates.forget_points_few, gates.level)
    return [
        _decide(
            "forget accuracy",
            "Is accuracy on the forget samples that of a retrained model?",
            change,
            low=None if above_alone else -most,
            high=most,
            limit=f"within {most:.1f} points of the {len(evidence.references)} references'",
            shown=f"{change.value:+.1f} points",
        )
    ]


def _margin(found: Interval, large: float, few: float, level: float) -> float:
    """Return how far a difference may be from 0, see `_reach`; its standard error comes from its interval."""
    error = (found.high - found.low) / (2 * float(norm.ppf((1 + level) / 2)))
    return _reach(error, large, few, level)


def _reach(error: float, large: float, few: float, level: float) -> float:
    """Return the limit of a distance: `large`, or a larger limit that a model without any distance passes often enough.

    The larger limit is what the interval of such a model stays within in all but _MISSED of the cases: half of the
    interval, plus the variation by chance. It is never above `few`.
    """
    return min(max(large, (float(norm.ppf((1 + level) / 2)) + float(norm.ppf(1 - _MISSED))) * error), few)


def _accuracy_change(model: ModelOutputs, others: Sequence[ModelOutputs], name: str, level: float) -> Interval:
    """Return accuracy minus the mean of the others', in points; resampled by sample, for all models together."""
    mine = _correct(model.predictions[name])
    theirs = np.mean([_correct(other.predictions[name]) for other in others], axis=0)
    change = 100 * (mine - theirs)
    return percentiles(float(change.mean()), bootstrap_means(change[:, None])[:, 0], level)


def _correct(p: Predictions) -> np.ndarray:
    return (p.logits.argmax(1) == p.labels).astype(np.float64)


def _membership(evidence: Evidence, gates: Gates) -> list[Gate]:
    """Return the gates of the attack on the model, and whether such gates detect the original."""
    found = _attacks(evidence.model, evidence, gates)
    control = [
        *_forget_accuracy(evidence.original, evidence, gates, above_alone=True),
        *_attacks(evidence.original, evidence, gates),
    ]
    question = "Would the attacks detect anything at all?"
    limit = f"the untouched original fails {', '.join(gate.name for gate in control[:-1])} or {control[-1].name}"
    shown = "; ".join(f"{gate.name}: {gate.reason}" for gate in control)
    if any(gate.status == FAIL for gate in control):
        return [Gate("power", question, PASS, None, limit, shown), *found]
    reason = f"it does not fail them, so that a pass of the model proves nothing ({shown})"
    return [Gate("power", question, INSUFFICIENT, None, limit, reason), *found]


def _attacks(subject: ModelOutputs, evidence: Evidence, gates: Gates) -> list[Gate]:
    members, others = (_scores(subject, evidence.references, name) for name in ("forget", "test"))
    power = auc_interval(members, others, level=gates.level)
    margin = _auc_margin(gates.membership_auc, gates.membership_auc_few, members, others, gates.level)
    attack = "the attack calibrated by the references" if evidence.references else "the confidence attack"
    found = [
        _decide(
            "membership",
            "Can an attack find that the forget samples were trained on?",
            power,
            low=0.5 - margin,
            high=0.5 + margin,
            limit=f"AUC of {attack} within {margin:.3f} of 0.5",
            shown=f"AUC {power.value:.3f}",
        )
    ]
    name, question = "sure members", "Are there forget samples that an attack finds with near certainty?"
    percent = f"{100 * gates.membership_fpr:g}% false positives"
    if len(others) * gates.membership_fpr < 1:
        reason = f"{len(others)} test samples cannot show a false positive rate of {gates.membership_fpr:g}"
        return [*found, _undecided(name, question, f"few found at {percent}", reason)]
    rate = tpr_interval(members, others, gates.membership_fpr, level=gates.level)
    most = _tpr_limit(gates, len(members), len(others))
    limit, shown = f"at most {100 * most:.1f}% found at {percent}", f"share {rate.value:.3f}"
    return [*found, _decide(name, question, rate, low=None, high=most, limit=limit, shown=shown)]


def _auc_margin(large: float, few: float, members: np.ndarray, others: np.ndarray, level: float) -> float:
    """Return how far an AUC may be from 0.5, see `_reach`."""
    m, n = len(members), len(others)
    error = ((m + n + 1) / (12 * m * n)) ** 0.5  # of AUC if both have one distribution (Mann and Whitney 1947)
    return _reach(error, large, few, level)


@functools.lru_cache  # the same for every model of a verifier, and its original
def _tpr_limit(gates: Gates, members: int, others: int) -> float:
    """Return the limit of true positives, by simulation, since it depends on the two counts alone."""
    rng = np.random.default_rng(0)
    highs = [
        tpr_interval(rng.random(members), rng.random(others), gates.membership_fpr, level=gates.level, draws=200).high
        for _ in range(_SIMULATED)
    ]
    return min(max(gates.membership_tpr, float(np.quantile(highs, 1 - _MISSED))), gates.membership_tpr_few)


def attack_power(
    subject: ModelOutputs, references: Sequence[ModelOutputs], sets: tuple[str, str], level: float
) -> Interval:
    """Return the AUC of the calibrated attack on a model, the first of two sets against the second; see the top."""
    members, others = (_scores(subject, references, name) for name in sets)
    return auc_interval(members, others, level=level)


def _scores(subject: ModelOutputs, references: Sequence[ModelOutputs], name: str) -> np.ndarray:
    """Return the score [n] of each sample: higher = predicted better than by models not trained on it."""
    return _calibrated(subject.predictions[name], [each.predictions[name] for each in references])


def _calibrated(mine: Predictions, others: Sequence[Predictions]) -> np.ndarray:
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
            _undecided(name, question, limit, f"{len(references)} retrained references, {gates.references} required")
        ]
    mine = np.mean([_kl(each, evidence.model.predictions["forget"]) for each in references], axis=0)
    floor = np.mean([_kl(a, b) for a, b in itertools.combinations(references, 2)], axis=0)
    drawn = bootstrap_means(np.stack([mine, floor], 1))
    ratio = percentiles(
        mine.mean() / max(floor.mean(), _TINY), drawn[:, 0] / np.maximum(drawn[:, 1], _TINY), gates.level
    )
    shown = f"{ratio.value:.2f} times ({mine.mean():.3f} against {floor.mean():.3f} nats)"
    found = [_decide(name, question, ratio, low=None, high=gates.agreement_ratio, limit=limit, shown=shown)]
    if len(references) < gates.references:
        reason = f"{len(references)} retrained references, {gates.references} required"
        found.append(_undecided("references", "Are there enough retrained references?", f"{gates.references}", reason))
    return found


def _kl(reference: Predictions, model: Predictions) -> np.ndarray:
    """Return KL(reference || model) [n] in nats, symmetrised by the mean of both directions."""
    p, q = reference.log_probabilities, model.log_probabilities
    return 0.5 * (kl(p, q) + kl(q, p))


def _relearning(evidence: Evidence, gates: Gates) -> list[Gate]:
    name, question = "relearning", "Does training on some forget samples restore the others?"
    limit = "AUC of the attack on the others after it not above 0.5"
    if not evidence.model.relearned:
        return [_undecided(name, question, limit, "the relearning attack was not run")]
    references = [each.relearned for each in evidence.references]
    members, others = (
        _calibrated(evidence.model.relearned[each], [reference[each] for reference in references])
        for each in ("held_back", "test")
    )
    if len(members) < gates.minimum_samples // 2:
        return [_undecided(name, question, limit, f"{len(members)} forget samples held back")]
    power = auc_interval(members, others, level=gates.level)
    margin = _auc_margin(gates.relearning_auc, gates.relearning_auc_few, members, others, gates.level)
    limit, shown = f"AUC of the attack on the others after it at most {0.5 + margin:.3f}", f"AUC {power.value:.3f}"
    return [_decide(name, question, power, low=None, high=0.5 + margin, limit=limit, shown=shown)]


_GROUPS: Sequence[Callable[[Evidence, Gates], list[Gate]]] = (_weights, _accuracy, _membership, _agreement, _relearning)


# --- statuses ---------------------------------------------------------------------------------------------------------


def _decide(
    name: str, question: str, found: Interval, *, low: float | None, high: float | None, limit: str, shown: str
) -> Gate:
    """Return PASS if the whole interval is within [low, high], FAIL if all of it is outside, else undecided."""
    above = -np.inf if low is None else low
    below = np.inf if high is None else high
    if above <= found.low and found.high <= below:
        status: Status = PASS
    elif found.high < above or found.low > below:
        status = FAIL
    else:
        status = INSUFFICIENT
    doubt = "; more samples would decide it" if status == INSUFFICIENT else ""
    return Gate(name, question, status, found, limit, f"{shown}, {_interval_text(found)}{doubt}", (low, high))


def _interval_text(found: Interval) -> str:
    return f"interval {found.low:.3g} to {found.high:.3g}"


def _undecided(name: str, question: str, limit: str, reason: str) -> Gate:
    return Gate(name, question, INSUFFICIENT, None, limit, reason)
