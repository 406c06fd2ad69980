"""Compare each choice of LetheViT and of LetheViT+ with its alternative, and ways to train less, over seeds.

Every run is stored when it is done, so that an interrupted ablation continues with `--json` of the same file.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.harness.measure import spread
from bench.harness.report import Report, kept
from engine.cli.console import console
from engine.config import parse_assignments
from engine.errors import UserError
from engine.evaluate import Evaluation, compare
from engine.jobs.task import Task
from engine.methods import get_method
from engine.models.checkpoint import load_checkpoint
from engine.run.unlearn import unlearn

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
        "targets of the image itself": {"views": False},
        "targets as sure as the mean over views": {"calibrate": False},
        "retained images augmented": {"augment_retain": True},
    },
}
# Ways to train less: options of every run, so of any method.
ACCELERATORS: dict[str, dict[str, Any]] = {
    "default: all weights, all retained images": {},
    "half of the retained images, random": {"retain_share": 0.5, "retain_choice": "random"},
    "half of the retained images, hard": {"retain_share": 0.5, "retain_choice": "hard"},
    "half of the retained images, near": {"retain_share": 0.5, "retain_choice": "near"},
    "retained images pruned by SeTa": {"retain_pruning": "seta"},
    "the last three blocks": {"trainable": "last:3"},
    "low-rank updates, rank 8": {"trainable": "lora:8"},
    "until forget samples look held out": {"stop_when": "held_out"},
}
# Of lethe: the first half of the default's run.
ALONE = "forget stage alone"
# Stage of the rows of accelerators, whatever the names of the method's own stages.
ALL_STAGES = "all stages"


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
    accelerators: bool = False,
) -> dict[str, Any]:
    """Print and return rows (variant, seed, stage). accelerators: `ACCELERATORS` in place of the method's choices.

    seconds of a row: wall-clock seconds of the run until the end of the stage, without the evaluation of stages.
    images, in the row of the last stage: number of images in the steps of the whole run.
    """
    if not accelerators and method not in VARIANTS:
        raise UserError(
            f"--method {method}: there are variants of {' and '.join(VARIANTS)}; --accelerators takes any method"
        )
    get_method(method)  # a wrong name is an error before the models are read
    report = Report()
    setting: dict[str, Any] = {
        "method": method,
        "accelerators": accelerators,
        "checkpoint": checkpoint,
        "data": data,
        "forget": forget,
        "references": list(references),
        "options": parse_assignments(settings),
    }
    rows = list(kept(json_file, setting, "an ablation").get("rows", []))
    done = {(row["variant"], row["seed"]) for row in rows}
    variants = variants_of(setting)
    wanted = [(variant, seed) for seed in range(seeds) for variant in variants if (variant, seed) not in done]
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
    evaluating = 0.0

    def keep(phase: str, model: torch.nn.Module) -> None:
        nonlocal evaluating
        ended = time.perf_counter()
        metrics = compare(evaluator(model), retrained)
        numbers = {**metrics["accuracy"], **{k: metrics["mia"][k] for k in ("efficacy", "auc")}}
        agreement = metrics["reference"]["agreement"]
        rows.append(
            {"variant": variant, "seed": seed, "stage": phase, **numbers, "gap": metrics["gap"]["average"]}
            | {"noise_floor": metrics.get("noise_floor", {}).get("average")}
            | {"agreement": agreement["top1"], "kl": agreement["kl"], "seconds": ended - began - evaluating}
        )
        evaluating += time.perf_counter() - ended

    original = load_checkpoint(setting["checkpoint"])
    began = time.perf_counter()
    result = unlearn(
        original,
        task.forget,
        task.retain,
        method=setting["method"],
        config={**setting["options"], **variants_of(setting)[variant], "seed": seed},
        validation=task.source.validation,
        after_phase=keep,
    )
    rows[-1] |= {"events": result.events, "images": sum(result.samples_seen.values())}
    return [rows[-1] | {"stage": ALL_STAGES}] if setting["accelerators"] else rows


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
    "seconds": ("seconds", 1, 1),
    "images": ("images", 1, 0),
    "forget": ("forget", 100, 1),
    "retain": ("retain", 100, 1),
    "test": ("test", 100, 1),
    "MIA efficacy": ("efficacy", 100, 1),
    "loss AUC": ("auc", 1, 3),
    "average gap": ("gap", 1, 2),
    "agreement": ("agreement", 100, 1),
    "KL": ("kl", 1, 3),
}


def variants_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each variant of a setting or of its results.

    Early files have no method and are of lethe.
    """
    return ACCELERATORS if report.get("accelerators") else VARIANTS[report.get("method", "lethe")]


def columns(report: dict[str, Any]) -> list[str]:
    """Return the headings of the rows' figures; those of early versions had neither agreement nor seconds."""
    return [name for name, (key, _, _) in _COLUMNS.items() if all(key in row for row in report["rows"])]


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, int, list[str]]]:
    """Return (variant, stage, number of seeds, cells in the order of `columns`) of each variant and stage."""
    shown = [_COLUMNS[name] for name in columns(report)]
    variants = variants_of(report)
    made = []
    for variant, options in variants.items():
        for stage in ("forget", "retain", ALL_STAGES):
            chosen = [row for row in report["rows"] if (row["variant"], row["stage"]) == (variant, stage)]
            if chosen:
                alone = stage == "forget" and not options and variants is VARIANTS["lethe"]
                cells = [spread([factor * row[key] for row in chosen], digits) for key, factor, digits in shown]
                made.append((ALONE if alone else variant, stage, len(chosen), cells))
    return made
