"""Attention rollout as one carried row, with the top-k selection in the same launch.

A tile of attention logits stays in registers, is turned into weights there, and is summed over its query rows,
each weighted by its entry of the carried row. A program writes N numbers a layer to memory.

    WHOLE      a tile spans all N keys: every logit is computed once
    otherwise  the log-sum-exp of each query row comes first, then the column sums: every logit twice, or three times
               for max and min fusion, whose fused rows have a sum of their own

The work on one image is divided into parts: groups of heads times groups of blocks of query rows. Each part writes
a row of its own; the next layer adds the parts up in a fixed order, so the bits do not depend on timing. With one part
an image, no program waits for another and a single launch runs all layers. With more, a launch is one layer, and a
last launch adds up and selects.

Legend: L layers, B images, H heads, N tokens, D head width; BI x BJ the tile of query rows and key columns.
"""

import triton
import triton.language as tl

from .. import _triton
from . import Scalar

FUSIONS = {"mean": 0, "max": 1, "min": 2}
_MEAN, _MAX = tl.constexpr(0), tl.constexpr(1)
_INTERPRETED = tl.constexpr(_triton.INTERPRETED)


@triton.jit
def _pick(pointers: tl.tuple, index: Scalar, COUNT: tl.constexpr) -> tl.tensor:
    """Return pointers[index] for an index that is not known at compile time."""
    chosen = pointers[0]
    for other in tl.static_range(1, COUNT):
        chosen = tl.where(index == other, pointers[other], chosen)
    return chosen


