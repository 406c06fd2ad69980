"""The mask over the patches that a model attends to most, computed in one forward pass of the model.

ViT and DeiT: attention rollout, by `lethe_kernels.rollout_topk_mask` on the captured q and k of all blocks, or on the
CPU in float32 by `lethe_kernels.StreamedRollout` on the maps as explicit attention makes them.

Swin has windows, and no token that attends to the whole image. The rule here: in the last block of the last stage, with
A_w = softmax(q k^T scale + relative position bias + shift mask) of window w, averaged over heads, the score of a
token is the attention it receives, sum_i A_w[i, j] / n_w. Every window weighs the same, and a maskable patch is a
token of the last stage (32 x 32 pixels for patch 4). At 224 pixels that stage is a single window of 7 x 7 tokens, so
the scores are one distribution over the whole image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.attention import capture_queries_keys, stream_attention
from engine.models.capture import assemble, attention_calls
from engine.models.vit import ViTInfo, attention_modules, cosine_attention, outputs, plain_attention
from lethe_kernels import StreamedRollout, attention_rollout, resolve_backend, rollout_topk_mask
from lethe_kernels.rollout import topk_mask

MaskSource = Literal["rollout", "last", "mean", "lowest", "random"]
HeadFusion = Literal["mean", "max", "min"]
Backend = Literal["auto", "triton", "eager"]

# Patches per width up to which streaming the maps is no slower than computing the class row from q and k.
_STREAMED_PER_WIDTH = 2


def count_masked(info: ViTInfo, share: float) -> int:
    """Return the number of patches of a share (0, 1): rounded to the nearest, at least one, never all."""
    return min(max(1, round(share * info.num_patches)), info.num_patches - 1)


@torch.no_grad()
def scores_and_outputs(
    model: nn.Module,
    images: Tensor,
    info: ViTInfo,
    *,
    source: MaskSource = "rollout",
    head_fusion: HeadFusion = "mean",
    what: str = "logits",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return attention scores [B, P], float32, and the outputs of the same forward pass.

    Args:
        model: The model.
        images: Normalised images [B, C, H, W].
        info: Geometry of the patches.
        source: rollout, last or mean (modes of `lethe_kernels.attention_rollout`); lowest is rollout too.
        head_fusion: How heads are combined: mean, max or min.
        what: Outputs to return, see `vit.outputs`.
        backend: Backend of the kernels.

    Raises:
        UserError: The source is not available for a windowed model (Swin).
    """
    return _guided(model, images, info, None, source, head_fusion, what, backend)


