"""The main job on scikit-learn's digits, end to end, in about two minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engine.cli.console import console, print_metrics, print_seconds, progress_bars
from engine.config import DEFAULT_METHOD
from engine.errors import UserError
from engine.jobs.start import architecture
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.jobs.unlearn import run_job
from engine.runtime import lock

# A ViT of 4 blocks and 0.2 million weights: 16 patches of 2 x 2 pixels.
MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
# fp32: matrices this small gain nothing from bf16.
RUN = {"batch_size": 50, "precision": "fp32"}
RECIPE = {**RUN, "epochs": 40, "lr": 2e-3}
# The published method, and the default.
METHODS = ("lethe", DEFAULT_METHOD)


def run_demo(out: Path, seed: int = 0) -> dict[str, Any]:
    """Train, retrain twice without a random tenth (two seeds: the noise floor), unlearn it by two methods and compare.

    Returns the metrics of the default method.
    """
    if out.exists() and any(out.iterdir()) and not (out / "original").is_dir():
        raise UserError(f"folder {out} holds files that are not the demo's; name another with --out")
    with lock.held(out):
        for each in out.iterdir():
            if each.name != lock.FILE:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        return _run_demo(out, seed)


def _run_demo(out: Path, seed: int) -> dict[str, Any]:
    task = Task.open("digits", f"random:0.1@{seed}")
    console.print(
        f"digits: {len(task.forget)} samples to forget, {len(task.retain)} to retain, {len(task.source.test)} "
        "for the test"
    )
    model = architecture("vit_tiny_patch16_224", MODEL_ARGS, task.source)
    with progress_bars() as progress:
        console.print("training the original on all samples")
        train_job(task.source, model, out / "original", config={**RECIPE, "seed": seed}, progress=progress)
    retrain_seconds = []
    for number in (1, 2):
        console.print(f"retraining without the forget samples, seed {seed + number}")
        with progress_bars() as progress:
            result = train_job(
                task.source,
                model,
                out / f"retrain_{number}",
                task=task,
                config={**RECIPE, "seed": seed + number},
                progress=progress,
            )
        retrain_seconds.append(result.seconds["unlearn"])
    for method in METHODS:
        console.print(f"unlearning with {method}")
        with progress_bars() as progress:
            outcome = run_job(
                task,
                str(out / "original"),
                out / method,
                method=method,
                config={**RUN, "seed": seed},
                references=[out / "retrain_1", out / "retrain_2"],
                retrain_seconds=sum(retrain_seconds) / len(retrain_seconds),
                progress=progress,
            )
        print_metrics(outcome.metrics)
        print_seconds(outcome.metrics["seconds"])
        console.print(f"report: {out / method / 'report.html'}")
    shutil.copyfile(out / METHODS[-1] / "report.html", out / "report.html")
    console.print(f"report of {METHODS[-1]}: {out / 'report.html'}")
    return outcome.metrics
