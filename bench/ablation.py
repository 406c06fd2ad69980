"""The choices of LetheViT, each against its alternative, over seeds.

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
from engine.evaluate import Evaluation, compare
from engine.job import Task
from engine.loop import unlearn
from engine.vit import load_checkpoint

# Variant: options that differ from the defaults. The forget stage alone is the first half of the default's run.
VARIANTS: dict[str, dict[str, Any]] = {
    "default: top patches, cosine, logits": {},
    "retain stage alone": {"forget_epochs": 0.0},
    "random patches": {"mask_source": "random"},
    "lowest patches": {"mask_source": "lowest"},
    "dot product, t = 5": {"similarity": "dot", "temperature": 5.0},
    "features": {"contrast": "features"},
}
ALONE = "forget stage alone"


def run_ablation(
    checkpoint: str,
    data: str,
    forget: str,
    references: Sequence[str],
    seeds: int,
    jobs: int,
    settings: Sequence[str],
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints and returns rows (variant, seed, stage) and their summary."""
    report = Report()
    setting: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": data,
        "forget": forget,
        "references": list(references),
        "options": parse_assignments(settings),
    }
    rows = list(kept(json_file, setting, "an ablation").get("rows", []))
    done = {(row["variant"], row["seed"]) for row in rows}
    wanted = [(variant, seed) for seed in range(seeds) for variant in VARIANTS if (variant, seed) not in done]
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
    _print(rows)
    return report.write({**setting, "rows": rows}, json_file)


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
        rows.append(
            {"variant": variant, "seed": seed, "stage": phase, **numbers, "gap": metrics["gap"]["average"]}
            | {"noise_floor": metrics.get("noise_floor", {}).get("average")}
        )

    result = unlearn(
        load_checkpoint(setting["checkpoint"]),
        task.forget,
        task.retain,
        config={**setting["options"], **VARIANTS[variant], "seed": seed},
        validation=task.source.validation,
        after_phase=keep,
    )
    rows[-1]["events"] = result.events
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("variant", "stage", "seeds", header_style="bold")
    for column in ("forget %", "retain %", "test %", "MIA %", "AUC", "gap"):
        table.add_column(column, justify="right")
    for name, stage, seeds, cells in table_rows(rows):
        table.add_row(name, f"after {stage}", str(seeds), *cells)
    console.print(table)
    console.print("[dim]mean ± half of the range over seeds[/dim]")


def table_rows(rows: list[dict[str, Any]]) -> list[tuple[str, str, int, list[str]]]:
    """(variant, stage, number of seeds, cells) of each variant and stage; cells as `_print` heads them."""
    made = []
    for variant in VARIANTS:
        for stage in ("forget", "retain"):
            chosen = [row for row in rows if (row["variant"], row["stage"]) == (variant, stage)]
            if chosen:
                name = ALONE if stage == "forget" and not VARIANTS[variant] else variant
                percent = [
                    spread([100 * row[key] for row in chosen]) for key in ("forget", "retain", "test", "efficacy")
                ]
                auc, gap = (spread([row[key] for row in chosen], digits) for key, digits in (("auc", 3), ("gap", 2)))
                made.append((name, stage, len(chosen), [*percent, auc, gap]))
    return made
