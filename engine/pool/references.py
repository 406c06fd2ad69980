"""References from a pool: for each sample, models of the pool that were not trained on it.

The verdict compares a model with R references on the same samples (`engine.evaluate.verdict`). Here the prediction of
reference j for a sample is that of the j-th of the models that were not trained on it, in the order that its id draws;
so every reference is put together from all models of the pool. Test samples, which no model was trained on, are given
to models in the same way, so that on forget and on test samples the references vary in the same way.

Models of a pool are trained on a part of the samples, and know less than a retrained model: what is expected of the
model is read from test samples (`Evidence.partial`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from engine.core.proof_sizes import CONTROLS
from engine.data import Samples, Source
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.gates import Gate, Gates, Proof, Verdict, undecided
from engine.evaluate.membership import auc
from engine.evaluate.verdict import Evidence, ModelOutputs, calibrated_margins, chance_error, judge
from engine.jobs.opening import open_model
from engine.jobs.task import Task
from engine.jobs.verify import changed_share
from engine.models.predict import Predictions
from engine.models.preprocessing import preprocessing_of
from engine.pool.answers import Answers
from engine.pool.membership import FEWEST_WITHOUT, digests_of, order_of
from engine.pool.store import Pool, model_identity
from engine.runtime.files import read_npz, write_npz

# Of each kind, for the check of what a model of the pool knows.
_CHECKED = 500
# Share of a class that has to be retained for the models of a pool to be references for its samples.
_LEFT = 0.1
# Standard errors by which a model may know its samples better than the other models of the pool know theirs.
_SURE = 3.5


class PoolReferences:
    """The references of a pool for one data source and original, opened and checked.

    Args:
        pool: The pool.
        source: The data, with labels in the order of the models.
        original: The model before unlearning.
        answers: Computes predictions.

    Attributes:
        coverage: What of the data the pool covers.
        count: R, the number of references.

    Raises:
        UserError: The pool is not complete or out of date, was trained on other data, or holds a model of another
            architecture or that knows samples which it should lack.
    """

    def __init__(self, pool: Pool, source: Source, original: nn.Module, answers: Answers) -> None:
        self.pool, self.source, self.original, self.answers = pool, source, original, answers
        self.coverage = pool.check(source)
        if self.coverage.out_of_date:
            raise UserError(
                f"pool {pool.folder}: out of date: since its last model was trained {self.coverage.new} samples are "
                f"new and {self.coverage.gone} are gone, of {self.coverage.samples}; add models by lethe pool train "
                f"--models {pool.models + 2}, or train a new pool"
            )
        self.count = max(FEWEST_WITHOUT, int(pool.facts["lacking"]))
        self.test = answers.readable(evenly_spaced(source.test, CONTROLS), original)
        self._check_models()

    @property
    def retrain(self) -> float:
        """Forward passes of a retrain by the pool's recipe; a training step counts as three."""
        return 3.0 * float(self.pool.facts["recipe"]["epochs"]) * len(self.source.train)

    @functools.cached_property
    def _read_by(self) -> tuple[Any, ...]:
        return preprocessing_of(self.model(1)).to_dict(), self.answers.run.decode

    def model(self, number: int) -> nn.Module:
        return open_model(self.pool.place(number))

    def forget(self, samples: Samples, *, moved: bool = True) -> list[dict[str, Predictions]]:
        """Return the references' predictions, plain and, unless left out, moved, for training samples.

        Raises:
            UserError: Fewer than two models of the pool were not trained on a sample.
        """
        short = self.pool.short(samples.ids)
        if len(short):
            raise UserError(
                f"pool {self.pool.folder}: does not cover {len(short)} of {len(samples)} samples, such as "
                f"{samples.ids[int(short[0])]!r}: fewer than {FEWEST_WITHOUT} of its models lack them; add models by "
                f"lethe pool train --models {self.pool.models + 2}"
            )
        return self._of(samples, self.pool.unseen(samples.ids), ("plain", "moved") if moved else ("plain",))

    def controls(self) -> list[dict[str, Predictions]]:
        """Return the references' predictions, plain and moved, for the test samples; kept in the pool's folder."""
        facts = (self.pool.identity, self.test.fingerprint(), self.count, self.answers.precision)
        path = self._kept("test", facts)
        kept = read_npz(path)
        if kept is None:
            unseen = np.ones((len(self.test), self.pool.models), dtype=bool)
            found = self._of(self.test, unseen)
            write_npz(path, {f"{n} {kind}": p.logits for n, each in enumerate(found) for kind, p in each.items()})
            return found
        kinds = ("plain", "moved")
        return [{kind: Predictions(kept[f"{n} {kind}"], self.test.labels) for kind in kinds} for n in range(self.count)]

    def expected_test(self) -> np.ndarray:
        """Return the share of all models that are right for each test sample, float64 [n]; kept in the folder."""
        path = self._kept("expected", (self.pool.identity, self.test.fingerprint(), self.answers.precision))
        kept = read_npz(path)
        if kept is None:
            models = (self.model(number) for number in range(1, self.pool.models + 1))
            kept = {"share": np.mean([self.answers(model, self.test).correct for model in models], axis=0)}
            write_npz(path, kept)
        return kept["share"]

    def original_controls(self) -> Predictions:
        """Return the original's predictions for the test samples; kept in the pool's folder."""
        facts = (model_identity(self.original), self.test.fingerprint(), self.answers.precision)
        path = self._kept("original", facts)
        kept = read_npz(path)
        if kept is not None:
            return Predictions(kept["logits"], self.test.labels)
        found = self.answers(self.original, self.test)
        write_npz(path, {"logits": found.logits})
        return found

    def _kept(self, what: str, facts: tuple[Any, ...]) -> Path:
        """Return the file of outputs that depend on these facts, and on how images are read for the models."""
        facts = (*facts, self._read_by)
        return self.pool.folder / "outputs" / f"{what}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npz"

    def _of(
        self, samples: Samples, unseen: np.ndarray, kinds: Sequence[str] = ("plain", "moved")
    ) -> list[dict[str, Predictions]]:
        """Return R references, each with the predictions of the first models that were not trained on a sample."""
        order = order_of(digests_of(samples.ids, self.pool.facts["key"]), self.pool.models)
        lacks = np.take_along_axis(unseen, order, axis=1)
        rank = np.cumsum(lacks, axis=1) * lacks
        # Where fewer models than R lack a sample, its last one stands for the others.
        wanted = np.minimum(np.arange(1, self.count + 1)[None], unseen.sum(1)[:, None])
        chosen = np.stack(
            [
                np.take_along_axis(order, (rank == wanted[:, [j]]).argmax(1)[:, None], axis=1)[:, 0]
                for j in range(self.count)
            ]
        )
        found: list[dict[str, np.ndarray]] = [{} for _ in range(self.count)]
        for number in range(self.pool.models):
            rows = np.flatnonzero((chosen == number).any(0))
            if not len(rows):
                continue
            model, part = self.model(number + 1), samples.subset(rows)
            for kind in kinds:
                logits = self.answers(model, part, moved=kind == "moved").logits
                for j in range(self.count):
                    into = found[j].setdefault(kind, np.empty((len(samples), logits.shape[1]), dtype=np.float32))
                    mine = chosen[j, rows] == number
                    into[rows[mine]] = logits[mine]
        return [{kind: Predictions(values, samples.labels) for kind, values in each.items()} for each in found]

    # --- checks of the models -----------------------------------------------------------------------------------------

    def _check_models(self) -> None:
        """Check size and knowledge of each model, once for each original."""
        path = self._kept("checked", (self.pool.identity, model_identity(self.original), self.answers.precision))
        if read_npz(path) is not None:
            return
        unseen = self.pool.unseen(self.source.train.ids)
        size = sum(p.numel() for p in self.original.parameters())
        found = []
        for number in range(1, self.pool.models + 1):
            model = self.model(number)
            mine = sum(p.numel() for p in model.parameters())
            if mine != size:
                raise UserError(
                    f"pool {self.pool.folder}: model {number} has {mine:,} parameters, the original {size:,}; a pool "
                    "has the architecture of the original"
                )
            if (used := preprocessing_of(model)) != preprocessing_of(self.original):
                raise UserError(
                    f"pool {self.pool.folder}: model {number} has the preprocessing {used.line()}, the original "
                    f"{preprocessing_of(self.original).line()}; a pool has that of the original"
                )
            found.append(self._knowledge(model, unseen[:, number - 1]))
        check_knowledge(self.pool.folder, found)
        write_npz(path, {"knowledge": np.array(found)})

    def _knowledge(self, model: nn.Module, unseen: np.ndarray) -> tuple[float, float]:
        """Return (AUC, its standard error by chance) of how much worse a model fits the samples that it lacks.

        The original was trained on all samples. Compared with it, a model fits those that it lacks less than those
        that it was trained on: above 0.5. If it was trained on both, it fits both alike.

        Args:
            model: A model of the pool.
            unseen: bool [training samples], those that it lacks.
        """
        train = self.source.train
        sets = [
            self.answers.readable(evenly_spaced(train.subset(np.flatnonzero(rows)), _CHECKED), self.original)
            for rows in (unseen, ~unseen)
        ]
        lacked, seen = (
            calibrated_margins(self.answers(self.original, samples), [self.answers(model, samples)]) for samples in sets
        )
        return auc(lacked, seen), chance_error(len(lacked), len(seen))


