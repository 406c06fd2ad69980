"""The weights that a run may change: all, the head, the last blocks, or low-rank updates of the linear layers.

With `lora:R` (Hu et al., ICLR 2022, arXiv 2106.09685) the linear layers of attention and MLP in every block (timm's
qkv, proj, fc1, fc2) compute with

    W + B A,   A [R, in] uniform in +-1/sqrt(in), B [out, R] zero at first,

and A and B alone are trained: no alpha / R scale (a learning rate has the same effect), no dropout, no biases. W + B A
is computed at every call (torch.nn.utils.parametrize), so every method runs on it unchanged and the merge is exact; the
price is that the gradient of W + B A is computed whole, as in full training. Weights that are not trained have no
gradient, no optimizer state and no weight decay, and keep their bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from engine.errors import UserError
from engine.models.info import classifiers

# Model attribute that holds the names of the weights that `restrict` froze.
_FROZEN = "_lethe_frozen"
_PARAMETRIZED = ".parametrizations.weight."
# Parts of a block of transformers, by timm's names.
_PARTS = {"attention": "attn", "self_attn": "attn", "intermediate": "mlp", "output": "mlp"}
_BLOCK = re.compile(r"(layers\.\d+\.)?blocks\.\d+")


class LowRank(nn.Module):
    """W + B A for a weight W [out, in].

    Attributes:
        A: Parameter [rank, in].
        B: Parameter [out, rank].
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        uniform = 2 * torch.rand(rank, weight.shape[1], generator=generator) - 1
        self.A = nn.Parameter((uniform * weight.shape[1] ** -0.5).to(weight))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        # Not in the half precision of autocast: forward passes must use the same weight as the merge.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.B @ self.A


def restrict(model: nn.Module, spec: str, seed: int, parts: Sequence[str] = ("attn", "mlp")) -> None:
    """Freeze the weights that a run must not change, and add low-rank updates for `lora:R`; undone by `merge`.

    Args:
        model: timm's ViT, DeiT or Swin; changed in place.
        spec: `RunConfig.trainable`.
        seed: Seed of A.
        parts: Modules of a block whose linear layers get updates.

    Raises:
        UserError: The model has no such part.
    """
    if spec == "all":
        return
    kind, _, number = spec.partition(":")
    if kind == "lora":
        layers, kept = _linear_layers(model, parts, spec, int(number)), set()
    else:
        modules = _head(model, spec) if kind == "head" else _last(model, spec, int(number))
        layers, kept = [], {id(p) for module in modules for p in module.parameters()}
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    setattr(model, _FROZEN, frozen)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, int(number), generator))


def merge(model: nn.Module) -> nn.Module:
    """Replace W by W + B A, in place, and unfreeze the weights that `restrict` froze."""
    for layer in [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer._parameters["bias"] = layer._parameters.pop("bias")  # keep the order: weight, bias
    for name in vars(model).pop(_FROZEN, ()):
        model.get_parameter(name).requires_grad_(True)
    return model


def merge_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the merged state dict of a restricted model; that of a plain model is unchanged."""
    merged = {}
    for key, value in state.items():
        owner, parametrized, which = key.partition(_PARAMETRIZED)
        if not parametrized:
            merged[key] = value
        elif which == "original":
            merged[f"{owner}.weight"] = value + state[key[: -len(which)] + "0.B"] @ state[key[: -len(which)] + "0.A"]
    return merged


def refuse_sharding(model: nn.Module, zero: Mapping[str, Any]) -> None:
    """Check that a DeepSpeed configuration supports a restricted model.

    Raises:
        UserError: Frozen weights would be rounded, or ZeRO-3 would not gather them.
    """
    if not hasattr(model, _FROZEN):
        return
    if zero["bf16"]["enabled"]:
        raise UserError(
            "option trainable: DeepSpeed keeps weights that are not trained in bf16 alone, so they would end rounded; "
            "use precision=fp32, torch_autocast, or stage 0"
        )
    if zero["zero_optimization"]["stage"] == 3:
        raise UserError(
            "option trainable: ZeRO-3 gathers a weight when its own module is called, which low-rank updates and "
            "frozen blocks do not support; use stage 0, 1 or 2"
        )


def low_ranks(model: nn.Module) -> list[list[LowRank]]:
    """Return the low-rank updates of each block, first block first."""
    return [[m for m in block.modules() if isinstance(m, LowRank)] for block in blocks_of(model)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks in the order of the forward pass, over all stages of a Swin."""
    found = [module for name, module in model.named_modules() if _BLOCK.fullmatch(name)]
    return found or list(getattr(model, "blocks", ()))


def after_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules after the blocks: norms, pooling, heads."""
    if hasattr(model, "tail"):  # not a model of timm
        return list(model.tail)  # type: ignore[arg-type]
    children = dict(model.named_children())
    names = list(children)
    return [children[name] for name in names[max(names.index(n) for n in ("blocks", "layers") if n in names) + 1 :]]


def _head(model: nn.Module, spec: str) -> list[nn.Module]:
    try:
        return classifiers(model)
    except UserError:
        raise UserError(f"option trainable={spec!r}: the model has no classifier; use last:N or lora:R") from None


def _last(model: nn.Module, spec: str, count: int) -> list[nn.Module]:
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(
            f"option trainable={spec!r}: {type(model).__name__} has no `blocks`; use trainable=all or trainable=head"
        )
    if count > len(blocks):
        raise UserError(
            f"option trainable={spec!r}: the model has {len(blocks)} blocks, so N is 1 to {len(blocks)}; all trains "
            "every weight"
        )
    first = len(blocks) - count
    seen, between = 0, []
    for stage in getattr(model, "layers", ()):  # Swin: the downsampling between two trained blocks is trained
        if seen > first:
            between.append(stage.downsample)
        seen += len(stage.blocks)
    return [*blocks[first:], *between, *after_blocks(model)]


def _linear_layers(model: nn.Module, parts: Sequence[str], spec: str, rank: int) -> list[nn.Linear]:
    layers = [
        module
        for block in blocks_of(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and _part_of_block(name) in parts
    ]
    if not layers:
        raise UserError(
            f"option trainable={spec!r}: {type(model).__name__} has no linear layers in `blocks[i].attn` and "
            "`blocks[i].mlp` to add low-rank updates to; use trainable=all or trainable=head"
        )
    smallest = min(min(layer.weight.shape) for layer in layers)
    if rank > smallest:
        raise UserError(
            f"option trainable={spec!r}: the smallest dimension of the layers is {smallest}, so R is 1 to {smallest}"
        )
    return layers


def _part_of_block(name: str) -> str:
    """Return timm's name of the part of a block that a linear layer is in; empty for the layer of a position bias."""
    first, _, rest = name.partition(".")
    if first in _PARTS:  # transformers nests its layers deeper
        return "" if "position_bias" in rest else _PARTS[first]
    return first if name.count(".") == 1 else ""
