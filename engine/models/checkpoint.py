"""Checkpoints: build, load and save a model.

A checkpoint is a folder in timm's / Hugging Face's layout: `config.json` (architecture, num_classes, model_args,
pretrained_cfg) and `model.safetensors`. `timm.create_model("local-dir:FOLDER", pretrained=True)` opens every
checkpoint that is written here. Files of other training scripts are opened too (`engine.models.weight_files`,
`unwrap`, `architecture`). User files are never unpickled without restriction: a pickle is read as inert data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.architecture import (
    Described,
    advice,
    classifier_names,
    config_of,
    described,
    inferred_args,
    is_architecture,
    names_of_config,
    unknown_architecture,
)
from engine.models.checkpoint_source import CheckpointSource
from engine.models.hub import fetching, hub_folder
from engine.models.spec import (
    CROP_FITTING,
    IMPORTED,
    ModelSpec,
    _difference,
    _plain,
    _recorded_model_args,
    remember_model_args,
    set_folder,
    set_spec,
    spec_of,
    stored_spec,
)
from engine.models.unwrap import Kind, StateDict, choose, fit
from engine.models.weight_files import WeightFile, read_weights
from engine.runtime.files import replacing

logger = logging.getLogger(__name__)

# Keys of config.json that `save_checkpoint` writes itself.
_CONFIG_KEYS = ("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg")
# Weights that timm's filters resample if their shape differs.
_RESAMPLED = ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")


def load_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: Kind | None = None,
    headless: bool = False,
) -> nn.Module:
    """Open a checkpoint in eval mode, on the CPU.

    Args:
        checkpoint: A folder or file of weights, `timm:NAME` (pretrained weights of timm) or `hf-hub:ID`. The arguments
            below may follow after a question mark, as in `model.pth?arch=vit_tiny_patch16_224&img_size=32`.
        architecture: timm's name, for a file without it.
        model_args: Arguments of `timm.create_model`, for a file without them.
        weights: raw or ema, for a file with both; by default EMA weights, as in timm.
        headless: Accept a file without a classifier, as a model with `num_classes` 0.

    Raises:
        UserError: Weights are missing, damaged, do not fit the architecture, hold values that are not finite, or are a
            pickle with code in it.
    """
    source = CheckpointSource.parse(checkpoint)
    source = dataclasses.replace(
        source,
        architecture=architecture or source.architecture,
        model_args={**source.model_args, **(model_args or {})},
        weights=weights or source.weights,
    )
    if source.is_named:
        return _load_named(source)
    place = Path(source.place)
    if not place.exists():
        raise UserError(
            f"checkpoint {place} is not a folder and not a file; give a folder with config.json and model.safetensors, "
            "a file of weights (.safetensors, .pth, .pt, .bin, .ckpt, .tar), timm:NAME or hf-hub:ID"
        )
    folder = place if place.is_dir() else place.parent
    config = config_of(folder)
    if config is not None and config.get("model_type") and (place.is_dir() or place.name == "model.safetensors"):
        from engine.models import huggingface

        _refuse_arguments(source)
        if source.weights:
            raise UserError(f"--weights {source.weights}: {place} has one kind of weights; leave it out")
        return huggingface.load(folder, config)
    if place.is_dir() and (folder / "config.json").is_file():
        _refuse_arguments(source)
        model = _open_configured(_read_spec(folder), read_weights(place), source)
    elif not place.is_dir() and config is not None and _fits_config(source, config):
        model = _open_configured(_read_spec(folder), read_weights(place), source)
    else:
        model = _open_described(read_weights(place), source, headless)
    set_folder(model, source.folder)
    return model.eval()


def _load_named(source: CheckpointSource) -> nn.Module:
    _refuse_arguments(dataclasses.replace(source, model_args={}))
    if source.weights:
        raise UserError(f"--weights {source.weights}: {source.place} has one kind of weights; leave it out")
    with fetching(source.place):
        if source.place.startswith("hf-hub:"):
            from engine.models import huggingface

            if (found := hub_folder(source.place.removeprefix("hf-hub:"))) is not None:
                _refuse_arguments(source)
                return huggingface.load(*found)
        model = timm.create_model(source.place.removeprefix("timm:"), pretrained=True, **source.model_args)
    remember_model_args(model, **{**_recorded_model_args(model), **source.model_args})
    return model.eval()


def _refuse_arguments(source: CheckpointSource) -> None:
    given = "arch" if source.architecture else f"model-arg {next(iter(source.model_args))}" if source.model_args else ""
    if given:
        raise UserError(f"--{given}: the checkpoint {source.place} already defines the model; leave it out")


def _fits_config(source: CheckpointSource, config: Mapping[str, Any]) -> bool:
    """Return whether the config.json next to a file applies: no other architecture or arguments are given."""
    return "architecture" in config and not source.model_args and source.architecture in (None, config["architecture"])


def _open_configured(spec: ModelSpec, file: WeightFile, source: CheckpointSource) -> nn.Module:
    """Return a model that config.json describes, with the weights of a file."""
    model = spec.build()
    expected = model.state_dict()
    chosen = fit(choose(file.contents, source.weights, str(file.path)), expected)
    found = _remapped(_with_outer_head(chosen, model), model)
    if differing := _difference(expected, found.tensors):
        raise UserError(
            f"checkpoint {file.path.parent}: {file.path.name} does not match config.json ({spec.architecture}): "
            f"{differing}{_because(model, expected, found)}"
        )
    note = _note(file, found)
    if note:
        set_spec(model, dataclasses.replace(spec, extra={**spec.extra, IMPORTED: note}))
    return _filled(model, file, found, note)


def _open_described(file: WeightFile, source: CheckpointSource, headless: bool) -> nn.Module:
    """Return a model that the file itself describes, or `--arch` and `--model-arg`."""
    stored = described(file.contents, file.path)
    chosen = choose(file.contents, source.weights, str(file.path))
    name = source.architecture or stored.architecture
    if name is None:
        raise UserError(_without_architecture(file, stored, chosen))
    if not is_architecture(name):
        raise UserError(
            f"unknown architecture {name!r}{unknown_architecture(name)} (timm.list_models() has all); give --arch"
        )
    same = source.architecture in (None, stored.architecture)
    spec = ModelSpec(
        architecture=name,
        num_classes=_guessed_classes(chosen),
        model_args={**(stored.model_args if same else {}), **source.model_args},
        pretrained_cfg=stored.preprocessing,
    )
    model = _on_meta(spec)
    found = _with_outer_head(fit(chosen, model.state_dict()), model)
    inferred = inferred_args(model, found.tensors, spec.model_args)
    if isinstance(stored.img_size, list):  # the number of positions alone would imply a square
        inferred.pop("img_size", None)
    sized = _sized(dataclasses.replace(spec, model_args={**spec.model_args, **inferred}), stored, model)
    if sized != spec:
        spec, model = sized, _on_meta(sized)
    found = _remapped(found, model)
    spec = dataclasses.replace(spec, num_classes=_head_size(model, found, file, headless))
    model = spec.build()
    expected = model.state_dict()
    if differing := _difference(expected, found.tensors):
        raise UserError(
            f"checkpoint {file.path}: does not fit {name} ({len(set(expected) & set(found.tensors))} of "
            f"{len(expected)} names are there): {differing}{_because(model, expected, found)}"
        )
    note: dict[str, Any] = {
        **_note(file, found, always=True),
        "architecture_from": "--arch" if source.architecture else stored.source,
        "inferred": {**inferred, "num_classes": spec.num_classes},
    }
    extra: dict[str, Any] = {IMPORTED: note}
    if "crop_pct" in stored.preprocessing:
        extra[CROP_FITTING] = True
    if len(stored.label_names) == spec.num_classes:
        extra["label_names"] = stored.label_names
    elif stored.label_names:
        note["label_names"] = f"{len(stored.label_names)} names for {spec.num_classes} classes, ignored"
    set_spec(model, dataclasses.replace(spec, extra=extra))
    return _filled(model, file, found, note)


def _guessed_classes(found: StateDict) -> int:
    """Return the number of classes by the usual names of heads; `_head_size` determines it by the architecture."""
    sizes = [int(t.shape[0]) for key, t in found.tensors.items() if key.endswith(_HEADS) and t.ndim == 2]
    return sizes[0] if len(sizes) == 1 else 1000


def _filled(model: nn.Module, file: WeightFile, found: StateDict, note: Mapping[str, Any]) -> nn.Module:
    """Load weights that fit into a model.

    Args:
        model: The model.
        file: The file, for messages.
        found: Its weights.
        note: How they were read; logged if not empty.
    """
    expected = model.state_dict()
    for key, tensor in found.tensors.items():
        if problem := _unreadable(tensor, expected[key]):
            raise UserError(f"checkpoint {file.path}: {key} {problem}")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"checkpoint {file.path}: {key} holds values that are not finite; take an earlier checkpoint"
            )
    model.load_state_dict(found.tensors)
    if note:
        logger.info("%s", import_line(model, note))
    return model


def _unreadable(tensor: Tensor, expected: Tensor) -> str:
    """Return why a tensor cannot be copied into a weight of the model, as text; empty if it can be."""
    if tensor.is_meta:
        return "has a shape and no values (a tensor on the meta device); save the weights themselves"
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}; save it dense: tensor.to_dense()"
    if expected.is_floating_point() and (tensor.is_quantized or not tensor.is_floating_point()):
        kind = str(tensor.dtype).removeprefix("torch.")
        return (
            f"is stored as {kind}, expected floating-point numbers: without their scales these are other weights; give "
            "the checkpoint before its quantisation, or save it dequantised"
        )
    return ""


def import_line(model: nn.Module, note: Mapping[str, Any]) -> str:
    """Return one line on how a file was read, from the note that `load_checkpoint` stores in `ModelSpec.extra`."""
    spec = spec_of(model)
    parts = [f"{spec.architecture}, {spec.num_classes} classes"]
    if note.get("architecture_from"):
        parts[0] += f" (by {note['architecture_from']})"
    parts.append(f"{note['weights']} weights" + (f" under {note['container']!r}" if note["container"] else ""))
    inferred = {key: value for key, value in note.get("inferred", {}).items() if key != "num_classes"}
    if inferred:
        parts.append("by the shapes " + ", ".join(f"{key}={value}" for key, value in inferred.items()))
    if note["stripped"]:
        parts.append(f"without the prefix {' '.join(note['stripped'])}")
    if note["stored_as"] != "float32":
        parts.append(f"stored as {note['stored_as']}, loaded as float32")
    if note["passed_over"]:
        listed = note["passed_over"]
        parts.append(f"passed over {', '.join(listed[:3])}" + (f" and {len(listed) - 3} more" * (len(listed) > 3)))
    if isinstance(names := note.get("label_names"), str):
        parts.append(names)
    return f"{note['file']}: {'; '.join(parts)}"


def imported(model: nn.Module) -> dict[str, Any]:
    """Return how the file of a model was read; empty for a folder that `save_checkpoint` wrote."""
    spec = stored_spec(model)
    return dict(spec.extra.get(IMPORTED, {})) if spec is not None else {}


def _note(file: WeightFile, found: StateDict, always: bool = False) -> dict[str, Any]:
    """Return how a file was read; empty if it was a plain state dict in single precision."""
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in found.tensors.values() if t.is_floating_point()})
    note = {
        "file": file.path.name,
        "container": found.container,
        "weights": found.kind or "raw",
        "stripped": list(found.stripped),
        "passed_over": [*file.passed_over, *found.passed_over],
        "stored_as": ", ".join(kinds) or "float32",
    }
    plain = not found.stripped and not found.passed_over and found.kind is None and kinds in ([], ["float32"])
    return note if always or not plain else {}


def _on_meta(spec: ModelSpec) -> nn.Module:
    """Build the architecture without memory for its weights, if its code supports that."""
    try:
        with torch.device("meta"):
            return spec.build()
    except (UserError, RuntimeError):  # if it cannot be built at all, this raises the reason
        return spec.build()


def _without_architecture(file: WeightFile, stored: Described, chosen: StateDict) -> str:
    where = file.path
    head = f"{stored.unknown}, which timm does not have" if stored.unknown else "it does not name its architecture"
    keys = ", ".join(list(chosen.tensors)[:3])
    return (
        f"checkpoint {where}: there is no config.json and {head} ({len(chosen.tensors)} tensors: {keys}, ...); give "
        f"timm's name, such as --arch vit_tiny_patch16_224 --model-arg img_size=32, or write a folder once: "
        f"lethe import {where} --arch NAME --out FOLDER"
    )


def _because(model: nn.Module, expected: Mapping[str, Tensor], found: StateDict) -> str:
    reason = advice(model, expected, found.tensors)
    return f"; {reason}" if reason else ""


def _with_outer_head(found: StateDict, model: nn.Module) -> StateDict:
    """Use a linear layer next to a backbone (`fc.weight`, `fc.bias`) as its head, if no other names are left over."""
    names = classifier_names(model)
    expected = model.state_dict()
    extras = {key for key in found.tensors if key not in expected}
    stems = {key.rpartition(".")[0] for key in extras}
    if len(stems) != 1 or not names or any(name in found.tensors for name in names):
        return found
    stem, head = next(iter(stems)), names[0].rpartition(".")[0]
    moved = {key.replace(f"{stem}.", f"{head}.", 1) if key in extras else key: t for key, t in found.tensors.items()}
    if not set(names) <= set(moved) or moved[f"{head}.weight"].shape[1:] != expected[f"{head}.weight"].shape[1:]:
        return found
    return dataclasses.replace(found, tensors=moved, stripped=(*found.stripped, f"{stem}. -> {head}."))


def _sized(spec: ModelSpec, stored: Described, model: nn.Module) -> ModelSpec:
    """Add the image size of the training, if no weight has a shape that depends on it."""
    size = stored.img_size
    known = getattr(model, "pos_embed", None) is not None and not isinstance(size, list)
    if size is None or "img_size" in spec.model_args or known:
        return spec
    sized = dataclasses.replace(spec, model_args={**spec.model_args, "img_size": size})
    try:
        _on_meta(sized)
    except UserError:  # the architecture takes images of any size
        channels = int(spec.model_args.get("in_chans", 3))
        cfg = {**spec.pretrained_cfg, "input_size": [channels, *(size if isinstance(size, list) else (size, size))]}
        return dataclasses.replace(spec, pretrained_cfg=cfg)
    return sized


def _head_size(model: nn.Module, found: StateDict, file: WeightFile, headless: bool) -> int:
    names = classifier_names(model)
    weights = [found.tensors[name] for name in names if name.endswith("weight") and name in found.tensors]
    if weights:
        return int(weights[0].shape[0])
    biases = [found.tensors[name] for name in names if name in found.tensors]
    if biases:
        return int(biases[0].shape[0])
    if headless or not names:
        return 0
    others = [key for key in found.tensors if key not in model.state_dict()]
    remedy = advice(model, model.state_dict(), found.tensors) if others else ""
    raise UserError(
        f"checkpoint {file.path}: has no classifier ({names[0]} is not there"
        + (f"; it holds {', '.join(others[:4])} instead" if others else "")
        + f"); {remedy or 'a backbone has no classes to forget: train a head on it by lethe train --init'}"
    )


def _remapped(found: StateDict, model: nn.Module) -> StateDict:
    """Rename the original authors' names to timm's, by timm's own filter; weights are never resampled."""
    expected = model.state_dict()
    if set(expected) == set(found.tensors):
        return found
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return found
    try:
        renamed = convert(dict(found.tensors), model)
    except Exception:  # a filter of timm may fail for a file that it is not made for
        return found
    if not isinstance(renamed, dict) or len(set(renamed) & set(expected)) < len(set(found.tensors) & set(expected)):
        return found
    held = [tuple(t.shape) for t in found.tensors.values()]
    if any(key.endswith(_RESAMPLED) and tuple(t.shape) not in held for key, t in renamed.items()):
        return found  # for another image or patch size: an error with the right --model-arg, not other weights
    kept = {t.data_ptr() for t in renamed.values()}
    dropped = [key for key, t in found.tensors.items() if key not in renamed and t.data_ptr() not in kept]
    if not dropped and set(renamed) == set(found.tensors):
        return found
    passed_over = (*found.passed_over, *dropped)
    return dataclasses.replace(
        found, tensors=renamed, stripped=(*found.stripped, "timm's filter"), passed_over=passed_over
    )


