"""Properties of every classifier: input size, channels, classes, width, and the layers whose outputs are the logits.

The input size of a model is, in this order:

1. the size that its patch embedding was built for, unless that accepts any size (timm's `dynamic_img_size`);
2. `pretrained_cfg["input_size"]` if it differs from timm's own;
3. the argument `img_size` that the model was built with;
4. `pretrained_cfg["input_size"]`, or the attribute `input_size`, `img_size` or `image_size` of the module.

A module that wraps exactly one model with a `pretrained_cfg` has that model's configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers.space_to_depth import SpaceToDepth
from torch import Tensor, nn

from engine.errors import UserError

logger = logging.getLogger(__name__)

# Model attribute that holds the number of classes of a module that has no `num_classes`.
_CLASSES = "_lethe_num_classes"
_SIZES = ("input_size", "img_size", "image_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Properties of any classifier.

    Attributes:
        in_chans: Channels of an image.
        input_size: (height, width) in pixels.
        width: Number of features.
    """

    in_chans: int
    input_size: tuple[int, int]
    width: int


def model_info(model: nn.Module) -> ModelInfo:
    """Return channels, input size and width of a classifier.

    Raises:
        UserError: One of them is not declared; the message has the remedy.
    """
    if (declared := declared_info(model)) is not None:
        return declared
    return ModelInfo(in_chans=_channels(model), input_size=input_size_of(model), width=_width(model))


def declared_info(model: nn.Module) -> Any:
    """Return the result of the model's own `vit_info()`; None if it has no such method."""
    method = getattr(model, "vit_info", None)
    return method() if callable(method) else None


def configuration(model: nn.Module) -> dict[str, Any]:
    """Return the `pretrained_cfg` of a model, or of the only model that it wraps; empty if there is none."""
    own = getattr(model, "pretrained_cfg", None)
    if own:
        return dict(own)
    inner = configured_model(model)
    config: Any = getattr(inner, "pretrained_cfg", None)
    return dict(config or {})


def configured_model(model: nn.Module) -> nn.Module | None:
    """Return the outermost submodule with a `pretrained_cfg` if there is exactly one, or the model if it has one."""
    if getattr(model, "pretrained_cfg", None):
        return model
    found = [child for child in map(configured_model, model.children()) if child is not None]
    return found[0] if len(found) == 1 else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, else the same object."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


# --- input ------------------------------------------------------------------------------------------------------------


def input_size_of(model: nn.Module) -> tuple[int, int]:
    """Return (height, width) in pixels of a model's images, by the order on top of this file.

    Raises:
        UserError: The model does not declare a size.
    """
    core, config = configured_model(model) or model, configuration(model)
    embed = getattr(core, "patch_embed", None)
    embedded = getattr(embed, "img_size", None)
    if embedded is not None and not _takes_any_size(core, embed):
        return pair(embedded)
    declared = config.get("input_size")
    if declared is not None and _changed(config):
        return pair(tuple(declared)[-2:])
    built = _model_args(core).get("img_size")
    attributes = (getattr(model, name, None) for name in _SIZES)
    for size in (built, embedded, declared, *attributes):
        if isinstance(size, int) or (isinstance(size, (tuple, list, torch.Size)) and len(size) in (2, 3)):
            return pair(size if isinstance(size, int) else tuple(size)[-2:])
    raise UserError(
        f"{type(model).__name__} does not declare its input size: set model.pretrained_cfg = "
        "{'input_size': (3, height, width), 'mean': ..., 'std': ...}, or the attribute model.input_size"
    )


def _takes_any_size(model: nn.Module, embed: Any) -> bool:
    return bool(getattr(model, "dynamic_img_size", False)) or not getattr(embed, "strict_img_size", True)


def _changed(config: dict[str, Any]) -> bool:
    """Return whether `input_size` differs from the one that timm registered for the architecture and tag."""
    name, tag = config.get("architecture"), config.get("tag")
    if not name:
        return False
    known = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name, allow_unregistered=True)
    return known is not None and tuple(known.input_size) != tuple(config["input_size"])


def _model_args(model: nn.Module) -> dict[str, Any]:
    spec = getattr(model, "_lethe_spec", None)
    if spec is not None:
        return spec.model_args
    try:
        from timm.models._hub import get_model_args  # type: ignore[attr-defined]  # kept since timm 1.0.31
    except ImportError:
        return {}
    return get_model_args(model, {})


