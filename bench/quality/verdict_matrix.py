"""Test whether the verdict fails if it must, on models whose verdict is known, by one verifier at one setting.

Made from the untouched original, without any unlearning: the original itself, fresh weights, a head that is reset or
trained again on unchanged features, noise on the logits (fresh, or the same for an image every time), and the
original trained further on the forget samples. All of them must FAIL. Retrained models that are not among the
references must PASS. The verdicts of the registered methods at their defaults follow; these are findings, not checks.

The JSON, below the heading of `bench.harness.report`:

    {"subjects": {NAME: {"data", "forget", "gates": {...}, "references": int, "seconds": {"references": of looking at
        them, a model each: ...}, "models": {NAME: {"expected": status or null, "verdict": as `lethe verify --json`,
        "seconds": float, "accuracy": {...}}}}}}
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bench.harness.report import Report
from bench.quality.retrain_cost import DIGITS, RETRAIN_SEED, Subject, original_of
from engine.cli.console import console, progress_bars
from engine.config import parse_assignments
from engine.data import Loader
from engine.data.samples import evenly_spaced
from engine.evaluate.gates import FAIL, PASS, Gates
from engine.jobs.task import Task
from engine.jobs.verify import Verifier
from engine.methods import get_method
from engine.models.checkpoint import load_checkpoint
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import spec_of
from engine.models.vit import outputs
from engine.run.unlearn import train, unlearn

# Digits with three tenths to forget: with one tenth (144 samples) the attack does not catch the untouched model for
# sure, and the verdict on a retrained one is rightly INSUFFICIENT EVIDENCE.
FORGET_DIGITS = "random:0.3@0"

# Retrained models to be judged, if references have to be trained here: these come after the references.
_REFERENCES = 2
# Retained samples that a new head is fitted on.
_HEAD_SAMPLES = 5_000


def run_verdict_matrix(
    subjects: Sequence[Subject],
    retrained: Sequence[str],
    methods: Sequence[str],
    settings: Sequence[str],
    gates_file: Path | None,
    json_file: Path | None,
) -> dict[str, Any]:
    """Print and return the matrix. retrained: checkpoints that must PASS; if there are none, one is trained here."""
    report, gates, options = Report(), Gates.read(gates_file), parse_assignments(settings)
    for name in methods:
        get_method(name)  # a wrong name shall not cost minutes
    results: dict[str, Any] = {"subjects": {}}
    for subject in subjects:
        if subject is DIGITS:
            subject = dataclasses.replace(subject, forget=FORGET_DIGITS)
        task = Task.open(subject.data, subject.forget)
        original = original_of(subject, task, options)
        references = [load_checkpoint(name) for name in subject.references]
        references += [retrain(subject, task, original, n, options) for n in range(_REFERENCES - len(references))]
        began = time.perf_counter()
        examiner = Verifier(task, original, references, gates=gates)
        seconds = time.perf_counter() - began
        found = {
            "data": subject.data,
            "forget": subject.forget,
            "gates": dataclasses.asdict(gates),
            "references": len(references),
            "seconds": {"references": seconds},
            "models": {},
        }
        results["subjects"][subject.name] = found
        known = [*_planted(task, original, subject, options), *_retrains(subject, task, original, retrained, options)]
        for name, expected, make in [*known, *_unlearned(subject, task, original, methods, options)]:
            console.print(f"{subject.name}: {name}")
            model = make()
            began = time.perf_counter()
            evidence = examiner.evidence(model)
            verdict = examiner.judge(evidence)
            found["models"][name] = {  # type: ignore[index]
                "expected": expected,
                "verdict": verdict.to_dict(),
                "seconds": time.perf_counter() - began,
                "accuracy": {key: p.accuracy for key, p in evidence.model.predictions.items()},
            }
        print_matrix(subject.name, found)
        report.write(results, json_file)
    return report.write(results, json_file)


Made = tuple[str, str | None, Callable[[], nn.Module]]


def _planted(task: Task, original: nn.Module, subject: Subject, options: dict[str, Any]) -> Iterator[Made]:
    yield "untouched", FAIL, lambda: original
    yield "fresh weights", FAIL, lambda: spec_of(original).build(seed=1)
    yield "head reset", FAIL, lambda: with_fresh_head(original)
    yield "head trained anew", FAIL, lambda: with_new_head(original, task)
    yield "noise on logits", FAIL, lambda: with_noise(original, fixed=False)
    yield "noise on logits, the same each time", FAIL, lambda: with_noise(original, fixed=True)
    yield "trained on the forget samples", FAIL, lambda: _trained_on(task, original, subject, options)


def _retrains(
    subject: Subject, task: Task, original: nn.Module, retrained: Sequence[str], options: dict[str, Any]
) -> Iterator[Made]:
    if subject.checkpoint is not None and retrained:
        for name in retrained:
            yield f"retrained: {Path(name).name}", PASS, lambda name=name: load_checkpoint(name)  # type: ignore[misc]
    else:
        yield "retrained, another seed", PASS, lambda: retrain(subject, task, original, _REFERENCES, options)


def _unlearned(
    subject: Subject, task: Task, original: nn.Module, methods: Sequence[str], options: dict[str, Any]
) -> Iterator[Made]:
    for name in methods:
        yield name, None, lambda name=name: _unlearn(subject, task, original, name, options)  # type: ignore[misc]


def retrain(subject: Subject, task: Task, original: nn.Module, number: int, options: dict[str, Any]) -> nn.Module:
    """Return a model trained without the forget samples, with the seed of a number."""
    config = {**subject.options, **subject.recipe, "seed": RETRAIN_SEED + number, **options}
    console.print(f"{subject.name}: retraining, seed {config['seed']}")
    with progress_bars() as progress:
        return train(original, task.retain, config=config, validation=task.source.validation, progress=progress).model


def _unlearn(subject: Subject, task: Task, original: nn.Module, method: str, options: dict[str, Any]) -> nn.Module:
    config = {**subject.options, "seed": 0, **options}
    validation = task.source.validation
    with progress_bars() as progress:
        return unlearn(
            original, task.forget, task.retain, method=method, config=config, validation=validation, progress=progress
        ).model


def _trained_on(task: Task, original: nn.Module, subject: Subject, options: dict[str, Any]) -> nn.Module:
    """Return the result of fine-tuning with the two sets swapped."""
    config = {**subject.options, "seed": 0, **options}
    return unlearn(original, task.retain, task.forget, method="finetune", config=config).model


def with_fresh_head(original: nn.Module) -> nn.Module:
    """Return a copy whose head has its initial weights again; all else is unchanged."""
    model = copy.deepcopy(original)
    fresh: Any = spec_of(original).build(seed=1)
    model.get_classifier().load_state_dict(fresh.get_classifier().state_dict())  # type: ignore[operator]
    return model


def with_new_head(original: nn.Module, task: Task) -> nn.Module:
    """Return a copy whose head is a logistic regression on the original's features of retained samples alone."""
    model: Any = copy.deepcopy(original).eval()
    samples = evenly_spaced(task.retain, _HEAD_SAMPLES)
    loader = Loader(samples, preprocessing_of(model), batch_size=250, device=torch.device("cpu"), workers=0)
    with torch.no_grad():
        features, labels = loader.rows(lambda batch: (outputs(model, batch.images, "features"), batch.labels))
    fitted = LogisticRegression(max_iter=300).fit(features.numpy(), labels.numpy())
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.coef_))
        head.bias.copy_(torch.from_numpy(fitted.intercept_))
    return model


