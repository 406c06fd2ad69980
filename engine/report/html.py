"""report.html: sentences and table, computed from the numbers, and the page that contains them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.evaluate import Evaluation
from engine.evaluate.membership import DIRECTION
from engine.report import plots
from engine.report.data import ReportData
from engine.report.page import (
    MISSING,
    Measure,
    count,
    duration,
    flat,
    number,
    percent,
    points,
    render_template,
    unreadable,
    value_text,
    write_page,
)
from engine.report.proof.page import proof_view, tables_view

MEASURES = {
    "forget": Measure(
        "Forget accuracy",
        "closer to retrained is better",
        "Share of the samples to be forgotten that the model classifies correctly (top-1). The target is what a model "
        "retrained without them reaches, not zero: a model that was not trained on an image may still classify it "
        "correctly.",
    ),
    "retain": Measure(
        "Retain accuracy",
        "higher is better",
        "The same share of the training samples that are kept. A fall means that unlearning damaged what was to stay.",
    ),
    "test": Measure(
        "Test accuracy",
        "higher is better",
        "The same share of test images, which no model was trained or tuned on: how useful the model still is.",
    ),
    "efficacy": Measure(
        "MIA efficacy",
        "higher is better, up to retrained",
        "Membership inference attack (an attempt to find, by the model's confidence, whether a sample was trained on): "
        f"{DIRECTION['efficacy']}.",
    ),
    "auc": Measure(
        "Loss AUC",
        "0.5 is indistinguishable",
        "The chance that a random sample of the forget set has a lower loss than a random test image: "
        f"{DIRECTION['auc']}.",
    ),
    "gap": Measure(
        "Average gap",
        "lower is better, down to the noise floor",
        "Mean of four absolute differences to a retrained model, in percentage points: forget, retain and test "
        "accuracy, and MIA efficacy. With several retrained models it is the mean over them. In the column of a "
        "retrained model it is its gap to the other ones: the noise floor, by which two retrained models differ.",
    ),
    "top1": Measure(
        "Agreement, top-1",
        "higher is better",
        "Share of the forget samples on which the model and a retrained model predict the same class. Averages can be "
        "equal while single predictions differ; this compares the single predictions.",
    ),
    "kl": Measure(
        "Agreement, KL",
        "lower is better",
        "Mean over the forget samples of the Kullback-Leibler divergence KL(retrained || model), in nats: how far the "
        "model's probabilities are from a retrained model's. 0 means equal.",
    ),
}


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page to `path` and return it; the file is replaced only by a complete page."""
    return write_page(path, render(data))


def render(data: ReportData) -> str:
    """Return the text of the page."""
    rows = table(data)
    evidence = _evidence(data)
    shown = {"original": "Original", "unlearned": "Unlearned"}
    histograms = {
        name: evaluation
        for name, evaluation in data.evaluations.items()
        if name in ("original", "unlearned", "retrained 1")
    }
    return render_template(
        "report.html",
        title=data.title,
        method=data.method,
        warnings=warnings(data),
        request_sentences=request_sentences(data),
        results=results(data),
        cards=cards(data),
        columns=[shown.get(name, name.capitalize()) for name in data.evaluations],
        rows=rows,
        references=len(_references(data)),
        definitions=[*(row["measure"] for row in rows), *evidence["definitions"]],
        losses=plots.loss_curves(data.history),
        watched=plots.watched_curves(data.history),
        histograms=plots.confidence_histograms(histograms),
        gallery=[
            {
                "id": item.id,
                "label": item.label,
                "pictures": plots.sample_pictures(item),
                "probabilities": [(name, percent(p), round(100 * p, 1)) for name, p in item.probabilities.items()],
            }
            for item in data.gallery
        ],
        mask_used="mask_source" in data.config,
        attention_read=any(item.scores is not None for item in data.gallery),
        bars=time_bars(data),
        phases=phase_rows(data),
        config=flat(data.config),
        versions=flat(data.environment),
        hashes=data.hashes,
        proof=None if data.proof is None else proof_view(data.proof),
        evidence=evidence["sections"],
    )


def request_sentences(data: ReportData) -> list[str]:
    """Return the request in sentences."""
    request = data.request
    forget, retain = int(request["forget"]), int(request["retain"])
    share = percent(forget / (forget + retain))
    sentences = [
        f"The request “{request['spec']}” names {count(forget, 'sample')} to forget out of {forget + retain:,} "
        f"training samples ({share}) of the data “{request['data']}”."
    ]
    if request.get("duplicates"):
        sentences.append(
            f"{count(int(request['duplicates']), 'further mention')} of ids already named merged into one."
        )
    if request.get("unreadable"):
        sentences.append(unreadable(int(request["unreadable"]), "the training or the evaluation"))
    sentences.append(f"The method was {data.method} ({data.summary.rstrip('.')}).")
    return sentences


