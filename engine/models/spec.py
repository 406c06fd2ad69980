"""How a model is built again: architecture, arguments and the other keys of config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from engine.errors import UserError
from engine.models.architecture import (
    unknown_architecture,
)

# Model attribute that holds the ModelSpec; timm does not keep the arguments that a model was built with.
_SPEC = "_lethe_spec"
# Model attribute that holds the checkpoint folder.
_FOLDER = "_lethe_folder"

# Key of config.json, and of `ModelSpec.extra`, with how a file of another program was read.
IMPORTED = "lethe_import"
# The same, set if crop_pct was chosen for this model, by the command or its training script (`Preprocessing`).
CROP_FITTING = "lethe_crop_fitting"

_CFG_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"architecture"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the same architecture again.

    Attributes:
        architecture: timm's name.
        num_classes: Number of classes.
        model_args: Arguments of `timm.create_model`.
        pretrained_cfg: timm's configuration.
        extra: The other keys of config.json, such as `label_names`; kept in every checkpoint that is written.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label_names(self) -> list[str]:
        """Class names by label in the checkpoint; empty if there are none."""
        names = self.extra.get("label_names") or self.pretrained_cfg.get("label_names") or []
        return [str(name) for name in names]

    def build(self, seed: int | None = None) -> nn.Module:
        """Return a newly initialised model.

        Args:
            seed: The weights depend on it alone, and the global generator is unchanged; None: draw from the global
                generator.

        Raises:
            UserError: The architecture is unknown, or its arguments are wrong.
        """
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                model = timm.create_model(
                    self.architecture,
                    pretrained=False,
                    pretrained_cfg_overlay={k: v for k, v in self.pretrained_cfg.items() if k in _CFG_FIELDS},
                    num_classes=self.num_classes,
                    **self.model_args,
                )
            except RuntimeError as error:
                if "Unknown model" in str(error):
                    raise UserError(
                        f"unknown architecture {self.architecture!r}{unknown_architecture(self.architecture)} "
                        "(timm.list_models() has all)"
                    ) from None
                if isinstance(error, NotImplementedError) or "meta" in str(error):
                    raise  # the constructor needs values: `_on_meta` builds the model with memory
                raise UserError(
                    f"architecture {self.architecture!r} cannot be built with its model_args {self.model_args}: "
                    f"{str(error).splitlines()[0][:120]}"
                ) from None
            except (TypeError, AssertionError, ValueError, ArithmeticError, AttributeError) as error:
                raise UserError(
                    f"architecture {self.architecture!r} refuses its model_args {self.model_args}: {error}; correct "
                    "--model-arg, or model_args in config.json"
                ) from None
        set_spec(model, self)
        return model

    def write(self, model: nn.Module, folder: Path) -> Path | None:
        """Write a model in a layout other than timm's and return the folder; None: the layout is timm's."""
        return None


def stored_spec(model: nn.Module) -> ModelSpec | None:
    """Return the spec that a model carries; None if only `spec_of` could find it out, by building the model again."""
    return getattr(model, _SPEC, None)


def spec_of(model: nn.Module) -> ModelSpec:
    """Return the spec of a model that was built here, or by `timm.create_model`.

    Raises:
        UserError: The architecture is not known. The model then cannot be saved in timm's layout or retrained from
            scratch, but it can be unlearned in memory.
    """
    known = stored_spec(model)
    if known is not None:
        return known
    pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = pretrained_cfg.get("architecture")
    if not architecture:
        raise UserError(
            f"{type(model).__name__} has no record of its timm architecture; build it with timm.create_model, "
            "or load it with engine.load_checkpoint, so that it can be saved and built again"
        )
    spec = ModelSpec(
        architecture=architecture,
        num_classes=int(model.num_classes),  # type: ignore[arg-type]
        model_args=_recorded_model_args(model),
        pretrained_cfg=_plain(pretrained_cfg),
    )
    with torch.device("meta"):
        differing = _difference(spec.build().state_dict(), model.state_dict())
    if differing:
        raise UserError(
            f"timm.create_model({architecture!r}) does not give this model ({differing}); "
            "set the arguments it was built with by engine.remember_model_args(model, **model_args)"
        )
    return spec


def set_spec(model: nn.Module, spec: ModelSpec) -> None:
    """Set the result of `spec_of`."""
    setattr(model, _SPEC, spec)


def remember_model_args(model: nn.Module, **model_args: Any) -> None:
    """Store the keyword arguments of `timm.create_model`, which older timm releases do not keep."""
    pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    set_spec(
        model,
        ModelSpec(
            architecture=pretrained_cfg["architecture"],
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            model_args=model_args,
            pretrained_cfg=_plain(pretrained_cfg),
        ),
    )


def _recorded_model_args(model: nn.Module) -> dict[str, Any]:
    try:
        from timm.models._hub import get_model_args  # type: ignore[attr-defined]  # kept since timm 1.0.31
    except ImportError:
        return {}
    return {k: v for k, v in get_model_args(model, {}).items() if k != "num_classes"}


def _plain(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in pretrained_cfg.items()
        if v is not None and k not in ("state_dict", "file", "source", "architecture") and _is_json(v)
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the first difference of two state dicts as text; empty if they match."""
    for key in expected:
        if key not in found:
            return f"{key} is missing"
        if expected[key].shape != found[key].shape:
            return f"{key} has shape {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
    extra = sorted(set(found) - set(expected))
    return f"{extra[0]} is not in the model" if extra else ""


def describing(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Set the class names in config.json of a model that is trained anew, in place.

    Args:
        model: The model.
        names: Class names by label; other numbers than the head's leave the model without names.
    """
    spec = spec_of(model)
    old = (IMPORTED, "label_names", "label_descriptions")
    extra = {key: value for key, value in spec.extra.items() if key not in old}
    if len(names) == spec.num_classes:
        extra["label_names"] = [str(name) for name in names]
    cfg = {key: value for key, value in spec.pretrained_cfg.items() if key not in old}
    set_spec(model, dataclasses.replace(spec, extra=extra, pretrained_cfg=cfg))
    return model


def with_label_names(model: nn.Module, names: Sequence[str], source: str) -> nn.Module:
    """Set the class names of a model, in place.

    Args:
        model: The model.
        names: Class names by label.
        source: Option or file that the names come from, for the message.

    Raises:
        UserError: The number of names differs from the number of classes.
    """
    spec = spec_of(model)
    if len(names) != spec.num_classes:
        raise UserError(f"{source}: {len(names)} names for the {spec.num_classes} classes of the model; give one each")
    set_spec(model, dataclasses.replace(spec, extra={**spec.extra, "label_names": [str(n) for n in names]}))
    return model


def folder_of(model: nn.Module) -> Path | None:
    """Return the checkpoint folder that a model, or the model it was copied from, was loaded from.

    The weights may have changed since.
    """
    return getattr(model, _FOLDER, None)


def set_folder(model: nn.Module, folder: Path | None) -> None:
    """Set the result of `folder_of`."""
    setattr(model, _FOLDER, folder)
