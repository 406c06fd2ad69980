"""A deletion job from request to evidence: unlearn, evaluate, and the files of the run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.audit.run_record import UNLEARNED, RecordOptions, write_record
from engine.config import build, to_dict
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
        world = ProcessGroup.current()
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
        preprocessing_of(original),
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
