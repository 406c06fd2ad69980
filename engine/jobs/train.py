"""Train a model, from fresh weights or from a base, and record it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine.audit.run_record import TRAINED, RecordedRequest, RecordOptions, write_record
from engine.core.result import UnlearnResult
from engine.data import (
    Source,
)
from engine.jobs.task import Task
from engine.models.checkpoint import weights_sha256
from engine.run.folder import check_free
from engine.run.unlearn import train
from engine.runtime.environment import environment
from engine.runtime.process_group import ProcessGroup


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
    """Train a model and record the training.

    The model starts from fresh weights, from its own weights (`base=given`), or is trained in slices (`method="s3t"`).

    Args:
        source: The data.
        model: The model.
        output_dir: Run folder.
        task: The model is trained on the retain set of this task, as a reference model; None: on all training samples.
        notes, options: As of `engine.train`.
        record: As of `engine.jobs.unlearn.run_job`.

    Raises:
        UserError: Another process works in the run folder, the key cannot sign, or wrong use of `engine.train`.
    """
    record = record or RecordOptions()
    check_free(output_dir)
    record.check()
    samples = task.retain if task else source.train

    counts = task.counted() if task else {"kind": "none", "forget": 0, "retain": len(samples), "duplicates": 0}

    def write(result: UnlearnResult) -> None:
        write_record(
            output_dir,
            result,
            request=RecordedRequest(counts=counts, ids=task.forget.ids if task else [], data=source.spec),
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
        finalize=lambda result: ProcessGroup.current().on_main(lambda: write(result)),
        **options,
    )
