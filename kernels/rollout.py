"""Attention rollout, and the mask of the k most attended patches.

    A_l  = fuse_h softmax(scale Q_lh K_lh^T)        fuse: mean, max or min over heads, the last two with
    A~_l = residual I + (1 - residual) A_l          rows divided by their sums
    rollout:  row = start A~_L A~_(L-1) ... A~_1    scores = row on the patch tokens, not renormalised
    last:     row = start A_L
    mean:     row = 1/L sum_l start A_l

`start` is the unit vector of the class token (pool="token") or uniform over the patch tokens (pool="avg").

Legend: L layers, B images, H heads, N tokens = prefix tokens + P patches, R chosen query rows, d head width.
The class token is token 0; the other prefix tokens (distillation, registers) follow it, then the patches.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928 (residual = 0.5,
mean over heads); the mask of top-attended patches is LetheViT's, arXiv 2508.01569.

Cost: one row of the product is wanted, so row <- row A~_l goes from the last layer down: O(N^2) a layer, not
the O(N^3) of a matrix product. The last layer needs just the R rows where `start` is not zero; the modes last
and mean need just those in every layer.
Flops: 2 B L H N^2 d (rollout); 2 B H R N d (last); 2 B L H R N d (mean).
Bytes: 2 B L H N d itemsize to read Q and K; the Triton kernel (`_triton/rollout.py`) adds a few rows of N floats.
The eager path holds the attention of one layer and of as many images as fit in `CHUNK_BYTES`.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._backend import (
    Backend,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    compute_dtype,
    resolve_backend,
    without_autocast,
)

# Attention maps that the eager path makes at a time. On the CPU they then stay in its cache.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}

# The widest heads that the Triton kernel is tested and compiled with (`python -m bench compile`).
MAX_WIDTH = 128

Mode = Literal["rollout", "last", "mean"]
HeadFusion = Literal["mean", "max", "min"]
Pool = Literal["token", "avg"]


def rollout_row_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_prefix_tokens: int = 1,
    mode: Mode = "rollout",
    head_fusion: HeadFusion = "mean",
    residual: float = 0.5,
    pool: Pool = "token",
    scale: float | None = None,
    biases: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Compute the whole row [B, N], prefix tokens included, by full N x N products in the dtype of the inputs."""
    attentions_BNN = []
    for layer, (query_BHNd, key_BHNd) in enumerate(zip(queries, keys, strict=True)):
        factor = query_BHNd.shape[-1] ** -0.5 if scale is None else scale
        logits_BHNN = query_BHNd @ key_BHNd.transpose(-2, -1) * factor
        attention_BHNN = torch.softmax(logits_BHNN if biases is None else logits_BHNN + biases[layer], dim=-1)
        if head_fusion == "mean":
            fused_BNN = attention_BHNN.mean(dim=1)
        else:
            fused_BNN = attention_BHNN.amax(dim=1) if head_fusion == "max" else attention_BHNN.amin(dim=1)
            fused_BNN = fused_BNN / fused_BNN.sum(dim=-1, keepdim=True)
        attentions_BNN.append(fused_BNN)

    tokens = attentions_BNN[0].shape[-1]
    eye_NN = torch.eye(tokens, dtype=attentions_BNN[0].dtype, device=attentions_BNN[0].device)
    if mode == "last":
        matrix_BNN = attentions_BNN[-1]
    elif mode == "mean":
        matrix_BNN = torch.stack(attentions_BNN).mean(dim=0)
    else:
        matrix_BNN = eye_NN.expand_as(attentions_BNN[0])
        for attention_BNN in attentions_BNN:
            matrix_BNN = (residual * eye_NN + (1 - residual) * attention_BNN) @ matrix_BNN
    if start is not None:
        return (start.to(matrix_BNN).unsqueeze(1) @ matrix_BNN).squeeze(1)
    return matrix_BNN[:, 0] if pool == "token" else matrix_BNN[:, num_prefix_tokens:].mean(dim=1)