def results(data: ReportData) -> list[str]:
    """Return the outcome in sentences: behaviour, distance to retraining, time."""
    after, before = data.metrics["accuracy"], _original(data).get("accuracy", {})
    if before:
        sentences = [
            f"Accuracy on the forgotten samples went from {percent(before['forget'])} to {percent(after['forget'])}. "
            f"On unseen test images it is {percent(after['test'])} ({percent(before['test'])} before), and on the "
            f"training samples that are kept {percent(after['retain'])} ({percent(before['retain'])} before)."
        ]
    else:
        sentences = [
            f"Accuracy on the forgotten samples is {percent(after['forget'])}, on unseen test images "
            f"{percent(after['test'])}, and on the training samples that are kept {percent(after['retain'])}."
        ]
    return [*sentences, *_gap_sentences(data), _time_sentence(data)]


def _gap_sentences(data: ReportData) -> list[str]:
    gap, untouched, floor, references = _gaps(data)
    if gap is None:
        return []
    untouched_words = f", against {points(untouched)} for the untouched model" if untouched is not None else ""
    if floor is not None:
        floor_words = f" Two retrained models differ from each other by {points(floor)}: the noise floor."
    else:
        floor_words = " With one retrained model the noise floor, by which two of them differ, is not known."
    sentence = (
        f"The average gap to {count(references, 'model')} retrained without those samples is {points(gap)}"
        f"{untouched_words}.{floor_words}"
    )
    if floor is not None and gap <= floor:
        sentence += " The unlearned model is as close to the retrained ones as they are to each other."
    elif untouched is not None and gap < untouched:
        sentence += f" Unlearning closed {percent((untouched - gap) / untouched)} of the untouched model's gap."
    return [sentence]


def _time_sentence(data: ReportData) -> str:
    took = data.metrics.get("seconds", {}).get("unlearn")
    if took is None:
        return "The time that unlearning took was not recorded."
    if not data.retrain_seconds:
        return f"Unlearning took {duration(took)}. No retraining was timed in this run to compare it with."
    return (
        f"Unlearning took {duration(took)}, {percent(took / data.retrain_seconds)} of the "
        f"{duration(data.retrain_seconds)} that a retraining took in the same run."
    )


def warnings(data: ReportData) -> list[dict[str, str]]:
    """Return the warnings of a run. Each has a kind, "alarm" or "notice", a title and a text."""
    found = [{"kind": "alarm", **_event(row)} for row in data.history if "event" in row]
    gap, untouched, _, references = _gaps(data)
    if gap is not None and untouched is not None and gap >= untouched:
        text = f"Its average gap is {points(gap)}, the untouched model's {points(untouched)}."
        found.append(
            {"kind": "alarm", "title": "The unlearned model is no closer to retraining than before", "text": text}
        )
    if not references:
        text = (
            "Without a model retrained on the kept samples alone it is not known how close the result is to a model "
            "that was not trained on the forgotten samples. The numbers below can only be compared with the "
            "untouched model's."
        )
        found.append({"kind": "notice", "title": "No retrained reference was given", "text": text})
    return found


def _event(row: Mapping[str, Any]) -> dict[str, str]:
    if row["event"] != "collapse":
        details = ", ".join(f"{key} {value_text(value)}" for key, value in row.items() if key != "event")
        return {"title": f"Event in the history: {row['event']}", "text": details}
    if row.get("at") == "end":
        lost = points(row["points_lost"], 1)
        text = f"At the end of the run the accuracy on the watched samples was {lost} lower than before it."
    elif "back_to_step" in row:
        text = (
            f"In phase {row['phase']}, at step {row['step']}, the accuracy on the watched samples had fallen to "
            f"{percent(row['watched_accuracy'])}. The model was restored to its weights of step "
            f"{row['back_to_step']}, and the phase ended there."
        )
    else:
        text = "The accuracy on the watched samples fell too far."
    return {
        "title": "The model collapsed during the run",
        "text": f"{text} Check the accuracies below before using the model.",
    }


def cards(data: ReportData) -> list[dict[str, Any]]:
    """Return the key figures. Each has a label, a value, and notes with the numbers that it is compared with."""
    after, before = data.metrics["accuracy"], _original(data).get("accuracy", {})
    reference = data.metrics.get("reference", {}).get("accuracy", {})
    made: list[dict[str, Any]] = []
    for key in ("forget", "test"):
        notes = [f"before: {percent(before[key])}"] if before else []
        notes += [f"retrained: {percent(reference[key])}"] if reference else []
        made.append({"label": MEASURES[key].name, "value": percent(after[key]), "notes": notes})
    gap, untouched, floor, _ = _gaps(data)
    if gap is not None:
        notes = [f"untouched: {untouched:.2f}"] if untouched is not None else []
        notes += [f"noise floor: {floor:.2f}"] if floor is not None else []
        made.append({"label": MEASURES["gap"].name, "value": points(gap), "notes": notes})
    took = data.metrics.get("seconds", {}).get("unlearn")
    if took is not None:
        note = (
            f"{percent(took / data.retrain_seconds)} of a retraining"
            if data.retrain_seconds
            else "retraining: not timed"
        )
        made.append({"label": "Time", "value": duration(took), "notes": [note]})
    return made


