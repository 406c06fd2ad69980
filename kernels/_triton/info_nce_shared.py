"""Triton kernels of `lethe_kernels.info_nce` with shared negatives; its docstring has the formulas and the legend.

Forward is a product of tiles whose similarities stay in registers, with a running log-sum-exp. Backward computes each
tile again and multiplies it with the other side's rows. That kernel runs twice: rows are the anchors and columns the
negatives, then the other way round.

If one side is short, its programs divide the columns among them and each writes a partial result. A last kernel adds
these in order, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._info_nce_eager import LONG_INVERSE
from . import Scalar
from .info_nce import (
    Launch,
    inverse_norms,
    row_statistics,
    softplus,
    softplus_terms,
    temperature_gradient,
)

WHOLE_ROW = 256  # features that a program of the shared backward can hold
PROGRAMS = 512  # a few for every multiprocessor of a large card
HALF_RANGE = 32768.0  # weights are scaled up to this, so that in float16 small ones keep their digits
COMBINED = 128  # anchors that a program of `_combine_kernel` finishes
PRECISION = "ieee"  # of float32 products: TF32 would lose half the digits


Rows = tuple[Tensor, Tensor]  # [R, D], and the inverse norms [R]


def shared_forward_launch(D: int, itemsize: int, kind: str) -> Launch:
    inner = max(16, triton.next_power_of_2(D))
    if itemsize == 2:
        return Launch(128, 64, min(inner, 64), warps=8, stages=3 if kind == "cuda" else 2)
    return Launch(64, 64, min(inner, 32), warps=8, stages=2)


def shared_backward_launch(D: int, itemsize: int, kind: str) -> Launch:
    """Return the launch of the shared backward.

    In half precision rows stay whole in registers; in float32 they are read again, `inner` features at a time.
    """
    features = max(16, triton.next_power_of_2(D))
    # Rows that are not aligned are loaded number by number, and the addresses fill the registers.
    aligned = D % 16 == 0
    if itemsize == 2 and kind == "cuda":
        if not aligned:
            return Launch(32, 32, features, warps=4, stages=2, inner=features)
        return Launch(64, 64 if features <= 128 else 32, features, warps=8, stages=2, inner=features)
    if itemsize == 2:
        return Launch(64 if features <= 128 else 32, 32, features, warps=4, stages=2, inner=features)
    if features <= 128 and not aligned:
        return Launch(32, 16, features, warps=4, inner=16)
    return Launch(32, 32 if features <= 128 else 16, features, warps=8, inner=min(features, 32))


def project_launch(D: int) -> Launch:
    features = max(16, triton.next_power_of_2(D))
    return Launch(max(1, 1024 // features), 1, features, warps=4)


def splits(R: int, C: int, launch: Launch) -> tuple[int, int]:
    """Return (number of programs that divide the columns of one block of rows, tiles of each program)."""
    tiles = triton.cdiv(C, launch.columns)
    programs = min(tiles, max(1, PROGRAMS // triton.cdiv(R, launch.rows)))
    tiles_each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, tiles_each), tiles_each


@triton.jit
def _tile(
    x_ptr: tl.tensor,
    first_row: tl.tensor,
    first_feature: tl.tensor,
    R: Scalar,
    D: Scalar,
    stride_r: Scalar,
    stride_d: Scalar,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Load x[first_row:, first_feature:], zero outside; only the start takes 64 bits, see `_addressable`."""
    rows = tl.arange(0, BLOCK_R)
    features = tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(first_row, tl.int64) * stride_r + tl.cast(first_feature, tl.int64) * stride_d
    return tl.load(
        x_ptr + rows[:, None] * stride_r + features[None, :] * stride_d,
        mask=(rows < R - first_row)[:, None] & (features < D - first_feature)[None, :],
        other=0.0,
    )


