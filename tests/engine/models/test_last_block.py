"""What the head does not read is not computed, and nothing that anyone sees changes."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.models.attention import attention_backend, capture_queries_keys
from engine.models.last_block import prefix_tokens_read, truncate_last_block
from engine.models.spec import ModelSpec

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "normalised q and k": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "stochastic depth, dropout off": ("vit_tiny_patch16_224", {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}


def _build(kind: str) -> nn.Module:
    architecture, arguments = KINDS[kind]
    spec = ModelSpec(architecture=architecture, num_classes=5, model_args={**SMALL, **arguments}, pretrained_cfg={})
    return spec.build(seed=0).eval()


def _results(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits, and the gradient of every weight; double precision."""
    logits = model(images)
    logits.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_whole_block(kind: str, attention: str) -> None:
    model = _build(kind).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths: list[int] = []
    hook = model.blocks[-1].mlp.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    with attention_backend(model, attention):
        whole = _results(model, images)
        with truncate_last_block(model):
            short = _results(model, images)
        after = _results(model, images)
    hook.remove()
    tokens = 16 + model.num_prefix_tokens
    assert lengths == [tokens, model.num_prefix_tokens, tokens]
    assert len(whole) == len(short) > 20
    for one, other in zip(whole, short, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(one, other) for one, other in zip(whole, after, strict=True))


def test_attention_of_all_tokens_is_still_captured() -> None:
    model = _build("class token")
    with truncate_last_block(model), capture_queries_keys(model) as (queries, _), torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
    assert [tuple(q.shape) for q in queries] == [(1, 2, 17, 16)] * 2


def test_gradient_checkpointing_goes_through_it() -> None:
    model = _build("class token")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with truncate_last_block(model):
        plain = _results(model.train(), images)
        model.set_grad_checkpointing(True)
        assert all(torch.allclose(a, b) for a, b in zip(plain, _results(model, images), strict=True))


class _Unknown(VisionTransformer):
    """A model of somebody else, that may read any token."""


@pytest.mark.parametrize(
    "model",
    [
        timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL),
        timm.create_model("vit_tiny_patch16_224", global_pool="map", class_token=False, **SMALL),
        timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock, **SMALL),
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=16, depths=(1, 1, 1, 1)
        ),
        _Unknown(**SMALL),
    ],
    ids=["average", "attention pooling", "another block", "swin", "another class"],
)
def test_others_are_left_alone(model: nn.Module) -> None:
    assert prefix_tokens_read(model) == 0
    with truncate_last_block(model):
        assert not any("forward" in vars(module) for module in model.modules())