@torch.no_grad()
def mask_and_outputs(
    model: nn.Module,
    images: Tensor,
    info: ViTInfo,
    k: int,
    *,
    source: MaskSource = "rollout",
    head_fusion: HeadFusion = "mean",
    what: str = "logits",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return a mask [B, P], bool, of k patches, and the outputs of the same forward pass.

    Args:
        model: The model.
        images: Normalised images [B, C, H, W].
        info: Geometry of the patches.
        k: Number of masked patches for each image.
        source: rollout, last or mean: the most attended patches; lowest: the least attended by rollout.
        head_fusion: How heads are combined: mean, max or min.
        what: Outputs to return, see `vit.outputs`.
        backend: Backend of the kernels.

    Raises:
        UserError: The source is not available for a windowed model (Swin).
    """
    return _guided(model, images, info, k, source, head_fusion, what, backend)


def _guided(
    model: nn.Module,
    images: Tensor,
    info: ViTInfo,
    k: int | None,
    source: MaskSource,
    head_fusion: HeadFusion,
    what: str,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "num_prefix_tokens": info.num_prefix_tokens,
        "mode": source if source in ("last", "mean") else "rollout",
        "head_fusion": head_fusion,
        "pool": "token" if info.pool == "token" else "avg",
    }
    if info.windowed:
        if source not in ("rollout", "lowest", "last"):
            raise UserError(f"option mask_source={source!r}: a windowed model (Swin) has one rule; use rollout")
        scores, result = _swin_scores_and_outputs(model, images, what)
    elif _streams(model, info, images.device, backend):
        stream = StreamedRollout(**options)
        with stream_attention(model, stream.add):
            result = outputs(model, images, what)
        scores = stream.scores()
    else:
        if plain_attention(model):
            with capture_queries_keys(model) as (queries, keys):
                result = outputs(model, images, what)
            options["scale"] = float(model.blocks[0].attn.scale)  # type: ignore[union-attr, index]
        else:
            with attention_calls(model) as calls:
                result = outputs(model, images, what)
            found = assemble(calls, info.num_prefix_tokens + info.num_patches, info.num_prefix_tokens)
            queries, keys = found.queries, found.keys
            options |= {"scale": found.scale, "biases": found.biases, "start": found.start}
        options["backend"] = backend
        if k is not None and source != "lowest":
            return rollout_topk_mask(queries, keys, k=k, **options), result
        scores = attention_rollout(queries, keys, **options)
    return (scores if k is None else top_mask(scores, k, source)), result


def _streams(model: nn.Module, info: ViTInfo, device: torch.device, backend: Backend) -> bool:
    """Return whether the maps are taken from explicit attention, rather than computed again from q and k.

    True on the CPU, where explicit attention is no slower than fused (docs/lab) and q and k of all layers take as
    much memory as the maps; on other devices if the model's attention is explicit already. Not in half precision: its
    maps come from rounded logits, and would mask other patches than q and k in float32, which are the same for every
    backend. Not with many patches for the width: the maps arrive first layer first, so that the rollout costs N^3 a
    layer, compared with N^2 x width for the class row from q and k (docs/lab/2026-11-21.md has the times).
    """
    if info.num_patches > _STREAMED_PER_WIDTH * info.width or not (plain_attention(model) or _relative(model)):
        return False
    half = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype.itemsize < 4
    if half or resolve_backend("attention_rollout", backend, device) == "triton":
        return False
    modules = attention_modules(model)
    explicit = device.type == "cpu" or not any(getattr(module, "fused_attn", False) for module in modules)
    return explicit and all(hasattr(module, "attn_drop") and hasattr(module, "fused_attn") for module in modules)


def _relative(model: nn.Module) -> bool:
    """Return whether all attention is timm's relative position attention, without attention pooling."""
    modules = attention_modules(model)
    pooled = getattr(model, "attn_pool", None) is not None
    return bool(modules) and not pooled and all(type(module) is RelPosAttention for module in modules)


def top_mask(scores: Tensor, k: int, source: str) -> Tensor:
    """Return a mask [B, P] of the k highest scores (the lowest for source="lowest"); ties go to the lowest index."""
    return topk_mask(-scores if source == "lowest" else scores, k)


def random_masks(positions: Iterable[int], info: ViTInfo, k: int, seed: int) -> Tensor:
    """Return a mask [B, P], on the CPU, of k patches drawn at random: the control for attention guidance.

    It depends on the seed and on each sample's position in the forget set alone, so not on the batch size.

    Args:
        positions: Positions of the samples in the forget set.
        info: Geometry of the patches.
        k: Number of masked patches for each image.
        seed: Seed of the run.
    """
    draws = [
        torch.rand(info.num_patches, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(position)))
        for position in positions
    ]
    return topk_mask(torch.stack(draws), k)


def _swin_scores_and_outputs(model: nn.Module, images: Tensor, what: str) -> tuple[Tensor, Tensor]:
    block: Any = model.layers[-1].blocks[-1]  # type: ignore[index, union-attr]
    captured: list[Tensor] = []
    cosine = cosine_attention(block.attn)
    module = block.attn.attn_drop if cosine else block.attn.qkv  # after the softmax, or before it
    handle = module.register_forward_hook(lambda _m, _i, out: captured.append(out))
    try:
        result = outputs(model, images, what)
    finally:
        handle.remove()
    (height, width), (win_h, win_w) = block.input_resolution, block.window_size
    if height % win_h or width % win_w:
        raise UserError(
            f"a last stage of {height} x {width} tokens is not a whole number of {win_h} x {win_w} windows; "
            "Swin's rule cannot place its padding, use another input size"
        )
    maps = captured[0].float() if cosine else _swin_maps(block, captured[0])
    received = maps.mean(1).mean(1)  # over heads, then over the tokens that attend: [B * windows, N]
    down, across = height // win_h, width // win_w
    grid = received.view(-1, down, across, win_h, win_w).transpose(2, 3).reshape(-1, height, width) / (down * across)
    grid = torch.roll(grid, shifts=tuple(block.shift_size), dims=(1, 2))
    return grid.flatten(1), result


def _swin_maps(block: Any, qkv: Tensor) -> Tensor:
    """Return softmax(q k^T scale + relative position bias + shift mask) [B * windows, H, N, N] of Swin's attention."""
    attn = block.attn
    windows_BWN, tokens, _ = qkv.shape
    queries, keys, _ = qkv.float().reshape(windows_BWN, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    similarity = queries @ keys.transpose(-2, -1) * attn.scale + attn._get_rel_pos_bias().float()
    if block.attn_mask is not None:
        windows = block.attn_mask.shape[0]
        similarity = similarity.unflatten(0, (-1, windows)) + block.attn_mask.unsqueeze(1).float()
        similarity = similarity.flatten(0, 1)
    return similarity.softmax(-1)
