"""How often retrained models PASS the verdict, and impostors do, by the number of references.

Of an ensemble of models that were retrained without the forget samples each is judged by some of the others, and so is
each impostor (`bench.quality.impostors`) and the untouched original. The outputs of every model are computed once and
kept in a folder; the verdicts on them take seconds, so a change of the gates can be judged without training anything.
The variation between training runs, beyond that by sampling, is measured on the same ensembles: it is the prior of
`engine.evaluate.spread`.

The JSON, below the heading of `bench.harness.report`:

    {"subjects": {NAME: {"data", "forget", "retrained": models, "spread": {GATE: {"runs": standard deviation between
        models, "samples": that which sampling explains, "between": the rest}},
        "retrains": {R: {STATUS: verdicts}}, "deciding": {R: {GATE: verdicts that are no PASS}},
        "impostors": {MODEL: {R: {STATUS: verdicts}}}}}}
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import nn

from bench.harness.report import Report
from bench.publish.verdict_sheets import STATUSES, counts
from bench.quality.impostors import impostors
from bench.quality.retrain_cost import DIGITS, Subject, original_of
from bench.quality.verdict_matrix import FORGET_DIGITS, retrain
from engine.cli.console import console
from engine.errors import UserError
from engine.evaluate.gates import Gates
from engine.evaluate.verdict import Evidence, ModelOutputs, chance_error, judge, left_out_aucs
from engine.jobs.task import Task
from engine.jobs.verify import Verifier
from engine.models.checkpoint import load_checkpoint, save_checkpoint

REFERENCES = (1, 2, 4, 6)
_SETS = 4  # sets of references that judge a model, at most


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs of one model, and the share of its weights that differ from the original's."""

    outputs: ModelOutputs
    repeated: Any
    changed: float | None


def run_calibration(
    subjects: Sequence[Subject],
    *,
    retrained: Sequence[str],
    models: int,
    seeds: int,
    folder: Path,
    json_file: Path | None,
) -> dict[str, Any]:
    """Print and return the table.

    Args:
        subjects: The models with their requests.
        retrained: Checkpoints of retrained models, for a subject with a checkpoint.
        models: Retrained models that are trained for the digits.
        seeds: Requests for the digits, with an original and retrained models each.
        folder: Where the outputs of the models are kept.
        json_file: Results.
    """
    report, results = Report(), {"gates": dataclasses.asdict(Gates.read()), "subjects": {}}
    for subject in subjects:
        if subject is DIGITS:
            for seed in range(seeds):
                forget = FORGET_DIGITS.replace("@0", f"@{seed}")
                name = f"digits, list {seed}"
                one = dataclasses.replace(subject, name=name, forget=forget)
                results["subjects"][name] = _calibrate(one, seed, [], models, folder)
                report.write(results, json_file)
        else:
            if len(retrained) < 3:
                raise UserError(f"calibration: {len(retrained)} --retrained; give 3 or more retrained models")
            results["subjects"][subject.name] = _calibrate(subject, 0, retrained, 0, folder)
    for name, found in results["subjects"].items():
        _print(name, found)
    return report.write(results, json_file)


def _calibrate(subject: Subject, seed: int, retrained: Sequence[str], models: int, folder: Path) -> dict[str, Any]:
    known = Known(folder / subject.name.replace(", ", "-").replace(" ", "-"))
    task = Task.open(subject.data, subject.forget)
    made = Made(subject, task, seed, known)
    judged = [load_checkpoint(name) for name in retrained] or [made.retrain(n) for n in range(models)]
    verifier = Verifier(task, made.original(), [])
    outputs = [
        known.outputs(f"retrained {number}", verifier, lambda model=model: model)  # type: ignore[misc]
        for number, model in enumerate(judged)
    ]
    recipe = {**subject.options, **subject.recipe}
    fakes = impostors(
        task,
        made.original(),
        judged[-1],
        subject.options,
        epochs=min(20.0, float(recipe["epochs"])),
        lr=float(recipe.get("lr", 1e-3)),
    )
    others = {name: known.outputs(name, verifier, make) for name, make in {"untouched": made.original, **fakes}.items()}
    original = others["untouched"].outputs
    found: dict[str, Any] = {
        "data": subject.data,
        "forget": subject.forget,
        "retrained": len(outputs),
        "spread": spread(outputs),
        "retrains": {},
        "deciding": {},
        "impostors": {name: {} for name in others},
    }
    gates = Gates.read()
    for count in REFERENCES:
        statuses: collections.Counter[str] = collections.Counter()
        deciding: collections.Counter[str] = collections.Counter()
        for number, one in enumerate(outputs):
            rest = [each for index, each in enumerate(outputs) if index != number]
            for references in _some(rest, count):
                verdict = judge(as_evidence(one, original, references), gates)
                statuses[verdict.status] += 1
                deciding.update(verdict.decided_by)
        if not statuses:
            continue
        found["retrains"][count] = {status: statuses[status] for status in STATUSES}
        found["deciding"][count] = dict(deciding)
        for name, one in others.items():
            # Some impostors are made from the last of the retrained models, which therefore judges none.
            counted: collections.Counter[str] = collections.Counter(
                judge(as_evidence(one, original, references), gates).status for references in _some(outputs[:-1], count)
            )
            found["impostors"][name][count] = {status: counted[status] for status in STATUSES}
    return found


