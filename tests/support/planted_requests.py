"""A store of deletion requests over planted data, whose runs take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data import Samples, Source
from engine.evaluate.gates import Gate, Verdict
from engine.jobs.task import Task
from engine.jobs.unlearn import Outcome
from engine.requests import intake, runner
from engine.requests.store import Store
from engine.runtime.files import write_json

COUNT = 40
METRICS = {"accuracy": {"forget": 0.5, "retain": 0.9, "test": 0.6}, "mia": {"efficacy": 0.4, "auc": 0.5}}


class Crash(BaseException):
    """The process is gone."""


def samples(name: str, count: int) -> Samples:
    return Samples(name, [f"{name}/{i}" for i in range(count)], np.arange(count) % 10, lambda i: None)


SOURCE = Source("planted", samples("train", COUNT), samples("validation", 5), samples("test", 5))


def verdict(status: Any) -> Verdict:
    return Verdict([Gate("membership", "?", status, None, "limit", "planted [x]")], 0, {"forget": 1, "test": 1})


def make_store(folder: Path) -> Path:
    (folder / "versions" / "0000").mkdir(parents=True)
    settings: dict[str, Any] = {
        "data": "planted",
        "train": COUNT,
        "fingerprint": SOURCE.train.fingerprint(),
        "checkpoint": "x",
        "method": "lethe",
        "config": {},
        "references": [],
        "gates": None,
        "max_share": 0.2,
    }
    with Store.create(folder, settings):
        return folder


def unlearned(task: Task, checkpoint: str, place: Path, **options: Any) -> Outcome:
    """Stands for `run_job`: the files that say that it ended."""
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "metrics.json", {**METRICS, "collapsed": False})
    samples = {"forget": len(task.forget), "retain_sha256": task.retain.fingerprint()}
    write_json(place / "config.yaml", {"samples": samples})
    for name in ("model.safetensors", "report.html"):
        (place / name).touch()
    return Outcome(None, {**METRICS, "collapsed": False})  # type: ignore[arg-type]


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    def drift(store: Store, run: Any, test: Samples, forgotten: int, options: Any) -> dict[str, Any]:
        return {
            "forgotten": forgotten,
            "share": forgotten / COUNT,
            "test_accuracy": 0.6,
            "test_accuracy_change": -1.0,
            "test_kl": 0.02,
        }

    monkeypatch.setattr(intake, "open_source", lambda spec: SOURCE)
    monkeypatch.setattr(runner, "run_job", unlearned)
    monkeypatch.setattr(runner, "measure_drift", drift)
    monkeypatch.setattr(runner, "why_unusable", lambda store, run, metrics: "")
