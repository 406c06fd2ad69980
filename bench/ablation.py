"""The choices of LetheViT and of LetheViT+, each against its alternative, over seeds.

Every run is kept as soon as it is done, so that a broken-off ablation goes on with `--json` of the same file.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.measure import spread
from bench.report import Report, kept
from engine.config import parse_assignments
from engine.console import console
from engine.errors import UserError
from engine.evaluate import Evaluation, compare
from engine.job import Task
from engine.loop import unlearn
from engine.vit import load_checkpoint

# Of each method, variant: options that differ from the defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lethe": {
        "default: top patches, cosine, logits": {},
        "retain stage alone": {"forget_epochs": 0.0},
        "random patches": {"mask_source": "random"},
        "lowest patches": {"mask_source": "lowest"},
        "dot product, t = 5": {"similarity": "dot", "temperature": 5.0},
        "features": {"contrast": "features"},
    },
    "lethe_plus": {
        "default": {},
        "no correction": {"correction": 0.0},
        "all forget samples, each less often": {"coverage": 1.0},
        "targets of the image itself": {"views": False},
        "targets as sure as the mean over views": {"calibrate": False},
        "retained images augmented": {"augment_retain": True},
    },
}
# Of lethe: the first half of the default's run.
ALONE = "forget stage alone"


def run_ablation(
    method: str,
    checkpoint: str,
    data: str,
    forget: str,
    references: Sequence[str],
    seeds: int,
    jobs: int,
    settings: Sequence[str],
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints and returns rows (variant, seed, stage)."""
    if method not in VARIANTS:
        raise UserError(f"--method {method}: there are variants of {' and '.join(VARIANTS)}")
    report = Report()
    setting: dict[str, Any] = {
        "method": method,
        "checkpoint": checkpoint,
        "data": data,
        "forget": forget,
        "references": list(references),
        "options": parse_assignments(settings),
    }
    rows = list(kept(json_file, setting, "an ablation").get("rows", []))
    done = {(row["variant"], row["seed"]) for row in rows}
    wanted = [(variant, seed) for seed in range(seeds) for variant in VARIANTS[method] if (variant, seed) not in done]
    evaluator = Task.open(data, forget).evaluator(setting["options"])
    retrained = [evaluator(load_checkpoint(reference)) for reference in references]
    threads = max(1, torch.get_num_threads() // jobs)
    # spawn: a fork would copy this process's thread pools in whatever state they are
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_one, setting, retrained, variant, seed, threads) for variant, seed in wanted]
        for future in as_completed(futures):
            rows.extend(future.result())
            console.print(f"{len(rows)} rows: {rows[-1]['variant']}, seed {rows[-1]['seed']}")
            report.write({**setting, "rows": rows}, json_file)
    written = report.write({**setting, "rows": rows}, json_file)
    _print(written)
    return written


def _one(
    setting: dict[str, Any], retrained: list[Evaluation], variant: str, seed: int, threads: int
) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    task = Task.open(setting["data"], setting["forget"])
    evaluator = task.evaluator(setting["options"])
    rows: list[dict[str, Any]] = []

    def keep(phase: str, model: torch.nn.Module) -> None:
        metrics = compare(evaluator(model), retrained)
        numbers = {**metrics["accuracy"], **{k: metrics["mia"][k] for k in ("efficacy", "auc")}}
        agreement = metrics["reference"]["agreement"]
        rows.append(
            {"variant": variant, "seed": seed, "stage": phase, **numbers, "gap": metrics["gap"]["average"]}
            | {"noise_floor": metrics.get("noise_floor", {}).get("average")}
            | {"agreement": agreement["top1"], "kl": agreement["kl"]}
        )

    result = unlearn(
        load_checkpoint(setting["checkpoint"]),
        task.forget,
        task.retain,
        method=setting["method"],
        config={**setting["options"], **VARIANTS[setting["method"]][variant], "seed": seed},
        validation=task.source.validation,
        after_phase=keep,
    )
    rows[-1]["events"] = result.events
    return rows


def _print(report: dict[str, Any]) -> None:
    table = Table("variant", "stage", "seeds", header_style="bold")
    for column in columns(report):
        table.add_column(column, justify="right")
    for name, stage, seeds, cells in table_rows(report):
        table.add_row(name, f"after {stage}", str(seeds), *cells)
    console.print(table)
    console.print("[dim]mean ± half of the range over seeds[/dim]")


# Heading: (key of a row, factor, digits).
_COLUMNS = {
    "forget": ("forget", 100, 1),
    "retain": ("retain", 100, 1),
    "test": ("test", 100, 1),
    "MIA efficacy": ("efficacy", 100, 1),
    "loss AUC": ("auc", 1, 3),
    "average gap": ("gap", 1, 2),
    "agreement": ("agreement", 100, 1),
    "KL": ("kl", 1, 3),
}


def columns(report: dict[str, Any]) -> list[str]:
    """Headings of what the rows have; those of early versions had no agreement."""
    return [name for name, (key, _, _) in _COLUMNS.items() if all(key in row for row in report["rows"])]


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, int, list[str]]]:
    """(variant, stage, number of seeds, cells) of each variant and stage; cells as `columns` heads them."""
    shown = [_COLUMNS[name] for name in columns(report)]
    variants = VARIANTS[report.get("method", "lethe")]  # early files are of lethe and do not say so
    made = []
    for variant, options in variants.items():
        for stage in ("forget", "retain"):
            chosen = [row for row in report["rows"] if (row["variant"], row["stage"]) == (variant, stage)]
            if chosen:
                alone = stage == "forget" and not options and variants is VARIANTS["lethe"]
                cells = [spread([factor * row[key] for row in chosen], digits) for key, factor, digits in shown]
                made.append((ALONE if alone else variant, stage, len(chosen), cells))
    return made
