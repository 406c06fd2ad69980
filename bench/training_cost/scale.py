"""Compare several ranks with one process, and the memory of ViT-L with the estimate of `lethe plan`.

Both start the command itself, as a user does, in processes of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.table import Table

from bench.harness.report import Report
from engine.cli.console import console
from engine.models.checkpoint import save_checkpoint
from engine.models.spec import ModelSpec
from engine.plan import plan

MIB = 2**20
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")


@dataclasses.dataclass(frozen=True)
class Launched:
    """A finished run: seconds, and the peak resident memory of each rank in bytes."""

    seconds: float
    peaks: dict[int, int]


def launch(arguments: Sequence[str], ranks: int, config: Path | None, log: Path) -> Launched:
    """Run `lethe ARGUMENTS` on some ranks of this host, a thread each.

    Raises RuntimeError with the end of its output.
    """
    start = [sys.executable, "-m"]
    if config is not None:
        start += ["torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
        start += ["--rdzv_endpoint", "localhost:0", "-m"]
        arguments = [*arguments, "--deepspeed", str(config)]
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*start, "engine", *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for rank, peak in _peaks(process.pid):
                peaks[rank] = max(peak, peaks.get(rank, 0))
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"lethe {' '.join(arguments)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return Launched(time.perf_counter() - began, peaks)


def _peaks(parent: int) -> Iterator[tuple[int, int]]:
    """Yield (rank, VmHWM in bytes) of the ranks below a process, or of itself if it has none."""
    below = [pid for pid in _below(parent) if (rank := _rank(pid)) is not None and rank >= 0]
    for pid in below or [parent]:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        if peak:
            yield _rank(pid) or 0, int(peak) * 1024


def _below(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in text.split()]


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


def run_equality(
    checkpoint: str,
    data: str,
    forget: str,
    steps: int,
    batch_size: int,
    precisions: Sequence[str],
    json_file: Path | None,
) -> bool:
    """Compare one process, DeepSpeed on one process, and two ranks at every stage, after the same steps.

    Returns whether the results agree within 1e-5.
    """
    report, rows = Report(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="lethe-equality-") as name:
        folder = Path(name)
        for precision in precisions:
            alone = folder / f"alone-{precision}"
            cases = [
                ("one process", alone, 1, None),
                ("DeepSpeed, one process", folder / f"zero2-1-{precision}", 1, "zero2"),
            ]
            cases += [(f"two ranks, {stage}", folder / f"{stage}-{precision}", 2, stage) for stage in STAGES]
            for label, out, ranks, stage in cases:
                arguments = [
                    "unlearn",
                    "--method",
                    "lethe",
                    "--checkpoint",
                    checkpoint,
                    "--data",
                    data,
                    "--forget",
                    forget,
                    "--out",
                    str(out),
                ]
                for key, value in {
                    "precision": precision,
                    "device": "cpu",
                    "batch_size": batch_size // ranks,
                    "max_steps": steps,
                }.items():
                    arguments += ["--set", f"{key}={value}"]
                done = launch(arguments, ranks, _config(stage, folder), folder / "log")
                rows.append({"case": label, "precision": precision, "seconds": done.seconds, **_compare(alone, out)})
                console.print(f"{precision} {label}: {done.seconds:.0f} s", highlight=False)
                report.write({"steps": steps, "batch_size": batch_size, "rows": rows}, json_file)
    table = Table(
        "run", "precision", "worst tensor", "worst weight", "loss", "accuracies", "seconds", title="against one process"
    )
    for row in rows:
        table.add_row(
            row["case"],
            row["precision"],
            f"{row['tensor']:.1e}",
            f"{row['weight']:.1e}",
            f"{row['loss']:.1e}",
            "equal" if row["points"] == 0 else f"{row['points']:.2f} points",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    console.print(
        f"After {rows[0]['steps']} steps. Worst tensor: largest |difference| / |weights| of a tensor, 2-norms. Worst "
        "weight: largest difference of a weight, of its tensor's largest weight. Loss: largest difference in "
        "history.jsonl. Accuracies: largest difference of forget, retain and test.",
        soft_wrap=True,
        style="dim",
    )
    within = all(row["tensor"] <= 1e-5 for row in rows if row["precision"] == "fp32")
    console.print(f"fp32: worst tensor at most 1e-5: {'PASS' if within else 'MISSED'}", highlight=False)
    return within


def _config(stage: str | None, folder: Path) -> Path | None:
    if stage is None:
        return None
    if stage != "zero0":
        return Path(__file__).parents[2] / "configs" / f"{stage}.json"
    path = folder / "zero0.json"
    path.write_text('{"zero_optimization": {"stage": 0}}')
    return path


def _compare(first: Path, second: Path) -> dict[str, Any]:
    a, b = (safetensors.torch.load_file(path / "model.safetensors") for path in (first, second))
    losses = [
        [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()] for path in (first, second)
    ]
    steps = [row for row in losses[0] if "lr" in row]
    accuracy = [json.loads((path / "metrics.json").read_text())["accuracy"] for path in (first, second)]
    return {
        "steps": len(steps),
        "tensor": max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a),
        "weight": max(float((a[k] - b[k]).abs().max() / a[k].abs().max()) for k in a),
        "loss": max(
            abs(x[key] - y[key]) for x, y in zip(*losses, strict=True) for key in x if key in ("contrast", "retain_ce")
        ),
        "points": max(100 * abs(accuracy[0][k] - accuracy[1][k]) for k in accuracy[0]),
    }


def run_memory(
    architecture: str, images: Path, stages: Sequence[str], batch_size: int, steps: int, json_file: Path | None
) -> bool:
    """Run optimizer steps on two ranks on real images; compare peak memory with the estimate. True: all within 20%."""
    report, rows = Report(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="lethe-memory-") as name:
        folder = Path(name)
        classes = [path.name for path in sorted(images.iterdir()) if path.is_dir()]
        (folder / "data").mkdir()
        for split in ("train", "val"):
            (folder / "data" / split).symlink_to(images.resolve())
        files = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))
        (folder / "forget.txt").write_text(
            "\n".join(files[:: max(1, len(files) // (2 * batch_size * steps))][: 2 * batch_size * steps])
        )
        forgotten = len((folder / "forget.txt").read_text().split())
        spec = ModelSpec(architecture=architecture, num_classes=len(classes), model_args={}, pretrained_cfg={})
        save_checkpoint(spec.build(seed=0), folder / "original")
        for case in stages:
            stage, precision = case.split(":")
            config = _config(stage, folder)
            assert config is not None
            options = {
                "batch_size": batch_size,
                "precision": precision,
                "max_steps": steps,
                "forget_epochs": 1,
                "collapse_drop": 100,
                "workers": 0,
            }
            arguments = [
                "unlearn",
                "--method",
                "lethe",
                "--checkpoint",
                str(folder / "original"),
                "--data",
                f"imagefolder:{folder / 'data'}",
            ]
            arguments += ["--forget", str(folder / "forget.txt"), "--out", str(folder / "run"), "--overwrite"]
            for key, value in {**options, "device": "cpu"}.items():
                arguments += ["--set", f"{key}={value}"]
            done = launch(arguments, 2, config, folder / "log")
            predicted = plan(
                architecture,
                images=len(files),
                forget_share=forgotten / len(files),
                gpus=2,
                deepspeed=json.loads(config.read_text()),
                device="cpu",
                method="lethe",
                options=options,
                num_classes=len(classes),
            ).memory.total()
            history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
            seconds = json.loads((folder / "run" / "metrics.json").read_text())["seconds"]
            rows.append(
                {
                    "case": stage,
                    "precision": precision,
                    "steps": sum("lr" in row for row in history),
                    "peaks": done.peaks,
                    "planned": predicted,
                    "seconds": seconds,
                }
            )
            console.print(
                f"{case}: {_sizes(done.peaks)} MiB, planned {predicted // MIB:,} for the main rank", highlight=False
            )
            report.write(
                {"architecture": architecture, "batch_size": batch_size, "images": len(files), "rows": rows}, json_file
            )
    table = Table(
        "run",
        "precision",
        "steps",
        "peak, main rank",
        "planned",
        "planned / peak",
        "peak, other rank",
        "forget + retain phase",
    )
    for row in rows:
        table.add_row(
            row["case"],
            row["precision"],
            str(row["steps"]),
            f"{row['peaks'][0] / MIB:,.0f} MiB",
            f"{row['planned'] / MIB:,.0f} MiB",
            f"{row['planned'] / row['peaks'][0]:.2f}",
            f"{row['peaks'][1] / MIB:,.0f} MiB",
            f"{row['seconds']['forget_phase']:.0f} + {row['seconds']['retain_phase']:.0f} s",
        )
    console.print(table)
    within = all(0.8 <= row["planned"] / row["peaks"][0] <= 1.2 for row in rows)
    console.print(f"plan within 20% of the peak: {'PASS' if within else 'MISSED'}", highlight=False)
    return within


def _sizes(peaks: dict[int, int]) -> str:
    return " / ".join(f"{peaks[rank] / MIB:,.0f}" for rank in sorted(peaks))
