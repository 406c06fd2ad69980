"""A deletion job from request to evidence: unlearn, evaluate, and the files of the run folder."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.audit.run_record import UNLEARNED, RecordedRequest, RecordOptions, write_record
from engine.config import DEFAULT_METHOD, build, to_dict
from engine.core.result import Progress, UnlearnResult
from engine.evaluate import Evaluation, compare
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.start import import_note
from engine.jobs.task import Task
from engine.jobs.verify import check_references, original_of
from engine.methods import get_method
from engine.methods.lethe import LetheConfig
from engine.models.checkpoint import weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.report import ReportData, build_gallery, write_report
from engine.run.folder import check_apart, check_free
from engine.run.unlearn import unlearn
from engine.runtime.environment import environment
from engine.runtime.files import sha256, write_json
from engine.runtime.process_group import ProcessGroup


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a deletion job, and the contents of metrics.json."""

    result: UnlearnResult
    metrics: dict[str, Any]


def run_job(
    task: Task,
    checkpoint: str,
    output_dir: Path,
    *,
    method: str = DEFAULT_METHOD,
    config: Mapping[str, Any] | None = None,
    original: str | None = None,
    references: Sequence[str | Path] = (),
    retrain_seconds: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    deepspeed: str | Path | None = None,
    record: RecordOptions | None = None,
) -> Outcome:
    """Unlearn a checkpoint, compare it with the original and the reference models, and fill the run folder.

    Args:
        task: The data with the forget request.
        checkpoint: The model before unlearning.
        output_dir: Run folder.
        original: Checkpoint of the model before earlier requests, as of `engine.unlearn`; None: `checkpoint`.
        method, config, resume, overwrite, progress, deepspeed: As of `engine.unlearn`.
        references: Checkpoints of reference models.
        retrain_seconds: Seconds that a retrain took, for the report.
        record: Who signs record.json, and what else it holds of the request.

    Raises:
        UserError: A reference that is not valid (`engine.jobs.verify.check_references`), a folder that is taken, or
            wrong use of `engine.unlearn`.
    """
    record = record or RecordOptions()
    check_free(output_dir)
    check_apart(output_dir, [checkpoint, *([original] if original else []), *references])
    record.check()
    model = load_checkpoint(checkpoint)
    check_references(task, references, {"the original": model}, original_of(checkpoint, model))
    evidence = Evidence(
        task=task,
        folder=output_dir,
        method=method,
        original=model,
        references=[load_checkpoint(reference) for reference in references],
        retrain_seconds=retrain_seconds,
        record=record,
    )
    result = unlearn(
        model,
        task.forget,
        task.retain,
        method=method,
        config=config,
        validation=task.source.validation,
        original=load_checkpoint(original) if original else None,
        output_dir=output_dir,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        notes={
            "checkpoint": checkpoint,
            "checkpoint_sha256": evidence.original_sha256,
            **({"original": original} if original else {}),
            **import_note(model),
            **task.notes(),
        },
        deepspeed=deepspeed,
        finalize=evidence,
    )
    return Outcome(result, evidence.metrics)


@dataclasses.dataclass(kw_only=True)
class Evidence:
    """Measures an unlearned model and writes metrics.json, report.html and record.json.

    Attributes:
        task: The data with the forget request.
        folder: Run folder.
        method: Name of the method.
        original: The model before unlearning.
        references: Reference models.
        retrain_seconds: Seconds that a retrain took; None if unknown.
        record: Who signs record.json.
        metrics: Contents of metrics.json, once the model is measured.
    """

    task: Task
    folder: Path
    method: str
    original: nn.Module
    references: list[nn.Module]
    retrain_seconds: float | None
    record: RecordOptions
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def original_sha256(self) -> str:
        """SHA-256 of the original's weights, for config.yaml and record.json."""
        return weights_sha256(self.original)

    def __call__(self, result: UnlearnResult) -> None:
        """Measure a result on all ranks; the main rank writes."""
        began = time.perf_counter()
        measured = self.task.without(result.bad_images)
        evaluator = measured.evaluator(result.config, result.config["evaluation_samples"])
        evaluations = {"original": evaluator(self.original), "unlearned": evaluator(result.model)}
        retrained = {f"retrained {i}": evaluator(model) for i, model in enumerate(self.references, 1)}
        seconds = {**result.seconds, "evaluate": time.perf_counter() - began}
        compared = compare(
            evaluations["unlearned"],
            list(retrained.values()),
            evaluations["original"],
            seconds,
            result.samples_seen,
        )
        self.metrics.update(compared)
        self.metrics["collapsed"] = result.collapsed
        if result.stopped is not None:
            self.metrics["stopped"] = result.stopped
        if measured.unreadable:
            self.metrics["unreadable"] = {"forget": measured.unreadable}
        if self.retrain_seconds is not None:
            self.metrics["seconds"]["retrain"] = self.retrain_seconds
        ProcessGroup.current().on_main(lambda: self._write(measured, result, {**evaluations, **retrained}))

    def _write(self, measured: Task, result: UnlearnResult, evaluations: dict[str, Evaluation]) -> None:
        weights = {
            "before": self.original_sha256,
            "after": weights_sha256(result.model),
            "references": [weights_sha256(model) for model in self.references],
        }
        write_json(self.folder / "metrics.json", self.metrics)
        _write_evidence(self, measured, result, evaluations, weights)
        write_record(  # last: it covers the other files
            self.folder,
            result,
            request=RecordedRequest(counts=measured.counted(), ids=self.task.forget.ids, data=self.task.source.spec),
            weights=weights,
            environment=environment(),
            metrics=self.metrics,
            files=UNLEARNED,
            options=self.record,
        )


def _write_evidence(
    job: Evidence,
    task: Task,
    result: UnlearnResult,
    evaluations: dict[str, Evaluation],
    weights: dict[str, Any],
) -> None:
    """Write report.html.

    Args:
        job: The finished measurement.
        task: The task without images that cannot be read.
        result: The unlearned model and its history.
        evaluations: Evaluations by model.
        weights: Hashes of the models.
    """
    hashes = {
        "weights before": weights["before"],
        "weights after": weights["after"],
        "model.safetensors": sha256(job.folder / "model.safetensors"),
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
    masking = result.config if job.method == "lethe" else to_dict(build(LetheConfig, {}))
    gallery = build_gallery(
        {
            "original": job.original,
            "unlearned": result.model,
            **({"retrained": job.references[0]} if job.references else {}),
        },
        task.forget,
        preprocessing_of(job.original),
        source=masking["mask_source"],
        share=masking["mask_share"],
        head_fusion=masking["head_fusion"],
        seed=result.config["seed"],
    )
    write_report(
        job.folder / "report.html",
        ReportData(
            title="Unlearning report",
            method=job.method,
            summary=get_method(job.method).summary,
            request=request,
            config=result.config,
            metrics=job.metrics,
            history=result.history,
            evaluations=evaluations,
            gallery=gallery,
            retrain_seconds=job.retrain_seconds,
            environment=environment(),
            hashes=hashes,
        ),
    )
