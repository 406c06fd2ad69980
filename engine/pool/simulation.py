"""Simulated deletion requests: a method is run on a user's model for samples of the training set, and judged.

Each request is unlearned from the model by itself. All of them are judged together as one model would be: the forget
samples of each are predicted by the model that forgot them, and test and retain samples are divided among the models.
So one small request that shows nothing by itself adds to the evidence on the procedure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from engine.core.proof_sizes import CONTROLS
from engine.core.result import Progress
from engine.data import Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.representation import compare_weights
from engine.evaluate.verdict import Evidence, ModelOutputs, calibrated_margins
from engine.forget_sets.choose import choose_forget_set
from engine.jobs.task import Task
from engine.jobs.verify import changed_share
from engine.models.predict import Predictions
from engine.pool.answers import Answers, joined
from engine.pool.references import PoolReferences, as_outputs, outputs_of
from engine.pool.store import difference
from engine.run.unlearn import unlearn
from engine.runtime import lock
from engine.runtime.files import read_npz, write_json, write_npz

Kind = Literal["random", "class", "near-duplicates"]
KINDS: tuple[Kind, ...] = ("random", "class", "near-duplicates")
_SETS = ("forget", "test", "retain")
_MOVED = ("forget", "test")
# Samples from which on a request of one class counts as one of that kind, and the share of its most frequent class.
_OF_CLASS, _ONE_CLASS = 5, 0.8
# Smallest relative change of the weights whose logarithm is taken.
_TINY = 1e-9


def kind_of(labels: np.ndarray) -> Kind:
    """Return the kind of a request, by its labels: class if nearly all of five or more samples have one label."""
    most = np.bincount(labels).max() if len(labels) else 0
    return "class" if len(labels) >= _OF_CLASS and most >= _ONE_CLASS * len(labels) else "random"


def draw_requests(
    train: Samples, kind: Kind, size: int, count: int, seed: int, model: nn.Module | None = None
) -> list[list[str]]:
    """Return the ids of simulated requests, none in two of them.

    Args:
        train: Training samples.
        kind: random; class (each request of one class); near-duplicates (of samples whose neighbour is retained).
        size: Samples of a request.
        count: Number of requests.
        seed: Seed of the draw.
        model: The model, for near-duplicates.

    Raises:
        UserError: There are too few samples.
    """
    refuse_too_many(train, size, count)
    rng = np.random.default_rng([seed, size])
    if kind == "near-duplicates":
        chosen = choose_forget_set(train, kind, count=size * count, model=model, seed=seed)
        indices = rng.permutation(chosen.selection.indices)
    elif kind == "class":
        indices = _of_classes(train, size, count, rng)
    else:
        indices = rng.permutation(len(train))[: size * count]
    return [[train.ids[int(i)] for i in part] for part in np.split(indices, count)]


def refuse_too_many(train: Samples, size: int, count: int) -> None:
    """Raise UserError if simulated requests take more than half of the training samples."""
    if size < 1 or count < 1 or size * count > len(train) // 2:
        raise UserError(
            f"certify: {count} requests of {size} samples are {count * size} of the {len(train)} samples of "
            f"{train.name}; take at most half of them"
        )


def _of_classes(train: Samples, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    blocks = []
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        blocks += [members[i * size : (i + 1) * size] for i in range(len(members) // size)]
    if len(blocks) < count:
        raise UserError(
            f"certify: the classes of {train.name} hold {len(blocks)} requests of {size} samples, not {count}"
        )
    return np.concatenate([blocks[int(i)] for i in rng.permutation(len(blocks))[:count]])


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Result of one simulated request.

    Attributes:
        outputs: Predictions of its model: its forget samples, and its share of the test and retain samples.
        repeated: Predictions for the forget samples, computed again.
        changed: Share of the weights outside the head that differ from the original's; None for another architecture.
        figures: Of the run, see `figures_of`.
        seconds: Of unlearning.
        images: Training samples that it saw.
    """

    outputs: ModelOutputs
    repeated: Predictions
    changed: float | None
    figures: dict[str, float]
    seconds: float
    images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Procedure:
    """What is certified.

    Attributes:
        method, config: As of `engine.unlearn`; the seed of request i is `seed` + i.
        kind, size, count: As of `draw_requests`.
        seed: Seed of the draw and of the runs.
    """

    method: str
    config: Mapping[str, Any]
    kind: Kind
    size: int
    count: int
    seed: int = 0


