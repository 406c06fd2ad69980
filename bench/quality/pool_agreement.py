"""Whether a pool's verdict is that of retrained references, on the same models.

Models of `python -m bench calibration` (retrained ones and impostors of its requests) are judged by retrained
references, as there, and by the pool.

The JSON, below the heading of `bench.harness.report`:

    {"models": {NAME: {"references": STATUS, "pool": STATUS, "decided": {"references": [GATE], "pool": [GATE]}}},
     "counts": {STATUS by references: {STATUS by pool: models}}}
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from bench.harness.report import Report
from bench.quality.calibration import Known, Made, as_evidence
from bench.quality.certificates import RECIPE, Folder, Json, PoolFolder, models_of
from bench.quality.impostors import impostors
from bench.quality.retrain_cost import DIGITS
from bench.quality.verdict_matrix import FORGET_DIGITS
from engine.cli.console import console
from engine.evaluate.gates import Gates
from engine.evaluate.verdict import judge
from engine.jobs.task import Task
from engine.jobs.verify import Verifier
from engine.pool.answers import Answers
from engine.pool.references import PoolReferences, judge_task

_REFERENCES = 4


def pool_agreement(
    lists: Annotated[int, typer.Option(help="Requests of the calibration.")] = 2,
    models: Annotated[int, typer.Option(help="Retrained models of each.")] = 8,
    calibration: Annotated[Path, typer.Option(help="Folder of `python -m bench calibration`.")] = Path(
        "runs/calibration"
    ),
    folder: Folder = Path("runs/certificates"),
    pool: PoolFolder = None,
    json: Json = None,
) -> None:
    """Compare the verdict by a pool with that by retrained references, on the same models."""
    run_pool_agreement(lists, models, calibration, folder, pool, json)


def run_pool_agreement(
    lists: int, models: int, calibration: Path, folder: Path, pool: Path | None, json_file: Path | None
) -> dict[str, Any]:
    """Print and return the table; arguments as of the command."""
    report, gates = Report(), Gates.read()
    opened = models_of(folder, pool)[1]
    rows: dict[str, Any] = {}
    for seed in range(lists):
        forget = FORGET_DIGITS.replace("@0", f"@{seed}")
        subject = dataclasses.replace(DIGITS, name=f"digits, list {seed}", forget=forget)
        known = Known(calibration / subject.name.replace(", ", "-").replace(" ", "-"))
        task = Task.open(subject.data, subject.forget)
        made = Made(subject, task, seed, known)
        original = made.original()
        verifier = Verifier(task, original, [])
        references = PoolReferences(opened, task.source, original, Answers({"precision": "fp32"}))
        make: dict[str, Callable[[], nn.Module]] = {
            f"retrained {n}": functools.partial(made.retrain, n) for n in range(models)
        }
        make |= {"untouched": made.original}
        make |= impostors(task, original, made.retrain(models - 1), DIGITS.options, epochs=20.0, lr=float(RECIPE["lr"]))
        full = {name: known.outputs(name, verifier, each) for name, each in make.items()}
        for name, each in make.items():
            others = [full[f"retrained {n}"] for n in range(models - 1) if f"retrained {n}" != name][:_REFERENCES]
            by_references = judge(as_evidence(full[name], full["untouched"].outputs, others), gates)
            by_pool = judge_task(references, task, each(), gates)
            rows[f"list {seed}, {name}"] = {
                "references": by_references.status,
                "pool": by_pool.status,
                "decided": {"references": by_references.decided_by, "pool": by_pool.decided_by},
            }
            console.print(f"list {seed}, {name}: {by_references.status} by references, {by_pool.status} by the pool")
        report.write({"models": rows}, json_file)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows.values():
        counts[row["references"]][row["pool"]] += 1
    found = {"models": rows, "counts": {key: dict(value) for key, value in counts.items()}}
    console.print(found["counts"])
    return report.write(found, json_file)
