"""Triton kernels of `lethe_kernels.info_nce` with paired negatives; its docstring has the formulas and the legend.

Forward runs one program an anchor and reads every input once; backward is elementwise. What the shared form needs
too, such as the statistics of the rows, is in this file.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._info_nce_eager import EPS, LONG_INVERSE
from . import Scalar


class Launch(NamedTuple):
    """Sizes of a program's tile: rows, then columns (or negatives), then features; and the compiler's options."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int = 1
    inner: int = 0  # features of one product, where they are fewer


def paired_launch(K: int, D: int) -> Launch:
    """Return the launch of both paired kernels."""
    columns = min(triton.next_power_of_2(max(K, 1)), 8)
    features = min(triton.next_power_of_2(D), 2048 // columns)
    return Launch(1, columns, features, warps=8 if columns * features >= 2048 else 4)


def norm_launch(D: int) -> Launch:
    features = min(triton.next_power_of_2(D), 1024)
    return Launch(1024 // features, 1, features, warps=4)


@triton.jit
def softplus(x: tl.tensor, TERMS: tl.constexpr) -> tl.tensor:
    """Compute log(1 + e^x) accurately near zero too: log1p(u) = 2 artanh(u / (2 + u)), whose series is short."""
    u = tl.exp(-tl.abs(x))
    z = u / (2 + u)
    square = z * z
    series = 0 * z
    for term in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - term) - 1)
    return tl.maximum(x, 0) + 2 * z * series


@triton.jit
def _inverse_norm(squares: tl.tensor, EPS: tl.constexpr) -> tl.tensor:
    return 1 / tl.maximum(tl.sqrt(squares), EPS)


@triton.jit
def _inward(inverse: tl.tensor, COSINE: tl.constexpr, LONG_INVERSE: tl.constexpr) -> tl.tensor:
    """Return the factor by which the normalisation removes a row's own direction from its gradient, 1 / |x|^2 or 0."""
    if COSINE:
        return tl.where(inverse < LONG_INVERSE, inverse * inverse, 0)
    return 0 * inverse