def with_noise(original: nn.Module, *, fixed: bool) -> nn.Module:
    """Return a copy that adds noise to its logits, as large as they are.

    fixed: the noise is a function of the logits' bits; otherwise it is drawn each time.
    """
    model = copy.deepcopy(original)

    def add(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        return logits + logits.detach().std() * (_hashed(logits) if fixed else torch.randn_like(logits))

    model.get_classifier().register_forward_hook(add)  # type: ignore[operator]
    return model


def _hashed(logits: Tensor) -> Tensor:
    """Return noise [B, C] of variance one, a function of each row; coarse, so that rounding does not change it."""
    coarse = (logits.detach().float() * 10).round()
    angle = coarse @ torch.arange(1.0, 1.0 + coarse.shape[1], device=coarse.device)
    steps = torch.arange(1.0, 1.0 + coarse.shape[1], device=coarse.device)
    return 2**0.5 * torch.sin(angle[:, None] * 12.9898 + steps * 78.233)


def print_matrix(name: str, found: dict[str, Any]) -> None:
    table = Table(
        "model", "verdict", "expected", "decided by", "forget %", "test %", "s", header_style="bold", title=name
    )
    for model, row in found["models"].items():
        verdict = row["verdict"]
        right = row["expected"] in (None, verdict["status"])
        table.add_row(
            model,
            f"[{'green' if right else 'red'}]{verdict['status']}[/]",
            row["expected"] or "-",
            ", ".join(verdict["decided_by"]) or "-",
            *(f"{100 * row['accuracy'][key]:.1f}" for key in ("forget", "test")),
            f"{row['seconds']:.1f}",
        )
    console.print(table)
