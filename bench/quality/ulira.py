"""Run U-LiRA on digits: the demo's model and recipe, K models with each target and K without it, the stages timed.

Every method is compared with the originals, which unlearned nothing (what the attack can find here). `retrain` as a
method is the other end: a retrain with another seed, which must have an AUC of 0.5 within its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness.report import Report
from engine.attack.ensemble import EnsembleSpec
from engine.attack.ulira import attack_procedure
from engine.cli.attack import print_attack, state_needs
from engine.cli.console import console, progress_bars
from engine.cli.demo import MODEL_ARGS, RECIPE, RUN
from engine.data import open_source
from engine.jobs.start import architecture
from engine.models.spec import spec_of

TARGETS = "random:0.1@0"


def ulira(
    models: Annotated[int, typer.Option(help="K: models with each target, and as many without it.")] = 16,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for more; `retrain` is the exact one. Default: lethe.", show_default=False),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder of the trained models.")] = Path("runs/ensemble"),
    workers: Annotated[int, typer.Option(help="Models trained at once.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Three pairs of models, three steps each.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results, with every sample's score.")] = None,
) -> None:
    """Run U-LiRA on digits: can unlearned models be told from models that never had the samples? Stages are timed."""
    run_ulira(models, method or ["lethe"], cache, workers, quick, json_file)


def run_ulira(
    models: int, methods: Sequence[str], cache: Path, workers: int, quick: bool, json_file: Path | None
) -> dict[str, Any]:
    """Attack each method on one ensemble; quick: three pairs, three steps each, a smoke test."""
    report = Report()
    steps = {"max_steps": 3} if quick else {}
    recipe = {**RECIPE, **steps}
    spec = EnsembleSpec(
        data="digits",
        targets=TARGETS,
        model=spec_of(architecture("vit_tiny_patch16_224", MODEL_ARGS, open_source("digits"))),
        recipe=recipe,
        pairs=3 if quick else models,
    )
    rows: list[dict[str, Any]] = []
    for method in methods:
        options = recipe if method == "retrain" else {**RUN, **steps}
        state_needs(spec, method, options, cache, workers)
        with progress_bars() as progress:
            rows.append(attack_procedure(spec, method, options, cache, workers=workers, progress=progress))
        print_attack(rows[-1])
    console.print(f"models in {cache}")
    return report.write({"quick": quick, "rows": rows}, json_file)
