"""Attention of a model: its implementation, and captures of its queries and keys or of its maps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.vit import attention_modules, is_swin, plain_attention
from engine.models.xformers_attention import through_xformers

_UNCHANGED = (nn.Identity, type(None))


@contextlib.contextmanager
def attention_backend(model: nn.Module, implementation: str) -> Iterator[None]:
    """Run every block of the model with another implementation of attention within the context.

    Args:
        model: The model.
        implementation: `sdpa` (timm's fused attention), `eager` (explicit) or `xformers`.

    Raises:
        UserError: xformers, for a model whose attention is windowed or cannot be captured.
    """
    if implementation == "xformers" and not is_swin(model) and attention_modules(model) and not plain_attention(model):
        raise UserError(
            f"option attention='xformers': {type(model).__name__} rotates q and k, adds a bias to the attention or "
            "pools by attention, which is captured where torch computes it; use attention=sdpa"
        )
    before = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    redirected = _usable_attention(_without_windows(model)) if implementation == "xformers" else []
    for module in before:
        module.fused_attn = implementation != "eager"  # type: ignore[assignment]
    other = model.set_attention(implementation) if hasattr(model, "set_attention") else None  # type: ignore[operator]
    try:
        with through_xformers(redirected) if redirected else contextlib.nullcontext():
            yield
    finally:
        for module, fused in before.items():
            module.fused_attn = fused
        if other is not None:
            model.set_attention(other)  # type: ignore[operator]


def _without_windows(model: nn.Module) -> nn.Module:
    if is_swin(model):
        raise UserError(
            f"option attention='xformers': {type(model).__name__} adds a relative position bias, and a mask where "
            "windows are shifted, to the attention of each window, which xformers is not given; use attention=sdpa"
        )
    return model


@contextlib.contextmanager
def capture_queries_keys(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the final q and k [B, H, N, d] of every block in one forward pass, first block first.

    timm's attention passes q and k through `q_norm` and `k_norm` even if those are Identity, so hooks there get the
    strided views that fused attention reads: nothing is copied and nothing is switched off.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for module in _usable_attention(model):
            for norm, sink in ((module.q_norm, queries), (module.k_norm, keys)):
                handle = norm.register_forward_hook(functools.partial(_pass_to_sink, sink.append))  # type: ignore[union-attr]
                hooks.callback(handle.remove)
        yield queries, keys


@contextlib.contextmanager
def stream_attention(model: nn.Module, sink: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass the attention [B, H, N, N] of every block to `sink` during a forward pass, first block first.

    Within the context the model's attention is explicit, and its maps pass through `attn_drop`, where a hook reads
    them.
    """
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(attention_backend(model, "eager"))
        for module in _usable_attention(model):
            handle = module.attn_drop.register_forward_hook(functools.partial(_pass_to_sink, sink))  # type: ignore[union-attr]
            hooks.callback(handle.remove)
        yield


def _usable_attention(model: nn.Module) -> list[nn.Module]:
    modules = attention_modules(model)
    if not modules:
        raise UserError(
            f"{type(model).__name__} has no usable attention: expected `blocks[i].attn` with `q_norm` and `k_norm`"
        )
    return modules


def _pass_to_sink(sink: Callable[[Tensor], None], _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    sink(output.detach())


def zero_key_bias_grads(model: nn.Module) -> list[Any]:
    """Set the gradient of key biases to zero, its exact value, and return the handles of the hooks.

    A key bias adds the same number to all logits of a query, which softmax cancels, so its gradient is zero except for
    rounding. Adam divides the rounding error by its own size, so the bias would drift at the full rate, and differently
    for each number of ranks. Hooks are set only in classes whose `qkv` is known to be queries, keys and values in that
    order, with a softmax over unchanged keys: DaViT's channels, the head order of TinyViT and MaxViT, and rotated or
    normalised keys have a gradient for the bias.
    """
    handles = []
    for module in model.modules():
        if type(module) not in (Attention, RelPosAttention, WindowAttention):
            continue
        qkv: Any = module.qkv
        if qkv.bias is not None and qkv.bias.requires_grad and isinstance(getattr(module, "k_norm", None), _UNCHANGED):
            handles.append(qkv.bias.register_hook(_without_key_part))
    return handles


def _without_key_part(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient.view(3, -1)[1] = 0
    return gradient
