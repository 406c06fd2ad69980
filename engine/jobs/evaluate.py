"""Evaluate an existing model, compared with its original and with reference models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from engine.data import (
    ForgetRequest,
    Samples,
    Source,
    from_dataset,
    refuse_overlap,
)
from engine.data.samples import concatenate
from engine.errors import UserError, nearest
from engine.evaluate import compare
from engine.evaluate.gates import Gates
from engine.evaluate.verdict import ModelOutputs
from engine.jobs.opening import open_given
from engine.jobs.task import EVALUATION_OPTIONS, Task
from engine.jobs.verify import check_reference, check_references, original_of


def evaluate_models(
    task: Task,
    model: nn.Module | str | Path,
    original: nn.Module | str | Path | None = None,
    references: Sequence[nn.Module | str | Path] = (),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on forget set, retain set and test set; see `engine.evaluate`.

    Args:
        task: The data with the forget request.
        model: The model to evaluate, or its checkpoint.
        original: The model before unlearning; None if it is not available.
        references: Reference models or their checkpoints.
        config: Options of the evaluation by name, those of `EVALUATION_OPTIONS`.

    Returns:
        Contents of metrics.json, see `engine.evaluate.compare`. `seconds.evaluate` is the wall-clock time of the call,
        and `unreadable` the number of forget samples whose images cannot be read, if there are any.

    Raises:
        UserError: An option is unknown, or a reference is not valid: by its record (`engine.jobs.verify.check_origin`),
            by its weights (those of the model, of the original or of another reference), or, if there is an original,
            by its predictions (`engine.jobs.verify.check_reference`).
    """
    config = config or {}
    unknown = [key for key in config if key not in EVALUATION_OPTIONS]
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} of evaluate{nearest(unknown[0], EVALUATION_OPTIONS)}")
    began = time.perf_counter()
    opened = open_given(model)
    before = None if original is None else open_given(original)
    made = None if original is None or before is None else original_of(original, before)
    checked = check_references(task, references, {"the model that is evaluated": opened, "the original": before}, made)
    measured = task.readable(opened, config)
    evaluator = measured.evaluator(config)
    evaluation = evaluator(opened)
    evaluation_before = None if before is None else evaluator(before)
    evaluations = []
    for (name, proven), reference in zip(checked, references, strict=True):
        evaluations.append(evaluator(open_given(reference)))
        if evaluation_before is not None:
            mine, theirs = (ModelOutputs(each.predictions, {}) for each in (evaluations[-1], evaluation_before))
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
    """Evaluate a model on given samples or datasets; the body of `engine.evaluate`.

    Args:
        sets: "forget", "retain" and "test".
        model, original, references, config: As of `evaluate_models`. Given models keep their device and mode.

    Returns:
        As of `evaluate_models`.

    Raises:
        UserError: The forget set shares items with another set, a model is neither a module nor a checkpoint, or as of
            `evaluate_models`.
    """
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
    """Restore the device and the mode of a caller's models on exit."""
    devices = [next(model.parameters()).device for model in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for model, device in zip(models, devices, strict=True):
            model.to(device)
        for module, training in modes:
            module.training = training
