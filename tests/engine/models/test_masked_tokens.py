"""The token form of masking against masked images, through whole models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.masked_tokens import capture_patch_tokens, masked_outputs, masked_patch_token, supports_tokens
from engine.models.vit import describe, outputs
from lethe_kernels import mask_patches

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
VALUES = {"zero": torch.zeros(3), "black": -MEAN / STD, "mean": torch.tensor([0.11, -0.05, 0.3])}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "patch norm": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}),
    "norm before the blocks": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "oblong patches": ("vit_tiny_patch16_224", {"img_size": (32, 48), "patch_size": (8, 16)}),
}


def build(name: str, **changed: Any) -> nn.Module:
    architecture, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **{**SMALL, **arguments, **changed}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, biases are zero and patches hardly move the logits
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    info = describe(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, info.in_chans, *info.input_size, generator=generator).to(dtype)
    mask = torch.rand(3, info.num_patches, generator=generator) < 0.3
    mask[0], mask[1] = False, True
    return images, mask


def both(model: nn.Module, images: Tensor, mask: Tensor, value: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs on masked tokens, on masked images, and without a mask."""
    with torch.no_grad(), capture_patch_tokens(model) as captured:
        unmasked = outputs(model, images, what)
        tokens = masked_outputs(model, captured[0], mask, masked_patch_token(model, value), what=what)
        masked = mask_patches(images, mask, patch_size=describe(model).patch_size, value=value)
        return tokens, outputs(model, masked, what), unmasked


@pytest.mark.parametrize("what", ["logits", "features"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16 autocast"])
def test_masked_tokens_give_what_masked_images_give(name: str, value: str, what: str, precision: str) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else contextlib.nullcontext()
    model = build(name).to(dtype)
    assert supports_tokens(model)
    images, mask = inputs(model, dtype)
    with autocast:
        tokens, masked, unmasked = both(model, images, mask, VALUES[value].to(dtype), what)
    assert tokens.dtype == masked.dtype
    # Equal to the bit where a convolution sums every patch in the same order; a vectorised one may not at its edges.
    allowed = 8 * torch.finfo(masked.dtype).eps * masked.abs().max().item()
    torch.testing.assert_close(tokens, masked, rtol=0, atol=allowed)
    assert torch.equal(tokens[0], unmasked[0])  # nothing is masked there
    assert (masked - unmasked).abs().max() > 2 * allowed


def test_neither_images_nor_the_convolution_are_needed() -> None:
    model = build("class token")
    images, mask = inputs(model)
    with torch.no_grad(), capture_patch_tokens(model) as captured:
        model(images)
        token = masked_patch_token(model, VALUES["black"])
        captured.clear()
        model(images)
        before = captured[0].clone()
        expected = masked_outputs(model, captured[0], mask, token)
        assert torch.equal(captured[0], before)
        model.patch_embed.proj.weight.fill_(torch.nan)
        assert torch.equal(masked_outputs(model, before, mask, token), expected)


def test_the_model_is_left_as_it_was() -> None:
    model = build("class token")
    images, mask = inputs(model)
    expected = model(images)
    tokens, token = model.patch_embed(images), masked_patch_token(model, VALUES["zero"])
    masked_outputs(model, tokens, mask, token)
    with pytest.raises(ValueError, match=r"^mask_tokens: mask has shape"):
        masked_outputs(model, tokens, mask[:, 1:], token)
    with pytest.raises(RuntimeError):
        masked_outputs(model, tokens[:, 1:], mask[:, 1:], token)  # the position embedding does not fit
    assert "forward" not in vars(model.patch_embed)
    assert torch.equal(model(images), expected)
    with capture_patch_tokens(model) as captured:
        pass
    model(images)
    assert captured == []


def test_a_forward_that_someone_else_has_wrapped_comes_back() -> None:
    model = build("class token")
    images, mask = inputs(model)
    tokens, token = model.patch_embed(images), masked_patch_token(model, VALUES["zero"])
    expected = masked_outputs(model, tokens, mask, token)
    original = model.patch_embed.forward
    wrapper = lambda images: original(images) * 2  # noqa: E731
    model.patch_embed.forward = wrapper
    assert torch.equal(masked_outputs(model, tokens, mask, token), expected)
    assert model.patch_embed.forward is wrapper


def test_gradient_reaches_the_model_and_the_tokens() -> None:
    model = build("class token")
    images, mask = inputs(model)
    tokens = model.patch_embed(images).detach().requires_grad_()
    masked_outputs(model, tokens, mask, masked_patch_token(model, VALUES["zero"])).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad.abs().sum(-1) == 0, mask)
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def refused(kind: str) -> nn.Module:
    if kind == "swin":
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=5
        )
    if kind == "hybrid":
        return timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=24, depth=1, num_classes=5)
    model = build("class token", dynamic_img_pad=kind == "padded")
    embed = model.patch_embed
    if kind == "overlapping":
        embed.proj = nn.Conv2d(3, 32, 16, stride=8, padding=4)
    elif kind == "wider than the stride":
        embed.proj = nn.Conv2d(3, 32, 9, stride=8)
    elif kind == "dilated":
        embed.proj = nn.Conv2d(3, 32, 8, stride=8, dilation=2)
    elif kind == "padded convolution":
        embed.proj = nn.Conv2d(3, 32, 8, stride=8, padding=1)
    elif kind == "stem":
        embed.proj = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.Conv2d(32, 32, 3, padding=1))
    elif kind == "channels first":
        embed.flatten = False
    elif kind == "norm over patches":
        embed.norm = nn.BatchNorm1d(16)
    elif kind == "own patch embedding":
        embed.__class__ = type("Own", (type(embed),), {})
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "swin",
        "hybrid",
        "padded",
        "overlapping",
        "wider than the stride",
        "dilated",
        "padded convolution",
        "stem",
        "channels first",
        "norm over patches",
        "own patch embedding",
    ],
)
def test_models_for_which_it_does_not_hold(kind: str) -> None:
    model = refused(kind)
    assert not supports_tokens(model)
    message = f"^{type(model).__name__} does not embed each patch by itself, so patches cannot be masked as tokens"
    with pytest.raises(UserError, match=message):
        masked_patch_token(model, torch.zeros(3))
    with pytest.raises(UserError, match=message), capture_patch_tokens(model):
        pass
    with pytest.raises(UserError, match=message):
        masked_outputs(model, torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool), torch.zeros(8))


def test_errors() -> None:
    with pytest.raises(UserError, match="not a Vision Transformer"):
        supports_tokens(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^masked_patch_token: value has shape \(1,\), expected \(3,\), a number a"):
        masked_patch_token(build("class token"), torch.zeros(1))
