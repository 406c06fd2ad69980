"""A deletion job from request to evidence: unlearn, evaluate, and the files of the run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import build, to_dict
from engine.data import ForgetRequest, Preprocessing, Samples, Source, open_source, read_forget_request
from engine.distributed.world import World
from engine.environment import environment
from engine.errors import UserError, nearest
from engine.evaluate import Evaluation, Evaluator, compare
from engine.files import sha256, write_json
from engine.loop import unlearn
from engine.methods import get_method
from engine.methods.lethe import LetheConfig
from engine.report import ReportData, build_gallery, write_report
from engine.trainer import Progress, UnlearnResult
from engine.vit import ModelSpec, load_checkpoint, weights_sha256

# Options of a run that an evaluation has too.
_EVALUATION_KEYS = ("precision", "device", "workers", "decode", "on_bad_image", "max_bad_share")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data source with a forget request resolved against it."""

    source: Source
    request: ForgetRequest
    forget: Samples
    retain: Samples

    @classmethod
    def open(cls, data: str, forget: str) -> Task:
        world = World.current()
        if world.size > 1:  # an index is built by one rank, and then read by all
            world.on_main(lambda: open_source(data))
        source = open_source(data)
        request = read_forget_request(forget, source.train)
        return cls(source, request, *request.split(source.train))

    def evaluator(self, config: Mapping[str, Any] | None = None) -> Evaluator:
        options = {key: value for key, value in (config or {}).items() if key in _EVALUATION_KEYS}
        return Evaluator(self.forget, self.retain, self.source.test, **options)

    def notes(self) -> dict[str, Any]:
        """What config.yaml and record.json keep of the request: counts and a digest, not the ids themselves."""
        return {"data": self.source.spec, "forget": {"spec": self.request.spec, "duplicates": self.request.duplicates}}


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
) -> Outcome:
    """Unlearns a checkpoint, evaluates it beside the original and the references, and fills the run folder."""
    original = load_checkpoint(checkpoint)
    retrained = [load_checkpoint(reference) for reference in references]
    metrics: dict[str, Any] = {}

    def evaluate(result: UnlearnResult) -> None:
        began = time.perf_counter()
        world = World.current()
        evaluator = task.evaluator(result.config)
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
        if retrain_seconds is not None:
            metrics["seconds"]["retrain"] = retrain_seconds
        models = {
            "original": original,
            "unlearned": result.model,
            **({"retrained": retrained[0]} if retrained else {}),
        }

        def write() -> None:
            write_json(output_dir / "metrics.json", metrics)
            _write_evidence(task, output_dir, method, result, metrics, evaluations, models, retrain_seconds)

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
        notes={"checkpoint": checkpoint, **task.notes()},
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
    retrain_seconds: float | None,
) -> None:
    original = models["original"]
    hashes = {
        "weights before": weights_sha256(original),
        "weights after": weights_sha256(result.model),
        "model.safetensors": sha256(folder / "model.safetensors"),
        "forget ids and labels": result.config["samples"]["forget_sha256"],
        "retain ids and labels": result.config["samples"]["retain_sha256"],
    }
    request = {
        "spec": task.request.spec,
        "forget": len(task.forget),
        "retain": len(task.retain),
        "duplicates": task.request.duplicates,
        "data": task.source.spec,
    }
    facts = environment()
    write_json(
        folder / "record.json",
        {
            "format": 1,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": request,
            "config": result.config,
            "environment": facts,
            "sha256": hashes,
            "metrics": metrics,
            "events": result.events,
            "bad_images": result.bad_images,
        },
    )
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
            environment=facts,
            hashes=hashes,
        ),
    )


def evaluate_job(
    task: Task, checkpoint: str, original: str | None, references: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """metrics.json of a checkpoint that is already there."""
    unknown = [key for key in config if key not in _EVALUATION_KEYS]
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} of evaluate{nearest(unknown[0], _EVALUATION_KEYS)}")
    began = time.perf_counter()
    evaluator = task.evaluator(config)
    before = evaluator(load_checkpoint(original)) if original else None
    retrained = [evaluator(load_checkpoint(reference)) for reference in references]
    metrics = compare(evaluator(load_checkpoint(checkpoint)), retrained, before)
    metrics["seconds"]["evaluate"] = time.perf_counter() - began
    return metrics


def architecture(name: str, model_args: Mapping[str, Any], source: Source) -> nn.Module:
    """A model with fresh weights for a data source: a timm architecture, or that of a checkpoint folder."""
    if Path(name).is_dir():
        if model_args:
            raise UserError(
                f"--model-arg {next(iter(model_args))}: the checkpoint {name} already says how the model is built"
            )
        return load_checkpoint(name)
    num_classes = len(source.train.class_names) or int(source.train.labels.max()) + 1
    return ModelSpec(architecture=name, num_classes=num_classes, model_args=dict(model_args), pretrained_cfg={}).build()
