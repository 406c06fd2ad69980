"""Checkpoints: build, load and save a model.

A checkpoint is a folder in timm's / Hugging Face's layout: `config.json` (architecture, num_classes, model_args,
pretrained_cfg) and `model.safetensors`. `timm.create_model("local-dir:FOLDER", pretrained=True)` opens every one
that is written here. Nothing of a user's is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from engine.errors import UserError, nearest
from engine.files import replacing
from engine.models.hub import fetching

# Model attribute that holds the ModelSpec; timm itself does not keep the arguments a model was built with.
_SPEC = "_lethe_spec"
# And the folder that it was loaded from.
_FOLDER = "_lethe_folder"
# Keys of config.json that `save_checkpoint` writes itself.
_CONFIG_KEYS = ("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the same architecture again: timm's name, and what was passed to it.

    extra: the other keys of config.json, such as `label_names`; kept in every checkpoint that is written.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label_names(self) -> list[str]:
        """Class names by label, as the checkpoint gives them; empty if it gives none."""
        names = self.extra.get("label_names") or self.pretrained_cfg.get("label_names") or []
        return [str(name) for name in names]

    def build(self, seed: int | None = None) -> nn.Module:
        """A freshly initialised model; with a seed the same weights each time, the global generator untouched."""
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                model = timm.create_model(
                    self.architecture,
                    pretrained=False,
                    pretrained_cfg_overlay={k: v for k, v in self.pretrained_cfg.items() if k != "architecture"},
                    num_classes=self.num_classes,
                    **self.model_args,
                )
            except RuntimeError as error:
                if "Unknown model" in str(error):
                    hint = nearest(self.architecture, timm.list_models()).split(" known:")[0].rstrip(";")
                    raise UserError(
                        f"unknown architecture {self.architecture!r}{hint} (timm.list_models() has all)"
                    ) from None
                raise
            except TypeError as error:
                raise UserError(
                    f"architecture {self.architecture!r} refuses its model_args {self.model_args}: {error}"
                ) from None
        setattr(model, _SPEC, self)
        return model


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of a model built here, or by `timm.create_model`.

    Raises UserError where the architecture cannot be told: then the model cannot be saved in timm's layout or
    retrained from scratch, though it can be unlearned in memory.
    """
    known = getattr(model, _SPEC, None)
    if known is not None:
        return known
    pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = pretrained_cfg.get("architecture")
    if not architecture:
        raise UserError(
            f"{type(model).__name__} does not say which timm architecture it is; build it with timm.create_model, "
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


def remember_model_args(model: nn.Module, **model_args: Any) -> None:
    """Notes the keyword arguments that `timm.create_model` was given, which older timm releases do not keep."""
    pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    setattr(
        model,
        _SPEC,
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
        if v is not None
        and k not in ("state_dict", "file", "source", "architecture")
        and isinstance(v, (str, int, float, bool, list, tuple))
    }


def load_checkpoint(checkpoint: str | os.PathLike[str]) -> nn.Module:
    """Opens a checkpoint folder, `timm:NAME` (pretrained weights of timm) or `hf-hub:ID`; in eval mode, on the CPU.

    Raises UserError for a folder without config.json or weights, weights that are damaged, do not fit the
    configuration, hold values that are not finite, or are a pickle with code in it.
    """
    name = os.fspath(checkpoint)
    if name.startswith(("timm:", "hf-hub:")):
        architecture = name.removeprefix("timm:")
        with fetching(name):
            model = timm.create_model(architecture, pretrained=True)
        remember_model_args(model, **_recorded_model_args(model))
        return model.eval()
    folder = Path(name)
    spec = _read_spec(folder)
    weights, path = _read_weights(folder)
    model = spec.build()
    differing = _difference(model.state_dict(), weights)
    if differing:
        raise UserError(
            f"checkpoint {folder}: {path.name} does not match config.json ({spec.architecture}): {differing}"
        )
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"checkpoint {folder}: {key} holds values that are not finite; take an earlier checkpoint")
    model.load_state_dict(weights)
    set_folder(model, folder)
    return model.eval()


def folder_of(model: nn.Module) -> Path | None:
    """The checkpoint folder that a model, or the one it was copied from, was loaded from; its weights may have changed
    since."""
    return getattr(model, _FOLDER, None)


def set_folder(model: nn.Module, folder: Path | None) -> None:
    """Notes what `folder_of` gives."""
    setattr(model, _FOLDER, folder)


def _read_spec(folder: Path) -> ModelSpec:
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} is not a folder; give one with config.json and model.safetensors, "
            "timm:NAME or hf-hub:ID"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pretrained_cfg = config.get("pretrained_cfg", {})
        return ModelSpec(
            architecture=config["architecture"],
            num_classes=int(config.get("num_classes", pretrained_cfg.get("num_classes", 1000))),
            # timm names the classes here too
            model_args={k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"},
            pretrained_cfg=_plain(pretrained_cfg),
            extra={k: v for k, v in config.items() if k not in _CONFIG_KEYS},
        )
    except FileNotFoundError:
        raise UserError(
            f"checkpoint {folder} has no config.json; write it with engine.save_checkpoint or timm.models.save_for_hf"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder}: config.json is not a timm configuration ({type(error).__name__}: {error})"
        ) from None


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    path = folder / "model.safetensors"
    if path.is_file():
        try:
            return safetensors.torch.load_file(path), path
        except safetensors.SafetensorError as error:
            raise UserError(
                f"checkpoint {folder}: model.safetensors is damaged or cut short ({error}); copy it again"
            ) from None
    for path in sorted([*folder.glob("*.pth"), *folder.glob("*.pt"), *folder.glob("*.bin")]):
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"checkpoint {folder}: {path.name} is not a plain state dict, or is damaged, and is not opened since "
                f"a pickle can run code ({str(error).splitlines()[0][:80]}); save it as model.safetensors"
            ) from None
        weights = weights.get("state_dict", weights.get("model", weights)) if isinstance(weights, dict) else weights
        if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
            raise UserError(f"checkpoint {folder}: {path.name} is not a state dict (names to tensors)")
        return weights, path
    raise UserError(f"checkpoint {folder} has no model.safetensors (nor .pth, .pt, .bin)")


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first way in which two state dicts do not fit, in words; empty where they do."""
    for key in expected:
        if key not in found:
            return f"{key} is missing"
        if expected[key].shape != found[key].shape:
            return f"{key} has shape {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
    extra = sorted(set(found) - set(expected))
    return f"{extra[0]} is not in the model" if extra else ""


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes `config.json` and `model.safetensors` as timm reads them; returns the folder.

    Each file is written under another name and renamed, so a failure (no space left) leaves the earlier one whole.
    """
    spec, folder = spec_of(model), Path(folder)
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
    """SHA-256 over names, shapes, types and bytes of all weights: equal for equal models, whatever file holds them."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
