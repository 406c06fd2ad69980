"""The proof of a verdict for readers: the verdict in plain language, and its evidence in tables and plots.

A proof is one JSON-ready dict, any part of which may be missing:

    verdict         `engine.evaluate.verdict.Verdict.to_dict`; a gate may have `within`: [lowest, highest] value that
                    passes, null for an open side; the gate's bar is drawn against it
    gates           the limits in force, by name
    attacks         by model, original and reference: as `engine.evaluate.membership.attacks` or `mean_attacks` return
    agreement       `engine.evaluate.agreement.agreement_report`
    representation  `engine.evaluate.representation.compare_features`
    relearning      `engine.evaluate.relearning_report`
    attention       `engine.evaluate.attention.attention_report`
    seconds         by part, the wall-clock time of its measurement
    unmeasured      by part, the reason why it is missing

In representation, relearning and attention, `model` is the examined model, `original` the untouched one, and every
other name a retrained one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluate.gates import WORTH, Proof
from engine.report.page import count, duration, flat, render_template, unreadable, usable, write_page
from engine.report.proof.answers import agreement_section, attacks_section, sections
from engine.report.proof.glossary import sentence
from engine.report.proof.tables import Used

_GENERAL = ("forget samples", "retrained", "interval")
_PARTS = {
    "attacks": "Membership attacks",
    "agreement": "Agreement",
    "relearning": "Relearning",
    "representation": "Features",
    "attention": "Attention",
}

# By status: (css class, title, meaning).
_STATUSES = {
    "PASS": (
        "pass",
        "No sign was found that this model still holds the samples",
        "Every question below could be answered, and every figure is within its limit, with its interval. As far as "
        "these questions go, the model behaves like one that was never trained on the samples to be forgotten.",
    ),
    "FAIL": (
        "fail",
        "This model does not behave like one that was never trained on the samples",
        "At least one figure below is outside its limit, with all of its interval. The model "
        "should not be taken for one that has forgotten the samples.",
    ),
    "INSUFFICIENT EVIDENCE": (
        "undecided",
        "It is not known whether this model has forgotten the samples",
        "No figure below is clearly outside its limit, but at least one is not clearly within it, or could not be "
        "measured. That is not a pass: more samples or more retrained models are needed to decide.",
    ),
}
_PROOFS = {
    "references": "models retrained without these samples",
    "pool": "a pool of reference models",
    "certificate": "a certificate of the procedure",
    "none": "none, no retrained model was given",
}
_WORDS = {"pass": "Pass", "fail": "Fail", "undecided": "Undecided"}


@dataclasses.dataclass(frozen=True)
class Bar:
    """A found interval against its limits, as shares [0, 100] of the bar's width.

    Attributes:
        limit_low, limit_high: The limits; 0 and 100 for an open side.
        low, high, value: The interval and the value in it.
        alt: The same in words.
    """

    limit_low: float
    limit_high: float
    low: float
    high: float
    value: float
    alt: str


def write_proof(path: Path, proof: Mapping[str, Any], *, title: str, facts: Mapping[str, Any]) -> Path:
    """Write a page of its own, for `lethe verify --html`, and return its path.

    The file is replaced only by a complete page.

    Args:
        path: The file.
        proof: The proof.
        title: Title of the page.
        facts: What was examined, by (dotted) name.
    """
    text = render_template("proof_page.html", title=title, facts=flat(facts), proof=proof_view(proof))
    return write_page(path, text)


def proof_view(proof: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that proof.html shows."""
    used = Used()
    verdict = _verdict(proof["verdict"], used) if proof.get("verdict") else None
    shown = sections(proof, used)
    for key in _GENERAL:
        used.measure(key)
    unmeasured = [f"{_part(name)}: {sentence(str(reason))}" for name, reason in (proof.get("unmeasured") or {}).items()]
    seconds = [
        f"{_part(name).lower()} {duration(value)}"
        for name, value in (proof.get("seconds") or {}).items()
        if usable(value)
    ]
    return {
        "verdict": verdict,
        "limits": flat(proof.get("gates") or {}),
        "sections": shown,
        "unmeasured": unmeasured,
        "seconds": seconds,
        "definitions": used.defined(),
    }