def check_knowledge(folder: Path, found: Sequence[tuple[float, float]]) -> None:
    """Check that no model of a pool knows the samples that it should lack better than the others know theirs.

    Args:
        folder: Folder of the pool.
        found: For each model, as of `PoolReferences._knowledge`.

    Raises:
        UserError: One does, by more than chance explains.
    """
    values = np.array([value for value, _ in found])
    for number, (value, error) in enumerate(found, 1):
        expected = float(np.delete(values, number - 1).mean())
        if value < expected - _SURE * error:
            raise UserError(
                f"pool {folder}: model {number} was trained on samples that it should lack: the original fits them no "
                f"better than it does (AUC {value:.3f} against its own samples, {expected:.3f} for the others); "
                "remove its folder, and train it again by lethe pool train"
            )


def emptied_classes(task: Task) -> Gate | None:
    """Return the undecided gate of a request after which hardly any sample of a class is retained; None for others.

    The models of a pool were trained on other images of that class, as no model is that was retrained without it.
    """
    train = task.source.train
    before, left, forgotten = (
        np.bincount(labels, minlength=int(train.labels.max()) + 1)
        for labels in (train.labels, task.retain.labels, task.forget.labels)
    )
    emptied = np.flatnonzero((forgotten > 0) & (left < _LEFT * before))
    if not len(emptied):
        return None
    label = int(emptied[0])
    name = train.class_names[label] if train.class_names else label
    return undecided(
        "classes",
        "Is something of every class retained?",
        f"{100 * _LEFT:g}% of each class that samples are forgotten of",
        f"of class {name} {left[label]} of {before[label]} samples are retained; the models of the pool know that "
        "class, and a model retrained without it does not, so they are no references here: give --reference in place "
        "of --pool (lethe train --forget)",
    )


