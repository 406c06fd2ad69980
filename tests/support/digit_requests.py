"""Runs of deletion requests on digits: two steps, a verdict that is told what to say, processes that are killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data import Source
from engine.evaluate.gates import Gate, Status, Verdict
from engine.jobs.task import Task
from engine.requests.run_options import Overrides
from engine.requests.runner import Finished, run_requests
from engine.requests.store import Store
from engine.runtime.files import write_json

# Two steps over what is retained, a checkpoint after each; so low a rate that nothing collapses.
QUICK = {"max_steps": 2, "checkpoint_every": 1, "batch_size": 32, "precision": "fp32", "lr": 1e-5}


class Judge:
    """Stands for `verify_job`: gives the verdicts that it was told, then PASS; keeps what it was asked."""

    def __init__(self, *statuses: Status) -> None:
        self.statuses = list(statuses)
        self.asked: list[tuple[Task, str, str, list[str]]] = []

    def __call__(
        self, task: Task, checkpoint: Any, original: Any, references: Sequence[Any], *, gates: Any, config: Any
    ) -> Verdict:
        self.asked.append((task, Path(checkpoint).name, Path(original).name, [str(each) for each in references]))
        status = self.statuses.pop(0) if self.statuses else "PASS"
        return Verdict([Gate("membership", "?", status, None, "limit", "planted")], 0, {"forget": 1, "test": 1})


def record(place: Path, verdict: Verdict) -> None:
    write_json(place / "verdict.json", verdict.to_dict())


def ids_of(digits: Source, start: int, count: int = 6) -> list[str]:
    return list(digits.train.ids[start : start + count])


def run(store: Path, *statuses: Status, judge: Judge | None = None, **options: Any) -> Finished:
    given = {field.name: options.pop(field.name) for field in dataclasses.fields(Overrides) if field.name in options}
    finished = run_requests(store, given=Overrides(**given), verify=judge or Judge(*statuses), record=record, **options)
    assert finished is not None
    return finished


def killed(action: Callable[[], Any]) -> None:
    """Runs something in a process of its own that it ends by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def die(*anything: Any, **more: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: int) -> Callable[..., None]:
    return lambda phase, now, total, numbers: die() if now == step else None


def states(store: Path) -> dict[int, str]:
    with Store.open(store) as opened:
        return {request.number: request.state for request in opened.requests()}
