"""Sections of a page on the answers of the models: membership attacks and agreement. See also `internals`.

The sentences are made from the numbers; if a number is missing, its sentence is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.report.page import percent
from engine.report.plots import Picture
from engine.report.proof.glossary import rate_of, term
from engine.report.proof.internals import attention_section, relearning_section, representation_section
from engine.report.proof.plots import MODEL, ORIGINAL, RETRAINED, Number, Series, dot_plot
from engine.report.proof.tables import (
    SETS,
    Figures,
    Group,
    Row,
    Section,
    Table,
    Used,
    cell,
    formatted,
    heading,
    plain,
    value_of,
)

# Models of attacks and agreement in the order of the columns, and the part of the agreement that belongs to each.
_COLUMNS = {"original": "original", "model": "model", "reference": "noise_floor"}
_STYLES = {"original": ORIGINAL, "model": MODEL, "reference": RETRAINED}
_SHARES = ("top1",)


def sections(proof: Mapping[str, Any], used: Used) -> list[Section]:
    builders: dict[str, Callable[[Any, Used], Section]] = {
        "attacks": attacks_section,
        "agreement": agreement_section,
        "relearning": relearning_section,
        "representation": representation_section,
        "attention": attention_section,
    }
    return [build(proof[part], used) for part, build in builders.items() if proof.get(part)]


# --- membership attacks -----------------------------------------------------------------------------------------------


def attacks_section(
    attacks: Mapping[str, Any], used: Used, *, model: str = "This model", plots: bool = True
) -> Section:
    """Return the section on membership attacks.

    Args:
        attacks: Results by model: "model", "original" and "reference"; any of them may be missing.
        used: Collects the measures that are shown.
        model: Name of the first on the page.
        plots: Whether the section has plots.
    """
    names = {"original": "Original", "model": model, "reference": "Retrained"}
    by_model = {name: attacks.get(name) or {} for name in _COLUMNS}
    there = list(dict.fromkeys(attack for each in by_model.values() for attack in each))
    keys = dict.fromkeys(key for each in by_model.values() for numbers in each.values() for key in numbers)
    groups, pictures = [], []
    for key in keys:
        numbers = {attack: [by_model[name].get(attack, {}).get(key) for name in _COLUMNS] for attack in there}
        measured = {attack: row for attack, row in numbers.items() if any(row)}
        measure = used.measure(key, _direction(each for row in measured.values() for each in row))
        rate = rate_of(key)
        text = percent if rate is not None else plain
        rows = [Row(used.measure(attack), [cell(each, text) for each in row]) for attack, row in measured.items()]
        if not any(value_of(each) is not None for row in measured.values() for each in row):
            reasons = dict.fromkeys(str(each.get("reason", "")) for row in measured.values() for each in row if each)
            measure, rows = dataclasses.replace(measure, hint=f"not measured: {'; '.join(reasons)}"), []
        groups.append(Group(measure, rows))
        if plots:
            columns = zip(*measured.values(), strict=True)
            pictures += dot_plot(
                measure.name,
                "forget samples found (%)" if rate is not None else measure.name,
                [term(attack).name for attack in measured],
                _series(names, dict(zip(_COLUMNS, columns, strict=True))),
                line=0.5 if rate is None else rate,
                shares=rate is not None,
            )
    return Section(
        title="Membership attacks",
        intro="Each attack tries to distinguish, by a model's outputs alone, forget samples from test images that no "
        "model was trained on. If this model is at the dotted line, or no further off it than the retrained models, "
        "the attack finds no trace of the samples.",
        found=_strongest(by_model),
        figures=[Figures("", pictures)],
        tables=[Table(list(names.values()), groups)],
    )


def _strongest(by_model: Mapping[str, Any]) -> list[str]:
    powers = {attack: value_of(numbers.get("auc")) for attack, numbers in by_model["model"].items()}
    known = {attack: value for attack, value in powers.items() if value is not None}
    if not known:
        return []
    attack = max(known, key=lambda name: abs(known[name] - 0.5))
    others = [
        f"{formatted(number, plain)} on {whom}"
        for name, whom in (("original", "the original"), ("reference", "retrained models"))
        if value_of(number := by_model[name].get(attack, {}).get("auc")) is not None
    ]
    return [
        f"The strongest attack on this model is “{term(attack).name}”: its AUC is "
        f"{formatted(by_model['model'][attack]['auc'], plain)}{', against ' if others else ''}{' and '.join(others)}. "
        "Chance is 0.5."
    ]


def _series(names: Mapping[str, str], numbers: Mapping[str, Sequence[Number | None]]) -> list[Series]:
    return [Series(names[name].lower(), _STYLES[name], numbers[name]) for name in _COLUMNS]


def _direction(numbers: Any) -> str | None:
    return next((each["direction"] for each in numbers if each and "direction" in each), None)


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement_section(
    agreement: Mapping[str, Any], used: Used, *, model: str = "This model", plots: bool = True
) -> Section:
    """Return the section on agreement; arguments as of `attacks_section`."""
    by_model = {name: agreement.get(key) or {} for name, key in _COLUMNS.items()}
    names = {"original": "Original", "model": model, "reference": "Noise floor"}

    def row(key: str, numbers: Sequence[Number | None]) -> Row:
        text = percent if key in _SHARES else plain
        cells = [cell(each, text) for each in numbers]
        return Row(used.measure(key, _direction(numbers)), cells)

    groups = []
    for part, title in SETS.items():
        parts = [each.get(part, {}) for each in by_model.values()]
        keys = dict.fromkeys(key for each in parts for key in each)
        groups.append(Group(heading(title), [row(key, [each.get(key) for each in parts]) for key in keys]))
    keys = dict.fromkeys(key for each in by_model.values() for key in each if key not in SETS)
    whole = [row(key, [each.get(key) for each in by_model.values()]) for key in keys]
    if agreement.get("rf_jsd"):
        whole.append(row("rf_jsd", [agreement["rf_jsd"].get(name) for name in _COLUMNS]))
    groups.append(Group(heading("All samples together"), whole))
    pictures: list[Picture] = []
    for key, axis in (
        ("top1", "same class as a retrained model (%)"),
        ("kl_from_reference", "KL from a retrained model (nats)"),
        ("margin_gap", "gap to a retrained model's log-odds"),
    ):
        if not plots:
            break
        numbers = {name: [each.get(part, {}).get(key) for part in SETS] for name, each in by_model.items()}
        pictures += dot_plot(term(key).name, axis, list(SETS.values()), _series(names, numbers), shares=key in _SHARES)
    return Section(
        title="Agreement with retraining, sample by sample",
        intro="Averages can be equal while single predictions differ. Here every output of this model is compared with "
        "that of a retrained model for the same sample. Two retrained models do not always agree either; how far they "
        "differ is the noise floor, and the target."
        if by_model["model"]
        else "No retrained model was given to compare the outputs with. One measure needs none.",
        found=_same_class(by_model),
        figures=[Figures("", pictures)],
        tables=[Table(list(names.values()), [group for group in groups if group.rows])],
        note="RF-JSD compares with the original's outputs for test images; in the last column it is that of the "
        "retrained models."
        if agreement.get("rf_jsd")
        else "",
    )


def _same_class(by_model: Mapping[str, Any]) -> list[str]:
    mine, before, floor = (by_model[name].get("forget", {}).get("top1") for name in ("model", "original", "reference"))
    if value_of(mine) is None:
        return []
    text = (
        f"This model predicts the same class as a retrained model for {formatted(mine, percent)} of the forget samples"
    )
    if value_of(before) is not None:
        text += f"; the original did for {formatted(before, percent)}"
    if value_of(floor) is not None:
        text += f"; two retrained models do for {formatted(floor, percent)}"
    return [f"{text}."]
