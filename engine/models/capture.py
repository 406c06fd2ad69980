"""Attention of a model as it calls `scaled_dot_product_attention`: queries, keys, scale and additive bias.

One mechanism serves every model with fused attention, whatever is applied to q and k before the call (rotary
embeddings, norms, cosine attention) and whatever is added to the logits in it (relative position bias, padding masks):
a TorchFunctionMode reads the arguments of the call and changes nothing. Modules that compute attention explicitly but
can be switched (timm's `fused_attn`) are switched within it.

The map of a call is softmax(scale q k^T + bias). A model is supported if its maps are a chain over the same tokens:

* each block calls at least once, with as many queries as keys as the model has prefix and patch tokens;
* the calls of parallel attentions of one block are heads of one map;
* after the blocks, attention pooling may call with fewer queries than tokens: its first query's row starts the chain.

Everything else (windows, pooled or cross attention, attention over channels, causal masks, differences of maps) is
refused with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.errors import UserError
from engine.models.info import black_image, configured_model, evaluating, input_size_of, one_line

# Model attribute that holds the result of a pass on one image: pooling, or why the attention cannot be read.
_PROBED = "_lethe_attention"


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of scaled_dot_product_attention.

    Attributes:
        query: [B, H, N, d].
        key: [B, H, M, d].
        bias: Broadcast to [B, H, N, M], or None.
        scale: Factor on the logits.
        block: Index in the model's blocks; None outside of them.
        causal: Keys after a query are hidden.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float
    block: int | None
    causal: bool


@dataclasses.dataclass(frozen=True)
class Captured:
    """Attention of all layers, first layer first, as arguments of `kernels.attention_rollout`.

    Attributes:
        queries, keys: [B, H, N, d] of each layer.
        scale: Factor on the logits of all layers.
        biases: One for each layer, broadcast to [B, H, N, N]; None if no layer has one.
        start: Weights [B, N] float32 of the tokens in attention pooling; None without it.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    scale: float
    biases: list[Tensor] | None
    start: Tensor | None


@contextlib.contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Do not use compiled graphs of the model and its parts within the context: hooks are not called in them."""
    compiled = {
        m: m._compiled_call_impl for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None
    }
    with contextlib.ExitStack() as stack:
        for module, graph in compiled.items():
            module._compiled_call_impl = None
            stack.callback(setattr, module, "_compiled_call_impl", graph)
        yield


@contextlib.contextmanager
def attention_calls(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Collect the attention calls of the forward passes within the context, in order.

    Within it fused attention is on and compiled graphs are not used.
    """
    calls: list[AttentionCall] = []
    current: list[int] = []
    explicit = [m for m in model.modules() if getattr(m, "fused_attn", True) is False]
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks_of_core(model) or ()):
            enter = block.register_forward_pre_hook(lambda _module, _inputs, i=index: current.append(i))
            leave = block.register_forward_hook(lambda _module, _inputs, _output: (current.pop(), None)[1])
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        for module in explicit:
            module.fused_attn = True  # type: ignore[assignment]
            stack.callback(setattr, module, "fused_attn", False)
        stack.enter_context(not_compiled(model))
        if hasattr(model, "set_attention"):  # a model of transformers
            adapter: Any = model
            stack.callback(adapter.set_attention, adapter.set_attention("sdpa"))
        stack.enter_context(_Recorder(calls, current))
        yield calls


