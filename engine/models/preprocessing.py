"""Preprocessing of a model's images: read it from pretrained_cfg (timm's keys), check it, and change it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.models import PretrainedCfg
from torch import nn

from engine.data.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing, short
from engine.errors import UserError, nearest
from engine.models.image_processor import preprocessing_keys, unknown_preprocessing
from engine.models.info import configuration, configured_model, model_info
from engine.models.spec import CROP_FITTING, ModelSpec, set_spec, spec_of, stored_spec

logger = logging.getLogger(__name__)

# (mean, std) by name, of red, green and blue.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_SYNONYMS = {"openai": "clip"}
# Keys of timm's pretrained_cfg that define the preprocessing, and all other keys.
_KEYS = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")
_OTHER_KEYS = tuple(field.name for field in dataclasses.fields(PretrainedCfg) if field.name not in _KEYS)
_HUGGING_FACE = ("image_mean", "image_std", "image_processor_type", "feature_extractor_type", "do_normalize")


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a model's images, from its pretrained_cfg (timm's keys).

    Raises:
        UserError: A value cannot be used.
    """
    info, config = model_info(model), configuration(model)
    mean, std = _numbers("mean", config.get("mean", (0.5,))), _numbers("std", config.get("std", (0.5,)))
    if len(mean) != info.in_chans:  # a grey-scale model made from a colour configuration
        mean, std = (float(np.mean(mean)),) * info.in_chans, (float(np.mean(std)),) * info.in_chans
    crop_pct = _crop_pct(config.get("crop_pct") or 1.0)
    mode = INTERPOLATIONS[_interpolation(config.get("interpolation") or "bicubic")]
    hugging_face, kept = getattr(configured_model(model), "crop_rounds_down", False), stored_spec(model)
    return Preprocessing(
        info.input_size,
        mean,
        std,
        crop_pct,
        mode,
        _crop_mode(config.get("crop_mode") or "center"),
        unknown_preprocessing(model),
        hugging_face,
        hugging_face or (kept is not None and bool(kept.extra.get(CROP_FITTING))),
    )


def origins(model: nn.Module, changes: Changes) -> dict[str, str]:
    """Return the origin of each value: `given` on the command line, the `checkpoint`, or timm's `default`."""
    given, kept = changes.values(), _spec(model)
    stated = kept.pretrained_cfg if kept is not None else {}
    where = {key: "given" if key in given else "checkpoint" if stated.get(key) else "default" for key in _KEYS}
    if where["input_size"] == "default":
        where["input_size"] = "checkpoint"  # fixed by the model's weights
    return where


def origins_line(model: nn.Module, changes: Changes) -> str:
    """Return the origins as text: `mean, std as given; crop_pct, ... timm's default`."""
    words = {"given": "as given", "checkpoint": "from the checkpoint", "default": "timm's default"}
    where = origins(model, changes)
    groups = {word: [key for key in _KEYS if where[key] == kind] for kind, word in words.items()}
    return "; ".join(f"{', '.join(keys)} {word}" for word, keys in groups.items() if keys)