def table(data: ReportData) -> list[dict[str, Any]]:
    """Return rows of measure and cells, with a cell for each model in the order of the evaluations."""
    keys = [key for key in MEASURES if key not in ("gap", "top1", "kl") or _references(data)]
    columns = {name: _column(data, name, evaluation) for name, evaluation in data.evaluations.items()}
    return [{"measure": MEASURES[key], "cells": [columns[name][key] for name in columns]} for key in keys]


def _column(data: ReportData, name: str, evaluation: Evaluation) -> dict[str, str]:
    others = [reference for key, reference in _references(data).items() if key != name]
    if name == "unlearned":
        compared = data.metrics
    elif name == "original":
        compared = _original(data)
    else:
        agreements = [evaluation.agreement_with(other) for other in others]
        compared = {"gap": {"average": _mean(evaluation.gap_to(other)["average"] for other in others)}}
        compared["reference"] = {"agreement": {key: _mean(a[key] for a in agreements) for key in ("top1", "kl")}}
    agreement = compared.get("reference", {}).get("agreement", {})
    # A retrained model's numbers are its own; the two others are read from the metrics, like the sentences.
    numbers = evaluation.numbers if name.startswith("retrained") else compared
    accuracy, mia = numbers["accuracy"], numbers["mia"]
    return {
        **{key: percent(accuracy[key]) for key in ("forget", "retain", "test")},
        "efficacy": percent(mia["efficacy"]),
        "auc": number(mia["auc"], 3),
        "gap": number(compared.get("gap", {}).get("average"), 2),
        "top1": percent(agreement.get("top1")),
        "kl": number(agreement.get("kl"), 3),
    }


def time_bars(data: ReportData) -> list[dict[str, Any]]:
    """Return the bars of unlearning and retraining: label, text, and width [0, 100] relative to the longest."""
    took = data.metrics.get("seconds", {}).get("unlearn")
    times = {"Unlearning": took, "Retraining": data.retrain_seconds}
    longest = max((value for value in times.values() if value), default=None)
    return [
        {"label": label, "text": duration(value), "width": round(100 * value / longest, 2)}
        for label, value in times.items()
        if value and longest
    ]


def phase_rows(data: ReportData) -> list[tuple[str, str, str]]:
    """Return (phase, time, samples seen) of each phase, the parts of unlearning first."""
    seconds, seen = data.metrics.get("seconds", {}), data.metrics.get("samples_seen", {})
    rows = [
        (f"Phase {key.removesuffix('_phase')}", duration(value), f"{seen.get(key.removesuffix('_phase'), 0):,}")
        for key, value in seconds.items()
        if key.endswith("_phase")
    ]
    names = {
        "prepare": "Preparation (masks and teacher passes), part of the phases",
        "unlearn": "Unlearning, all of it",
        "evaluate": "Evaluation, not part of unlearning",
        "retrain": "Retraining, for comparison",
    }
    total = f"{sum(seen.values()):,}"
    rows += [(names[k], duration(seconds[k]), total if k == "unlearn" else MISSING) for k in names if k in seconds]
    return rows


def _evidence(data: ReportData) -> dict[str, Any]:
    """Return the tables of the metrics' membership attacks and agreement, except those that the proof shows."""
    others = {"original": _original(data), "reference": data.metrics.get("reference", {})}
    attacks = {"model": data.metrics.get("attacks"), **{name: each.get("attacks") for name, each in others.items()}}
    parts = {"attacks": attacks if attacks["model"] else None, "agreement": data.metrics.get("agreement")}
    return tables_view({name: part for name, part in parts.items() if name not in (data.proof or {})}, "Unlearned")


def _original(data: ReportData) -> dict[str, Any]:
    return data.metrics.get("original", {})


def _references(data: ReportData) -> dict[str, Evaluation]:
    return {name: evaluation for name, evaluation in data.evaluations.items() if name.startswith("retrained")}


def _gaps(data: ReportData) -> tuple[float | None, float | None, float | None, int]:
    """Return the gaps of the unlearned and the untouched model, the noise floor, and the number of references.

    Gaps and noise floor are in percentage points; None if not measured.
    """
    metrics = data.metrics
    gap, untouched, floor = (
        part.get("average")
        for part in (metrics.get("gap", {}), _original(data).get("gap", {}), metrics.get("noise_floor", {}))
    )
    return gap, untouched, floor, int(metrics.get("reference", {}).get("count", 0))


def _mean(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
