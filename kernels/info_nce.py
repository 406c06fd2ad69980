"""The contrastive loss InfoNCE: pull each anchor to its positive, push it from its negatives.

    loss_b = -log( e^(s(a_b, p_b) / t) / (e^(s(a_b, p_b) / t) + sum_n e^(s(a_b, n) / t)) )
           = softplus( logsumexp_n(s(a_b, n) / t) - s(a_b, p_b) / t )

    dot:     s(x, y) = x . y
    cosine:  s(x, y) = x^ . y^,  x^ = x / max(|x|, eps),  eps = 1e-8

A zero vector thus has similarity 0 to everything, a finite loss, and a finite gradient, though a steep one
(1 / eps).

Backward, with lse_b = logsumexp_n(s(a_b, n) / t), upstream gradient g_b, and x^ = x for dot:

    w_b   = g_b sigmoid(lse_b - s(a_b, p_b) / t)        what one unit of lse_b is worth; the positive's is -w_b
    G_bn  = w_b e^(s(a_b, n) / t - lse_b) / t
    da^_b = sum_n G_bn n^ - w_b / t p^_b      dp^_b = -w_b / t a^_b      dn^ = sum_b G_bn a^_b
    dx    = (dx^ - x^ (x^ . dx^) where |x| > eps) / max(|x|, eps)   for cosine
    dt    = -1/t sum_b a^_b . da^_b           because t only ever divides a^; true for dot as well

Legend: B anchors, D features, K negatives of each anchor, M negatives shared by all (B in-batch); a name that ends
in `inverse_B` holds 1 / max(|x|, eps) of the rows of x, or ones for dot.

Two forms. Paired, [B, K, D], is LetheViT's: every byte is used once, so one pass over the inputs is the cost. Shared,
[M, D], and in-batch are a matrix product whose B x M similarities are never stored, only a chunk (eager) or a tile
(Triton) at a time; backward computes them again. Shared form, backward, D > 256: both backends take the chunked
matrix products of the eager path, since a Triton program cannot hold whole rows there and a product that long is
bound by the multiplications, which the vendor's library does best.

Source: van den Oord et al., arXiv 1807.03748; the roles (anchor: the model being changed, positive: the
original on the masked image, negative: the original on the image) are LetheViT's, arXiv 2508.01569.

Cost. Paired: bytes itemsize B D (K + 2) forward, twice that backward; flops 4 and 8 an element. Shared: flops
2 B M D forward and 6 B M D backward, and B M exponentials each; bytes itemsize D (2 B + M) at least. The eager path
adds float32 copies of B D and M D numbers, a few of each.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor
from torch.linalg import vector_norm

from . import _info_nce_eager as eager
from ._backend import (
    Backend,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    check_tensor,
    compute_dtype,
    resolve_backend,
    triton_has_float64_products,
    without_autocast,
)
from ._gather import gather_rows
from ._info_nce_eager import EPS

Similarity = Literal["cosine", "dot"]
Reduction = Literal["mean", "sum", "none"]


def info_nce_reference(
    anchors_BD: Tensor,
    positives_BD: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    similarity: Similarity = "cosine",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the loss anchor by anchor, in the dtype of the inputs."""

    def similar(x_D: Tensor, y_D: Tensor) -> Tensor:
        if similarity == "cosine":
            x_D = x_D / vector_norm(x_D).clamp_min(EPS)
            y_D = y_D / vector_norm(y_D).clamp_min(EPS)
        return (x_D * y_D).sum()

    losses = []
    for row, anchor_D in enumerate(anchors_BD):
        if negatives is None:
            negatives_JD = torch.cat([positives_BD[:row], positives_BD[row + 1 :]])
        else:
            negatives_JD = negatives[row] if negatives.dim() == 3 else negatives
        candidates_D = [positives_BD[row], *negatives_JD]
        logits = torch.stack([similar(anchor_D, candidate_D) / temperature for candidate_D in candidates_D])
        losses.append(-torch.log_softmax(logits, dim=0)[0])
    losses_B = torch.stack(losses)
    if reduction == "none":
        return losses_B
    return losses_B.mean() if reduction == "mean" else losses_B.sum()