def _channels(model: nn.Module) -> int:
    core, config = configured_model(model) or model, configuration(model)
    embed = getattr(core, "patch_embed", None)
    if embed is not None and hasattr(embed, "patch_size"):
        projection = next((m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
        if isinstance(projection, nn.Conv2d):
            return projection.in_channels
        if projection is not None:
            patch = pair(embed.patch_size)
            return projection.in_features // (patch[0] * patch[1])
    if (built := _model_args(core).get("in_chans")) is not None:
        return int(built)
    first = config.get("first_conv")
    for name in (first,) if isinstance(first, str) else tuple(first or ()):
        with contextlib.suppress(AttributeError):
            layer = core.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                return layer.in_channels // _folded(core)
    for size in (config.get("input_size"), *(getattr(model, name, None) for name in _SIZES)):
        if isinstance(size, (tuple, list, torch.Size)) and len(size) == 3:
            return int(size[0])
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if stem is None else stem.in_channels // _folded(core)


def _folded(model: nn.Module) -> int:
    """Return the number of pixels that are folded into channels before the first convolution (TResNet); else 1."""
    module = next((m for m in model.modules() if isinstance(m, SpaceToDepth)), None)
    return 1 if module is None else module.bs**2


# --- output -----------------------------------------------------------------------------------------------------------


def num_classes_of(model: nn.Module) -> int:
    """Return the number of classes: `num_classes`, or the width of the logits of one pass on a black image.

    Raises:
        UserError: The model has no head, or its output is not logits [images, classes].
    """
    declared = getattr(model, "num_classes", None)
    if isinstance(declared, int):
        if declared > 0:
            return declared
        raise UserError(
            f"{type(model).__name__} has no classifier (num_classes=0); give the model with the head that it was "
            "trained with"
        )
    known = getattr(model, _CLASSES, None)
    if known is None:
        known = _logits_of_one_image(model).shape[1]
        setattr(model, _CLASSES, known)
    return int(known)


def _logits_of_one_image(model: nn.Module) -> Tensor:
    with evaluating(model), torch.no_grad():
        try:
            logits = model(black_image(model))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{type(model).__name__} does not take images of {_channels(model)} x "
                f"{' x '.join(map(str, input_size_of(model)))}, its declared input size ({one_line(error)}); set "
                "model.pretrained_cfg['input_size'] to the size it was trained with"
            ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{type(model).__name__} returns {found} for one image, expected logits [1, classes]; wrap it in a module "
            "whose forward returns the logits alone"
        )
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and abs(float(logits.float().sum()) - 1) < 1e-3:
        raise UserError(
            f"{type(model).__name__} returns probabilities (they sum to 1), expected logits: the loss takes the "
            "softmax itself; give the model without its softmax"
        )
    return logits


def black_image(model: nn.Module) -> Tensor:
    """Return one image [1, C, H, W] of zeros, on the device and in the dtype of the model's weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, _channels(model), *input_size_of(model), dtype=weight.dtype, device=weight.device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model and its submodules in eval mode within the context; afterwards restore each."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs are the logits: timm's `get_classifier()`, or the last linear layer of that
    width.

    DeiT's distilled models have two, and their logits are the mean.

    Raises:
        UserError: There is none.
    """
    method = getattr(model, "get_classifier", None)
    found = method() if callable(method) else None
    if isinstance(found, (tuple, list, nn.ModuleList)):
        heads = list(found)
    elif isinstance(found, nn.Module):
        heads = [found]
    else:
        classes = num_classes_of(model)
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes][-1:]
    if not heads or not any(True for head in heads for _ in head.parameters()):
        raise UserError(
            f"{type(model).__name__} has no classifier whose inputs could be read as features: expected "
            "get_classifier() or a linear layer as wide as the logits"
        )
    return heads


def _width(model: nn.Module) -> int:
    """Return the number of features at the input of the classifier; for a timm ViT, its `num_features`."""
    declared = getattr(model, "num_features", None)
    if isinstance(declared, int) and hasattr(model, "blocks"):
        return declared
    try:
        head = classifiers(model)[0]
    except UserError:
        head = None
    for name in ("in_features", "in_channels"):
        if isinstance(width := getattr(head, name, None), int):
            return width
    if isinstance(declared, int):
        return declared
    widths = [p.shape[-1] for p in model.parameters() if p.dim() >= 2]
    if not widths:
        raise UserError(f"{type(model).__name__} has no weights of two dimensions; give a trained classifier")
    return int(widths[-1])
