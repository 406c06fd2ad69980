"""Differentiable all-gather of rows over a process group."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ._backend import FLOAT_DTYPES, compute_dtype, dtype_name


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group, ctx.mine = group, slice(group.rank() * len(rows), (group.rank() + 1) * len(rows))
        gathered = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(compute_dtype(grad.dtype), copy=True).contiguous()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[ctx.mine].to(grad.dtype), None


def gather_rows(op: str, argument: str, rows_RD: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, with gradients.

    Every rank has to call it, and backward, equally often.

    Args:
        op: Name of the operation, for error messages.
        argument: Name of the argument, for error messages.
        rows_RD: Rows [R, D] of this rank.
        group: The process group.

    Returns:
        Rows [ranks x R, D] in the order of ranks. Backward gives each rank the sum over ranks of the gradients of its
        rows.

    Raises:
        ValueError: On every rank, if shapes, dtypes or `requires_grad` differ between ranks: the collective would hang
            or mix rows.
    """
    needed = rows_RD.requires_grad and torch.is_grad_enabled()
    ours = torch.tensor([*rows_RD.shape, FLOAT_DTYPES.index(rows_RD.dtype), needed], device=rows_RD.device)
    every = ours.new_empty(group.size() * len(ours))
    torch.distributed.all_gather_into_tensor(every, ours, group=group)
    first, *others = (_described(*row) for row in every.view(-1, len(ours)).tolist())
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                f"{op}: {argument} has {other} on rank {rank}, expected {first} to match rank 0 of the group"
            )
    return _GatheredRows.apply(rows_RD, group)


def _described(rows: int, features: int, dtype: int, needed: int) -> str:
    return f"shape {(rows, features)}, {dtype_name(FLOAT_DTYPES[dtype])}, requires_grad {bool(needed)}"