def tables_view(parts: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the sections of attacks and agreement, as far as they exist, without plots.

    Args:
        parts: The parts of a proof.
        model: Name of the examined model on the page.
    """
    used = Used()
    builders = {"attacks": attacks_section, "agreement": agreement_section}
    found = [build(parts[name], used, model=model, plots=False) for name, build in builders.items() if parts.get(name)]
    return {"sections": found, "definitions": used.defined()}


def _part(name: str) -> str:
    return _PARTS.get(name, name.replace("_", " "))


# --- the verdict ------------------------------------------------------------------------------------------------------


def _verdict(verdict: Mapping[str, Any], used: Used) -> dict[str, Any]:
    kind, title, meaning = _STATUSES.get(
        str(verdict.get("status")),
        ("undecided", "The verdict has no known status", "It is not to be taken for a pass."),
    )
    gates = [_gate(gate, used) for gate in verdict.get("gates", [])]
    decided_by = list(verdict.get("decided_by", []))
    missing = int(verdict.get("samples", {}).get("forget_unreadable", 0))
    return {
        "status": str(verdict.get("status")),
        "kind": kind,
        "title": title,
        "meaning": meaning,
        "basis": _basis(verdict, gates),
        "decided": [gate for gate in gates if gate["name"] in decided_by],
        "gates": gates,
        **_kind_of_proof(verdict),
        "unreadable": unreadable(missing, "the verdict") if missing else "",
        "does_not_prove": [str(line) for line in verdict.get("does_not_prove", [])],
    }


def _kind_of_proof(verdict: Mapping[str, Any]) -> dict[str, Any]:
    kind = verdict.get("kind") or ("references" if verdict.get("references") else "none")
    facts = verdict.get("proof")
    cost = f"It took {Proof(**facts).cost()}." if facts else ""
    return {"proof": kind, "proof_title": _PROOFS[kind], "worth": WORTH[kind], "cost": cost}


def _basis(verdict: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> str:
    samples = verdict.get("samples", {})
    references = int(verdict.get("references", 0))
    sizes = " and ".join(count(int(samples[name]), f"{name} sample") for name in ("forget", "test") if name in samples)
    if verdict.get("kind") == "pool":
        models = f"for each sample with {count(references, 'model')} of the pool"
    else:
        models = f"with {count(references, 'model')} retrained without the forget samples"
    paired = f", compared {models}" if references else ""
    basis = f"It is based on {sizes}{paired}. " if sizes else ""
    kinds = [gate["kind"] for gate in gates]
    counted = ", ".join(
        f"{kinds.count(kind)} {word}"
        for kind, word in (("pass", "passed"), ("fail", "failed"), ("undecided", "undecided"))
    )
    return f"{basis}Of {count(len(gates), 'question')}: {counted}."


def _gate(gate: Mapping[str, Any], used: Used) -> dict[str, Any]:
    status = str(gate.get("status"))
    kind = _STATUSES.get(status, ("undecided",))[0]
    value = gate.get("value") or {}
    return {
        "name": str(gate.get("name")),
        "measure": used.measure(str(gate.get("name"))),
        "question": str(gate.get("question", "")),
        "limit": str(gate.get("limit", "")),
        "reason": str(gate.get("reason", "")),
        "status": status,
        "kind": kind,
        "word": _WORDS[kind],
        "bar": _bar(value, gate.get("within")),
    }


def short(value: float) -> str:
    """Format a number as in the gates' reasons."""
    return f"{value:.3g}"


def _bar(value: Mapping[str, Any], within: Sequence[float | None] | None) -> Bar | None:
    """Return the bar of a gate; None if nothing was found, or if there is no limit to draw it against."""
    ends = [value.get(key) for key in ("low", "value", "high")]
    if not all(usable(end) for end in ends) or not within or not any(usable(end) for end in within):
        return None
    low, middle, high = (float(end) for end in ends if end is not None)
    limits = [float(end) for end in within if end is not None and usable(end)]
    first, last = min(low, *limits), max(high, *limits)
    room = 0.12 * (last - first) or 1.0  # margin beyond the outermost mark on either side
    first, last = first - room, last + room

    def place(number: float) -> float:
        return round(100 * (number - first) / (last - first), 2)

    least, most = within
    words = [f"found {short(middle)}, interval {short(low)} to {short(high)}"]
    words += [f"at {side} {short(end)} passes" for side, end in (("least", least), ("most", most)) if end is not None]
    return Bar(
        limit_low=place(float(least)) if least is not None else 0.0,
        limit_high=place(float(most)) if most is not None else 100.0,
        low=place(low),
        high=place(high),
        value=place(middle),
        alt="; ".join(words),
    )