@torch.library.custom_op("lethe::info_nce_paired", mutates_args=())
def _info_nce_paired(
    anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: Tensor, cosine: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute losses [B], and what backward needs: lse [B], positive logit [B], logits [B, K], three inverse norms."""
    _check_temperature_value(temperature)
    forward = eager.paired_forward
    if backend == "triton":
        from ._triton import info_nce as triton_kernels

        forward = triton_kernels.paired_forward
    with without_autocast(anchors.device), torch.cuda.device_of(anchors):
        return forward(anchors, positives, negatives, temperature, cosine)  # type: ignore[return-value]


@_info_nce_paired.register_fake
def _(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: Tensor, *options: Any) -> tuple[Tensor, ...]:
    B, K, _ = negatives.shape
    return tuple(temperature.new_empty(shape) for shape in ((B,), (B,), (B,), (B, K), (B,), (B,), (B, K)))


@torch.library.custom_op("lethe::info_nce_paired_backward", mutates_args=())
def _info_nce_paired_backward(
    grad: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of anchors, positives, negatives and temperature; of size 0 if not in `needs`."""
    backward = eager.paired_backward
    if backend == "triton":
        from ._triton import info_nce as triton_kernels

        backward = triton_kernels.paired_backward
    inputs = grad, anchors, positives, negatives, temperature, statistics
    with without_autocast(anchors.device), torch.cuda.device_of(anchors):
        return backward(*inputs, cosine, needs)  # type: ignore[return-value]


@torch.library.custom_op("lethe::info_nce_shared", mutates_args=())
def _info_nce_shared(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    cosine: bool,
    skip: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute losses [B], and what backward needs: lse [B], positive logit [B], three inverse norms.

    Args:
        anchors: Rows [B, D].
        positives: Rows [B, D].
        negatives: Rows [M, D], or None for the positives.
        temperature: 0-d tensor in the compute type.
        cosine: Whether rows are normalised.
        skip: Anchor b skips negative skip + b; -1 for none.
        backend: "triton" or "eager".
    """
    _check_temperature_value(temperature)
    forward = eager.shared_forward
    if backend == "triton":
        from ._triton import info_nce_shared as triton_kernels

        forward = triton_kernels.shared_forward
    with without_autocast(anchors.device), torch.cuda.device_of(anchors):
        return forward(anchors, positives, negatives, temperature, cosine, skip)  # type: ignore[return-value]


@_info_nce_shared.register_fake
def _(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, temperature: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    B, M = len(anchors), 0 if negatives is None else len(negatives)
    return tuple(temperature.new_empty(size) for size in (B, B, B, B, B, M))


@torch.library.custom_op("lethe::info_nce_shared_backward", mutates_args=())
def _info_nce_shared_backward(
    grad: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    skip: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of anchors, positives, negatives and temperature; of size 0 if not in `needs`."""
    backward = eager.shared_backward
    if backend == "triton":
        from ._triton import info_nce_shared as triton_kernels

        if anchors.shape[1] <= triton_kernels.WHOLE_ROW:
            backward = triton_kernels.shared_backward
    inputs = grad, anchors, positives, negatives, temperature, statistics
    with without_autocast(anchors.device), torch.cuda.device_of(anchors):
        return backward(*inputs, cosine, skip, needs)  # type: ignore[return-value]


@_info_nce_paired_backward.register_fake
@_info_nce_shared_backward.register_fake
def _(
    grad: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    statistics: list[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    *_, needs, _ = options
    return eager.empty_gradients((anchors, positives, negatives), temperature, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[4:]


def _differentiated_by(backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        anchors, positives, negatives, temperature, *statistics = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        *options, backend = ctx.options
        grads = backward_op(grad, anchors, positives, negatives, temperature, statistics, *options, needs, backend)
        wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return *wanted, *[None for _ in ctx.options]

    return backward


_info_nce_paired.register_autograd(_differentiated_by(_info_nce_paired_backward), setup_context=_save)
_info_nce_shared.register_autograd(_differentiated_by(_info_nce_shared_backward), setup_context=_save)


def _temperature(op: str, temperature: float | Tensor, anchors: Tensor) -> Tensor:
    """Return a 0-d tensor in the compute type on the device of the anchors, without waiting for that device."""
    dtype = compute_dtype(anchors.dtype)
    if not isinstance(temperature, Tensor):
        # Not math.isfinite, which torch.compile cannot trace once the number has changed between calls.
        number = isinstance(temperature, Real) and not isinstance(temperature, bool)
        if not number or not 0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature is {temperature!r}, expected a finite number above 0")
        return torch.full((), temperature, dtype=dtype, device=anchors.device)
    if temperature.dim() != 0:
        raise ValueError(f"{op}: temperature has shape {tuple(temperature.shape)}, expected () or a number")
    check_float(op, "temperature", temperature)
    if temperature.device.type != "cpu":
        check_device(op, "temperature", temperature, anchors.device, "anchors")
    temperature = temperature.to(anchors.device, dtype)
    if anchors.device.type == "cpu":
        return temperature  # its value is checked inside the op, which torch.compile does not trace
    # Reading it would stall the device at every step; the loss is NaN instead if it is out of range.
    return torch.where(temperature > 0, temperature, torch.nan)


def _check_temperature_value(temperature: Tensor) -> None:
    if temperature.device.type == "cpu" and not 0 < temperature.item() < float("inf"):
        raise ValueError(f"info_nce: temperature is {temperature.item()!r}, expected a finite number above 0")


def _check_negatives(op: str, negatives: Tensor | None, anchors_BD: Tensor, ranks: int) -> None:
    batch, features = anchors_BD.shape
    if negatives is None:
        if batch * ranks == 1:
            raise ValueError(
                f"{op}: anchors has shape {tuple(anchors_BD.shape)}, expected 2 or more rows for in-batch"
                " negatives; with one the loss is always 0, so pass negatives or a larger batch"
            )
        return
    if isinstance(negatives, Tensor) and negatives.dim() not in (2, 3):
        raise ValueError(f"{op}: negatives has shape {tuple(negatives.shape)}, expected (B, K, D) or (M, D)")
    if not isinstance(negatives, Tensor) or negatives.dim() == 3:
        check_tensor(op, "negatives", negatives, "B, K, D")
        check_shape(op, "negatives", negatives, (batch, negatives.shape[1], features), "anchors")
    else:
        check_tensor(op, "negatives", negatives, "M, D")
        check_shape(op, "negatives", negatives, (negatives.shape[0], features), "anchors")
    check_dtype(op, "negatives", negatives, anchors_BD.dtype, "anchors")
    check_device(op, "negatives", negatives, anchors_BD.device, "anchors")


def _check_group(op: str, group: object, negatives: Tensor | None) -> None:
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"{op}: group is {group!r}, expected a torch.distributed.ProcessGroup that this rank is in")
    if negatives is not None and negatives.dim() == 3:
        raise ValueError(
            f"{op}: negatives has shape {tuple(negatives.shape)}, expected (M, D) or None with a group, because"
            " negatives of one anchor are not shared"
        )


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    similarity: Similarity = "cosine",
    reduction: Reduction = "mean",
    group: "torch.distributed.ProcessGroup | None" = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the InfoNCE loss, which is never below zero.

    Half-precision inputs are computed and returned in float32, float64 in float64. The loss is differentiable once, in
    anchors, positives, negatives and temperature. The same input gives the same bits.

    Args:
        anchors: Rows [B, D].
        positives: Rows [B, D].
        negatives: [B, K, D] for each anchor its own, [M, D] shared by all, or None for the positives of the other
            anchors.
        temperature: Above 0, in units of the similarity; a 0-d tensor may be learned.
        similarity: "cosine" or "dot".
        reduction: "mean", "sum", or "none".
        group: Process group whose other ranks add their negatives [M, D] or, in-batch, their positives. Every rank
            passes the same shapes and calls backward once. The result is the loss of this rank's own anchors. Each
            gradient is that of the sum of the losses of all ranks, which DistributedDataParallel averages over ranks.
            Checking the shapes waits for the device once a call, and breaks the graph of torch.compile.
        backend: "auto" (Triton if it can run), "triton" or "eager".

    Returns:
        A scalar, or losses [B] with reduction="none". The loss is NaN if an input holds NaN or if inputs are on an
        accelerator and the temperature tensor is not above 0: checking the values would stall the device at every step.

    Raises:
        ValueError: A shape, dtype, device or value does not fit.
        RuntimeError: The backend "triton" cannot run.
    """
    op = "info_nce"
    check_tensor(op, "anchors", anchors, "B, D")
    check_float(op, "anchors", anchors)
    check_tensor(op, "positives", positives, "B, D")
    check_shape(op, "positives", positives, tuple(anchors.shape), "anchors")
    check_dtype(op, "positives", positives, anchors.dtype, "anchors")
    check_device(op, "positives", positives, anchors.device, "anchors")
    if group is not None:
        _check_group(op, group, negatives)
    _check_negatives(op, negatives, anchors, ranks=1 if group is None else group.size())
    temperature = _temperature(op, temperature, anchors)
    check_choice(op, "similarity", similarity, get_args(Similarity))
    check_choice(op, "reduction", reduction, get_args(Reduction))
    cosine, paired = similarity == "cosine", negatives is not None and negatives.dim() == 3
    unsupported = []
    if anchors.dtype == torch.float64 and anchors.is_cuda:
        unsupported.append("float64 is for the interpreter alone")
    if anchors.dtype == torch.float64 and not paired and not triton_has_float64_products():
        unsupported.append("float64 with shared negatives needs triton 3.5 or newer")
    backend = resolve_backend(op, backend, anchors.device, unsupported)

    if negatives is not None and paired:
        losses_B = _info_nce_paired(anchors, positives, negatives, temperature, cosine, backend)[0]
    else:
        skip = -1 if negatives is not None else 0
        if group is not None and negatives is not None:
            negatives = gather_rows(op, "negatives", negatives, group)
        elif group is not None:
            negatives, skip = gather_rows(op, "positives", positives, group), group.rank() * len(positives)
        losses_B = _info_nce_shared(anchors, positives, negatives, temperature, cosine, skip, backend)[0]
    if reduction == "none":
        return losses_B
    return losses_B.mean() if reduction == "mean" else losses_B.sum()