def _read_spec(folder: Path) -> ModelSpec:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        pretrained_cfg = config.get("pretrained_cfg") or {}
        if not isinstance(name := config["architecture"], str):
            raise ValueError(f"architecture is {name!r}, expected timm's name")
        extra = {k: v for k, v in config.items() if k not in _CONFIG_KEYS}
        if names := names_of_config({**extra, "pretrained_cfg": pretrained_cfg}):
            extra["label_names"] = names
        return ModelSpec(
            architecture=name,
            num_classes=int(config.get("num_classes", pretrained_cfg.get("num_classes", 1000))),
            # timm names the classes here too
            model_args={k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"},
            pretrained_cfg=_plain(pretrained_cfg),
            extra=extra,
        )
    except UserError as error:  # is a ValueError too
        raise UserError(f"checkpoint {folder}: {error}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder}: config.json is not a timm configuration ({type(error).__name__}: {error})"
        ) from None


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `config.json` and `model.safetensors` in timm's layout, and return the folder.

    Each file is written under another name and renamed, so a failure (no space left) leaves the earlier file whole.

    Args:
        model: The model, of timm or of transformers (then in its `save_pretrained` layout).
        folder: The folder; created if it does not exist.
    """
    from engine.models.huggingface import as_classifier

    model, folder = as_classifier(model), Path(folder)
    spec = spec_of(model)
    if (written := spec.write(model, folder)) is not None:
        return written
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **spec.extra,
        "architecture": spec.architecture,
        "num_classes": spec.num_classes,
        "num_features": int(model.num_features),  # type: ignore[arg-type]
        "global_pool": pool if isinstance(pool := getattr(model, "global_pool", ""), str) else "",
        "model_args": {k: list(v) if isinstance(v, tuple) else v for k, v in spec.model_args.items()},
        "pretrained_cfg": {**spec.pretrained_cfg, "num_classes": spec.num_classes},
    }
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    # Weights first: a folder whose config.json is new holds weights that fit it.
    with replacing(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of all weights; it does not depend on the file format."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
