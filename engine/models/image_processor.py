"""Convert the image processor of a Hugging Face model to timm's preprocessing keys, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import UserError

PROCESSOR = "preprocessor_config.json"
# Files in which the library stores an image processor.
_PROCESSORS = (PROCESSOR, "processor_config.json")
# Model attribute that is set if mean and std are not known.
UNKNOWN_PREPROCESSING = "_lethe_unknown_preprocessing"
# PIL's numbers of filters, with torch's names for those that torch has.
_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
_PIL_FILTERS = {1: "lanczos", 4: "box", 5: "hamming"}
# From this size on, ConvNeXt's processor ignores crop_pct.
_CONVNEXT_SQUASHES = 384
# Processors for which a size of one number is the shorter side; for all others it is both sides.
_SHORTEST = ("CLIP", "ChineseCLIP", "ConvNext", "Bit", "Levit", "LeViT", "MobileNet", "MobileViT", "PoolFormer")


def unknown_preprocessing(model: nn.Module) -> str:
    """Return why mean and std of a model's images are not known, with the remedy; empty if they are."""
    spec = getattr(model, "_lethe_spec", None)
    known = dict(getattr(spec or model, "pretrained_cfg", None) or {})
    if not getattr(model, UNKNOWN_PREPROCESSING, False) or {"mean", "std"} <= set(known):
        return ""
    return (
        f"{type(getattr(model, 'model', model)).__name__}: no {PROCESSOR} was found, so mean and std of its images are "
        "not known; save the image processor into the checkpoint folder (processor.save_pretrained(FOLDER)), give "
        "--mean and --std, or give images that are already normalised"
    )


def processor_of(source: str) -> Any:
    """Return the image processor that is stored with a model, or None.

    Args:
        source: A folder, or an id in the local cache.

    Raises:
        UserError: The folder has a processor that cannot be read.
    """
    if not source:
        return None
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSORS):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        if not folder.is_dir():
            return None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {source}: its image processor cannot be read ({reason})") from None


def read_preprocessing(processor: Any, channels: int) -> dict[str, Any]:
    """Return timm's keys for an image processor of transformers; empty for None. See `preprocessing_keys`."""
    if processor is None:
        return {}
    return preprocessing_keys(processor.to_dict(), type(processor).__name__, channels)


def preprocessing_keys(given: Mapping[str, Any], name: str, channels: int | None = None) -> dict[str, Any]:
    """Return timm's keys for the values of an image processor.

    Args:
        given: Values as in preprocessor_config.json.
        name: Name of the values in errors.
        channels: Channels of the model's images; the values are then complete. None: the values may be incomplete, and
            the result has only those that are given.

    Raises:
        UserError: A step cannot be expressed by these keys.
    """
    for step in ("do_pad", "do_flip_channel_order", "rescale_offset", "do_thumbnail", "do_align_long_axis"):
        if given.get(step):
            raise _inexpressible(name, step, given[step])
    found = _normalisation(given, name, channels)
    resample = 2 if given.get("resample") is None and channels is not None else given.get("resample")
    if resample is not None:
        found["interpolation"] = _interpolation(resample, name)
    if channels is not None or (given.get("size") and given.get("do_resize", True)) or given.get("do_center_crop"):
        size, shares = _geometry(given, name)
        found |= {"input_size": size if channels is None else (channels, *size), **shares}
    return found


def _inexpressible(name: str, step: str, value: Any) -> UserError:
    return UserError(
        f"{name}: {step}={value!r} cannot be expressed; supported: resize, centre crop, rescale and normalise"
    )


def _interpolation(resample: Any, name: str) -> str:
    if resample not in _RESAMPLE:
        shown = f"resample={resample}, interpolation {_PIL_FILTERS.get(resample, str(resample))!r}"
        raise UserError(f"{name}: {shown} is not supported; supported: 0 (nearest), 2 (bilinear), 3 (bicubic)")
    return _RESAMPLE[resample]


