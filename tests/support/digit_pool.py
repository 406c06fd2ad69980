"""A pool of four tiny models on digits, each trained for a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toys import tiny_vit

from engine.attack.ensemble import what_counts
from engine.data import Source
from engine.jobs.train import train_job
from engine.pool.store import Pool

KEY = "a key"
OPTIONS: dict[str, Any] = {"max_steps": 2, "batch_size": 32, "precision": "fp32", "epochs": 1.0}
TRAINING = {
    "start": {"arch": "tiny", "init": None, "model_args": {}},
    "recipe": {**what_counts(OPTIONS, "retrain"), "seed": 0},
}
# Content of a certificate, without what it is bound to.
CERTIFICATE: dict[str, Any] = {
    "format": 1,
    "granted": True,
    "reason": "",
    "created": "2026-05-01T00:00:00+00:00",
    "expires": "2999-01-01T00:00:00+00:00",
    "kind": "random",
    "max_drift": 0.1,
    "test_score": 0.1,
    "no_op": None,
    "cost": {},
}


def make_pool(folder: Path, digits: Source, models: int = 4, share: float = 0.5, train: bool = True) -> Pool:
    pool = Pool.create(folder, digits, models=models, share=share, training=TRAINING, key=KEY)
    for number in pool.unfinished() if train else ():
        train_member(pool, digits, number)
    return pool


def train_member(pool: Pool, digits: Source, number: int, lacking: bool = True) -> None:
    task = pool.task(digits, number) if lacking else None
    config = {**OPTIONS, "seed": pool.seed(number)}
    train_job(digits, tiny_vit(), pool.place(number), task=task, config=config, progress=False)
