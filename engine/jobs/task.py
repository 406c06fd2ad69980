"""A deletion job from request to evidence: unlearn, evaluate, and the files of the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from engine.audit.run_record import TRAINED, UNLEARNED, RecordOptions, write_record
from engine.config import RunConfig, build, to_dict
from engine.core.result import UnlearnResult
from engine.data import (
    ForgetRequest,
    Preprocessing,
    Samples,
    Source,
    from_dataset,
    open_source,
    read_forget_request,
    refuse_overlap,
)
from engine.data.labels import relabelled, relabelled_source
from engine.data.readable import bad_images, without
from engine.data.samples import concatenate
from engine.errors import UserError, nearest
from engine.evaluate import Evaluation, Evaluator, compare
from engine.evaluate.verdict import Gates, Witness
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.start import import_note
from engine.methods import get_method
from engine.methods.lethe import LetheConfig
from engine.models.checkpoint import weights_sha256
from engine.models.huggingface import as_classifier
from engine.report import ReportData, build_gallery, write_report
from engine.run.folder import check_apart, check_free
from engine.run.trainer import Progress
from engine.run.unlearn import train, unlearn
from engine.runtime.environment import environment
from engine.runtime.files import sha256, write_json
from engine.runtime.process_group import World

# Options of a run that an evaluation has too.
_EVALUATION_KEYS = ("precision", "device", "workers", "decode", "on_bad_image", "max_bad_share")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data source with a forget request resolved against it.

    unreadable: samples of the request that are not in `forget`, since their images cannot be read.
    facts: what else config.yaml keeps of it.
    """

    source: Source
    request: ForgetRequest
    forget: Samples
    retain: Samples
    unreadable: int = 0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: str, forget: str) -> Task:
        world = World.current()
        if world.size > 1:  # an index is built by one rank, and then read by all
            world.on_main(lambda: open_source(data))
        source = open_source(data)
        request = read_forget_request(forget, source.train)
        return cls(source, request, *request.split(source.train))

    @classmethod
    def of_ids(cls, source: Source, ids: Sequence[str], *, spec: str, excluded: Sequence[str] = ()) -> Task:
        """Forgets `ids`; retains the training samples that are neither among them nor `excluded`.

        excluded: forgotten earlier, so that they must never be trained on again; those that the data does not hold are
        gone anyway. spec: what the request is called in messages and files.
        Raises UserError for ids that the data does not hold, for none at all, and where nothing is left to retain.
        """
        train = source.train
        wanted = sorted(set(ids))
        positions = train.positions(wanted, spec)
        if not wanted:
            raise UserError(f"{spec}: names no samples; nothing to forget")
        indices = np.unique(positions)  # an id may be named in two Unicode forms
        request = ForgetRequest(spec, indices, len(ids) - len(indices), {})
        forget, others = request.split(train)
        kept = np.setdiff1d(np.arange(len(others)), others.ids.positions(excluded))
        if not len(kept):
            raise UserError(f"{spec}: with it, nothing of {train.name} is left to retain; train a new model instead")
        return cls(source, request, forget, others.subset(kept))

    def relabelled(self, mapping: np.ndarray, names: Sequence[str]) -> Task:
        """The same task with label `mapping[label]` in place of the data's; names: of the classes by new label."""
        return dataclasses.replace(
            self,
            source=relabelled_source(self.source, mapping, names),
            forget=relabelled(self.forget, mapping, names),
            retain=relabelled(self.retain, mapping, names),
        )

    def evaluator(self, config: Mapping[str, Any] | None = None) -> Evaluator:
        options = {key: value for key, value in (config or {}).items() if key in _EVALUATION_KEYS}
        return Evaluator(self.forget, self.retain, self.source.test, **options)

    def without(self, ids: Collection[str]) -> Task:
        """The task as far as it can be measured: forget samples whose images cannot be read are left out."""
        forget = without(self.forget, ids)
        return dataclasses.replace(self, forget=forget, unreadable=self.unreadable + len(self.forget) - len(forget))

    def readable(self, model: nn.Module, config: Mapping[str, Any] | None = None) -> Task:
        """Decodes all forget images: by on_bad_image an error at the first bad one, or the task without them."""
        run = build(RunConfig, {key: value for key, value in (config or {}).items() if key in _EVALUATION_KEYS})
        found = bad_images(
            self.forget,
            Preprocessing.of(model),
            on_bad_image=run.on_bad_image,
            max_bad_share=run.max_bad_share,
            out_of=len(self.forget) + len(self.retain),
            workers=run.workers,
            decode=run.decode,
            world=World.current(),
        )
        return self.without(found)

    def notes(self) -> dict[str, Any]:
        """What config.yaml keeps of the request: what it is called, not the ids themselves."""
        forget: dict[str, Any] = {"spec": self.request.spec, "duplicates": self.request.duplicates}
        kind = self.source.train.id_kind
        if kind is not None and kind.rows is not None:
            forget["rows"] = kind.rows  # ids are positions: they hold for this number of rows alone
        return {"data": self.source.spec, "forget": forget, **self.facts}

    def counted(self) -> dict[str, Any]:
        """What record.json keeps of it beside hashed ids: not the name of a file or class, which may be a person's."""
        spec = self.request.spec
        return {
            "kind": next((kind for kind in ("class", "random") if spec.startswith(f"{kind}:")), "ids"),
            "forget": len(self.forget) + self.unreadable,
            "retain": len(self.retain),
            "duplicates": self.request.duplicates,
            **({"unreadable": self.unreadable} if self.unreadable else {}),
        }