@triton.jit
def _piece(
    base: tl.tensor,
    tokens: tl.tensor,
    limit: Scalar,
    stride_n: Scalar,
    stride_d: Scalar,
    start: Scalar,
    D: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """Load [tokens, STEP]: the features from `start` on; zero for tokens from `limit` on."""
    features = start + tl.arange(0, STEP)
    piece = tl.load(
        base + tokens[:, None] * stride_n + features[None, :] * stride_d,
        mask=(tokens < limit)[:, None] & (features < D)[None, :],
        other=0.0,
    )
    if _INTERPRETED:
        piece = piece.to(tl.float32)  # the interpreter multiplies the bits of bfloat16, as integers
    return piece


@triton.jit
def _logits(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    head: Scalar,
    rows: tl.tensor,
    cols: tl.tensor,
    limit: Scalar,
    N: Scalar,
    strides: tl.tuple,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
) -> tl.tensor:
    """Compute the [BI, BJ] float32 products of one head, not scaled yet; -inf beyond the last key."""
    stride_qh, stride_qn, stride_qd, stride_kh, stride_kn, stride_kd = strides
    query_ptr += head * stride_qh
    key_ptr += head * stride_kh
    logits = tl.zeros([BI, BJ], tl.float32)
    if query_ptr.dtype.element_ty == tl.float32:
        # Fused multiply-adds read their operands from registers, which unrolling would fill.
        for start in range(0, D, STEP):
            query = _piece(query_ptr, rows, limit, stride_qn, stride_qd, start, D, STEP)
            key = _piece(key_ptr, cols, N, stride_kn, stride_kd, start, D, STEP)
            logits = tl.dot(query, tl.trans(key), logits, input_precision="ieee")
    else:
        # Unrolled, so that the loop around this one can fetch the next tile ahead.
        for start in tl.static_range(0, D, STEP):
            query = _piece(query_ptr, rows, limit, stride_qn, stride_qd, start, D, STEP)
            key = _piece(key_ptr, cols, N, stride_kn, stride_kd, start, D, STEP)
            logits = tl.dot(query, tl.trans(key), logits)
    return tl.where((cols < N)[None, :], logits, float("-inf"))


@triton.jit
def _tile(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    head_lse_ptr: tl.tensor,
    unit: Scalar,
    rows: tl.tensor,
    cols: tl.tensor,
    limit: Scalar,
    H: Scalar,
    N: Scalar,
    factor: float,
    strides: tl.tuple,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    FUSION: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Compute a tile [BI, BJ]: the attention of each row is proportional to 2^(unit_factor * tile).

    Mean fusion: the products of head `unit`, unit_factor the scale in units of log 2. Otherwise the maximum or minimum
    log2 attention of all heads, unit_factor 1.
    """
    if FUSION == _MEAN:
        tile = _logits(query_ptr, key_ptr, unit, rows, cols, limit, N, strides, D, STEP, BI, BJ)
    else:
        tile = tl.full([BI, BJ], float("-inf") if FUSION == _MAX else float("inf"), tl.float32)
        for head in range(H):
            logits = _logits(query_ptr, key_ptr, head, rows, cols, limit, N, strides, D, STEP, BI, BJ)
            if WHOLE:
                peak = tl.max(logits, 1) * factor
                lse = peak + tl.log2(tl.sum(tl.exp2(logits * factor - peak[:, None]), 1))
            else:
                lse = tl.load(head_lse_ptr + head * N + rows, mask=rows < limit, other=0.0)
            # A NaN in one head must not hide behind the numbers of another.
            if FUSION == _MAX:
                tile = tl.maximum(tile, logits * factor - lse[:, None], propagate_nan=tl.PropagateNan.ALL)
            else:
                tile = tl.minimum(tile, logits * factor - lse[:, None], propagate_nan=tl.PropagateNan.ALL)
    return tile


@triton.jit
def _store_lse(
    lse_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    head_lse_ptr: tl.tensor,
    unit: Scalar,
    block_low: Scalar,
    block_high: Scalar,
    limit: Scalar,
    H: Scalar,
    N: Scalar,
    factor: float,
    strides: tl.tuple,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    FUSION: tl.constexpr,
) -> None:
    """Store lse[i] = log2 sum_j 2^(unit_factor tile[i, j]) of the blocks' query rows, in one pass over the keys."""
    unit_factor = factor if FUSION == _MEAN else 1.0
    for block in range(block_low, block_high):
        rows = block * BI + tl.arange(0, BI)
        peak = tl.full([BI], float("-inf"), tl.float32)
        total = tl.zeros([BI], tl.float32)
        for start in range(0, N, BJ):
            cols = start + tl.arange(0, BJ)
            tile = _tile(
                query_ptr, key_ptr, head_lse_ptr, unit, rows, cols, limit, H, N, factor, strides,
                D, STEP, BI, BJ, FUSION, False,
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(tile, 1) * unit_factor)
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(tile * unit_factor - higher[:, None]), 1)
            peak = higher
        tl.store(lse_ptr + rows, peak + tl.log2(total), mask=rows < limit)


@triton.jit
def _row(
    parts_ptr: tl.tensor,
    tokens: tl.tensor,
    N: Scalar,
    parts: Scalar,
    from_start: Scalar,
    PREFIX: tl.constexpr,
    AVG: tl.constexpr,
    SINGLE: tl.constexpr,
) -> tl.tensor:
    """Load the carried row at `tokens`: the sum of the parts, or the start row; zero beyond the last token."""
    if AVG:
        start = tl.where((tokens >= PREFIX) & (tokens < N), 1.0 / (N - PREFIX), 0.0)
    else:
        start = tl.where(tokens == 0, 1.0, 0.0)
    count = tl.where(from_start != 0, 0, N)
    total = tl.load(parts_ptr + tokens, mask=tokens < count, other=0.0)
    if not SINGLE:  # a loop in here would keep the loop around it from being pipelined
        for part in range(1, parts):
            total += tl.load(parts_ptr + part * N + tokens, mask=tokens < count, other=0.0)
    return tl.where(from_start != 0, start, total)


@triton.jit
def _layer(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    old_ptr: tl.tensor,
    new_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part: Scalar,
    parts: Scalar,
    first: Scalar,
    unit_low: Scalar,
    unit_high: Scalar,
    block_low: Scalar,
    block_high: Scalar,
    H: Scalar,
    N: Scalar,
    factor: float,
    gain: float,
    residual: float,
    strides: tl.tuple,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    PREFIX: tl.constexpr,
    AVG: tl.constexpr,
    SINGLE: tl.constexpr,
    ROLLOUT: tl.constexpr,
    FUSION: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Compute one part of the new row of one image: units (heads) and blocks of query rows from `low` up to `high`.

    old, new: rows [parts, N] of this image, before this layer and after it.
    """
    from_start = first
    if not ROLLOUT:
        from_start = first | 1
    limit = N
    if not AVG:
        limit = tl.where(from_start != 0, 1, N)  # the start row is zero except for the class token
        block_high = tl.minimum(block_high, tl.cdiv(limit, BI))

    unit_factor = factor if FUSION == _MEAN else 1.0
    head_lse_ptr = lse_ptr
    if not WHOLE:
        if FUSION != _MEAN:
            for head in range(H):
                _store_lse(
                    head_lse_ptr + head * N, query_ptr, key_ptr, head_lse_ptr, head, block_low, block_high, limit,
                    H, N, factor, strides, D, STEP, BI, BJ, 0,
                )  # fmt: skip
            tl.debug_barrier()  # the threads of this program read each other's stores
            lse_ptr += H * N
        for unit in range(unit_low, unit_high):
            _store_lse(
                lse_ptr + unit * N, query_ptr, key_ptr, head_lse_ptr, unit, block_low, block_high, limit,
                H, N, factor, strides, D, STEP, BI, BJ, FUSION,
            )  # fmt: skip
        tl.debug_barrier()

    for start in range(0, N, BJ):
        cols = start + tl.arange(0, BJ)
        # Added up element by element, and over the rows once at the end: a sum over rows is shuffles between threads.
        weights = tl.zeros([BI, BJ], tl.float32)
        for unit in range(unit_low, unit_high):
            for block in range(block_low, block_high):
                rows = block * BI + tl.arange(0, BI)
                tile = _tile(
                    query_ptr, key_ptr, head_lse_ptr, unit, rows, cols, limit, H, N, factor, strides,
                    D, STEP, BI, BJ, FUSION, WHOLE,
                )  # fmt: skip
                share = _row(old_ptr, rows, N, parts, from_start, PREFIX, AVG, SINGLE)
                if WHOLE:
                    peak = tl.max(tile, 1) * unit_factor
                    attention = tl.exp2(tile * unit_factor - peak[:, None])
                    share /= tl.sum(attention, 1)
                else:
                    lse = tl.load(lse_ptr + unit * N + rows, mask=rows < limit, other=0.0)
                    attention = tl.exp2(tile * unit_factor - lse[:, None])
                weights += attention * share[:, None]
        columns = tl.sum(weights, 0) * gain
        if ROLLOUT:
            if part == 0:  # the identity's share
                columns += residual * _row(old_ptr, cols, N, parts, from_start, PREFIX, AVG, SINGLE)
        else:
            columns += tl.load(old_ptr + part * N + cols, mask=cols < tl.where(first != 0, 0, N), other=0.0)
        tl.store(new_ptr + part * N + cols, columns, mask=cols < N)


@triton.jit
def _select(
    rows_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    parts: Scalar,
    N: Scalar,
    k: Scalar,
    PREFIX: tl.constexpr,
    BN: tl.constexpr,
    SCORES: tl.constexpr,
    MASK: tl.constexpr,
) -> None:
    """Compute scores and mask of one image from its finished row, and whether that row is finite.

    The k-th largest score is found bit by bit: the bits of floats that are not negative order like integers.
    """
    tokens = tl.arange(0, BN)
    row = tl.zeros([BN], tl.float32)
    for part in range(parts):
        row += tl.load(rows_ptr + part * N + tokens, mask=tokens < N, other=0.0)
    total = tl.sum(row, 0)
    tl.store(finite_ptr, (tl.abs(total) < float("inf")).to(tl.int8))
    patch = (tokens >= PREFIX) & (tokens < N)
    if SCORES:
        tl.store(scores_ptr + tokens - PREFIX, row, mask=patch)
    if MASK:
        bits = tl.where(patch, row.to(tl.int32, bitcast=True), -1)
        threshold = 0
        for step in range(31):
            higher = threshold | (1 << (30 - step))
            threshold = tl.where(tl.sum((bits >= higher).to(tl.int32), 0) >= k, higher, threshold)
        above = bits > threshold
        tied = (bits == threshold).to(tl.int32)
        room = k - tl.sum(above.to(tl.int32), 0)
        chosen = above | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
        tl.store(mask_ptr + tokens - PREFIX, chosen.to(tl.int8), mask=patch)


# What changes from call to call is not compiled in, where a 1 or a multiple of 16 would be.
@triton.jit(do_not_specialize=["B", "k", "step_low", "step_high", "parts_h", "parts_i"])
def rollout_kernel(
    queries: tl.tuple,
    keys: tl.tuple,
    rows_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    stride_qb: Scalar,
    stride_qh: Scalar,
    stride_qn: Scalar,
    stride_qd: Scalar,
    stride_kb: Scalar,
    stride_kh: Scalar,
    stride_kn: Scalar,
    stride_kd: Scalar,
    B: Scalar,
    H: Scalar,
    N: Scalar,
    k: Scalar,
    factor: float,
    gain: float,
    residual: float,
    step_low: Scalar,
    step_high: Scalar,
    parts_h: Scalar,
    parts_i: Scalar,
    LAYERS: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    PREFIX: tl.constexpr,
    AVG: tl.constexpr,
    SINGLE: tl.constexpr,
    ROLLOUT: tl.constexpr,
    FUSION: tl.constexpr,
    WHOLE: tl.constexpr,
    FINISH: tl.constexpr,
    SCORES: tl.constexpr,
    MASK: tl.constexpr,
) -> None:
    """Run steps [step_low, step_high) of the layers, counted from the last; if FINISH, then select.

    rows: [2, B, parts, N], step s reads half s % 2 and writes the other. lse: [B, H + 1, N].
    """
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = parts_h * parts_i
    units = H if FUSION == _MEAN else 1
    share_h, share_i = tl.cdiv(units, parts_h), tl.cdiv(tl.cdiv(N, BI), parts_i)
    unit_low, block_low = (part // parts_i) * share_h, (part % parts_i) * share_i
    for step in range(step_low, step_high):
        index = LAYERS - 1 - (step - step_low)
        _layer(
            _pick(queries, index, LAYERS) + image * stride_qb,
            _pick(keys, index, LAYERS) + image * stride_kb,
            rows_ptr + ((step % 2) * B + image) * parts * N,
            rows_ptr + (((step + 1) % 2) * B + image) * parts * N,
            lse_ptr + image * (H + 1) * N,
            part, parts, tl.where(step == 0, 1, 0),
            unit_low, tl.minimum(unit_low + share_h, units), block_low, tl.minimum(block_low + share_i, tl.cdiv(N, BI)),
            H, N, factor, gain, residual, (stride_qh, stride_qn, stride_qd, stride_kh, stride_kn, stride_kd),
            D, STEP, BI, BJ, PREFIX, AVG, SINGLE, ROLLOUT, FUSION, WHOLE,
        )  # fmt: skip
        tl.debug_barrier()
    if FINISH:
        patches = N - PREFIX
        _select(
            rows_ptr + ((step_high % 2) * B + image) * parts * N,
            scores_ptr + image * patches, mask_ptr + image * patches, finite_ptr + image,
            parts, N, k, PREFIX, BN, SCORES, MASK,
        )  # fmt: skip
