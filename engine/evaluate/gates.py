"""A gate of the verdict: its limits (gates.yaml), how it decides, and the verdict that gates add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.config import build, read_yaml
from engine.errors import UserError
from engine.evaluate.intervals import Interval

Status = Literal["PASS", "FAIL", "INSUFFICIENT EVIDENCE"]
PASS: Status = "PASS"
FAIL: Status = "FAIL"
INSUFFICIENT: Status = "INSUFFICIENT EVIDENCE"

DEFAULTS = Path(__file__).with_name("gates.yaml")

DOES_NOT_PROVE = (
    "that no attack can find the samples: it was these attacks, at this strength, on this many samples",
    "anything of a single sample: the figures are of the forget set as a whole",
    "anything of the original, of earlier checkpoints, of backups or of models derived from them",
    "that the references were trained as their records state: they are checked only for signs of the contrary",
)

# What each kind of proof is worth, and what the next one costs.
WORTH = {
    "references": "Models that were retrained without exactly these samples are the comparison. Nothing is stronger "
    "here. It costs two retrains or more for every request.",
    "pool": "Each sample is compared with models of a pool that were never trained on it. They know less than a "
    "retrained model, so what is expected is read from test samples, and there is no relearning attack. It costs no "
    "retrain; own references (lethe train --forget FILE --references 4) cost four.",
    "certificate": "The procedure was shown to forget in simulated requests of this size and kind on this model, and "
    "this run resembles them. It says that such requests, many taken together, were forgotten, not that this one was: "
    "that, one small request cannot show. It costs no retrain; a verdict by the pool needs 100 forgotten samples "
    "(lethe request judge), and own references cost four retrains.",
    "none": "The samples are compared with held-out data alone: no model shows what a retrain without them would have "
    "answered. A pool (lethe pool train) costs some retrains, once for all requests; own references cost two or more "
    "for this one.",
}


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
    joint_signs: float
    joint_share: float

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
    "joint_signs": _more,
    "joint_share": _more,
}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """How a verdict was reached, and what it cost.

    Attributes:
        kind: references (models retrained without the samples), pool, certificate, or none (held-out data alone).
        source: Folder of the pool, or file of the certificate.
        images: Forward passes of images through models.
        retrain: Forward passes that a retrain equals: a training step counts as three.
        seconds: Wall-clock time.
    """

    kind: Literal["references", "pool", "certificate", "none"]
    source: str = ""
    images: int = 0
    retrain: float = 0.0
    seconds: float = 0.0

    def cost(self) -> str:
        share = f", {100 * self.images / self.retrain:.2g}% of a retrain" if self.retrain else ""
        return f"{self.images:,} images through models{share}"

    def line(self) -> str:
        return f"proof: {self.kind} {self.source}; {self.cost()}, {self.seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """FAIL if a gate fails; else INSUFFICIENT EVIDENCE if one is undecided; else PASS.

    Attributes:
        proof: How it was reached; None: by the references, or by held-out data if there are none.
    """

    gates: Sequence[Gate]
    references: int
    samples: Mapping[str, int]
    proof: Proof | None = None

    @property
    def kind(self) -> Literal["references", "pool", "certificate", "none"]:
        """Kind of the proof."""
        if self.proof is not None:
            return self.proof.kind
        return "references" if self.references else "none"

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
            "kind": self.kind,
            **({} if self.proof is None else {"proof": dataclasses.asdict(self.proof)}),
            "worth": WORTH[self.kind],
            "does_not_prove": list(DOES_NOT_PROVE),
        }


# Ends the reason of a gate that is undecided.
MORE = "more samples or references would decide it"


def decide(
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
    doubt = f"; {MORE}" if status == INSUFFICIENT else ""
    return Gate(name, question, status, found, limit, f"{shown}, {_interval_text(found)}{doubt}", (low, high))


def _interval_text(found: Interval) -> str:
    return f"interval {found.low:.3g} to {found.high:.3g}"


def undecided(name: str, question: str, limit: str, reason: str) -> Gate:
    return Gate(name, question, INSUFFICIENT, None, limit, reason)