@dataclasses.dataclass(frozen=True)
class Outcome:
    result: UnlearnResult
    metrics: dict[str, Any]


def run_job(
    task: Task,
    checkpoint: str,
    output_dir: Path,
    *,
    method: str = "lethe",
    config: Mapping[str, Any] | None = None,
    references: Sequence[str | Path] = (),
    retrain_seconds: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    deepspeed: str | Path | None = None,
    record: RecordOptions | None = None,
) -> Outcome:
    """Unlearns a checkpoint, evaluates it beside the original and the references, and fills the run folder.

    record: who signs record.json, and what else it says of the request.
    """
    from engine.jobs.verify import check_references, original_of

    record = record or RecordOptions()
    check_free(output_dir)
    check_apart(output_dir, [checkpoint, *references])
    record.check()
    original = load_checkpoint(checkpoint)
    check_references(task, references, {"the original": original}, original_of(checkpoint, original))
    retrained = [load_checkpoint(reference) for reference in references]
    metrics: dict[str, Any] = {}

    def evaluate(result: UnlearnResult) -> None:
        began = time.perf_counter()
        world = World.current()
        measured = task.without(result.bad_images)
        evaluator = measured.evaluator(result.config)
        evaluations = {"original": evaluator(original), "unlearned": evaluator(result.model)}
        evaluations.update({f"retrained {i}": evaluator(model) for i, model in enumerate(retrained, 1)})
        seconds = {**result.seconds, "evaluate": time.perf_counter() - began}
        metrics.update(
            compare(
                evaluations["unlearned"],
                _references(evaluations),
                evaluations["original"],
                seconds,
                result.samples_seen,
            )
        )
        metrics["collapsed"] = result.collapsed
        if result.stopped is not None:
            metrics["stopped"] = result.stopped
        if measured.unreadable:
            metrics["unreadable"] = {"forget": measured.unreadable}
        if retrain_seconds is not None:
            metrics["seconds"]["retrain"] = retrain_seconds
        models = {
            "original": original,
            "unlearned": result.model,
            **({"retrained": retrained[0]} if retrained else {}),
        }

        def write() -> None:
            weights = {
                "before": weights_sha256(original),
                "after": weights_sha256(result.model),
                "references": [weights_sha256(model) for model in retrained],
            }
            write_json(output_dir / "metrics.json", metrics)
            _write_evidence(
                measured, output_dir, method, result, metrics, evaluations, models, weights, retrain_seconds
            )
            write_record(  # last: it covers the other files
                output_dir,
                result,
                request=measured.counted(),
                forget=task.forget.ids,
                data=task.source.spec,
                weights=weights,
                environment=environment(),
                metrics=metrics,
                files=UNLEARNED,
                options=record,
            )

        world.on_main(write)

    result = unlearn(
        original,
        task.forget,
        task.retain,
        method=method,
        config=config,
        validation=task.source.validation,
        output_dir=output_dir,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        notes={"checkpoint": checkpoint, **import_note(original), **task.notes()},
        deepspeed=deepspeed,
        finalize=evaluate,
    )
    return Outcome(result, metrics)


def _references(evaluations: Mapping[str, Evaluation]) -> list[Evaluation]:
    return [evaluation for name, evaluation in evaluations.items() if name.startswith("retrained")]


def _write_evidence(
    task: Task,
    folder: Path,
    method: str,
    result: UnlearnResult,
    metrics: dict[str, Any],
    evaluations: dict[str, Evaluation],
    models: dict[str, nn.Module],
    weights: dict[str, Any],
    retrain_seconds: float | None,
) -> None:
    original = models["original"]
    hashes = {
        "weights before": weights["before"],
        "weights after": weights["after"],
        "model.safetensors": sha256(folder / "model.safetensors"),
        "forget ids and labels": result.config["samples"]["forget_sha256"],
        "retain ids and labels": result.config["samples"]["retain_sha256"],
    }
    request = {
        "spec": task.request.spec,
        "forget": len(task.forget),
        "retain": len(task.retain),
        "duplicates": task.request.duplicates,
        "unreadable": task.unreadable,
        "data": task.source.spec,
    }
    masking = result.config if method == "lethe" else to_dict(build(LetheConfig, {}))
    gallery = build_gallery(
        models,
        task.forget,
        Preprocessing.of(original),
        source=masking["mask_source"],
        share=masking["mask_share"],
        head_fusion=masking["head_fusion"],
        seed=result.config["seed"],
    )
    write_report(
        folder / "report.html",
        ReportData(
            title="Unlearning report",
            method=method,
            summary=get_method(method).summary,
            request=request,
            config=result.config,
            metrics=metrics,
            history=result.history,
            evaluations=evaluations,
            gallery=gallery,
            retrain_seconds=retrain_seconds,
            environment=environment(),
            hashes=hashes,
        ),
    )