def _some(outputs: Sequence[Outputs], count: int) -> Iterator[tuple[Outputs, ...]]:
    """Return sets of `count` references, at most _SETS of them, spread over all that there are."""
    sets = list(itertools.combinations(outputs, count))
    yield from (sets[i] for i in sorted({int(i) for i in np.linspace(0, len(sets) - 1, _SETS)} if sets else ()))


def as_evidence(one: Outputs, original: ModelOutputs, references: Sequence[Outputs]) -> Evidence:
    return Evidence(
        model=one.outputs,
        original=original,
        references=[each.outputs for each in references],
        repeated=one.repeated,
        changed=one.changed,
    )


class Known:
    """Outputs of models in a folder, computed when they are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def outputs(self, name: str, verifier: Verifier, make: Callable[[], nn.Module]) -> Outputs:
        file = self.folder / f"{name.replace(' ', '-').replace(',', '')}.pkl"
        if not file.is_file():
            console.print(f"{self.folder.name}: {name}")
            evidence = verifier.evidence(make())
            file.write_bytes(pickle.dumps(Outputs(evidence.model, evidence.repeated, evidence.changed)))
        found: Outputs = pickle.loads(file.read_bytes())
        return found


class Made:
    """The models of a subject, trained when they are missing."""

    def __init__(self, subject: Subject, task: Task, seed: int, known: Known) -> None:
        self.subject, self.task, self.seed, self.folder = subject, task, seed, known.folder

    def original(self) -> nn.Module:
        return self._kept("original", lambda: original_of(self.subject, self.task, {"seed": self.seed}))

    def retrain(self, number: int) -> nn.Module:
        seed = 100 * self.seed + number
        return self._kept(f"retrain_{number}", lambda: retrain(self.subject, self.task, self.original(), seed, {}))

    def _kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if self.subject.checkpoint is not None:
            return load_checkpoint(self.subject.checkpoint)
        if not (self.folder / name).is_dir():
            save_checkpoint(make(), self.folder / name)
        return load_checkpoint(self.folder / name)


def spread(outputs: Sequence[Outputs]) -> dict[str, dict[str, float]]:
    """Return standard deviations between retrained models: of all, what sampling explains, and what remains.

    Accuracies in percentage points: sampling explains half of the variance of the difference between two models, which
    is known from the samples on which they differ. AUC of the attack: that of one distribution.
    """
    found = {}
    for name in ("test", "retain", "forget"):
        right = np.stack([each.outputs.predictions[name].correct for each in outputs])
        accuracies = 100 * right.mean(1)
        differences = [100 * (a - b) for a, b in itertools.combinations(right, 2)]
        samples = float(np.mean([d.var() / len(d) for d in differences])) / 2
        found[f"{name} accuracy"] = _parts(float(accuracies.var(ddof=1)), samples)
    for name, sets in {
        "auc": [o.outputs.predictions for o in outputs],
        "shifted auc": [o.outputs.shifted for o in outputs],
        "relearning auc": [o.outputs.relearned for o in outputs],
    }.items():
        members = "held_back" if name.startswith("relearning") else "forget"
        found[name] = _auc_parts(sets, members)
    return found


def _auc_parts(sets: Sequence[Mapping[str, Any]], members: str) -> dict[str, float]:
    count = len(sets)
    runs = (count - 1) / count * float(np.mean(np.square(left_out_aucs(sets, members))))
    return _parts(runs, chance_error(len(sets[0][members]), len(sets[0]["test"])) ** 2 * count / (count + 1))


def _parts(runs: float, samples: float) -> dict[str, float]:
    return {"runs": runs**0.5, "samples": samples**0.5, "between": max(0.0, runs - samples) ** 0.5}


def _print(name: str, found: Mapping[str, Any]) -> None:
    table = Table("model", *(f"{count} references" for count in found["retrains"]), header_style="bold", title=name)
    table.add_row("retrained: PASS / INSUFFICIENT / FAIL", *(counts(row) for row in found["retrains"].values()))
    for model, rows in found["impostors"].items():
        table.add_row(model, *(counts(row) for row in rows.values()))
    console.print(table)
    for count, deciding in found["deciding"].items():
        console.print(f"  {count} references, retrained models that do not PASS: {deciding or 'none'}")
    for gate, parts in found["spread"].items():
        console.print(
            f"  {gate}: sd {parts['runs']:.3f}, by samples {parts['samples']:.3f}, rest {parts['between']:.3f}"
        )
