"""The model that a training starts from: fresh weights, or those of a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from engine.audit.run_record import Origin, origin
from engine.config import read_yaml
from engine.data import (
    Source,
)
from engine.data.labels import same_names
from engine.errors import UserError
from engine.jobs.opening import current
from engine.jobs.opening import open_model as load_checkpoint
from engine.models.checkpoint import imported, weights_sha256
from engine.models.checkpoint_source import CheckpointSource
from engine.models.labels import label_names
from engine.models.slice_stages import with_fresh_head
from engine.models.spec import ModelSpec, describing, spec_of

if TYPE_CHECKING:
    from engine.jobs.task import Task


def architecture(name: str, model_args: Mapping[str, Any], source: Source) -> nn.Module:
    """Build a model with fresh weights for a data source.

    Args:
        name: A timm architecture, or a checkpoint whose architecture is used.
        model_args: Arguments of a timm architecture.
        source: The data, which sets the number of classes of a timm architecture.

    Raises:
        UserError: `model_args` are given for a checkpoint.
    """
    if is_checkpoint(name):
        _refuse_model_args(name, model_args)
        return load_checkpoint(name)
    return ModelSpec(
        architecture=name, num_classes=_classes(source), model_args=dict(model_args), pretrained_cfg={}
    ).build()


def pretrained(checkpoint: str, model_args: Mapping[str, Any], source: Source) -> nn.Module:
    """Load a checkpoint with a fresh head for the classes of a data source.

    Args:
        checkpoint: A folder, a file, `timm:NAME` or `hf-hub:ID`.
        model_args: Must be empty.
        source: The data.

    Raises:
        UserError: `model_args` are given, or the config.yaml of a run folder names `source` as the training data.
    """
    _refuse_model_args(checkpoint, model_args)
    config = CheckpointSource.parse(checkpoint).folder / "config.yaml"
    if config.is_file() and read_yaml(config).get("data") == source.spec:
        raise UserError(
            f"{checkpoint}: {config.name} states that it was trained on {source.spec}; a base must not be trained on "
            "the samples, so take another, or leave base=given out"
        )
    model = with_fresh_head(load_checkpoint(checkpoint, headless=True), _classes(source))
    return describing(model, [])  # its class names are those of the head that was replaced


def init_model(checkpoint: str, source: Source, task: Task | None, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model to train from a checkpoint.

    The head is kept if it has the classes of the data source, in any order. The class names of the model are then those
    of its head by label, and labels of the data have to be put in that order (`Opening.prepare_training`). Otherwise
    the head is fresh, drawn from the seed.

    Args:
        checkpoint: The base.
        source: The data.
        task: The forget request whose samples are left out of the training, if there is one.
        seed: Seed of a fresh head.

    Returns:
        (the model, what config.yaml and the record keep of it).

    Raises:
        UserError: By its run folder the base was trained on samples that are to be left out.
    """
    made = origin(CheckpointSource.parse(checkpoint).folder)
    if made is not None and task is not None:
        _check_base(checkpoint, made, task)
    given = load_checkpoint(checkpoint, headless=True)
    names = _head_names(given, source)
    kept = names is not None
    if names is not None and made is not None and task is not None and names != source.train.class_names:
        mapping = current().match(source.train, given)[0]
        _check_base(checkpoint, made, task if mapping is None else task.relabelled(mapping, names))
    model = given if kept else with_fresh_head(given, _classes(source), seed)
    if not kept:
        head = f"fresh, for the {_classes(source)} classes of {source.spec}"
    elif label_names(given):
        head = f"kept, its classes are those of {source.spec}"
    else:
        head = f"kept; the base gives no class names, so its labels are taken for those of {source.spec}"
    current().notify(f"head: {head}")
    note = {
        "checkpoint": checkpoint,
        "weights_sha256": weights_sha256(given),
        "head": "kept" if kept else "fresh",
        "trained_on": made.samples_sha256 if made else None,
        **import_note(given),
    }
    return describing(model, source.train.class_names if names is None else names), {"init": note}


def _head_names(model: nn.Module, source: Source) -> list[str] | None:
    """Return class names of a base's head by label, in the data's words; None if the data has other classes.

    With `--label-order data`, names in another order count as other classes.
    """
    names = source.train.class_names
    if spec_of(model).num_classes != _classes(source):
        return None
    if not names:
        return spec_of(model).label_names
    try:
        known = label_names(model)
        if current().label_order == "data":
            return names if not known or same_names(known, names) else None
        return current().match(source.train, model)[1]
    except UserError:
        return None


def _check_base(checkpoint: str, made: Origin, task: Task) -> None:
    name = f"--init {checkpoint}: by its {made.source}"
    remedy = "take a base that was not trained on the samples to be left out, such as that of the original"
    seen = made.init.get("trained_on") if made.init else None
    if task.source.train.fingerprint() in (made.samples_sha256, seen):
        raise UserError(f"{name} it was trained on all samples of {task.source.spec}; {remedy}")
    if made.data == task.source.spec and not (made.is_training and made.samples_sha256 == task.retain.fingerprint()):
        raise UserError(f"{name} it was made from samples of {task.source.spec} that are to be left out; {remedy}")


def is_checkpoint(name: str) -> bool:
    """Return whether a name is that of a checkpoint on the disk, not of a timm architecture."""
    return Path(name).is_dir() or Path(CheckpointSource.parse(name).place).is_file()


def _refuse_model_args(checkpoint: str, model_args: Mapping[str, Any]) -> None:
    if model_args:
        raise UserError(f"--model-arg {next(iter(model_args))}: the checkpoint {checkpoint} already defines the model")


def _classes(source: Source) -> int:
    return len(source.train.class_names) or int(source.train.labels.max()) + 1


def import_note(model: nn.Module) -> dict[str, Any]:
    """Return what config.yaml and the record keep of how a file of weights was read."""
    return {"checkpoint_import": note} if (note := imported(model)) else {}