# --- changes ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """Values that replace those of a model's pretrained_cfg; None keeps a value.

    Attributes:
        mean, std: One value for all channels, or one for each channel. For a model with another number of channels,
            three values are accepted only by name (`STATISTICS`), and their mean is used, as in timm.
        crop_pct, interpolation, crop_mode: As in timm.
        input_size: (height, width) in pixels.
        named: mean or std was given by name.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    input_size: tuple[int, int] | None = None
    named: bool = False

    @classmethod
    def read(
        cls,
        *,
        mean: str | None = None,
        std: str | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        input_size: str | None = None,
        file: Path | None = None,
    ) -> Changes:
        """Return the changes from the options of a command; single options take precedence over the file.

        Args:
            mean, std: Numbers separated by commas, or a name of `STATISTICS`.
            crop_pct, interpolation, input_size: As on the command line.
            file: File of `--preprocessing`.

        Raises:
            UserError: A value cannot be used, or only one of mean and std is given.
        """
        found: dict[str, Any] = dict(read_file(file)) if file is not None else {}
        given: dict[str, Any] = {"mean": _statistic("mean", mean), "std": _statistic("std", std)}
        given |= {"crop_pct": crop_pct, "interpolation": interpolation, "input_size": input_size}
        found |= {key: value for key, value in given.items() if value is not None}
        if ("mean" in found) != ("std" in found):
            has, lacks = ("mean", "std") if "mean" in found else ("std", "mean")
            raise UserError(f"--{has} is given without --{lacks}; give both, such as --mean imagenet --std imagenet")
        readers: dict[str, Callable[[Any], Any]] = {
            "mean": lambda value: _numbers("mean", value),
            "std": lambda value: _numbers("std", value),
            "crop_pct": _crop_pct,
            "interpolation": _interpolation,
            "crop_mode": _crop_mode,
            "input_size": _input_size,
        }
        values = {key: readers[key](value) for key, value in found.items()}
        return cls(**values, named=any(each is not None and not _is_number(each) for each in (mean, std)))

    def values(self) -> dict[str, Any]:
        """Return the values that are given."""
        return {key: value for key in _KEYS if (value := getattr(self, key)) is not None}

    def apply(self, model: nn.Module) -> None:
        """Change `model.pretrained_cfg` and its ModelSpec, so that every checkpoint of the model has the values.

        Another input size resizes the model (timm's `set_input_size`; position embeddings are resampled).

        Raises:
            UserError: The model does not support a value.
        """
        if not self.values():
            return
        values = {key: value for key, value in self.values().items() if key != "input_size"}
        channels = model_info(model).in_chans
        for key in ("mean", "std"):
            if key in values:
                values[key] = _for_channels(key, values[key], channels, self.named)
        if self.input_size is not None and self.input_size != model_info(model).input_size:
            resize_model(model, self.input_size)
        _update(model, values)


def _update(model: nn.Module, values: Mapping[str, Any], **model_args: Any) -> None:
    known = _spec(model)
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **values}  # type: ignore[assignment]
    if known is not None:
        changed = {**known.pretrained_cfg, **values}
        arguments = {**known.model_args, **model_args}
        extra = {**known.extra, CROP_FITTING: True} if "crop_pct" in values else known.extra
        set_spec(model, dataclasses.replace(known, pretrained_cfg=changed, model_args=arguments, extra=extra))


def _spec(model: nn.Module) -> ModelSpec | None:
    try:
        return spec_of(model)
    except UserError:  # a model of another library: there is no spec to change
        return None


def resize_model(model: nn.Module, size: tuple[int, int]) -> None:
    """Change the input size of a model, resampling its position embeddings.

    Raises:
        UserError: The architecture cannot be resized, or the size is not a multiple of its patches.
    """
    before = model_info(model).input_size
    wanted = f"--input-size {size[0]}x{size[1]}: {type(model).__name__} takes {before[0]} x {before[1]} pixels"
    if not hasattr(model, "set_input_size"):
        raise UserError(f"{wanted} and cannot be resized; leave --input-size out, or train a model of that size")
    try:
        model.set_input_size(img_size=size)  # type: ignore[operator]
        found = model_info(model).input_size
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        found = (found[0] - found[0] % patch[0], found[1] - found[1] % patch[1])
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{wanted} and cannot be resized ({str(error).splitlines()[0][:120]}); leave it out") from None
    if found != size:
        raise UserError(f"{wanted}; of that size it would use {found[0]} x {found[1]}: give a multiple of its patches")
    channels = model_info(model).in_chans
    _update(model, {"input_size": (channels, *size)}, img_size=list(size))
    known = _spec(model)
    if known is not None:
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in known.build().state_dict().items()}
        if shapes != {key: value.shape for key, value in model.state_dict().items()}:
            raise UserError(f"{wanted} and cannot be built again at that size; leave --input-size out")