def _geometry(given: Mapping[str, Any], name: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return (height, width) of the model's input, and crop_pct and crop_mode."""
    resized, crop_mode = _resized(given, name)
    if (
        given.get("crop_pct") and not _is_cropped(given) and crop_mode == "center"
    ):  # ConvNeXt: crop_pct has timm's meaning
        squash = resized[0] >= _CONVNEXT_SQUASHES
        return resized, {
            "crop_pct": 1.0 if squash else given["crop_pct"],
            "crop_mode": "squash" if squash else "center",
        }
    if given.get("crop_pct"):
        raise _inexpressible(name, "crop_pct", given["crop_pct"])
    cropped = _cropped(given, name, resized)
    return cropped, {"crop_pct": _crop_pct(cropped, resized, name), "crop_mode": crop_mode}


def _is_cropped(given: Mapping[str, Any]) -> bool:
    return bool(given.get("do_center_crop", "crop_size" in given))


def resolved_preprocessing(pretrained_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """Return timm's keys of a TimmWrapper, with its image processor's defaults for absent values."""
    if not pretrained_cfg:
        return {}
    from timm.data.config import resolve_data_config

    return {**pretrained_cfg, **resolve_data_config(pretrained_cfg, model=None, verbose=False)}


def _sides(size: Any, name: str) -> dict[str, int]:
    """Return a size in Hugging Face's form by name: height and width, or shortest_edge."""
    if isinstance(size, int):
        size = [size, size]
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    try:
        return {key: int(value) for key, value in dict(size or {}).items() if value is not None}
    except (TypeError, ValueError):
        raise UserError(f"{name}: size {size!r} is not supported; expected pixels") from None


def _resized(given: Mapping[str, Any], name: str) -> tuple[tuple[int, int], str]:
    """Return (height, width) after resizing, and timm's crop_mode: squash, or center if the aspect ratio is kept."""
    size = _sides(given.get("size"), name)
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    if isinstance(given.get("size"), int) and kind.startswith(_SHORTEST):  # form of older files
        return (size["height"], size["width"]), "center"
    if set(size) == {"height", "width"}:
        return (size["height"], size["width"]), "squash"
    if set(size) == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, "center"
    raise UserError(f"{name}: size {size} is not supported; supported: height and width, or shortest_edge alone")


def _cropped(given: Mapping[str, Any], name: str, resized: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the model's input."""
    if not _is_cropped(given):
        if "shortest_edge" in _sides(given.get("size"), name):
            raise UserError(f"{name}: without do_center_crop, size with shortest_edge gives images of many shapes")
        return resized
    if not given.get("do_resize", True):
        raise UserError(f"{name}: do_center_crop without do_resize is not supported")
    crop = _sides(given.get("crop_size"), name)
    if not crop.get("height") or not crop.get("width"):
        raise UserError(f"{name}: crop_size {crop} is not supported; expected height and width")
    height, width = crop["height"], crop["width"]
    if height > resized[0] or width > resized[1]:
        raise UserError(f"{name}: crop_size {height} x {width} is larger than size {resized[0]} x {resized[1]}")
    return height, width


def _crop_pct(cropped: tuple[int, int], resized: tuple[int, int], name: str) -> float:
    """Return the share for which int(cropped / share) is `resized`.

    Raises:
        UserError: Height and width would need two shares.
    """
    for share in (cropped[0] / resized[0], cropped[0] / (resized[0] + 1e-6), cropped[1] / (resized[1] + 1e-6)):
        if all(int(c / share) == r for c, r in zip(cropped, resized, strict=True)):
            return share
    raise UserError(f"{name}: a crop of {cropped} from {resized} has no common crop_pct")


def _normalisation(given: Mapping[str, Any], name: str, channels: int | None) -> dict[str, Any]:
    """Return mean and std for pixels in [0, 1], for any scale of pixels in the processor."""
    factor = (given.get("rescale_factor") or 1 / 255) if given.get("do_rescale", True) else 1.0
    if not isinstance(factor, (int, float)):
        raise UserError(f"{name}: rescale_factor {factor!r}: expected a number, such as {1 / 255:.6g}")
    scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor
    if channels is None and abs(scale - 1) > 3e-4:
        raise UserError(f"{name}: pixels are not scaled by 1 / 255 (rescale_factor {factor:g}), which is not supported")
    if not given.get("do_normalize", True):
        return {"mean": (0.0,) * (channels or 1), "std": (1 / scale,) * (channels or 1)}
    found = {key: given.get(f"image_{key}") for key in ("mean", "std")}
    if channels is None:
        return {key: value for key, value in found.items() if value is not None}
    return {
        key: tuple(each / scale for each in _channels(value, channels, f"{name}: image_{key}"))
        for key, value in found.items()
    }


def _channels(values: Any, channels: int, name: str) -> tuple[float, ...]:
    if isinstance(values, (int, float)):
        values = [values] * channels
    if not values or len(values) != channels:
        raise UserError(f"{name} is {values}, expected {channels} numbers, one a channel")
    return tuple(float(value) for value in values)


def processor_text(text: str, stands_for: dict[str, Any], pretrained_cfg: dict[str, Any]) -> str:
    """Return the text of preprocessor_config.json for a model's preprocessing.

    Args:
        text: The file as it was loaded, empty if there was none.
        stands_for: timm's keys that are equivalent to `text`.
        pretrained_cfg: timm's keys now, such as after `--mean`.

    Returns:
        `text` if nothing has changed, or if mean and std are not known.
    """
    if dict(pretrained_cfg) == dict(stands_for):
        return text
    if not {"mean", "std"} <= set(pretrained_cfg):
        return text
    size = [int(side) for side in pretrained_cfg["input_size"][1:]] if "input_size" in pretrained_cfg else None
    share = float(pretrained_cfg.get("crop_pct") or 1.0)
    written: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in pretrained_cfg["mean"]],
        "image_std": [float(value) for value in pretrained_cfg["std"]],
        "do_resize": True,
        "resample": _number_of(pretrained_cfg.get("interpolation", "bicubic")),
    }
    if size is not None:
        resized = [int(side / share) for side in size]
        squash = pretrained_cfg.get("crop_mode") == "squash"
        kept = {"height": resized[0], "width": resized[1]} if squash else {"shortest_edge": min(resized)}
        written |= {"size": kept, "do_center_crop": not squash or resized != size}
        written |= {"crop_size": {"height": size[0], "width": size[1]}} if written["do_center_crop"] else {}
        kind = "ViTImageProcessor" if not written["do_center_crop"] else "DeiTImageProcessor" if squash else None
        written["image_processor_type"] = kind or "CLIPImageProcessor"
    return json.dumps(written, indent=2) + "\n"


def _number_of(interpolation: str) -> int:
    numbers = {name: number for number, name in _RESAMPLE.items()} | {"nearest": 0}
    return numbers[interpolation]