def attention_rollout_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_prefix_tokens: int = 1,
    mode: Mode = "rollout",
    head_fusion: HeadFusion = "mean",
    residual: float = 0.5,
    pool: Pool = "token",
    scale: float | None = None,
    biases: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return the patch part [B, P] of `rollout_row_reference`, in the dtype of the inputs."""
    row_BN = rollout_row_reference(
        queries,
        keys,
        num_prefix_tokens=num_prefix_tokens,
        mode=mode,
        head_fusion=head_fusion,
        residual=residual,
        pool=pool,
        scale=scale,
        biases=biases,
        start=start,
    )
    return row_BN[:, num_prefix_tokens:]


def _fused_attention(
    query_BHRd: Tensor, key_BHNd: Tensor, scale: float, head_fusion: HeadFusion, bias: Tensor | None = None
) -> Tensor:  # [B, R, N], rows sum to one
    dtype = compute_dtype(query_BHRd.dtype)
    # The scale multiplies R x d numbers rather than R x N.
    logits_BHRN = (query_BHRd.to(dtype) * scale) @ key_BHNd.to(dtype).transpose(-2, -1)
    if bias is not None:
        logits_BHRN = logits_BHRN + bias.to(dtype)
    if head_fusion == "mean":
        return logits_BHRN.softmax(dim=-1).mean(dim=1)
    # In logarithms, because the minimum of sharp heads can underflow to a row of zeros, which has no sum to
    # divide by.
    # softmax(log x) = x / sum x is the division.
    log_BHRN = logits_BHRN.log_softmax(dim=-1)
    log_BRN = log_BHRN.amax(dim=1) if head_fusion == "max" else log_BHRN.amin(dim=1)
    return log_BRN.softmax(dim=-1)


def _rollout_row_eager(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_prefix_tokens: int,
    mode: Mode,
    head_fusion: HeadFusion,
    residual: float,
    pool: Pool,
    scale: float,
    biases: Sequence[Tensor] = (),
    start: Tensor | None = None,
) -> Tensor:  # [B, N]
    batch, heads, tokens, _ = queries[0].shape
    map_bytes = heads * tokens * tokens * compute_dtype(queries[0].dtype).itemsize
    images = max(1, CHUNK_BYTES.get(queries[0].device.type, CHUNK_BYTES["cuda"]) // map_bytes)
    rows = slice(0, 1) if pool == "token" else slice(num_prefix_tokens, None)

    def chunk_row(low: int) -> Tensor:
        def fused(layer: int, rows: slice) -> Tensor:
            query_BHRd = queries[layer][low : low + images, :, rows]
            bias = (_part(biases[layer], slice(low, low + images), rows),) if biases else ()
            return _fused_attention(query_BHRd, keys[layer][low : low + images], scale, head_fusion, *bias)

        def from_start(layer: int) -> Tensor:
            """Compute start A_l [B, N]; if `start` is uniform over `rows`, it is the mean of those rows."""
            if start is None:
                return fused(layer, rows).mean(dim=1)
            fused_BNN = fused(layer, slice(None))
            return (start[low : low + images].to(fused_BNN).unsqueeze(1) @ fused_BNN).squeeze(1)

        last = len(queries) - 1
        row_BN = from_start(last)
        if mode == "last":
            return row_BN
        if mode == "mean":
            for layer in range(last):
                row_BN += from_start(layer)
            return row_BN / len(queries)

        start_N = start_row(row_BN, num_prefix_tokens, pool) if start is None else start[low : low + images].to(row_BN)
        row_BN = residual * start_N + (1 - residual) * row_BN
        for layer in reversed(range(last)):
            fused_BNN = fused(layer, slice(None))
            row_BN = residual * row_BN + (1 - residual) * (row_BN.unsqueeze(1) @ fused_BNN).squeeze(1)
        return row_BN

    return torch.cat([chunk_row(low) for low in range(0, batch, images)])


def _part(bias: Tensor, images: slice, rows: slice) -> Tensor:
    """Return those images and rows of a bias [B or 1, H or 1, N or 1, N]."""
    bias = bias[images] if bias.shape[0] > 1 else bias
    return bias[:, :, rows] if bias.shape[2] > 1 else bias


def start_row(like_BN: Tensor, num_prefix_tokens: int, pool: Pool) -> Tensor:
    """Return the row [N] that the rollout begins with: the class token's, or uniform over the patch tokens."""
    start_N = torch.zeros_like(like_BN[0])
    start_N[slice(0, 1) if pool == "token" else slice(num_prefix_tokens, None)] = 1
    return start_N / start_N.sum()