@contextlib.contextmanager
def takes_folder(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Lock the folder of simulated requests; its file procedure.json has what they are of.

    Raises:
        UserError: The folder holds those of another procedure, or other files, or another process works in it.
    """
    path = folder / "procedure.json"
    with lock.held(folder):
        if path.is_file():
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise UserError(f"--out {folder}: {path.name} cannot be read; name another folder") from None
            for name in facts:
                if before.get(name) != json.loads(json.dumps(facts[name])):
                    raise UserError(
                        f"--out {folder}: holds simulated requests that differ in {name} "
                        f"({difference(before.get(name), facts[name])}); name another folder"
                    )
        elif others := [each.name for each in folder.iterdir() if each.name != lock.FILE]:
            raise UserError(f"--out {folder}: holds other files ({others[0]}); name a folder for the certificate alone")
        else:
            write_json(path, facts)
        yield


# Unlearns one request: (original, task, method, options) -> (model, images seen). Replaced in tests and benchmarks.
Run = Callable[[nn.Module, Task, str, Mapping[str, Any]], tuple[nn.Module, int]]


def run_method(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Unlearn a request by a registered method."""
    result = unlearn(
        original,
        task.forget,
        task.retain,
        method=method,
        config=config,
        validation=task.source.validation,
        progress=False,
    )
    return result.model, sum(result.samples_seen.values())


def simulate(
    references: PoolReferences,
    procedure: Procedure,
    folder: Path,
    progress: Progress | None = None,
    run: Run = run_method,
    drawn: Sequence[Sequence[str]] | None = None,
) -> tuple[list[Simulated], Evidence]:
    """Unlearn all simulated requests, and return them with their joint evidence.

    Finished requests are kept in the folder, so that a repeated call continues.

    Args:
        references: The references of the pool.
        procedure: What is certified.
        folder: Folder of the results.
        progress: Called with ("requests", done, all, numbers).
        run: Unlearns one request.
        drawn: Ids of the requests; None: those of `draw_requests`.
    """
    source, original, answers = references.source, references.original, references.answers
    requests = drawn or draw_requests(
        source.train, procedure.kind, procedure.size, procedure.count, procedure.seed, original
    )
    tasks = [Task.of_ids(source, ids, spec=f"simulated request {i}") for i, ids in enumerate(requests, 1)]
    forget = [references.forget(task.forget) for task in tasks]
    retained = _retained(references, [i for ids in requests for i in ids])
    test = references.test
    found = []
    for number, task in enumerate(tasks):
        # Every count-th control sample, so that each is judged by one of the models.
        sets = {
            "forget": task.forget,
            "test": test.subset(np.arange(number, len(test), procedure.count)),
            "retain": retained.subset(np.arange(number, len(retained), procedure.count)),
        }
        path = folder / "requests" / f"{number + 1:04d}.npz"
        one = _kept(path, sets)
        if one is None:
            one = _run_one(original, task, sets, procedure, number, run, answers, forget[number])
            _keep(path, one, sets)
        found.append(one)
        if progress:
            progress("requests", number + 1, len(tasks), {"seconds": one.seconds})
    return found, joint_evidence(references, tasks, found, forget, retained)


def _retained(references: PoolReferences, forgotten: Sequence[str]) -> Samples:
    """Return the retain samples that accuracy is measured on: in no simulated request."""
    train = references.source.train
    left = np.setdiff1d(np.arange(len(train)), train.ids.positions(forgotten))
    return references.answers.readable(evenly_spaced(train.subset(left), CONTROLS), references.original)


def _run_one(
    original: nn.Module,
    task: Task,
    sets: Mapping[str, Samples],
    procedure: Procedure,
    number: int,
    run: Run,
    answers: Answers,
    forget: Sequence[Mapping[str, Predictions]],
) -> Simulated:
    began = time.perf_counter()
    config = {**procedure.config, "seed": procedure.seed + number}
    model, images = run(original, task, procedure.method, config)
    seconds = time.perf_counter() - began
    outputs = outputs_of(answers, model, sets)
    figures = figures_of(model, original, original, outputs.predictions["forget"], forget)
    return Simulated(outputs, answers(model, task.forget), changed_share(model, original), figures, seconds, images)


def figures_of(
    model: nn.Module,
    before: nn.Module,
    root: nn.Module,
    forget: Predictions,
    references: Sequence[Mapping[str, Predictions]],
) -> dict[str, float]:
    """Return figures by which a run is compared with certified ones.

    Args:
        model, before: The model after the run, and before it.
        root: The model that the certified runs began from: its size is the unit of the change. That of `before` may
            have grown in earlier runs, by which the same change would be a smaller part of it.
        forget: Predictions for the forget samples.
        references: Those of the references.

    Returns:
        weights: log10 of the distance of the weights from those before, relative to those of the root. score: mean
        log-odds of the true class on the forget samples, less that of the references.
    """
    try:
        distance = compare_weights(model, before)["distance"]["all"] or 0.0
    except UserError:
        distance = 1.0
    distance *= _size(before) / _size(root)
    score = calibrated_margins(forget, [each["plain"] for each in references])
    return {"weights": float(np.log10(max(distance, _TINY))), "score": float(score.mean())}


def _size(model: nn.Module) -> float:
    """Return the Euclidean norm of all weights."""
    return sum(float(each.detach().double().square().sum()) for each in model.parameters()) ** 0.5


def joint_evidence(
    references: PoolReferences,
    tasks: Sequence[Task],
    found: Sequence[Simulated],
    forget: Sequence[Sequence[Mapping[str, Predictions]]],
    retained: Samples,
) -> Evidence:
    """Return the evidence on the procedure: the outputs of all models, put together."""
    order = np.argsort(_divided(len(references.test), len(found)))
    test = joined([one.outputs.predictions["test"] for one in found]).take(order)
    moved_test = joined([one.outputs.shifted["test"] for one in found]).take(order)
    retain = joined([one.outputs.predictions["retain"] for one in found])
    answers, original = references.answers, references.original

    def before(samples: Sequence[Samples], moved: bool = False) -> Predictions:
        return joined([answers(original, each, moved=moved) for each in samples])

    forgotten, controls = [task.forget for task in tasks], [references.test]
    together = [
        as_outputs({kind: joined([each[j][kind] for each in forget]) for kind in ("plain", "moved")}, of_test)
        for j, of_test in enumerate(references.controls())
    ]
    changes = [one.changed for one in found if one.changed is not None]
    return Evidence(
        model=ModelOutputs(
            {"forget": joined([one.outputs.predictions["forget"] for one in found]), "test": test, "retain": retain},
            {},
            {"forget": joined([one.outputs.shifted["forget"] for one in found]), "test": moved_test},
        ),
        original=ModelOutputs(
            {
                "forget": before(forgotten),
                "test": before(controls),
                "retain": before([retained]).take(_divided(len(retained), len(found))),
            },
            {},
            {"forget": before(forgotten, moved=True), "test": before(controls, moved=True)},
        ),
        references=together,
        repeated=joined([one.repeated for one in found]),
        changed=min(changes) if changes else None,
        partial=True,
        expected_test=references.expected_test(),
    )


def _divided(samples: int, parts: int) -> np.ndarray:
    """Return the positions of samples in the order of the parts that they are divided into."""
    return np.concatenate([np.arange(part, samples, parts) for part in range(parts)])


# --- the file of a request --------------------------------------------------------------------------------------------


def _keep(path: Path, one: Simulated, sets: Mapping[str, Samples]) -> None:
    facts = {"changed": one.changed, "figures": one.figures, "seconds": one.seconds, "images": one.images}
    write_npz(
        path,
        {
            **{f"plain {name}": p.logits for name, p in one.outputs.predictions.items()},
            **{f"moved {name}": p.logits for name, p in one.outputs.shifted.items()},
            "repeated": one.repeated.logits,
            "facts": np.array(json.dumps(facts)),
            "samples": np.array(_samples_of(sets)),
        },
    )


def _samples_of(sets: Mapping[str, Samples]) -> str:
    return " ".join(f"{name} {sets[name].fingerprint()}" for name in _SETS)


def _kept(path: Path, sets: Mapping[str, Samples]) -> Simulated | None:
    stored = read_npz(path)
    if stored is None or str(stored.get("samples")) != _samples_of(sets):
        return None  # of other samples: the data has changed since
    facts = json.loads(str(stored["facts"]))
    plain = {name: Predictions(stored[f"plain {name}"], sets[name].labels) for name in _SETS}
    moved = {name: Predictions(stored[f"moved {name}"], sets[name].labels) for name in _MOVED}
    return Simulated(ModelOutputs(plain, {}, moved), Predictions(stored["repeated"], sets["forget"].labels), **facts)
