"""What the engine needs to know of a Vision Transformer: build, load, save, patch grid, prefix tokens, q/k capture.

A checkpoint is a folder in timm's / Hugging Face's layout: `config.json` (architecture, num_classes, model_args,
pretrained_cfg) and `model.safetensors`. `timm.create_model("local-dir:FOLDER", pretrained=True)` opens every one
that is written here. Nothing of a user's is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from engine.errors import UserError, nearest
from engine.files import replacing
from engine.memory_efficient import through_xformers

# Model attribute that holds the ModelSpec; timm itself does not keep the arguments a model was built with.
_SPEC = "_lethe_spec"
# And the folder that it was loaded from.
_FOLDER = "_lethe_folder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the same architecture again: timm's name, and what was passed to it."""

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTInfo:
    """Geometry of a model's patches, as the mask sees them.

    patch_size: (height, width) in pixels of one maskable patch. grid: patches down and across.
    num_prefix_tokens: class, distillation and register tokens before the patch tokens.
    pool: "token" where the class token is read by the head, "avg" where patch tokens are averaged.
    in_chans, input_size: channels; (height, width) in pixels. windowed: Swin's rule applies (`engine.swin`).
    """

    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    pool: Literal["token", "avg"]
    in_chans: int
    input_size: tuple[int, int]
    windowed: bool
    width: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


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


def describe(model: nn.Module) -> ViTInfo:
    """Geometry of a timm ViT, DeiT or Swin. Raises UserError, saying what was looked for, for anything else."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(embed, "patch_size"):
        raise UserError(
            f"{type(model).__name__} is not a Vision Transformer of timm: looked for `patch_embed.patch_size`"
        )
    patch, grid = _pair(embed.patch_size), _pair(embed.grid_size)
    projection = next(m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    in_chans = (
        projection.in_channels if isinstance(projection, nn.Conv2d) else projection.in_features // (patch[0] * patch[1])
    )
    input_size = (patch[0] * grid[0], patch[1] * grid[1])
    windowed = _is_swin(model)
    if windowed:
        # A maskable patch is a token of the last stage: its scores are what Swin's rule gives.
        last_grid = _pair(model.layers[-1].blocks[-1].input_resolution)  # type: ignore[index, union-attr]
        patch, grid = (input_size[0] // last_grid[0], input_size[1] // last_grid[1]), last_grid
    elif not attention_modules(model):
        raise UserError(
            f"{type(model).__name__} offers no usable attention: looked for `blocks[i].attn` with `q_norm` and `k_norm`"
        )
    elif getattr(model, "rope", None) is not None:
        raise UserError(
            f"{type(model).__name__} rotates q and k after `q_norm` and `k_norm` (rotary position embedding), so its "
            "attention cannot be captured there; models with learned position embeddings can be used"
        )
    pool = getattr(model, "global_pool", "token")
    return ViTInfo(
        patch_size=patch,
        grid=grid,
        num_prefix_tokens=0 if windowed else int(getattr(model, "num_prefix_tokens", 1)),
        pool="token" if pool == "token" and not windowed else "avg",
        in_chans=in_chans,
        input_size=input_size,
        windowed=windowed,
        width=int(model.num_features),  # type: ignore[arg-type]
    )


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _is_swin(model: nn.Module) -> bool:
    layers = getattr(model, "layers", None)
    block = getattr(layers[-1], "blocks", [None])[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    return hasattr(block, "window_size") and hasattr(getattr(block, "attn", None), "relative_position_bias_table")


def outputs(model: nn.Module, images: Tensor, what: str = "logits") -> Tensor:
    """`logits` [B, classes], or `features` [B, width]: what the last linear layer reads. In the precision of the pass.

    Always one call of the model itself, never of its parts, and what that call returns: DeepSpeed gathers sharded
    weights at the call, and begins the backward pass at what was returned.
    """
    images = images.to(next(model.parameters()).dtype)
    if what == "logits":
        return model(images)
    classifier = model.get_classifier()  # type: ignore[operator]
    with contextlib.ExitStack() as replaced:
        for head in classifier if isinstance(classifier, tuple) else (classifier,):  # DeiT has two, and takes the mean
            replaced.enter_context(forwarding(head, lambda features: features))
        return model(images)


@contextlib.contextmanager
def forwarding(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, a module computes something else; its hooks still run."""
    before = vars(module).get("forward")  # another wrapper's, if there is one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention of each block, first block first; empty where a block has none that can be captured."""
    modules = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    usable = [m for m in modules if m is not None and hasattr(m, "q_norm") and hasattr(m, "k_norm")]
    return usable if len(usable) == len(modules) else []