@torch.library.custom_op("lethe::attention_rollout", mutates_args=())
def _rollout_op(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    k: int | None,
    num_prefix_tokens: int,
    mode: str,
    head_fusion: str,
    residual: float,
    pool: str,
    scale: float,
    backend: str,
    biases: Sequence[Tensor],
    start: Tensor | None,
) -> Tensor:
    """Compute scores, or the mask if `k` is given; values of inputs are read here alone, outside any graph."""
    op = "attention_rollout" if k is None else "rollout_topk_mask"
    options: dict[str, Any] = {
        "num_prefix_tokens": num_prefix_tokens,
        "mode": mode,
        "head_fusion": head_fusion,
        "residual": residual,
        "pool": pool,
        "scale": scale,
    }
    if backend == "triton":
        from ._triton.rollout import launch

        with torch.cuda.device_of(queries[0]):
            result_BP, finite = launch(queries, keys, k=k, **options)
    else:
        with without_autocast(queries[0].device):
            row_BN = _rollout_row_eager(queries, keys, **options, biases=biases, start=start)
        finite = row_BN.sum()  # finite only if every entry is
        result_BP = row_BN[:, num_prefix_tokens:].to(torch.float32, copy=True)
        if k is not None:
            result_BP = _topk_mask(op, result_BP, k)
    _check_finite(op, queries, keys, finite, biases)
    return result_BP


@_rollout_op.register_fake
def _(
    queries: Sequence[Tensor], keys: Sequence[Tensor], k: int | None, num_prefix_tokens: int, *options: Any
) -> Tensor:
    batch, _, tokens, _ = queries[0].shape
    dtype = torch.float32 if k is None else torch.bool
    return queries[0].new_empty((batch, tokens - num_prefix_tokens), dtype=dtype)


def _check_finite(
    op: str, queries: Sequence[Tensor], keys: Sequence[Tensor], finite: Tensor, biases: Sequence[Tensor] = ()
) -> None:
    """Raise ValueError unless all of `finite` (a sum, or a flag an image) is finite and not zero.

    The check waits for the device once a call; it is left out while a CUDA graph is recorded.
    """
    if finite.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not bool((finite.isfinite() & (finite != 0)).all()):
        _raise_not_finite(op, queries, keys, biases)