@triton.jit
def _paired_forward_kernel(
    anchors_ptr: tl.tensor,
    positives_ptr: tl.tensor,
    negatives_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    positive_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    a_inverse_ptr: tl.tensor,
    p_inverse_ptr: tl.tensor,
    n_inverse_ptr: tl.tensor,
    K: Scalar,
    D: Scalar,
    stride_ab: Scalar,
    stride_ad: Scalar,
    stride_pb: Scalar,
    stride_pd: Scalar,
    stride_nb: Scalar,
    stride_nk: Scalar,
    stride_nd: Scalar,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute the loss of one anchor. With K of 0 only the positive's logit and the two inverse norms are written."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr)
    dtype = temperature.dtype
    a_squares = tl.zeros([BLOCK_D], dtype)
    p_squares = tl.zeros([BLOCK_D], dtype)
    products = tl.zeros([BLOCK_D], dtype)
    a_inverse = tl.full([], 1.0, dtype)
    peak = tl.full([], -float("inf"), dtype)
    total = tl.full([], 0.0, dtype)
    for start in range(0, tl.maximum(K, 1), BLOCK_K):
        negatives = start + tl.arange(0, BLOCK_K).to(tl.int64)
        n_squares = tl.zeros([BLOCK_K, BLOCK_D], dtype)
        n_products = tl.zeros([BLOCK_K, BLOCK_D], dtype)
        for offset in range(0, D, BLOCK_D):
            features = offset + tl.arange(0, BLOCK_D).to(tl.int64)
            inside = features < D
            a = tl.load(anchors_ptr + row * stride_ab + features * stride_ad, mask=inside, other=0.0).to(dtype)
            n = tl.load(
                negatives_ptr + row * stride_nb + negatives[:, None] * stride_nk + features[None, :] * stride_nd,
                mask=(negatives < K)[:, None] & inside[None, :],
                other=0.0,
            ).to(dtype)
            n_products += a[None, :] * n
            n_squares += n * n
            if start == 0:
                p = tl.load(positives_ptr + row * stride_pb + features * stride_pd, mask=inside, other=0.0).to(dtype)
                a_squares += a * a
                p_squares += p * p
                products += a * p
        logits = tl.sum(n_products, 1)
        if COSINE:
            if start == 0:
                a_inverse = _inverse_norm(tl.sum(a_squares, 0), EPS)
            n_inverse = _inverse_norm(tl.sum(n_squares, 1), EPS)
            logits = logits * n_inverse
        else:
            n_inverse = tl.full([BLOCK_K], 1.0, dtype)
        logits = logits * (a_inverse / temperature)
        tl.store(logits_ptr + row * K + negatives, logits, mask=negatives < K)
        tl.store(n_inverse_ptr + row * K + negatives, n_inverse, mask=negatives < K)
        if K > 0:
            logits = tl.where(negatives < K, logits, -float("inf"))
            higher = tl.maximum(peak, tl.max(logits, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher), 0)
            peak = higher

    positive = tl.sum(products, 0) * (a_inverse / temperature)
    p_inverse = tl.full([], 1.0, dtype)
    if COSINE:
        p_inverse = _inverse_norm(tl.sum(p_squares, 0), EPS)
        positive = positive * p_inverse
    tl.store(positive_ptr + row, positive)
    tl.store(a_inverse_ptr + row, a_inverse)
    tl.store(p_inverse_ptr + row, p_inverse)
    if K > 0:
        lse = peak + tl.log(total)
        tl.store(lse_ptr + row, lse)
        tl.store(losses_ptr + row, softplus(lse - positive, TERMS))


@triton.jit
def _paired_backward_kernel(
    grad_ptr: tl.tensor,
    anchors_ptr: tl.tensor,
    positives_ptr: tl.tensor,
    negatives_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    positive_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    a_inverse_ptr: tl.tensor,
    p_inverse_ptr: tl.tensor,
    n_inverse_ptr: tl.tensor,
    a_grad_ptr: tl.tensor,
    p_grad_ptr: tl.tensor,
    n_grad_ptr: tl.tensor,
    radial_ptr: tl.tensor,
    K: Scalar,
    D: Scalar,
    stride_g: Scalar,
    stride_ab: Scalar,
    stride_ad: Scalar,
    stride_pb: Scalar,
    stride_pd: Scalar,
    stride_nb: Scalar,
    stride_nk: Scalar,
    stride_nd: Scalar,
    NEEDS_A: tl.constexpr,
    NEEDS_P: tl.constexpr,
    NEEDS_N: tl.constexpr,
    COSINE: tl.constexpr,
    LONG_INVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute the gradients of one anchor and one block of features; forward has stored every coefficient."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = features < D
    temperature = tl.load(temperature_ptr)
    dtype = temperature.dtype
    lse = tl.load(lse_ptr + row)
    positive = tl.load(positive_ptr + row)
    weight = tl.load(grad_ptr + row * stride_g) / (1 + tl.exp(positive - lse))
    a_inverse = tl.load(a_inverse_ptr + row)
    p_inverse = tl.load(p_inverse_ptr + row)
    pull = weight * p_inverse * (a_inverse / temperature)
    a = tl.load(anchors_ptr + row * stride_ab + features * stride_ad, mask=inside, other=0.0).to(dtype)
    a_grad = tl.zeros([BLOCK_D], dtype)
    radial = -weight * positive
    for start in range(0, K, BLOCK_K):
        negatives = start + tl.arange(0, BLOCK_K).to(tl.int64)
        logits = tl.load(logits_ptr + row * K + negatives, mask=negatives < K, other=-float("inf"))
        n_inverse = tl.load(n_inverse_ptr + row * K + negatives, mask=negatives < K, other=0.0)
        share = weight * tl.exp(logits - lse)
        outward = share * tl.where(negatives < K, logits, 0.0)
        radial += tl.sum(outward, 0)
        push = share * n_inverse * (a_inverse / temperature)
        if NEEDS_A or NEEDS_N:
            tile = (negatives < K)[:, None] & inside[None, :]
            n = tl.load(
                negatives_ptr + row * stride_nb + negatives[:, None] * stride_nk + features[None, :] * stride_nd,
                mask=tile,
                other=0.0,
            ).to(dtype)
            a_grad += tl.sum(push[:, None] * n, 0)
            if NEEDS_N:
                inward = outward * _inward(n_inverse, COSINE, LONG_INVERSE)
                n_grad = push[:, None] * a[None, :] - inward[:, None] * n
                n_grad_ptrs = n_grad_ptr + (row * K + negatives[:, None]) * D + features[None, :]
                tl.store(n_grad_ptrs, n_grad.to(n_grad_ptr.dtype.element_ty), mask=tile)
    if NEEDS_A or NEEDS_P:
        p = tl.load(positives_ptr + row * stride_pb + features * stride_pd, mask=inside, other=0.0).to(dtype)
        if NEEDS_A:
            a_grad -= pull * p + radial * _inward(a_inverse, COSINE, LONG_INVERSE) * a
            tl.store(a_grad_ptr + row * D + features, a_grad.to(a_grad_ptr.dtype.element_ty), mask=inside)
        if NEEDS_P:
            p_grad = weight * positive * _inward(p_inverse, COSINE, LONG_INVERSE) * p - pull * a
            tl.store(p_grad_ptr + row * D + features, p_grad.to(p_grad_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(radial_ptr + row, radial)


@triton.jit
def _inverse_norm_kernel(
    x_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    R: Scalar,
    D: Scalar,
    stride_r: Scalar,
    stride_d: Scalar,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dtype = inverse_ptr.dtype.element_ty
    inverse = tl.full([BLOCK_R], 1.0, dtype)
    if COSINE:
        squares = tl.zeros([BLOCK_R, BLOCK_D], dtype)
        for offset in range(0, D, BLOCK_D):
            features = offset + tl.arange(0, BLOCK_D).to(tl.int64)
            x = tl.load(
                x_ptr + rows[:, None] * stride_r + features[None, :] * stride_d,
                mask=(rows < R)[:, None] & (features < D)[None, :],
                other=0.0,
            ).to(dtype)
            squares += x * x
        inverse = _inverse_norm(tl.sum(squares, 1), EPS)
    tl.store(inverse_ptr + rows, inverse, mask=rows < R)


def softplus_terms(dtype: torch.dtype) -> int:
    """Return the terms of the series in `softplus`: the first omitted one is below the rounding of the type."""
    return 17 if dtype == torch.float64 else 8


def paired_forward(
    anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: Tensor, cosine: bool
) -> tuple[Tensor, ...]:
    B, K, _ = negatives.shape
    shapes = (B,), (B,), (B,), (B, K), (B,), (B,), (B, K)
    outputs = tuple(_triton.empty(shape, temperature.dtype, anchors.device) for shape in shapes)
    _launch_paired_forward(anchors, positives, negatives, temperature, outputs, K, cosine)
    return outputs


def _launch_paired_forward(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    outputs: tuple[Tensor, ...],
    K: int,
    cosine: bool,
) -> None:
    B, D = anchors.shape
    launch = paired_launch(K, D)
    _paired_forward_kernel[(B,)](
        anchors,
        positives,
        negatives,
        temperature,
        *outputs,
        K,
        D,
        *anchors.stride(),
        *positives.stride(),
        *(negatives.stride() if K else (0, 0, 0)),
        COSINE=cosine,
        EPS=EPS,
        TERMS=softplus_terms(temperature.dtype),
        BLOCK_K=launch.columns,
        BLOCK_D=launch.features,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def paired_backward(
    grad_B: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    B, K, D = negatives.shape
    grads = [
        _triton.empty(x.shape if needed else (0,), x.dtype, x.device)
        for x, needed in zip((anchors, positives, negatives), needs, strict=False)
    ]
    radial_B = _triton.empty((B,), temperature.dtype, anchors.device)
    launch = paired_launch(K, D)
    _paired_backward_kernel[(B, triton.cdiv(D, launch.features))](
        grad_B,
        anchors,
        positives,
        negatives,
        temperature,
        *statistics,
        *grads,
        radial_B,
        K,
        D,
        grad_B.stride(0),
        *anchors.stride(),
        *positives.stride(),
        *negatives.stride(),
        NEEDS_A=needs[0],
        NEEDS_P=needs[1],
        NEEDS_N=needs[2],
        COSINE=cosine,
        LONG_INVERSE=LONG_INVERSE,
        BLOCK_K=launch.columns,
        BLOCK_D=launch.features,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return *grads, temperature_gradient(radial_B, temperature, needs[3])


def temperature_gradient(radial_B: Tensor, temperature: Tensor, needed: bool) -> Tensor:
    return -radial_B.sum() / temperature if needed else temperature.new_empty(0)


def row_statistics(anchors: Tensor, positives: Tensor, temperature: Tensor, cosine: bool) -> tuple[Tensor, ...]:
    """Compute each positive's logit and the inverse norms of anchors and positives: paired forward, no negatives."""
    rows = tuple(_triton.empty((len(anchors),), temperature.dtype, anchors.device) for _ in range(3))
    positive_B, a_inverse_B, p_inverse_B = unused, *_ = rows
    outputs = (unused, unused, positive_B, unused, a_inverse_B, p_inverse_B, unused)
    _launch_paired_forward(anchors, positives, positives, temperature, outputs, 0, cosine)
    return rows


def inverse_norms(x_RD: Tensor, cosine: bool, dtype: torch.dtype) -> Tensor:
    R, D = x_RD.shape
    inverse_R = _triton.empty((R,), dtype, x_RD.device)
    launch = norm_launch(D)
    _inverse_norm_kernel[(triton.cdiv(R, launch.rows),)](
        x_RD,
        inverse_R,
        R,
        D,
        *x_RD.stride(),
        COSINE=cosine,
        EPS=EPS,
        BLOCK_R=launch.rows,
        BLOCK_D=launch.features,
        num_warps=launch.warps,
    )
    return inverse_R
