"""Which procedures get a certificate on digits: retrained models should, impostors never.

An original and a pool are trained once. Each seed draws other requests, which every procedure then
forgets: `retrain` (models that were trained without the samples) should always get the certificate; impostors never:

    no-op           the original, its weights changed by a thousandth of their size
    head only       a new head on the original's features
    labels flipped  trained to give its second class on so many forget samples that its accuracy on them is right
    early-stopped   fine-tuned on the retained samples for half an epoch

The retrained models come from a bank that is trained once: the training set is cut into blocks, and each model lacks
one. A seed takes eight blocks, and of each as many samples as a request has. So the certificates of `retrain` are not
independent of each other: their rate has the uncertainty of the bank's models as well.

The JSON, below the heading of `bench.harness.report`:

    {"requests", "size", "pool": {"models", "share"},
     "procedures": {NAME: {"granted": seeds, "seeds", "rate": {value, low, high}, "verdicts": {STATUS: seeds},
        "deciding": {GATE: seeds}, "auc": [membership of each seed], "no_op": [rate], "reasons": [why not]}}}
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torch import nn

from bench.harness.report import Report
from bench.publish.sheet import print_sheet
from bench.publish.verdict_sheets import certificates_table
from bench.quality.impostors import flipped, nudged
from bench.quality.retrain_cost import DIGITS
from bench.quality.verdict_matrix import with_new_head
from engine.attack.ensemble import what_counts
from engine.cli.console import console
from engine.cli.demo import MODEL_ARGS
from engine.data import Source, open_source
from engine.evaluate.intervals import proportion
from engine.jobs.start import architecture
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.models.checkpoint import load_checkpoint
from engine.pool.answers import Answers
from engine.pool.certificate import certify
from engine.pool.references import PoolReferences
from engine.pool.simulation import Procedure, Run, run_method, simulate
from engine.pool.store import Pool
from engine.run.folder import is_finished
from engine.run.unlearn import unlearn

RECIPE: Mapping[str, Any] = {**DIGITS.options, **DIGITS.recipe}
REQUESTS, SIZE = 8, 50
BLOCKS = 24
_MODELS, _SHARE = 8, 0.25
_SEED = 5_000  # of the pool and the bank, so that no model has the seed of another benchmark's

Folder = Annotated[Path, typer.Option(help="Where models are kept.")]
Json = Annotated[Path | None, typer.Option("--json", help="Results.")]
PoolFolder = Annotated[Path | None, typer.Option(help="Pool on digits. Default: one is trained.", show_default=False)]


def certificates(
    seeds: Annotated[int, typer.Option(help="Draws of the requests.")] = 20,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Methods of `lethe methods`, findings and no checks.")
    ] = None,
    folder: Folder = Path("runs/certificates"),
    pool: PoolFolder = None,
    json: Json = None,
) -> None:
    """Count how often a retrain, impostors and methods get a certificate, on digits."""
    run_certificates(seeds, methods or [], folder, pool, json)


def run_certificates(
    seeds: int, methods: Sequence[str], folder: Path, pool: Path | None, json_file: Path | None
) -> dict[str, Any]:
    """Print and return the table; arguments as of the command."""
    report = Report()
    original, opened = models_of(folder, pool)
    source = open_source("digits")
    references = PoolReferences(opened, source, original, Answers({"precision": "fp32"}))
    bank = _Bank(folder, original)
    procedures: dict[str, Run] = {"retrain": bank.run, **IMPOSTORS, **dict.fromkeys(methods, run_method)}
    rows: dict[str, Any] = {name: [] for name in procedures}
    found: dict[str, Any] = {}
    for seed in range(seeds):
        drawn = bank.requests(seed)
        for name, run in procedures.items():
            procedure = Procedure(
                method=name if name in methods else "finetune",
                config=DIGITS.options,
                kind="random",
                size=SIZE,
                count=REQUESTS,
                seed=seed,
            )
            place = folder / "certificates" / name.replace(" ", "-") / str(seed)
            simulated, evidence = simulate(references, procedure, place, run=run, drawn=drawn)
            content, verdict = certify(references, procedure, simulated, evidence)
            auc = next(gate.value.value for gate in verdict.gates if gate.name == "membership" and gate.value)
            rows[name].append((content, verdict, auc))
            console.print(f"seed {seed}, {name}: {content['reason'] or 'granted'}", soft_wrap=True)
        found = {
            "requests": REQUESTS,
            "size": SIZE,
            "pool": {"models": opened.models, "share": opened.facts["share"]},
            "procedures": {name: _summary(each) for name, each in rows.items()},
        }
        report.write(found, json_file)
    print_sheet(certificates_table(found))
    return report.write(found, json_file)


def _summary(rows: Sequence[tuple[Mapping[str, Any], Any, float]]) -> dict[str, Any]:
    granted = sum(content["granted"] for content, _, _ in rows)
    return {
        "granted": granted,
        "seeds": len(rows),
        "rate": proportion(granted, len(rows)).to_dict(),
        "verdicts": dict(collections.Counter(verdict.status for _, verdict, _ in rows)),
        "deciding": dict(collections.Counter(gate for _, verdict, _ in rows for gate in verdict.decided_by)),
        "auc": [auc for _, _, auc in rows],
        "no_op": [None if content["no_op"] is None else content["no_op"]["value"] for content, _, _ in rows],
        "reasons": [content["reason"] for content, _, _ in rows],
    }


def models_of(folder: Path, pool: Path | None) -> tuple[nn.Module, Pool]:
    """Return the original and the pool, trained where they are missing."""
    source = open_source("digits")
    fresh = functools.partial(architecture, "vit_tiny_patch16_224", MODEL_ARGS, source)
    place = folder / "original"
    _trained(place, source, fresh(), None, _SEED)
    facts = {
        "start": {"arch": str(place.resolve()), "init": None, "model_args": {}},
        "recipe": {**what_counts(RECIPE, "retrain"), "seed": _SEED},
    }
    opened = (
        Pool.open(pool)
        if pool
        else Pool.create(folder / "pool", source, models=_MODELS, share=_SHARE, training=facts, key="bench")
    )
    for number in opened.unfinished():
        console.print(f"model {number} of the pool")
        _trained(opened.place(number), source, fresh(), opened.task(source, number), opened.seed(number))
    return load_checkpoint(place), opened


def _trained(place: Path, source: Source, model: nn.Module, task: Task | None, seed: int) -> None:
    """Train a model by the recipe, if its run folder does not hold the finished run."""
    if not is_finished(place):
        config, begun = {**RECIPE, "seed": seed}, (place / "config.yaml").is_file()
        train_job(source, model, place, task=task, config=config, resume=begun, progress=False)


class _Bank:
    """Retrained models, each without one block of the training set."""

    def __init__(self, folder: Path, original: nn.Module) -> None:
        self.folder, self.original = folder, original
        self.source = open_source("digits")
        order = np.random.default_rng(_SEED).permutation(len(self.source.train))
        self.blocks = np.array_split(order, BLOCKS)
        self.block_of = {self.source.train.ids[int(i)]: n for n, block in enumerate(self.blocks) for i in block}

    def requests(self, seed: int) -> list[list[str]]:
        """Return the ids of the requests of a seed: a part of one block each."""
        rng = np.random.default_rng([_SEED, seed])
        chosen = rng.permutation(BLOCKS)[:REQUESTS]
        return [[self.source.train.ids[int(i)] for i in rng.permutation(self.blocks[n])[:SIZE]] for n in chosen]

    def run(self, original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
        """Return the model of the bank that lacks the samples."""
        number = self.block_of[task.forget.ids[0]]
        place = self.folder / "bank" / str(number)
        if not is_finished(place):
            console.print(f"retrained model {number} of {BLOCKS}")
            ids = [self.source.train.ids[int(i)] for i in self.blocks[number]]
            without = Task.of_ids(self.source, ids, spec=f"block {number}")
            _trained(place, self.source, self.original, without, _SEED + 100 + number)
        return load_checkpoint(place), 0


def _no_op(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    return nudged(original), 0


def _head_only(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    return nudged(with_new_head(original, task)), 0


def _flipped(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    return flipped(task, original, float(RECIPE["lr"]) / 5), 0


def _early(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    options = {**config, "retain_epochs": 0.5}
    return unlearn(original, task.forget, task.retain, method="finetune", config=options, progress=False).model, 0


IMPOSTORS: dict[str, Run] = {
    "no-op": _no_op,
    "head only": _head_only,
    "labels flipped": _flipped,
    "early-stopped": _early,
}
