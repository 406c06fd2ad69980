"""A queue of small requests, one run each by the command line, whose proof is a pool or a certificate.

Their sizes are given, and taken in turn. In the tenth run a method that changes nothing is planted, and in the
fifteenth one whose change is too small to matter: both must be refused. They are run again as they are, so that every
request is decided.

The JSON, below the heading of `bench.harness.report`:

    {"data", "method", "options", "certificates": [{"sizes", "granted"}], "retrain": forward passes of a retrain,
     "runs": [{"request", "samples", "planted": "" | "no-op" | "nudged", "status", "state", "kind", "reason", "images",
        "kept": {"test accuracy" and "retain accuracy": [points above the original's, low, high]},
        "share": images over those of a retrain, "proof_seconds", "unlearn_seconds"}],
     "judged": {"status", "kind", "samples", "decided_by"} of all that was forgotten, by the pool}
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.harness.report import Report
from bench.publish.sheet import print_sheet
from bench.publish.verdict_sheets import queue_table
from engine.cli.console import console
from engine.config import parse_assignments
from engine.data import open_source
from engine.errors import UserError

SIZES = "1,5,20,50"
PLANTED = {10: "no-op", 15: "nudged"}
# Keeps a part of what a run changes in each weight, and leaves all options as they are.
_PLANT = """
from engine.run.train_engine import TrainEngine
begin, finish = TrainEngine.__init__, TrainEngine.finish

def begin_and_keep(self, model, *others, **options):
    self.before = {{name: value.detach().clone() for name, value in model.state_dict().items()}}
    begin(self, model, *others, **options)

def finish_in_part(self):
    model = finish(self)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(self.before[name] + {factor} * (value - self.before[name]))
    return model

TrainEngine.__init__, TrainEngine.finish = begin_and_keep, finish_in_part
from engine.cli.app import main
main()
"""
_FACTORS = {"no-op": "0.0", "nudged": "1e-3"}


def pool_queue(
    checkpoint: Annotated[str, typer.Option(help="The model before unlearning.", show_default=False)],
    data: Annotated[str, typer.Option(help="Data source, as for `lethe unlearn`.", show_default=False)],
    pool: Annotated[Path, typer.Option(help="Pool of `lethe pool train`.", show_default=False)],
    certificate: Annotated[list[Path], typer.Option(help="Certificate of `lethe certify`.", show_default=False)],
    method: Annotated[str, typer.Option(help="Method of the runs.")] = "lethe",
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 20,
    samples: Annotated[str, typer.Option(help="Samples of the requests, in turn.")] = SIZES,
    seed: Annotated[int, typer.Option(help="Seed of the draw of samples.")] = 0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for every run.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> dict[str, Any]:
    """Run a queue of small requests by the command line, with a no-op planted, and print the proof of each."""
    settings, turns = settings or [], sizes_of(samples)
    report, train = Report(), open_source(data).train
    order = np.random.default_rng(seed).permutation(len(train))
    sizes = [turns[number % len(turns)] for number in range(requests)]
    if sum(sizes) > len(train) // 2:
        raise UserError(f"pool-queue: {sum(sizes)} samples of {len(train)}; give fewer --requests")
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    found: dict[str, Any] = {
        "data": data,
        "method": method,
        "options": parse_assignments(settings),
        "certificates": [_facts(each) for each in certificate],
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        queue, ids = Path(folder) / "queue", Path(folder) / "ids.txt"
        options = [word for each in settings for word in ("--set", each)]
        of_pool = ["--pool", str(pool), *(word for each in certificate for word in ("--certificate", str(each)))]
        _lethe("init", queue, "--checkpoint", checkpoint, "--data", data, "--method", method, *options, *of_pool)
        for number, part in enumerate(parts, 1):
            ids.write_text("".join(f"{train.ids[int(i)]}\n" for i in part))
            _lethe("add", queue, "--ids", str(ids))
            for planted in [PLANTED[number], ""] if number in PLANTED else [""]:
                row = _run(queue, Path(folder) / "run.json", planted)
                found["runs"].append({"request": number, "samples": len(part), "planted": planted, **row})
                console.print(f"request {number}, {len(part)} samples {planted}: {row['status']} by {row['kind']}")
                report.write(found, json_file)
        _lethe("judge", queue, "--pool", str(pool), "--json", str(ids), codes=(0, 1, 3))
        judged = json.loads(ids.read_text())["judged"]
        verdict = None if judged is None else judged["verdict"]
        found["judged"] = verdict and {key: verdict[key] for key in ("status", "kind", "samples", "decided_by")}
    print_sheet(queue_table(found))
    console.print(dict(collections.Counter(row["state"] for row in found["runs"])))
    console.print(f"all that was forgotten, by the pool: {found['judged']}")
    return report.write(found, json_file)


def sizes_of(text: str) -> list[int]:
    """Return the sizes of requests, such as "1,5,20".

    Raises:
        UserError: One is not a number above 0.
    """
    if not all(each.strip().isdecimal() and int(each) for each in text.split(",")):
        raise UserError(f"--samples {text}: expected numbers above 0 with commas between, such as {SIZES}")
    return [int(each) for each in text.split(",")]


def _facts(certificate: Path) -> dict[str, Any]:
    path = certificate / "certificate.json" if certificate.is_dir() else certificate
    content = json.loads(path.read_text(encoding="utf-8"))["content"]
    return {key: content[key] for key in ("sizes", "kind", "granted", "requests", "no_op", "cost")}


def _lethe(command: str, queue: Path, *words: str, codes: Sequence[int] = (0,), plant: str = "") -> int:
    start = ["-c", _PLANT.format(factor=_FACTORS[plant])] if plant else ["-m", "engine"]
    run = subprocess.run(
        [sys.executable, *start, "request", command, "--store", str(queue), *words], capture_output=True, text=True
    )
    if run.returncode not in codes:
        raise UserError(f"pool-queue: lethe request {command} ended with {run.returncode}: {run.stderr[-500:]}")
    return run.returncode


def _run(queue: Path, json_file: Path, planted: str) -> dict[str, Any]:
    _lethe("run", queue, "--json", str(json_file), codes=(0, 1, 3), plant=planted)
    run = json.loads(json_file.read_text())["run"]
    verdict = run["verdict"] or {}
    proof = verdict.get("proof") or {}
    return {
        "status": run["status"],
        "state": run["state"],
        "kind": verdict.get("kind", "none"),
        "reason": ", ".join(verdict["decided_by"]) if verdict else run["reason"],
        "kept": {
            gate["name"]: [gate["value"][key] for key in ("value", "low", "high")]
            for gate in verdict.get("gates", [])
            if gate["name"] in ("test accuracy", "retain accuracy") and gate["value"]
        },
        "images": proof.get("images"),
        "share": proof["images"] / proof["retrain"] if proof else None,
        "proof_seconds": proof.get("seconds"),
        "unlearn_seconds": run["metrics"]["seconds"]["unlearn"],
    }
