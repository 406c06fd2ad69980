"""Outputs of a model for masked images, by replacing the tokens of masked patches.

A patch whose pixels are one constant per channel embeds to the same token at every position. So a second pass needs
only the tokens of the first pass and one more token:

    with capture_patch_tokens(model) as captured:
        logits = model(images)
    token = masked_patch_token(model, value)  # once
    masked_logits = masked_outputs(model, captured[0], mask, token)

equals `model(mask_patches(images, mask, patch_size=..., value=value))` except for rounding, if `supports_tokens`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.vit import attention_info, attention_modules, forwarding, outputs
from lethe_kernels import mask_tokens

Backend = Literal["auto", "triton", "eager"]


def supports_tokens(model: nn.Module) -> bool:
    """Return whether replacing tokens is equivalent to masking images.

    It is if each maskable patch becomes one token that depends on its own pixels alone: timm's plain patch embedding,
    with output [B, P, D] or (dynamic_img_size) [B, gh, gw, D]. It is not for Swin, whose maskable patch is many tokens,
    nor if patches overlap, are padded, or pass through a convolutional stem.

    Raises:
        UserError: `engine.models.vit.attention_info` refuses the model.
    """
    attention_info(model)
    embed = getattr(model, "patch_embed", None)
    if (
        not attention_modules(model)  # Swin has none that is over all patches
        or getattr(model, "rope", None) is not None
        or type(embed) is not PatchEmbed
        or embed.dynamic_img_pad
    ):
        return False
    projection = embed.proj
    return (
        (embed.flatten or embed.output_fmt == Format.NHWC)
        and isinstance(embed.norm, (nn.Identity, nn.LayerNorm))
        and type(projection) is nn.Conv2d
        and projection.kernel_size == projection.stride == tuple(embed.patch_size)
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
    )


def _patch_embed(model: nn.Module) -> Any:
    if not supports_tokens(model):
        raise UserError(
            f"{type(model).__name__} does not embed each patch by itself, so patches cannot be masked as tokens; "
            "mask the images (lethe_kernels.mask_patches)"
        )
    return model.patch_embed


@contextlib.contextmanager
def capture_patch_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of the patch embedding in each forward pass: [B, P, D], or [B, gh, gw, D]; nothing is copied.

    Raises:
        UserError: `supports_tokens(model)` is false.
    """
    captured: list[Tensor] = []
    handle = _patch_embed(model).register_forward_hook(lambda _module, _inputs, output: captured.append(output))
    try:
        yield captured
    finally:
        handle.remove()


@torch.no_grad()
def masked_patch_token(model: nn.Module, value: Tensor) -> Tensor:
    """Return the token [D] of a patch of constant pixels, in the dtype of the model's tokens.

    Convolution, bias and norm of the patch embedding are the model's own. Call it under the same autocast as the passes
    that use it.

    Args:
        model: The model.
        value: Pixel value [C], in normalised units.

    Raises:
        UserError: `supports_tokens(model)` is false, or the value is not [C].
    """
    embed = _patch_embed(model)
    if value.shape != (embed.proj.in_channels,):
        raise UserError(
            f"masked_patch_token: value has shape {tuple(value.shape)}, expected ({embed.proj.in_channels},), a number "
            "a channel"
        )
    image = value.to(embed.proj.weight).view(1, -1, 1, 1).expand(1, -1, *embed.img_size)
    return embed(image).flatten(0, -2)[0]


def masked_outputs(
    model: nn.Module, tokens: Tensor, mask: Tensor, token: Tensor, *, what: str = "logits", backend: Backend = "auto"
) -> Tensor:
    """Return `vit.outputs` of a model with the tokens of masked patches replaced.

    Neither images nor the patch embedding are needed.

    Args:
        model: The model.
        tokens: Patch tokens as captured, [B, P, D] or [B, gh, gw, D].
        mask: Masked patches [B, P], bool.
        token: Token [D] of a masked patch.
        what: Outputs to return.
        backend: Backend of the kernel.

    Raises:
        UserError: `supports_tokens(model)` is false.
    """
    masked = mask_tokens(tokens.flatten(1, -2), mask, token, backend=backend).view(tokens.shape)
    with forwarding(_patch_embed(model), lambda tokens: tokens):
        return outputs(model, masked, what)
