"""Memory-efficient attention of xformers in place of `scaled_dot_product_attention`, and a check that it runs here.

timm's attention stays as it is, with its q_norm and k_norm, its dropout, norm and projection. Only the call of
`F.scaled_dot_product_attention` inside it is redirected to `xformers.ops.memory_efficient_attention`, which computes
the same softmax(q k^T scale) v on [B, N, H, d] instead of [B, H, N, d].
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.errors import UserError

_OPTION = "option attention='xformers'"


def resolve_attention(
    name: Literal["auto", "sdpa", "eager", "xformers"], device: torch.device, precision: str = "fp32"
) -> Literal["sdpa", "eager", "xformers"]:
    """Return the implementation for a device: for auto, fused attention on an accelerator and explicit on the CPU.

    Args:
        name: The option.
        device: Device of the run.
        precision: Precision of the run.

    Raises:
        UserError: xformers is not installed, or does not run on this device in this precision.
    """
    if name == "xformers":
        check_xformers(device, precision)
    if name != "auto":
        return name
    return "eager" if device.type == "cpu" else "sdpa"


def check_xformers(device: torch.device, precision: str = "fp32") -> None:
    """Run a small attention, forward and backward, on this device in this precision.

    Raises:
        UserError: xformers is not installed, or none of its operators runs; the message has the reason of each
            operator, and why the compiled extension did not load.
    """
    try:
        operators = _operators()
    except ImportError as error:
        raise UserError(
            f"{_OPTION}: xformers cannot be imported ({_one_line(str(error))}); "
            "pip install 'lethe-unlearning[xformers]', or use attention=sdpa"
        ) from None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query = torch.zeros(1, 8, 1, 64, dtype=dtype, device=device, requires_grad=True)
    try:
        operators.memory_efficient_attention(query, query, query).sum().backward()
    except NotImplementedError as error:
        raise UserError(_refusal(error, f"{device.type} in {precision}")) from None


@contextlib.contextmanager
def through_xformers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Compute the calls of `F.scaled_dot_product_attention` of these modules by xformers within the context."""
    operators = _operators()
    before = {module: vars(module).get("forward") for module in modules}  # another wrapper's, if there is one
    for module in modules:
        module.forward = functools.partial(_forward, module.forward, operators)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _forward(forward: Callable[..., Tensor], operators: Any, *args: Any, **kwargs: Any) -> Tensor:
    with _Redirect(operators):
        return forward(*args, **kwargs)


class _Redirect(TorchFunctionMode):
    def __init__(self, operators: Any) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UserError(f"{_OPTION}: this model masks its attention, which is not passed on; use attention=sdpa")
        # Under autocast q_norm or k_norm returns float32, and v is in half precision; xformers needs one type.
        BNHd = (tensor.to(value.dtype).transpose(1, 2) for tensor in (query, key, value))
        try:
            output_BNHd = self.operators.memory_efficient_attention(*BNHd, p=dropout_p, scale=scale)
        except NotImplementedError as error:
            raise UserError(_refusal(error, f"heads of {query.shape[-1]} features on {query.device.type}")) from None
        return output_BNHd.transpose(1, 2)


def _operators() -> Any:
    """Return the module xformers.ops, without its log message about an extension that does not load."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import xformers.ops
    finally:
        logger.setLevel(level)
    return xformers.ops


def _refusal(error: NotImplementedError, what: str) -> str:
    """Return the reasons of all operators of xformers on one line."""
    reasons = [
        f"{name} ({', '.join(line.strip() for line in lines.strip().splitlines())})"
        for name, lines in re.findall(r"`([^`]+)` is not supported because:\n((?: {4}.*\n?)*)", str(error))
    ]
    found = "; ".join(reasons) or _one_line(str(error))
    extension = _extension_problem()
    return f"{_OPTION}: no operator of xformers takes {what}: {found}{extension}; use attention=sdpa"


def _extension_problem() -> str:
    """Return why the compiled extension of xformers did not load, as its own message; empty if it did."""
    try:
        from xformers._cpp_lib import _cpp_library_load_exception as problem
    except ImportError:
        return ""
    return f"; {_one_line(str(problem).split('Please reinstall')[0])}" if problem is not None else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