def _check_layers(op: str, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    for name, layers in (("queries", queries), ("keys", keys)):
        if isinstance(layers, Tensor) or not isinstance(layers, Sequence):
            raise ValueError(
                f"{op}: {name} is a {type(layers).__name__}, expected a list or tuple of tensors"
                " (B, H, N, d), one a layer"
            )
    if len(queries) == 0:
        raise ValueError(f"{op}: queries is empty, expected one tensor a layer, first layer first")
    if len(keys) != len(queries):
        raise ValueError(f"{op}: keys has {len(keys)} layers, expected {len(queries)} to match queries")
    check_tensor(op, "queries[0]", queries[0], "B, H, N, d")
    check_float(op, "queries[0]", queries[0])
    first = queries[0]
    for name, layers in (("queries", queries), ("keys", keys)):
        for layer, tensor_BHNd in enumerate(layers):
            argument = f"{name}[{layer}]"
            check_tensor(op, argument, tensor_BHNd, "B, H, N, d")
            check_shape(op, argument, tensor_BHNd, tuple(first.shape), "queries[0]")
            check_dtype(op, argument, tensor_BHNd, first.dtype, "queries[0]")
            check_device(op, argument, tensor_BHNd, first.device, "queries[0]")


def _raise_not_finite(
    op: str, queries: Sequence[Tensor], keys: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> None:
    """Raise ValueError that names the tensor that is not finite; slow, so called only if scores are not finite."""
    for name, layers in (("queries", queries), ("keys", keys)):
        for layer, tensor_BHNd in enumerate(layers):
            if not bool(tensor_BHNd.isfinite().all()):
                raise ValueError(f"{op}: {name}[{layer}] holds NaN or infinity, expected finite values")
    for layer, bias in enumerate(biases):
        if bool(((bias == -torch.inf).all(dim=-1) | bias.isnan().any(dim=-1) | (bias == torch.inf).any(dim=-1)).any()):
            raise ValueError(f"{op}: biases[{layer}] holds NaN or infinity, or hides every token from one")
    raise ValueError(
        f"{op}: queries and keys are finite but too large, their products overflow; expected finite scores"
    )


def _rollout(
    op: str,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    k: int | None,
    num_prefix_tokens: int,
    mode: Mode,
    head_fusion: HeadFusion,
    residual: float,
    pool: Pool,
    scale: float | None,
    backend: Backend,
    biases: Sequence[Tensor] | None,
    start: Tensor | None,
) -> Tensor:
    """Check the arguments of both public functions and run the operation; `op` is the name in errors."""
    _check_layers(op, queries, keys)
    check_rollout(op, mode, head_fusion, residual, pool)
    tokens, width = queries[0].shape[2:]
    prefix = check_int(op, "num_prefix_tokens", num_prefix_tokens, 0, tokens - 1, "at least one of N is a patch")
    if pool == "token" and prefix == 0:
        raise ValueError(f"{op}: num_prefix_tokens is 0, expected 1 or more for pool='token'; use pool='avg'")
    if op == "rollout_topk_mask":
        k = check_int(op, "k", k, 0, tokens - prefix, "the number of patches")
    factor = width**-0.5 if scale is None else check_number(op, "scale", scale, "a finite number above 0")
    if factor <= 0:
        raise ValueError(f"{op}: scale is {scale!r}, expected a finite number above 0")
    _check_biases(op, biases, queries)
    _check_start(op, start, queries[0])
    unsupported = []
    if biases is not None:
        unsupported.append("biases are not supported")
    if start is not None:
        unsupported.append("a start row is not supported")
    if width > MAX_WIDTH:
        unsupported.append(f"heads are {width} wide, {MAX_WIDTH} at most")
    if queries[0].dtype == torch.float64:
        unsupported.append("float64 is not supported")
    ran = resolve_backend(op, backend, queries[0].device, unsupported)
    with torch.no_grad():
        options = (k, prefix, mode, head_fusion, float(residual), pool, factor, ran)
        return _rollout_op(list(queries), list(keys), *options, [] if biases is None else list(biases), start)


def _check_biases(op: str, biases: Sequence[Tensor] | None, queries: Sequence[Tensor]) -> None:
    if biases is None:
        return
    if len(biases) != len(queries):
        raise ValueError(f"{op}: biases has {len(biases)} layers, expected {len(queries)} to match queries")
    batch, heads, tokens, _ = queries[0].shape
    for layer, bias in enumerate(biases):
        check_tensor(op, f"biases[{layer}]", bias, "B, H, N, N")
        check_float(op, f"biases[{layer}]", bias)
        check_device(op, f"biases[{layer}]", bias, queries[0].device, "queries[0]")
        full = (batch, heads, tokens, tokens)
        if any(mine not in (1, wanted) for mine, wanted in zip(bias.shape, full, strict=True)):
            raise ValueError(f"{op}: biases[{layer}] has shape {tuple(bias.shape)}, expected {full} or 1 for any of it")


def _check_start(op: str, start: Tensor | None, query: Tensor) -> None:
    if start is not None:
        check_tensor(op, "start", start, "B, N")
        check_float(op, "start", start)
        check_shape(op, "start", start, (query.shape[0], query.shape[2]), "queries[0]")
        check_device(op, "start", start, query.device, "queries[0]")


def check_rollout(op: str, mode: str, head_fusion: str, residual: float, pool: str) -> None:
    """Raise ValueError for an option that does not exist."""
    check_choice(op, "mode", mode, get_args(Mode))
    check_choice(op, "head_fusion", head_fusion, get_args(HeadFusion))
    check_choice(op, "pool", pool, get_args(Pool))
    if not 0 <= check_number(op, "residual", residual, "a number from 0 to 1") <= 1:
        raise ValueError(f"{op}: residual is {residual!r}, expected a number from 0 to 1")


def topk_mask(scores_BP: Tensor, k: int) -> Tensor:
    """Return a mask [B, P] bool, True on the k highest scores of each row; ties go to the lowest index.

    Args:
        scores_BP: Float [B, P] without NaN (not checked: a check would wait for the device).
        k: From 0 to P.
    """
    return _topk_mask("topk_mask", scores_BP, k)


def _topk_mask(op: str, scores_BP: Tensor, k: int) -> Tensor:
    check_tensor(op, "scores", scores_BP, "B, P")
    count = check_int(op, "k", k, 0, scores_BP.shape[1], "the number of patches")
    # Not torch.topk: which of equal scores it picks is unspecified and differs between devices.
    order_BP = torch.sort(scores_BP, dim=1, descending=True, stable=True).indices
    mask_BP = torch.zeros_like(scores_BP, dtype=torch.bool)
    return mask_BP.scatter_(1, order_BP[:, :count], True)


def attention_rollout(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_prefix_tokens: int = 1,
    mode: Mode = "rollout",
    head_fusion: HeadFusion = "mean",
    residual: float = 0.5,
    pool: Pool = "token",
    scale: float | None = None,
    backend: Backend = "auto",
    biases: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Compute how much each patch is attended to.

    Half-precision inputs are computed in float32, float64 in float64. No gradient flows through the result.

    Args:
        queries: L tensors [B, H, N, d], first layer first, after any q/k norm and before the scale; strided views are
            accepted. N = num_prefix_tokens + P.
        keys: L tensors, likewise.
        num_prefix_tokens: Tokens before the first patch: class token, distillation token, registers.
        mode: "rollout" over all layers, the "last" layer alone, or the "mean" of the layers.
        head_fusion: "mean", "max" or "min" over heads.
        residual: Weight of the identity, from 0 to 1; used by "rollout" alone.
        pool: "token" reads the row of token 0, "avg" the mean row of the patch tokens.
        scale: Factor of the attention logits; None for d ** -0.5.
        backend: "auto" (Triton if it can run), "triton" or "eager".
        biases: Added to the scaled logits, one tensor a layer, [B, H, N, N] or 1 in place of any size; -inf hides a
            token. Eager only.
        start: Weights [B, N] of the tokens whose rows are read, in place of `pool`: attention pooling. Eager only.

    Returns:
        Scores [B, P] float32, not renormalised.

    Raises:
        ValueError: A shape, dtype, device or value does not fit, or scores are not finite: the message names the tensor
            that holds NaN or infinity. An infinity that merely leaves a token without attention passes.
        RuntimeError: The backend "triton" cannot run.
    """
    return _rollout(
        "attention_rollout",
        queries,
        keys,
        None,
        num_prefix_tokens,
        mode,
        head_fusion,
        residual,
        pool,
        scale,
        backend,
        biases,
        start,
    )


def rollout_topk_mask(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    k: int,
    num_prefix_tokens: int = 1,
    mode: Mode = "rollout",
    head_fusion: HeadFusion = "mean",
    residual: float = 0.5,
    pool: Pool = "token",
    scale: float | None = None,
    backend: Backend = "auto",
    biases: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return a mask [B, P] bool, True on the k patches of each image with the highest `attention_rollout` scores.

    Args:
        k: From 0 to P; ties go to the lowest index. All other arguments, and errors, are those of `attention_rollout`.
    """
    op = "rollout_topk_mask"
    options = (num_prefix_tokens, mode, head_fusion, residual, pool, scale, backend, biases, start)
    return _rollout(op, queries, keys, k, *options)