@contextlib.contextmanager
def attention_as(model: nn.Module, implementation: str) -> Iterator[None]:
    """Within it, every block of the model runs timm's fused (`sdpa`) or explicit (`eager`) attention, or `xformers`'.

    Raises UserError for xformers where the model's attention is windowed or cannot be captured.
    """
    before = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    redirected = _usable_attention(_without_windows(model)) if implementation == "xformers" else []
    for module in before:
        module.fused_attn = implementation != "eager"  # type: ignore[assignment]
    try:
        with through_xformers(redirected) if redirected else contextlib.nullcontext():
            yield
    finally:
        for module, fused in before.items():
            module.fused_attn = fused


def _without_windows(model: nn.Module) -> nn.Module:
    if _is_swin(model):
        raise UserError(
            f"option attention='xformers': {type(model).__name__} adds a relative position bias, and a mask where "
            "windows are shifted, to the attention of each window, which xformers is not given; use attention=sdpa"
        )
    return model


@contextlib.contextmanager
def capture_queries_keys(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects the final q and k [B, H, N, d] of every block during one forward pass, first block first.

    timm's attention passes q and k through `q_norm` and `k_norm` even where those are Identity, so hooks there
    see the strided views that fused attention reads: nothing is copied and nothing is switched off.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for module in _usable_attention(model):
            for norm, sink in ((module.q_norm, queries), (module.k_norm, keys)):
                handle = norm.register_forward_hook(functools.partial(_hand_on, sink.append))  # type: ignore[union-attr]
                hooks.callback(handle.remove)
        yield queries, keys


@contextlib.contextmanager
def stream_attention(model: nn.Module, sink: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands the attention [B, H, N, N] of every block to `sink` as a forward pass makes it, first block first.

    Within it the model's attention is explicit, and its maps pass through `attn_drop`, where they can be seen.
    """
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(attention_as(model, "eager"))
        for module in _usable_attention(model):
            handle = module.attn_drop.register_forward_hook(functools.partial(_hand_on, sink))  # type: ignore[union-attr]
            hooks.callback(handle.remove)
        yield


def _usable_attention(model: nn.Module) -> list[nn.Module]:
    modules = attention_modules(model)
    if not modules:
        raise UserError(
            f"{type(model).__name__} offers no usable attention: looked for `blocks[i].attn` with `q_norm` and `k_norm`"
        )
    return modules


def _hand_on(sink: Callable[[Tensor], None], _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    sink(output.detach())


def still_key_biases(model: nn.Module) -> list[Any]:
    """Sets the gradient of key biases to zero, which it is but for rounding; returns the handles of the hooks.

    A key bias adds the same number to all logits of a query, and softmax does not see it. Adam divides what rounding
    leaves of its gradient by its own size, so the bias would wander at full rate, elsewhere on every number of ranks.
    Not where keys are normalised after the bias.
    """
    handles = []
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        plain = isinstance(getattr(module, "k_norm", None), (nn.Identity, type(None)))
        if isinstance(qkv, nn.Linear) and qkv.bias is not None and qkv.bias.requires_grad and plain:
            handles.append(qkv.bias.register_hook(_without_key_part))
    return handles


def _without_key_part(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient.view(3, -1)[1] = 0
    return gradient


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all weights: equal for equal models, whatever file holds them."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