def evidence_by_pool(references: PoolReferences, task: Task, model: nn.Module) -> Evidence:
    """Return the evidence on a model whose references are those of a pool."""
    answers, original = references.answers, references.original
    retain = answers.readable(evenly_spaced(task.retain, CONTROLS), original)
    sets = {"forget": task.forget, "test": references.test, "retain": retain}
    forget, test = references.forget(task.forget), references.controls()
    return Evidence(
        model=outputs_of(answers, model, sets),
        original=outputs_of(answers, original, sets),
        references=[as_outputs(f, t) for f, t in zip(forget, test, strict=True)],
        repeated=answers(model, task.forget),
        changed=changed_share(model, original),
        partial=True,
        expected_test=references.expected_test(),
    )


def judge_task(references: PoolReferences, task: Task, model: nn.Module, gates: Gates) -> Verdict:
    """Return the verdict on a model whose references are those of a pool."""
    emptied = emptied_classes(task)
    if emptied is not None:
        sizes = {"forget": len(task.forget), "test": len(references.test), "retain": len(task.retain)}
        return Verdict([emptied], 0, sizes)
    return judge(evidence_by_pool(references, task, model), gates)


def outputs_of(answers: Answers, model: nn.Module, sets: Mapping[str, Samples]) -> ModelOutputs:
    plain = {name: answers(model, samples) for name, samples in sets.items()}
    moved = {name: answers(model, sets[name], moved=True) for name in ("forget", "test")}
    return ModelOutputs(plain, {}, moved)


def as_outputs(forget: Mapping[str, Predictions], test: Mapping[str, Predictions]) -> ModelOutputs:
    return ModelOutputs(
        {"forget": forget["plain"], "test": test["plain"]}, {}, {"forget": forget["moved"], "test": test["moved"]}
    )


def judge_by_pool(
    pool: Path,
    task: Task,
    checkpoint: str | Path,
    original: str | Path,
    *,
    gates: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Verdict:
    """Return the verdict on a checkpoint whose references are those of a pool; the body of `lethe verify --pool`.

    Args:
        pool: Folder of the pool.
        task, checkpoint, original, gates, config: As of `engine.jobs.verify.verify_job`.

    Raises:
        UserError: As of `PoolReferences`, or the pool does not cover a forget sample.
    """
    began, limits, model = time.perf_counter(), Gates.read(gates), open_model(checkpoint)
    opened, before = Pool.open(pool), open_model(original)
    opened.check_recipe(str(original))
    task = task.readable(before, config)
    references = PoolReferences(opened, task.source, before, Answers(config))
    return with_cost(judge_task(references, task, model, limits), references, "pool", opened.folder, began)


def with_cost(
    verdict: Verdict, references: PoolReferences, kind: Literal["pool", "certificate"], source: Path, began: float
) -> Verdict:
    """Return a verdict with its proof; `began`: time.perf_counter() before it."""
    proof = Proof(
        kind=kind,
        source=str(source),
        images=references.answers.images,
        retrain=references.retrain,
        seconds=time.perf_counter() - began,
    )
    return dataclasses.replace(verdict, proof=proof)