@triton.jit
def _dot(x: tl.tensor, y: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    if WIDEN:
        x = x.to(total.dtype)
        y = y.to(total.dtype)
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit(do_not_specialize=["skip"])
def _shared_forward_kernel(
    anchors_ptr: tl.tensor,
    negatives_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    a_inverse_ptr: tl.tensor,
    n_inverse_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    B: Scalar,
    M: Scalar,
    D: Scalar,
    stride_ab: Scalar,
    stride_ad: Scalar,
    stride_nm: Scalar,
    stride_nd: Scalar,
    skip: Scalar,
    tiles_each: Scalar,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute the highest logit and the sum of exponentials for a block of anchors and a share of the negatives."""
    first_anchor = tl.program_id(0) * BLOCK_B
    anchors = first_anchor + tl.arange(0, BLOCK_B)
    dtype = temperature_ptr.dtype.element_ty
    scale = tl.load(a_inverse_ptr + anchors, mask=anchors < B, other=0.0) / tl.load(temperature_ptr)
    peak = tl.full([BLOCK_B], -float("inf"), dtype)
    total = tl.zeros([BLOCK_B], dtype)
    first = tl.program_id(1) * tiles_each * BLOCK_M
    for start in range(first, tl.minimum(first + tiles_each * BLOCK_M, M), BLOCK_M):
        negatives = start + tl.arange(0, BLOCK_M)
        products = tl.zeros([BLOCK_B, BLOCK_M], dtype)
        for offset in range(0, D, BLOCK_D):
            a = _tile(anchors_ptr, first_anchor, offset, B, D, stride_ab, stride_ad, BLOCK_B, BLOCK_D)
            n = _tile(negatives_ptr, start, offset, M, D, stride_nm, stride_nd, BLOCK_M, BLOCK_D)
            products = _dot(a, n.T, products, PRECISION, WIDEN)
        inverse = tl.load(n_inverse_ptr + negatives, mask=negatives < M, other=0.0)
        seen = (negatives < M)[None, :] & ((skip < 0) | (negatives[None, :] != anchors[:, None] + skip))
        logits = tl.where(seen, products * scale[:, None] * inverse[None, :], -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # Finite even if every negative so far is skipped, because -inf - -inf is NaN.
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        peak = higher
    share = tl.program_id(1).to(tl.int64) * B + anchors
    tl.store(peak_ptr + share, peak, mask=anchors < B)
    tl.store(total_ptr + share, total, mask=anchors < B)


@triton.jit
def _combine_kernel(
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    positive_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    B: Scalar,
    S: Scalar,
    TERMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """Compute lse and loss from the S shares of each anchor."""
    anchors = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = anchors < B
    shares = anchors.to(tl.int64)
    peak = tl.full([BLOCK_B], -float("inf"), peak_ptr.dtype.element_ty)
    for _ in range(0, S):
        peak = tl.maximum(peak, tl.load(peak_ptr + shares, mask=inside, other=0.0))
        shares += B
    total = tl.zeros([BLOCK_B], peak.dtype)
    for _ in range(0, S):
        shares -= B
        share_peak = tl.load(peak_ptr + shares, mask=inside, other=0.0)
        total += tl.load(total_ptr + shares, mask=inside, other=1.0) * tl.exp(share_peak - peak)
    lse = peak + tl.log(total)
    tl.store(lse_ptr + anchors, lse, mask=inside)
    positive = tl.load(positive_ptr + anchors, mask=inside, other=0.0)
    tl.store(losses_ptr + anchors, softplus(lse - positive, TERMS), mask=inside)


@triton.jit(do_not_specialize=["skip"])
def _push_kernel(
    rows_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    r_inverse_ptr: tl.tensor,
    c_inverse_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    push_ptr: tl.tensor,
    R: Scalar,
    C: Scalar,
    D: Scalar,
    stride_rr: Scalar,
    stride_rd: Scalar,
    stride_cc: Scalar,
    stride_cd: Scalar,
    skip: Scalar,
    tiles_each: Scalar,
    ROWS_ARE_ANCHORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute push[r] = sum_c weight e^(s(r, c) / t - lse) c^ over a share of the columns.

    weight and lse are the anchor's.
    """
    first_row = tl.program_id(0) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    features = tl.arange(0, BLOCK_D)
    dtype = temperature_ptr.dtype.element_ty
    input_dtype = rows_ptr.dtype.element_ty
    scale = tl.load(r_inverse_ptr + rows, mask=rows < R, other=0.0) / tl.load(temperature_ptr)
    if BLOCK_K == BLOCK_D:
        x = _tile(rows_ptr, first_row, 0, R, D, stride_rr, stride_rd, BLOCK_R, BLOCK_D)
    if ROWS_ARE_ANCHORS:
        weight = tl.load(weight_ptr + rows, mask=rows < R, other=0.0)[:, None]
        lse = tl.load(lse_ptr + rows, mask=rows < R, other=0.0)[:, None]
    push = tl.zeros([BLOCK_R, BLOCK_D], dtype)
    first = tl.program_id(1) * tiles_each * BLOCK_C
    for start in range(first, tl.minimum(first + tiles_each * BLOCK_C, C), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        y = _tile(columns_ptr, start, 0, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D)
        inverse = tl.load(c_inverse_ptr + columns, mask=columns < C, other=0.0)
        products = tl.zeros([BLOCK_R, BLOCK_C], dtype)
        if BLOCK_K == BLOCK_D:
            products = _dot(x, y.T, products, PRECISION, WIDEN)
        else:
            for offset in range(0, D, BLOCK_K):
                x = _tile(rows_ptr, first_row, offset, R, D, stride_rr, stride_rd, BLOCK_R, BLOCK_K)
                z = _tile(columns_ptr, start, offset, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_K)
                products = _dot(x, z.T, products, PRECISION, WIDEN)
        seen = (rows < R)[:, None] & (columns < C)[None, :]
        if ROWS_ARE_ANCHORS:
            seen = seen & ((skip < 0) | (columns[None, :] != rows[:, None] + skip))
        else:
            seen = seen & ((skip < 0) | (rows[:, None] != columns[None, :] + skip))
            weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0)[None, :]
            lse = tl.load(lse_ptr + columns, mask=columns < C, other=0.0)[None, :]
        below = tl.where(seen, products * scale[:, None] * inverse[None, :] - lse, -float("inf"))
        share = weight * tl.exp(below)
        if input_dtype == dtype:
            push = _dot(share * inverse[None, :], y, push, PRECISION, WIDEN)
        else:
            # Normalised before the product: share / |c| could leave the range of float16.
            normalised = (y.to(dtype) * inverse[:, None]).to(input_dtype)
            push = _dot(share.to(input_dtype), normalised, push, PRECISION, WIDEN)
    push_ptrs = push_ptr + (tl.program_id(1).to(tl.int64) * R + rows[:, None]) * D + features[None, :]
    tl.store(push_ptrs, push, mask=(rows < R)[:, None] & (features < D)[None, :])


@triton.jit
def _project_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_inverse_ptr: tl.tensor,
    y_inverse_ptr: tl.tensor,
    pull_ptr: tl.tensor,
    push_ptr: tl.tensor,
    push_scale_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    radial_ptr: tl.tensor,
    R: Scalar,
    S: Scalar,
    D: Scalar,
    stride_xr: Scalar,
    stride_xd: Scalar,
    stride_yr: Scalar,
    stride_yd: Scalar,
    HAS_PULL: tl.constexpr,
    COSINE: tl.constexpr,
    LONG_INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute dx from dx^ = the S shares of push, minus pull y^; and x^ . dx^ of each row."""
    first_row = tl.program_id(0) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    features = tl.arange(0, BLOCK_D)
    inside = (rows < R)[:, None] & (features < D)[None, :]
    x_inverse = tl.load(x_inverse_ptr + rows, mask=rows < R, other=0.0)
    dtype = x_inverse.dtype
    grad = tl.zeros([BLOCK_R, BLOCK_D], dtype)
    push_ptrs = push_ptr + rows.to(tl.int64)[:, None] * D + features[None, :]
    for _ in range(0, S):
        grad += tl.load(push_ptrs, mask=inside, other=0.0)
        push_ptrs += R * D
    grad *= tl.load(push_scale_ptr)
    if HAS_PULL:
        y = _tile(y_ptr, first_row, 0, R, D, stride_yr, stride_yd, BLOCK_R, BLOCK_D).to(dtype)
        pull = tl.load(pull_ptr + rows, mask=rows < R, other=0.0)
        grad -= (pull * tl.load(y_inverse_ptr + rows, mask=rows < R, other=0.0))[:, None] * y
    normalised = _tile(x_ptr, first_row, 0, R, D, stride_xr, stride_xd, BLOCK_R, BLOCK_D).to(dtype) * x_inverse[:, None]
    radial = tl.sum(grad * normalised, 1)
    tl.store(radial_ptr + rows, radial, mask=rows < R)
    if COSINE:
        grad -= tl.where(x_inverse < LONG_INVERSE, radial, 0.0)[:, None] * normalised
        grad *= x_inverse[:, None]
    grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * D + features[None, :]
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _widens(dtype: torch.dtype) -> bool:
    """Return whether tiles become float32 first: the interpreter would multiply the bit patterns of bfloat16."""
    return _triton.INTERPRETED and dtype == torch.bfloat16


def _addressable(x_RD: Tensor) -> Tensor:
    """Return x, or a copy if one tile of it would span more than 32-bit offsets reach."""
    return x_RD if max(x_RD.stride()) < 2**23 else x_RD.contiguous()


def shared_forward(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, temperature: Tensor, cosine: bool, skip: int
) -> tuple[Tensor, ...]:
    (B, D), device, dtype = anchors.shape, anchors.device, temperature.dtype
    anchors, positives = _addressable(anchors), _addressable(positives)
    positive_B, a_inverse_B, p_inverse_B = row_statistics(anchors, positives, temperature, cosine)
    losses_B, lse_B = _triton.empty((B,), dtype, device), _triton.empty((B,), dtype, device)
    if negatives is None:
        negatives_MD, inverse_M, n_inverse_M = positives, p_inverse_B, _triton.empty((0,), dtype, device)
    else:
        negatives_MD, inverse_M = _addressable(negatives), inverse_norms(negatives, cosine, dtype)
        n_inverse_M = inverse_M
    M = len(negatives_MD)
    launch = shared_forward_launch(D, anchors.itemsize, _triton.platform())
    shares, tiles_each = splits(B, M, launch)
    peak_SB, total_SB = (_triton.empty((shares, B), dtype, device) for _ in range(2))
    _shared_forward_kernel[(triton.cdiv(B, launch.rows), shares)](
        anchors,
        negatives_MD,
        temperature,
        a_inverse_B,
        inverse_M,
        peak_SB,
        total_SB,
        B,
        M,
        D,
        *anchors.stride(),
        *negatives_MD.stride(),
        skip,
        tiles_each,
        PRECISION=PRECISION,
        WIDEN=_widens(anchors.dtype),
        BLOCK_B=launch.rows,
        BLOCK_M=launch.columns,
        BLOCK_D=launch.features,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    _combine_kernel[(triton.cdiv(B, COMBINED),)](
        peak_SB, total_SB, positive_B, lse_B, losses_B, B, shares, TERMS=softplus_terms(dtype), BLOCK_B=COMBINED
    )
    return losses_B, lse_B, positive_B, a_inverse_B, p_inverse_B, n_inverse_M


def shared_backward(
    grad_B: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    skip: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Compute the gradients for D up to WHOLE_ROW."""
    lse_B, positive_B, a_inverse_B, p_inverse_B, n_inverse_M = statistics
    weight_B = grad_B * torch.sigmoid(lse_B - positive_B)
    pull_B = weight_B / temperature
    largest = pull_B.abs().amax()
    weight_B = pull_B * (HALF_RANGE / largest.where(largest > 0, 1))
    push_scale = largest / HALF_RANGE
    in_batch = negatives is None
    anchor_rows, positive_rows = (_addressable(anchors), a_inverse_B), (_addressable(positives), p_inverse_B)
    negative_rows = positive_rows if negatives is None else (_addressable(negatives), n_inverse_M)

    def pushed(rows: Rows, columns: Rows, rows_are_anchors: bool) -> Tensor:
        (rows_RD, r_inverse), (columns_CD, c_inverse) = rows, columns
        (R, D), C = rows_RD.shape, len(columns_CD)
        launch = shared_backward_launch(D, anchors.itemsize, _triton.platform())
        shares, tiles_each = splits(R, C, launch)
        push_SRD = _triton.empty((shares, R, D), temperature.dtype, anchors.device)
        _push_kernel[(triton.cdiv(R, launch.rows), shares)](
            rows_RD,
            columns_CD,
            temperature,
            r_inverse,
            c_inverse,
            lse_B,
            weight_B,
            push_SRD,
            R,
            C,
            D,
            *rows_RD.stride(),
            *columns_CD.stride(),
            skip,
            tiles_each,
            ROWS_ARE_ANCHORS=rows_are_anchors,
            PRECISION=PRECISION,
            WIDEN=_widens(anchors.dtype),
            BLOCK_R=launch.rows,
            BLOCK_C=launch.columns,
            BLOCK_K=launch.inner,
            BLOCK_D=launch.features,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        return push_SRD

    def projected(rows: Rows, pulled_to: Rows | None, push_SRD: Tensor | None) -> tuple[Tensor, Tensor]:
        (x_RD, x_inverse), (y_RD, y_inverse) = rows, pulled_to or rows
        R, D = x_RD.shape
        launch = project_launch(D)
        grad_RD = _triton.empty((R, D), x_RD.dtype, x_RD.device)
        radial_R = _triton.empty((R,), temperature.dtype, x_RD.device)
        _project_kernel[(triton.cdiv(R, launch.rows),)](
            x_RD,
            y_RD,
            x_inverse,
            y_inverse,
            pull_B,
            radial_R if push_SRD is None else push_SRD,
            push_scale,
            grad_RD,
            radial_R,
            R,
            0 if push_SRD is None else len(push_SRD),
            D,
            *x_RD.stride(),
            *y_RD.stride(),
            HAS_PULL=pulled_to is not None,
            COSINE=cosine,
            LONG_INVERSE=LONG_INVERSE,
            BLOCK_R=launch.rows,
            BLOCK_D=launch.features,
            num_warps=launch.warps,
        )
        return grad_RD, radial_R

    grads = [x.new_empty(0) for x in (anchors, positives, anchors if negatives is None else negatives, temperature)]
    if needs[0] or needs[3]:
        grad_BD, radial_B = projected(anchor_rows, positive_rows, pushed(anchor_rows, negative_rows, True))
        if needs[0]:
            grads[0] = grad_BD
        grads[3] = temperature_gradient(radial_B, temperature, needs[3])
    if needs[1]:
        push_SMD = pushed(negative_rows, anchor_rows, False) if in_batch else None
        grads[1], _ = projected(positive_rows, anchor_rows, push_SMD)
    if needs[2]:
        grads[2], _ = projected(negative_rows, None, pushed(negative_rows, anchor_rows, False))
    return tuple(grads)