# --- reading values ---------------------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """Read values by timm's keys, from YAML or JSON.

    The file is a pretrained_cfg, a config.json that holds one, or Hugging Face's preprocessor_config.json.

    Raises:
        UserError: The file is none of them.
    """
    name = f"--preprocessing {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if Path(path).suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{name}: is neither YAML nor JSON ({str(error).splitlines()[0][:80]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected keys and values, such as mean, std and crop_pct")
    if any(key in values for key in _HUGGING_FACE):
        return preprocessing_keys(values, name)
    values = values.get("pretrained_cfg", values) if isinstance(values.get("pretrained_cfg", {}), dict) else values
    for key in values:
        if key not in _KEYS and key not in _OTHER_KEYS:
            raise UserError(f"{name}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    found = {key: values[key] for key in _KEYS if values.get(key) is not None}
    if not found:
        raise UserError(f"{name}: holds none of {', '.join(_KEYS)}")
    return found


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[-+.,\deE\s\[\]()]+", text))


def _statistic(key: str, text: str | None) -> tuple[float, ...] | None:
    """Return numbers separated by commas, or those of a name of `STATISTICS`."""
    if text is None:
        return None
    if _is_number(text):
        return _numbers(key, [part for part in re.split(r"[,\s]+", text.strip("[]() ")) if part])
    name = _SYNONYMS.get(text.lower(), text.lower())
    if name not in STATISTICS:
        raise UserError(f"--{key} {text}: expected numbers such as 0.5,0.5,0.5, or a name{nearest(name, STATISTICS)}")
    return STATISTICS[name][("mean", "std").index(key)]


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(each) for each in (value if isinstance(value, (list, tuple)) else [value]))
    except (TypeError, ValueError):
        raise UserError(f"preprocessing: {key} {value!r}: expected numbers, one a channel") from None
    if not numbers or not all(math.isfinite(each) for each in numbers):
        raise UserError(f"preprocessing: {key} {value!r}: expected finite numbers, one a channel")
    if key == "std" and min(numbers) <= 0:
        raise UserError(f"preprocessing: std {short(numbers)}: expected numbers above 0")
    if max(map(abs, numbers)) > 10:
        raise UserError(
            f"preprocessing: {key} {short(numbers)}: expected values of pixels scaled to [0, 1]; divide by 255"
        )
    return numbers


def _for_channels(key: str, numbers: tuple[float, ...], channels: int, named: bool) -> tuple[float, ...]:
    if len(numbers) == 1:
        return numbers * channels
    if len(numbers) == channels:
        return numbers
    if named:
        return (float(np.mean(numbers)),) * channels
    raise UserError(f"--{key} {short(numbers)}: {len(numbers)} numbers for a model of {channels} channels")


def _crop_pct(value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"preprocessing: crop_pct {value}: expected a share in (0, 1], such as 0.9")
    return share


def _interpolation(value: Any) -> str:
    name = str(value).lower()
    if name not in INTERPOLATIONS:
        raise UserError(
            f"preprocessing: interpolation {value!r} is not supported; take one by --interpolation: "
            f"{', '.join(INTERPOLATIONS)}"
        )
    return name


def _crop_mode(value: Any) -> str:
    if value not in CROP_MODES:
        raise UserError(
            f"preprocessing: crop_mode {value!r} is not supported; known: {', '.join(CROP_MODES)}. Set another in a "
            "file with --preprocessing"
        )
    return str(value)


def _input_size(value: Any) -> tuple[int, int]:
    """Return (height, width) of `224`, `224x192`, [224, 192] or timm's [3, 224, 192]."""
    parts = re.split(r"[x,\s]+", value.strip().lower()) if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    try:
        sides = [int(part) for part in (parts * 2 if len(parts) == 1 else parts[-2:])]
        valid = len(parts) <= 3 and len(sides) == 2 and min(sides) > 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"preprocessing: input size {value!r}: expected pixels, such as 224 or 224x192")
    return sides[0], sides[1]
