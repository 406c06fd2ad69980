"""The image processor of a Hugging Face model as timm's preprocessing keys, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import UserError

PROCESSOR = "preprocessor_config.json"
# Where else the library keeps an image processor.
_PROCESSORS = (PROCESSOR, "processor_config.json")
# Model attribute that is set where nothing tells mean and std.
UNKNOWN_PREPROCESSING = "_lethe_unknown_preprocessing"
# PIL's numbers.
_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


def unknown_preprocessing(model: nn.Module) -> str:
    """Why mean and std of a model's images are not known, with the remedy; empty where they are."""
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
    """The image processor that is stored with a model, or None; source: a folder, or an id in the local cache."""
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
    """An image processor as timm's keys; empty for None.

    Args:
        processor: an image processor of transformers.
        channels: of the model's images.

    Raises:
        UserError: for a step that these keys cannot express.
    """
    if processor is None:
        return {}
    kind, given = type(processor).__name__, dict(processor.to_dict())
    for step in ("do_pad", "do_flip_channel_order", "rescale_offset", "crop_pct", "do_thumbnail", "do_align_long_axis"):
        if given.get(step):
            raise UserError(f"{kind}: {step}={given[step]!r} cannot be expressed; supported: resize, centre crop, "
                            "rescale and normalise")  # fmt: skip
    resized, crop_mode = _resized(given, kind)
    cropped = _cropped(given, kind, resized)
    resample = int(given.get("resample", 2) if given.get("resample") is not None else 2)
    if resample not in _RESAMPLE:
        raise UserError(
            f"{kind}: resample={resample} is not supported; supported: 0 (nearest), 2 (bilinear), 3 (bicubic)"
        )
    mean, std = _normalisation(given, channels)
    return {
        "mean": mean,
        "std": std,
        "input_size": (channels, *cropped),
        "interpolation": _RESAMPLE[resample],
        "crop_pct": _crop_pct(cropped, resized),
        "crop_mode": crop_mode,
    }


def resolved_preprocessing(pretrained_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """timm's keys of a TimmWrapper's configuration, with the values that its image processor takes for absent ones."""
    if not pretrained_cfg:
        return {}
    from timm.data.config import resolve_data_config

    return {**pretrained_cfg, **resolve_data_config(pretrained_cfg, model=None, verbose=False)}


def _resized(given: dict[str, Any], kind: str) -> tuple[tuple[int, int], str]:
    """(height, width) that an image is resized to, and timm's crop_mode: squash, or center where the shape is kept."""
    size = given.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    size = {key: int(value) for key, value in (size or {}).items() if value is not None}
    if set(size) == {"height", "width"}:
        return (size["height"], size["width"]), "squash"
    if set(size) == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, "center"
    raise UserError(f"{kind}: size {size} is not supported; supported: height and width, or shortest_edge alone")


def _cropped(given: dict[str, Any], kind: str, resized: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what the model gets."""
    if not given.get("do_center_crop"):
        if "shortest_edge" in (given.get("size") or {}):
            raise UserError(f"{kind}: without do_center_crop, size with shortest_edge gives images of many shapes")
        return resized
    if not given.get("do_resize", True):
        raise UserError(f"{kind}: do_center_crop without do_resize is not supported")
    crop = given.get("crop_size") or {}
    height, width = (crop, crop) if isinstance(crop, int) else (crop.get("height", 0), crop.get("width", 0))
    if not height or not width:
        raise UserError(f"{kind}: crop_size {crop} is not supported; expected height and width")
    if height > resized[0] or width > resized[1]:
        raise UserError(f"{kind}: crop_size {height} x {width} is larger than size {resized[0]} x {resized[1]}")
    return int(height), int(width)


def _crop_pct(cropped: tuple[int, int], resized: tuple[int, int]) -> float:
    """The share for which int(cropped / share) is `resized`.

    Raises UserError where height and width would need two shares.
    """
    for share in (cropped[0] / resized[0], cropped[0] / (resized[0] + 1e-6), cropped[1] / (resized[1] + 1e-6)):
        if all(int(c / share) == r for c, r in zip(cropped, resized, strict=True)):
            return share
    raise UserError(f"image processor: a crop of {cropped} from {resized} has no common crop_pct")


def _normalisation(given: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for pixels in [0, 1], whatever the processor's own scale of pixels is."""
    scale = 255 * float(given.get("rescale_factor") or 1 / 255) if given.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    if not given.get("do_normalize", True):
        return (0.0,) * channels, (1 / scale,) * channels
    mean, std = (_channels(given.get(key), channels, key) for key in ("image_mean", "image_std"))
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _channels(values: Any, channels: int, key: str) -> tuple[float, ...]:
    if isinstance(values, (int, float)):
        values = [values] * channels
    if not values or len(values) != channels:
        raise UserError(f"image processor: {key} is {values}, expected {channels} numbers, one a channel")
    return tuple(float(value) for value in values)


def processor_text(text: str, stands_for: dict[str, Any], pretrained_cfg: dict[str, Any]) -> str:
    """preprocessor_config.json for a model's preprocessing.

    Args:
        text: the file as it came, empty if there was none.
        stands_for: timm's keys as `text` gives them.
        pretrained_cfg: timm's keys as they are now, such as after `--mean`.

    Returns:
        `text` as it is if nothing has changed; empty if mean and std are not known.
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