class _Recorder(TorchFunctionMode):
    def __init__(self, calls: list[AttentionCall], current: list[int]) -> None:
        super().__init__()
        self.calls, self.current = calls, current

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(_call_of(self.current[-1] if self.current else None, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _call_of(
    block: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Return the call for arguments of `scaled_dot_product_attention`."""
    if enable_gqa and key.dim() == 4 and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    bias = None if attn_mask is None else attn_mask.detach()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -torch.inf)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return AttentionCall(query.detach(), key.detach(), bias, factor, block, is_causal)


def blocks_of_core(model: nn.Module) -> list[nn.Module] | None:
    """Return the transformer blocks of a model, or of the model that it wraps; None if it has no `blocks`."""
    blocks = getattr(configured_model(model) or model, "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks) else None


# --- from calls to a chain of maps ------------------------------------------------------------------------------------


def assemble(calls: Sequence[AttentionCall], tokens: int, prefix: int) -> Captured:
    """Return the chain of maps over the tokens of a model that passed `check_calls`.

    Args:
        calls: Calls of one forward pass.
        tokens: Number of tokens N.
        prefix: Number of leading tokens that are not patches.

    Raises:
        UserError: No call is over so many tokens.
    """
    layers: dict[int, list[AttentionCall]] = {}
    pooled = None
    for number, call in enumerate(calls):
        if call.query.shape[-2] == call.key.shape[-2] == tokens:
            layers.setdefault(number if call.block is None else call.block, []).append(call)
        else:
            pooled = call
    if not layers:
        raise UserError(
            f"none of the {len(calls)} attention calls of a pass was over {tokens} tokens; switch fused attention on "
            "(transformers: attn_implementation='sdpa')"
        )
    joined = [_joined(layer) for layer in layers.values()]
    scale = joined[0].scale
    biases = None
    if any(layer.bias is not None for layer in joined):
        none = joined[0].query.new_zeros(1, 1, 1, 1)
        biases = [none if layer.bias is None else layer.bias for layer in joined]
    return Captured(
        [layer.query if layer.scale == scale else layer.query * (layer.scale / scale) for layer in joined],
        [layer.key for layer in joined],
        scale,
        biases,
        None if pooled is None else _pooling_row(pooled, tokens, prefix),
    )


def _joined(calls: list[AttentionCall]) -> AttentionCall:
    """Return the calls of parallel attentions as heads of one call."""
    first = calls[0]
    if len(calls) == 1:
        return dataclasses.replace(first, bias=None if first.bias is None else _as_4d(first.bias))
    bias = None
    if any(call.bias is not None for call in calls):
        shape = (*first.query.shape[:3], first.key.shape[2])
        bias = torch.cat(
            [(first.query.new_zeros(1) if c.bias is None else _as_4d(c.bias)).expand(shape) for c in calls], 1
        )
    queries = [call.query if call.scale == first.scale else call.query * (call.scale / first.scale) for call in calls]
    return dataclasses.replace(
        first, query=torch.cat(queries, 1), key=torch.cat([call.key for call in calls], 1), bias=bias
    )


def _as_4d(bias: Tensor) -> Tensor:
    """Return a bias with four dimensions, by the rule of broadcasting."""
    return bias.view(*[1] * (4 - bias.dim()), *bias.shape)


def _pooling_row(call: AttentionCall, tokens: int, prefix: int) -> Tensor:
    """Return the weights [B, N] float32 of the tokens for the first query of attention pooling, a mean over heads."""
    query, key = call.query[:, :, :1].float(), call.key.float()
    logits = query @ key.transpose(-2, -1) * call.scale
    if call.bias is not None:
        logits = logits + _as_4d(call.bias).float()[:, :, :1]
    row = logits.softmax(-1).mean(1).squeeze(1)
    if row.shape[0] != call.query.shape[0]:
        row = row.expand(call.query.shape[0], -1)
    return F.pad(row, (tokens - row.shape[-1], 0)) if row.shape[-1] != tokens else row


# --- which models -----------------------------------------------------------------------------------------------------


def check_calls(model: nn.Module, tokens: int, prefix: int) -> bool:
    """Return whether the model pools by attention, from one pass on a black image for each input size.

    Args:
        model: The model.
        tokens: Number of tokens N.
        prefix: Number of leading tokens that are not patches.

    Raises:
        UserError: The attention is not a chain of maps over `tokens` tokens; the message has the reason.
    """
    size = (input_size_of(model), tokens, prefix)
    known = getattr(model, _PROBED, None)
    if known is None or known[0] != size:
        found = _probe(model, tokens, prefix)
        known = (size, *found)
        setattr(model, _PROBED, known)
    _, reason, pooled = known
    if reason:
        raise UserError(f"{type(configured_model(model) or model).__name__}: {reason}")
    return pooled


def pool_of_head(model: nn.Module, prefix: int) -> Literal["token", "avg"]:
    """Return which tokens a head depends on, by the gradient of the logits at the last block's tokens.

    Args:
        model: A model that does not declare its pooling.
        prefix: Number of leading tokens that are not patches.

    Returns:
        "token": the first token alone; "avg": all patches alone.

    Raises:
        UserError: The head depends on other tokens.
    """
    tokens: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        tokens.append(output.detach().requires_grad_())
        return tokens[-1]

    handle = (blocks_of_core(model) or [])[-1].register_forward_hook(keep)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(black_image(model))
            weights = torch.linspace(1, 2, logits.shape[-1], dtype=logits.dtype, device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), tokens[-1])
        read = gradient[0].abs().sum(-1) > 0
    except (RuntimeError, AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__}: the tokens that its head depends on cannot be found ({one_line(error)})"
        ) from None
    finally:
        handle.remove()
    if prefix and bool(read[0]) and not bool(read[1:].any()):
        return "token"
    if bool(read[prefix:].all()) and not bool(read[:prefix].any()):
        return "avg"
    raise UserError(
        f"{type(model).__name__}: its head reads {int(read.sum())} of {len(read)} tokens, neither the class token "
        "alone nor all patches alone; set model.global_pool to 'token' or 'avg', whichever is nearer"
    )


def _probe(model: nn.Module, tokens: int, prefix: int) -> tuple[str, bool]:
    try:
        with evaluating(model), torch.no_grad(), attention_calls(model) as calls:
            model(black_image(model))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, NotImplementedError) as error:
        return f"a pass on one image of its input size fails ({one_line(error)})", False
    return _reason(model, calls, tokens, prefix)


def _reason(model: nn.Module, calls: list[AttentionCall], tokens: int, prefix: int) -> tuple[str, bool]:
    """Return why the calls are not a chain of maps, empty if they are, and whether attention pooling follows."""
    blocks = blocks_of_core(model)
    if not calls:
        return "it does not compute attention by scaled_dot_product_attention, where its maps could be read", False
    for index, block in enumerate(blocks or ()):
        if size := getattr(block, "window_size", None):
            return f"block {index + 1} attends within windows ({size} tokens wide), not over the whole image", False
        if any(isinstance(module, XCA) for module in block.modules()):
            return f"block {index + 1} attends over channels (cross-covariance), not over tokens", False
    inside = [call for call in calls if call.block is not None or blocks is None]
    pooled = False
    if blocks is None:
        inside = [call for call in calls if call.query.shape[-2] == call.key.shape[-2]]
    for call in inside:
        if problem := _problem(call, tokens, prefix):
            return problem, False
    if blocks is not None:
        counts = [sum(call.block == index for call in inside) for index in range(len(blocks))]
        if 0 in counts:
            return f"block {counts.index(0) + 1} of {len(counts)} makes no attention call that could be read", False
        for index, count in enumerate(counts):
            if count > 1 and not _parallel(blocks[index], count):
                return f"block {index + 1} combines {count} attention maps, which are not heads of one", False
    outside = [call for call in calls if call not in _IdentitySet(inside)]
    for call in outside:
        pools = call.key.shape[-2] in (tokens, tokens - prefix) and call.query.shape[-2] < call.key.shape[-2]
        if not pools or pooled or call.query.shape[0] not in (1,) or call.causal:
            return "it attends outside of its blocks in a way that is not attention pooling over its tokens", False
        pooled = True
    return "", pooled


class _IdentitySet:
    """A set of calls by identity; comparing them would compare tensors."""

    def __init__(self, calls: Sequence[AttentionCall]) -> None:
        self.ids = {id(call) for call in calls}

    def __contains__(self, call: object) -> bool:
        return id(call) in self.ids


def _problem(call: AttentionCall, tokens: int, prefix: int) -> str:
    where = "" if call.block is None else f" in block {call.block + 1}"
    if call.query.dim() != 4:
        return f"its attention{where} has queries of {call.query.dim()} dimensions, expected B, H, N, d"
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    expected = f"{tokens} tokens ({prefix} prefix tokens and {tokens - prefix} patches)"
    if call.query.shape[0] != 1:
        return f"it attends{where} within {call.query.shape[0]} windows, not over all of its {expected}"
    if queries != keys:
        return f"it attends{where} from {queries} to {keys} tokens, expected {expected} on both sides"
    if queries != tokens:
        return f"it attends{where} over {queries} tokens or channels, expected {expected}"
    return f"its attention{where} is causal, and rollout is for attention over the whole image" if call.causal else ""


def _parallel(block: nn.Module, count: int) -> bool:
    """Return whether a block has as many parallel attentions as calls (timm's ParallelThingsBlock)."""
    attentions = getattr(block, "attns", None)
    return isinstance(attentions, nn.ModuleList) and len(attentions) == count
