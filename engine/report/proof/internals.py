"""Sections of a page on the internals of the models: relearning, representation, attention. See also `answers`.

Of the models that these parts name, `model` is the examined one and `original` the untouched one. All others were
retrained without the forget samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.evaluate.intervals import proportion
from engine.report.page import MISSING, percent, usable
from engine.report.plots import Picture
from engine.report.proof.plots import (
    MODEL,
    MODEL_TO_ORIGINAL,
    MODEL_TO_RETRAINED,
    ORIGINAL,
    ORIGINAL_TO_RETRAINED,
    RETRAINED,
    Number,
    Series,
    band_plot,
    dot_plot,
)
from engine.report.proof.tables import (
    SETS,
    Cell,
    Figures,
    Group,
    Row,
    Section,
    Table,
    Used,
    by_place,
    cell,
    formatted,
    heading,
    mean_of,
    plain,
    range_of,
    references_of,
    retrained_column,
    retrained_range,
    signed_points,
    three_cells,
    upwards,
    value_of,
)

# --- relearning -------------------------------------------------------------------------------------------------------

_ATTACKS = {"forget_share": "trained on some of the forget samples", "unrelated": "trained on unrelated samples"}


def relearning_section(relearning: Mapping[str, Any], used: Used) -> Section:
    models, about = relearning["models"], relearning["attack"]
    direction = relearning.get("direction") or {}
    references = references_of(models)
    figures, groups, found = [], [], []
    for attack in about["samples"]:
        curves = {name: models.get(name, {}).get(attack) or {} for name in ("original", "model", *references)}
        sizes = about["samples"][attack]
        title = _ATTACKS.get(attack, attack.replace("_", " "))
        pictures: list[Picture] = []
        for key, shown in (("held_back", "Held-back samples"), ("test", "Test images of the same classes")):
            by_name = {name: _accuracies(curve, key, sizes) for name, curve in curves.items()}
            pictures += _by_step(shown, "accuracy (%)", about["steps"], by_name)
        excess = {name: curve.get("excess") or [] for name, curve in curves.items()}
        pictures += _by_step("Excess", "held-back less test (points)", about["steps"], excess, line=0.0)
        powers = {name: curve.get("auc") or [] for name, curve in curves.items()}
        pictures += _by_step("Attack on the losses", "AUC", about["steps"], powers, line=0.5, shares=False)
        figures.append(Figures(upwards(title), pictures))
        groups.append(Group(heading(upwards(title)), _relearning_rows(curves, sizes, direction, used)))
        found += _comes_back(curves["model"], title)
    probes = {name: (each.get("probe") or {}).get("excess") for name, each in models.items()}
    if any(probes.values()):
        row = Row(used.measure("probe", direction.get("probe")), three_cells(probes, references, signed_points))
        groups.append(Group(heading("A new head on frozen features"), [row]))
    return Section(
        title="Relearning attack",
        intro="A copy of the model is trained, and the accuracy on forget samples that it is not trained on is "
        f"measured. It is trained on {percent(about.get('share'))} of the forget samples and tested on the others, "
        "which are held back; in some runs also on unrelated samples and tested on all forget samples. For a model "
        "that was never trained on the held-back samples they are like test images, whatever the copy is trained on. "
        "So the measure is the excess, accuracy on held-back samples less accuracy on test images, compared with "
        "that of retrained models under the same attack.",
        found=found,
        figures=figures,
        tables=[Table(["Original", "This model", retrained_column(references)], groups)],
    )


def _accuracies(curve: Mapping[str, Any], key: str, sizes: Mapping[str, int]) -> list[Number | None]:
    """Return the accuracy by step, with its interval over the number of samples."""
    values, size = curve.get("accuracy", {}).get(key, []), sizes.get(key, 0)
    return [proportion(min(v, 1.0) * size, size).to_dict() if size and usable(v) else {"value": v} for v in values]


def _by_step(
    title: str,
    axis: str,
    steps: Sequence[int],
    by_name: Mapping[str, list[Number | None]],
    *,
    line: float | None = None,
    shares: bool = True,
) -> list[Picture]:
    references = references_of(by_name)
    series = [
        Series(retrained_range(references), RETRAINED, by_place((by_name[name] for name in references), range_of)),
        Series("original", ORIGINAL, by_name["original"]),
        Series("this model", MODEL, by_name["model"]),
    ]
    return band_plot(title, "steps of the attack", axis, list(map(str, steps)), series, line=line, shares=shares)


def _relearning_rows(
    curves: Mapping[str, Any], sizes: Mapping[str, int], direction: Mapping[str, str], used: Used
) -> list[Row]:
    references = references_of(curves)

    def row(key: str, numbers: Mapping[str, Number | None], text: Callable[[Any], str]) -> Row:
        direct = direction.get(key.removeprefix("relearned_"))
        return Row(used.measure(key, direct), three_cells(numbers, references, text))

    rows = []
    for key, part, place in (
        ("held_back_before", "held_back", 0),
        ("held_back", "held_back", -1),
        ("test_before", "test", 0),
        ("test_after", "test", -1),
    ):
        at = {name: (_accuracies(curve, part, sizes) or [None])[place] for name, curve in curves.items()}
        rows.append(row(key, at, percent))
    last = {name: (curve.get("excess") or [None])[-1] for name, curve in curves.items()}
    rows.append(row("excess", last, signed_points))
    power = {name: (curve.get("auc") or [None])[-1] for name, curve in curves.items()}
    if any(power.values()):
        rows.append(row("relearned_auc", power, plain))
    rows.append(row("advantage", {name: curve.get("advantage") for name, curve in curves.items()}, signed_points))
    steps = [
        _steps(curves["original"]),
        _steps(curves["model"]),
        ", ".join(_steps(curves[name]) for name in references),
    ]
    measure = used.measure("steps_to_original", direction.get("steps_to_original"))
    return [*rows, Row(measure, [Cell(text or MISSING) for text in steps])]


def _steps(curve: Mapping[str, Any]) -> str:
    if "steps_to_original" not in curve:
        return MISSING
    return "never" if curve["steps_to_original"] is None else str(curve["steps_to_original"])


def _comes_back(curve: Mapping[str, Any], title: str) -> list[str]:
    advantage = curve.get("advantage")
    if not advantage or value_of(advantage) is None:
        return []
    if advantage["low"] > 0:
        reading = "above 0: what was to be forgotten was hidden, or was never removed"
    elif advantage["high"] <= 0:
        reading = "not above 0"
    else:
        reading = "not distinguishable from 0"
    return [
        f"{upwards(title)}, this model's advantage over retrained ones is "
        f"{formatted(advantage, signed_points)} points, {reading}."
    ]


# --- representation ---------------------------------------------------------------------------------------------------


def representation_section(part: Mapping[str, Any], used: Used) -> Section:
    models, layers = part["models"], part["layers"]
    direction = part.get("direction") or {}
    references = references_of(models)
    sets = [name for name in SETS if any(name in each.get("sets", {}) for each in models.values())]
    for key in ("cka", "share_of_way"):  # shown in plots alone
        used.measure(key, direction.get(key))
    return Section(
        title="Features of the layers",
        intro="A model can have the outputs of a retrained one while its features still hold the samples, where a "
        "new head would find them. Here the features are compared layer by layer: with the original's, which hold "
        "them, and with those of retrained models, which do not. Layers: in = the patch embedding, then the blocks, "
        "out = the input of the head.",
        found=_kept_features(models.get("model")),
        figures=[
            Figures("Similarity of the features", _cka_plots(models, layers, sets)),
            Figures("Distance from the original", _travelled_plots(models, layers, sets, int(part.get("k", 5)))),
        ],
        tables=[
            Table(
                ["Original", "This model", retrained_column(references)],
                _representation_groups(models, sets, direction, used),
            )
        ],
    )


def _to(models: Mapping[str, Any], first: str, second: str, part: str) -> Mapping[str, Any]:
    """Return the comparison of two models on a set of samples; empty if there is none."""
    found: Mapping[str, Any] = models.get(first, {}).get("sets", {}).get(part, {}).get("to", {}).get(second, {})
    return found


def _cka_plots(models: Mapping[str, Any], layers: Sequence[str], sets: Sequence[str]) -> list[Picture]:
    references = references_of(models)
    pairs = {
        "retrained and retrained": (RETRAINED, [(a, b) for a in references for b in references if a != b]),
        "original and retrained": (ORIGINAL_TO_RETRAINED, [("original", name) for name in references]),
        "this model and original": (MODEL_TO_ORIGINAL, [("model", "original")]),
        "this model and retrained": (MODEL_TO_RETRAINED, [("model", name) for name in references]),
    }
    pictures: list[Picture] = []
    for part in sets:
        series = [
            Series(name, style, by_place((_to(models, *pair, part).get("cka") or [] for pair in between), mean_of))
            for name, (style, between) in pairs.items()
        ]
        ticks = [_layer(name) for name in layers]
        pictures += band_plot(f"CKA, {SETS[part].lower()}", "layer", "similarity", ticks, series)
    return pictures


def _travelled_plots(models: Mapping[str, Any], layers: Sequence[str], sets: Sequence[str], k: int) -> list[Picture]:
    references = references_of(models)
    retrained = retrained_range(references)

    def lines(by_name: Mapping[str, list[Number | None]]) -> list[Series]:
        band = by_place((by_name[name] for name in references), range_of)
        return [Series(retrained, RETRAINED, band), Series("this model", MODEL, by_name.get("model", []))]

    ways = {name: each.get("sets", {}).get("forget", {}).get("share_of_way") for name, each in models.items()}
    pictures = band_plot(
        "Share of the way, forget samples",
        "layer",
        "0 = original, 1 = retrained",
        [_layer(name) for name in layers],
        lines({name: [{"value": value} for value in each or []] for name, each in ways.items()}),
        line=0.5,
    )
    parts = list(dict.fromkeys(key for each in models.values() for key in each.get("distance", {}) if key != "all"))
    pictures += band_plot(
        "Distance from the original's weights",
        "layer",
        "relative distance",
        [_layer(name) for name in parts],
        lines({n: [{"value": each.get("distance", {}).get(key)} for key in parts] for n, each in models.items()}),
    )
    near = {name: [_knn(each, part) for part in sets] for name, each in models.items()}
    unknown: list[Number | None] = [None] * len(sets)
    return pictures + dot_plot(
        f"{k}-NN accuracy",
        "accuracy (%)",
        [SETS[part] for part in sets],
        [
            Series("original", ORIGINAL, near.get("original", unknown)),
            Series("this model", MODEL, near.get("model", unknown)),
            Series(retrained, RETRAINED, by_place((near[name] for name in references), range_of) or unknown),
        ],
        shares=True,
    )


def _layer(name: str) -> str:
    short = {"patch embedding": "in", "features": "out", "other": "rest"}.get(name, name)
    return short.replace("stage ", "").replace(" block ", ".").removeprefix("block ")


def _knn(model: Mapping[str, Any], part: str) -> Number | None:
    found: Number | None = model.get("sets", {}).get(part, {}).get("knn_accuracy")
    return found


def _representation_groups(
    models: Mapping[str, Any], sets: Sequence[str], direction: Mapping[str, str], used: Used
) -> list[Group]:
    references = references_of(models)

    def row(key: str, of: str, numbers: Mapping[str, Number | None], text: Callable[[Any], str]) -> Row:
        return Row(used.measure(key, direction.get(of)), three_cells(numbers, references, text))

    changed: dict[str, Number | None] = {name: {"value": each.get("changed")} for name, each in models.items()}
    moved: dict[str, Number | None] = {
        name: {"value": each.get("distance", {}).get("all")} for name, each in models.items()
    }
    weights = [row("weights_changed", "changed", changed, percent), row("distance", "distance", moved, plain)]
    groups = [Group(heading("Weights"), weights)]
    for part in sets:
        near = {name: _knn(each, part) for name, each in models.items()}
        to_original = {name: _to(models, name, "original", part).get("neighbours") for name in models}
        to_retrained = {
            name: mean_of(_to(models, name, other, part).get("neighbours") for other in references) for name in models
        }
        rows = [
            row("knn_accuracy", "knn_accuracy", near, percent),
            row("neighbours_original", "neighbours", to_original, percent),
            row("neighbours_retrained", "neighbours", to_retrained, percent),
        ]
        groups.append(Group(heading(SETS[part]), rows))
    return groups


def _kept_features(model: Mapping[str, Any] | None) -> list[str]:
    if not model:
        return []
    if model.get("identical"):
        return ["Every weight of this model is the original's: nothing was changed."]
    if model.get("untouched_backbone"):
        return ["Only the head of this model was changed: its features are still the original's."]
    found = [f"Outside the head, {percent(model.get('changed'))} of the weights differ from the original's."]
    ways = [each for each in model.get("sets", {}).get("forget", {}).get("share_of_way") or [] if usable(each)]
    if ways:
        found.append(
            f"On the forget samples its layers have gone {percent(min(ways))} to {percent(max(ways))} of the way from "
            "the original's features to the retrained models'; one trained independently of both stands at 50%."
        )
    return found


# --- attention --------------------------------------------------------------------------------------------------------

_READINGS = {
    "unmasked": "Whole image",
    "masked": "Most attended masked",
    "random": "Random ones masked",
    "between_references": "Two retrained models",
}


def attention_section(part: Mapping[str, Any], used: Used) -> Section:
    direction = part.get("direction") or {}
    overlap, reading = part.get("overlap") or {}, part.get("reading") or {}
    references = list(dict.fromkeys(name for each in overlap.values() for name in references_of(each)))
    figures = [Figures("Most attended patches", _overlap_plots(overlap, references, part))]
    tables = [
        Table(
            ["Original", "This model", retrained_column(references)],
            [_overlap_group(overlap[name], name, references, direction, used) for name in overlap],
        )
    ]
    if reading:
        figures.append(Figures("The original on masked images", _reading_plots(reading)))
        groups = []
        for name, each in reading.items():
            rows = [
                Row(
                    used.measure(f"reading_{key}", direction.get(key)),
                    [cell((each.get(r) or {}).get(key), text) for r in _READINGS],
                )
                for key, text in (("top1", percent), ("kl", plain))
            ]
            groups.append(Group(heading(SETS.get(name, name)), rows))
        tables.append(Table(list(_READINGS.values()), groups, marked=None))
    return Section(
        title="Attention",
        intro=f"Attention of the models: the {part.get('k', MISSING)} most attended of the "
        f"{part.get('patches', MISSING)} patches of an image. LetheViT masks those, and assumes that the original's "
        "output for the masked image is that of a model that was not trained on it. Here that assumption is measured.",
        found=[sentence for name in reading for sentence in _assumption(reading[name], SETS.get(name, name).lower())],
        figures=figures,
        tables=tables,
    )


def _overlap_plots(overlap: Mapping[str, Any], references: Sequence[str], part: Mapping[str, Any]) -> list[Picture]:
    pairs = {
        "original and retrained": (ORIGINAL_TO_RETRAINED, [("original", name) for name in references]),
        "this model and original": (MODEL_TO_ORIGINAL, [("model", "original")]),
        "this model and retrained": (MODEL_TO_RETRAINED, [("model", name) for name in references]),
        "retrained and retrained": (RETRAINED, [(a, b) for a in references for b in references if a != b]),
    }
    pictures: list[Picture] = []
    for key, title, axis in (
        ("iou", "Overlap of the most attended", "intersection over union"),
        ("spearman", "Rank correlation", "rank correlation of all patches"),
    ):
        series = [
            Series(name, style, [mean_of(_between(overlap[s], *pair).get(key) for pair in between) for s in overlap])
            for name, (style, between) in pairs.items()
        ]
        chance = part.get("chance", {}).get(key, 0.0)
        pictures += dot_plot(title, axis, [SETS.get(name, name) for name in overlap], series, line=chance)
    return pictures


def _between(overlap: Mapping[str, Any], first: str, second: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = overlap.get(first, {}).get(second, {})
    return found


def _overlap_group(
    overlap: Mapping[str, Any], name: str, references: Sequence[str], direction: Mapping[str, str], used: Used
) -> Group:
    rows = []
    for key in ("iou", "spearman"):
        measure = used.measure(key, direction.get(key))
        for whom, others in (("original", ["original"]), ("retrained", references)):
            numbers = {
                each: mean_of(_between(overlap, each, other).get(key) for other in others if other != each)
                for each in overlap
            }
            shown = dataclasses.replace(measure, name=f"{measure.name}, with {whom}")
            rows.append(Row(shown, three_cells(numbers, references, plain)))
    return Group(heading(SETS.get(name, name)), rows)


def _reading_plots(reading: Mapping[str, Any]) -> list[Picture]:
    styles = {"forget": MODEL, "test": ORIGINAL_TO_RETRAINED}
    pictures: list[Picture] = []
    for key, title, axis, shares in (
        ("kl", "KL from retrained", "KL (nats)", False),
        ("top1", "Same class as retrained", "share of images (%)", True),
    ):
        series = [
            Series(
                SETS.get(name, name).lower(),
                styles.get(name, RETRAINED),
                [(each.get(r) or {}).get(key) for r in _READINGS],
            )
            for name, each in reading.items()
        ]
        pictures += dot_plot(title, axis, list(_READINGS.values()), series, shares=shares)
    return pictures


def _assumption(reading: Mapping[str, Any], images: str) -> list[str]:
    """Return a sentence on whether masking brings the original's answer nearer to a retrained model's."""
    against = [(reading.get(f"masked_less_{other}") or {}).get("kl") for other in ("unmasked", "random")]
    if any(value_of(each) is None for each in against):
        return []
    whole, random = against
    return [
        f"On {images}, the original's output for the masked image is {_nearer(whole)} a retrained model's than its "
        f"output for the whole image (KL {_signed(whole)}), and {_nearer(random)} it than with as many patches masked "
        f"at random (KL {_signed(random)})."
    ]


def _nearer(found: Any) -> str:
    if found["high"] < 0:
        return "nearer to"
    if found["low"] > 0:
        return "further from"
    return "neither clearly nearer to nor further from"


def _signed(found: Any) -> str:
    return f"{found['value']:+.3f}, interval {found['low']:+.3f} to {found['high']:+.3f}"
