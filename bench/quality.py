"""Unlearning beside retraining: every method at its defaults on one model, one request, one machine, one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from bench.report import Report
from engine.config import parse_assignments
from engine.console import console, progress_bars
from engine.evaluate import Evaluation, Evaluator, compare
from engine.job import Task
from engine.loop import train, unlearn
from engine.vit import load_checkpoint


def run_quality(
    checkpoint: str,
    data: str,
    forget: str,
    references: Sequence[str],
    methods: Sequence[str],
    retrain_epochs: float,
    settings: Sequence[str],
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints and returns the table; `seconds` of a method is all that its user waits for, evaluation apart."""
    report = Report()
    task, options = Task.open(data, forget), parse_assignments(settings)
    original = load_checkpoint(checkpoint)
    retrain_seconds = None
    if retrain_epochs:
        console.print(f"retraining {retrain_epochs:g} epochs without the forget samples, for its time")
        with progress_bars() as progress:
            config = {**options, "epochs": retrain_epochs}
            result = train(original, task.retain, config=config, validation=task.source.validation, progress=progress)
        retrain_seconds = result.seconds["unlearn"]
    evaluator = task.evaluator(options)
    retrained = [evaluator(load_checkpoint(reference)) for reference in references]
    untouched = evaluator(original)
    rows = {"untouched": compare(untouched, retrained)}
    for method in methods:
        console.print(f"unlearning with {method}")
        stages: dict[str, Evaluation] = {}
        with progress_bars() as progress:
            result = unlearn(
                original,
                task.forget,
                task.retain,
                method=method,
                config=options,
                validation=task.source.validation,
                progress=progress,
                after_phase=functools.partial(_keep, stages, evaluator),
            )
        for phase in list(stages)[:-1]:
            rows[f"{method}, after {phase} stage"] = compare(stages[phase], retrained)
        rows[method] = compare(list(stages.values())[-1], retrained, None, result.seconds, result.samples_seen)
        rows[method]["collapsed"] = result.collapsed
        rows[method]["config"] = result.config
    _print(rows, retrain_seconds)
    results = {"data": data, "forget": forget, "retrain_seconds": retrain_seconds, "rows": rows}
    return report.write(results, json_file)


def _keep(stages: dict[str, Evaluation], evaluator: Evaluator, phase: str, model: nn.Module) -> None:
    stages[phase] = evaluator(model)


def _print(rows: dict[str, Any], retrain_seconds: float | None) -> None:
    table = Table("model", header_style="bold")
    columns = (
        "forget %",
        "retain %",
        "test %",
        "MIA %",
        "AUC",
        "gap",
        "gap / floor",
        "agree %",
        "seconds",
        "of retrain",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in table_rows(rows, retrain_seconds):
        table.add_row(name, *cells)
    console.print(table)


def table_rows(rows: dict[str, Any], retrain_seconds: float | None) -> list[tuple[str, list[str]]]:
    """(model, cells) of each row, the retrained models last; accuracies, MIA efficacy and agreement in percent."""
    made = []
    for name, row in rows.items():
        floor = row.get("noise_floor", {}).get("average")
        seconds = row["seconds"].get("unlearn")
        cells = [
            f"{row['gap']['average']:.2f}",
            f"{row['gap']['average'] / floor:.1f}" if floor else "-",
            f"{100 * row['reference']['agreement']['top1']:.1f}",
            f"{seconds:.0f}" if seconds else "-",
            f"{100 * seconds / retrain_seconds:.0f}%" if seconds and retrain_seconds else "-",
        ]
        made.append((name, [*numbers(row), *cells]))
    reference, floor = rows["untouched"]["reference"], rows["untouched"].get("noise_floor")
    cells = [
        f"{floor['average']:.2f}" if floor else "-",
        "1.0" if floor else "-",
        f"{100 * floor['agreement']['top1']:.1f}" if floor else "-",
        f"{retrain_seconds:.0f}" if retrain_seconds else "-",
        "100%" if retrain_seconds else "-",
    ]
    return [*made, (f"retrained (mean of {reference['count']})", [*numbers(reference), *cells])]


def numbers(row: dict[str, Any]) -> list[str]:
    """Forget, retain, test accuracy and MIA efficacy in percent, loss AUC."""
    accuracy, mia = row["accuracy"], row["mia"]
    return [
        *(f"{100 * accuracy[key]:.1f}" for key in ("forget", "retain", "test")),
        f"{100 * mia['efficacy']:.1f}",
        f"{mia['auc']:.3f}",
    ]