def train_job(
    source: Source,
    model: nn.Module,
    output_dir: Path,
    *,
    task: Task | None = None,
    notes: Mapping[str, Any] | None = None,
    record: RecordOptions | None = None,
    **options: Any,
) -> UnlearnResult:
    """Trains `model` from fresh weights, from its own (`base=given`) or in slices (`method="s3t"`), and records it.

    task: trains on what it retains, as its reference; None: on all training samples. record: as of `run_job`.
    notes, options: as of `engine.train`.
    """
    record = record or RecordOptions()
    check_free(output_dir)
    record.check()
    samples = task.retain if task else source.train

    def write(result: UnlearnResult) -> None:
        write_record(
            output_dir,
            result,
            request=task.counted() if task else {"kind": "none", "forget": 0, "retain": len(samples), "duplicates": 0},
            forget=task.forget.ids if task else [],
            data=source.spec,
            weights={"before": None, "after": weights_sha256(result.model)},  # before: drawn from the seed
            environment=environment(),
            metrics=None,
            files=TRAINED,
            options=record,
        )

    return train(
        model,
        samples,
        validation=source.validation,
        output_dir=output_dir,
        notes={"data": source.spec, **(notes or {}), **(task.notes() if task else {})},
        finalize=lambda result: World.current().on_main(lambda: write(result)),
        **options,
    )


def evaluate_job(
    task: Task, checkpoint: str, original: str | None, references: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """metrics.json of a checkpoint that is already there; arguments and errors as of `evaluate_models`."""
    return evaluate_models(task, checkpoint, original, references, config)


def evaluate_models(
    task: Task,
    model: nn.Module | str | Path,
    original: nn.Module | str | Path | None = None,
    references: Sequence[nn.Module | str | Path] = (),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures a model; see `engine.evaluate`.

    Raises:
        UserError: an unknown option, or a reference that is none: by its record (`engine.jobs.verify.check_origin`), by its
            weights (those of the model, of the original or of another reference), or, if there is an original, by its
            predictions (`engine.jobs.verify.check_reference`).
    """
    from engine.jobs.verify import check_reference, check_references, original_of

    config = config or {}
    unknown = [key for key in config if key not in _EVALUATION_KEYS]
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} of evaluate{nearest(unknown[0], _EVALUATION_KEYS)}")
    began = time.perf_counter()
    opened = _opened(model)
    before = None if original is None else _opened(original)
    made = None if original is None or before is None else original_of(original, before)
    checked = check_references(task, references, {"the model that is evaluated": opened, "the original": before}, made)
    measured = task.readable(opened, config)
    evaluator = measured.evaluator(config)
    evaluation = evaluator(opened)
    evaluation_before = None if before is None else evaluator(before)
    evaluations = []
    for (name, proven), reference in zip(checked, references, strict=True):
        evaluations.append(evaluator(_opened(reference)))
        if evaluation_before is not None:
            mine, theirs = (Witness(each.predictions, {}) for each in (evaluations[-1], evaluation_before))
            check_reference(name, mine, theirs, proven=proven, level=Gates.read().level)
    metrics = compare(evaluation, evaluations, evaluation_before)
    if measured.unreadable:
        metrics["unreadable"] = {"forget": measured.unreadable}
    metrics["seconds"]["evaluate"] = time.perf_counter() - began
    return metrics


def evaluate_samples(
    sets: Mapping[str, Samples | Dataset[Any]],
    model: nn.Module | str | Path,
    original: nn.Module | str | Path | None,
    references: Sequence[nn.Module | str | Path],
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """`engine.evaluate`. sets: forget, retain and test."""
    forget, retain, test = (from_dataset(sets[name], name) for name in ("forget", "retain", "test"))
    refuse_overlap(sets["forget"], sets["retain"])
    refuse_overlap(sets["forget"], sets["test"], "test")
    if isinstance(references, (nn.Module, str, Path)):
        references = [references]
    for each in (model, *references):
        if not isinstance(each, (nn.Module, str, Path)):
            raise UserError(f"evaluate: a model is a {type(each).__name__}, expected a torch.nn.Module or a checkpoint")
    everything = concatenate(forget, retain)
    request = ForgetRequest("forget", np.arange(len(forget)), 0, {})
    task = Task(Source("the given samples", everything, test, test), request, forget, retain)
    given = [each for each in (model, original, *references) if isinstance(each, nn.Module)]
    with _as_they_were(given):
        return evaluate_models(task, model, original, references, config)


@contextlib.contextmanager
def _as_they_were(models: Sequence[nn.Module]) -> Iterator[None]:
    """Puts a caller's models back on their device and in their mode."""
    devices = [next(model.parameters()).device for model in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for model, device in zip(models, devices, strict=True):
            model.to(device)
        for module, training in modes:
            module.training = training


def _opened(model: nn.Module | str | Path) -> nn.Module:
    return load_checkpoint(model) if isinstance(model, (str, Path)) else as_classifier(model)
