from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from toys import tiny_vit

from engine.errors import UserError
from engine.models.attention import attention_backend
from engine.models.attention_masking import (
    MaskSource,
    count_masked,
    mask_and_outputs,
    random_masks,
    scores_and_outputs,
    top_mask,
)
from engine.models.vit import ViTInfo, describe, outputs
from lethe_kernels.rollout import attention_rollout_reference


def explicit_attention(vit: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Attention maps [B, H, N, N] of each block, from timm's explicit path."""
    maps: list[torch.Tensor] = []
    hooks = [b.attn.attn_drop.register_forward_hook(lambda m, i, out: maps.append(out)) for b in vit.blocks]
    with torch.no_grad(), attention_backend(vit, "eager"):
        vit(images)
    for hook in hooks:
        hook.remove()
    return maps


def test_scores_are_the_class_row_of_the_rolled_out_maps() -> None:
    vit, images = tiny_vit(), torch.randn(3, 1, 8, 8)
    joint = torch.eye(17).expand(3, 17, 17)
    for attention in explicit_attention(vit, images):
        joint = (0.5 * torch.eye(17) + 0.5 * attention.mean(1)) @ joint
    scores, logits = scores_and_outputs(vit, images, describe(vit))
    torch.testing.assert_close(scores, joint[:, 0, 1:])
    with torch.no_grad():
        torch.testing.assert_close(logits, vit(images))


def test_last_and_mean_sources_and_max_fusion() -> None:
    vit, images = tiny_vit(), torch.randn(3, 1, 8, 8)
    maps = explicit_attention(vit, images)
    info = describe(vit)
    last, _ = scores_and_outputs(vit, images, info, source="last")
    torch.testing.assert_close(last, maps[-1].mean(1)[:, 0, 1:])
    mean, _ = scores_and_outputs(vit, images, info, source="mean")
    torch.testing.assert_close(mean, torch.stack([m.mean(1) for m in maps]).mean(0)[:, 0, 1:])
    fused, _ = scores_and_outputs(vit, images, info, source="last", head_fusion="max")
    row = maps[-1].amax(1)
    torch.testing.assert_close(fused, (row / row.sum(-1, keepdim=True))[:, 0, 1:])


@pytest.mark.parametrize("source", ["rollout", "last", "mean", "lowest"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_maps_and_queries_and_keys_give_the_same_masks(
    source: MaskSource, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = tiny_vit(global_pool=pool, class_token=pool == "token")
    images, info = torch.randn(3, 1, 8, 8), describe(vit)
    for block in vit.blocks:
        block.attn.qkv.weight.data *= 10  # away from uniform attention, where rounding would decide
    streamed, logits = scores_and_outputs(vit, images, info, source=source)
    mask, _ = mask_and_outputs(vit, images, info, 5, source=source)
    assert torch.equal(mask, top_mask(streamed, 5, source))
    assert mask.sum(1).tolist() == [5, 5, 5]
    monkeypatch.setattr("engine.models.attention_masking._streams", lambda *_: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend in ("eager", "triton"):
        captured, same_logits = scores_and_outputs(vit, images, info, source=source, backend=backend)
        torch.testing.assert_close(captured, streamed)
        torch.testing.assert_close(same_logits, logits)
        assert torch.equal(mask_and_outputs(vit, images, info, 5, source=source, backend=backend)[0], mask)


def test_on_the_cpu_maps_are_streamed_and_fused_attention_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    fused = [block.attn.fused_attn for block in vit.blocks]
    monkeypatch.setattr(
        "engine.models.attention_masking.attention_rollout", lambda *args, **options: pytest.fail("q and k were kept")
    )
    scores_and_outputs(vit, images, describe(vit))
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert not any(block.attn.attn_drop._forward_hooks for block in vit.blocks)
    for half in (torch.autocast("cpu", dtype=torch.bfloat16), None):
        with half or contextlib.nullcontext(), pytest.raises(pytest.fail.Exception, match="q and k were kept"):
            scores_and_outputs(vit if half else vit.bfloat16(), images if half else images.bfloat16(), describe(vit))
    vit.float()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(pytest.fail.Exception, match="q and k were kept"):
        scores_and_outputs(vit, images, describe(vit))  # auto is Triton here, which reads q and k


def test_many_patches_for_the_width_are_read_from_q_and_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "engine.models.attention_masking.attention_rollout", lambda *args, **options: pytest.fail("q and k were kept")
    )
    few, many = tiny_vit(img_size=16), tiny_vit(img_size=18)  # 64 and 81 patches of width 32
    scores_and_outputs(few, torch.randn(1, 1, 16, 16), describe(few))
    with pytest.raises(pytest.fail.Exception, match="q and k were kept"):
        scores_and_outputs(many, torch.randn(1, 1, 18, 18), describe(many))


def test_masks_in_half_precision_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = tiny_vit(), torch.randn(16, 1, 8, 8)
    info = describe(vit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, _ = mask_and_outputs(vit, images, info, 5)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        triton, _ = mask_and_outputs(vit, images, info, 5, backend="triton")
    assert torch.equal(eager, triton)


def test_average_pooled_models_start_from_the_uniform_row() -> None:
    vit = tiny_vit(global_pool="avg", class_token=False)
    images = torch.randn(2, 1, 8, 8)
    scores, _ = scores_and_outputs(vit, images, describe(vit), source="last")
    torch.testing.assert_close(scores, explicit_attention(vit, images)[-1].mean(1).mean(1))


def test_a_scale_of_the_models_own_is_used() -> None:
    vit, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    default, _ = scores_and_outputs(vit, images, describe(vit))
    for block in vit.blocks:
        block.attn.scale = 3.0
    sharp, _ = scores_and_outputs(vit, images, describe(vit))
    assert not torch.allclose(default, sharp)


def test_features_are_what_the_head_reads() -> None:
    vit, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(vit.head(outputs(vit, images, "features")), vit(images))


@pytest.mark.parametrize(("share", "expected"), [(0.05, 1), (0.001, 1), (0.25, 4), (0.999, 15)])
def test_count_masked_is_at_least_one_and_never_all(share: float, expected: int) -> None:
    assert count_masked(describe(tiny_vit()), share) == expected


def test_masks_take_the_highest_or_lowest_and_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.1, 0.0]])
    assert top_mask(scores, 1, "rollout").tolist() == [[False, True, False, False, False]]
    assert top_mask(scores, 3, "rollout").tolist() == [[True, True, True, False, False]]
    assert top_mask(scores, 2, "lowest").tolist() == [[True, False, False, False, True]]


def test_random_masks_have_k_patches_and_follow_seed_and_position() -> None:
    info = describe(tiny_vit())
    first = random_masks(range(50), info, 3, seed=1)
    assert first.sum(1).tolist() == [3] * 50
    assert torch.equal(first[20:30], random_masks(range(20, 30), info, 3, seed=1))
    assert not torch.equal(first, random_masks(range(50), info, 3, seed=2))
    assert first.float().mean(0).min() > 0  # every patch comes up


def swin(img_size: int, window: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=img_size,
        window_size=window,
        embed_dim=24,
        depths=(1, 2),
        num_heads=(2, 3),
        num_classes=5,
    ).eval()


@pytest.mark.parametrize(("img_size", "window"), [(56, 7), (64, 4)])  # one window in the last stage; shifted ones
def test_swin_scores_are_attention_received_in_the_last_block(img_size: int, window: int) -> None:
    vit = swin(img_size, window)
    info: ViTInfo = describe(vit)
    tokens = img_size // 8
    assert (info.patch_size, info.grid, info.windowed) == ((8, 8), (tokens, tokens), True)
    block = vit.layers[-1].blocks[-1]
    assert any(block.shift_size) == (tokens > window)
    images = torch.randn(2, 3, img_size, img_size)
    scores, logits = scores_and_outputs(vit, images, info)
    assert scores.shape == (2, tokens * tokens)
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
    with torch.no_grad():
        torch.testing.assert_close(logits, vit(images))
    # The same from timm's explicit attention: where tokens stand is found by sending each token's number along.
    maps: list[torch.Tensor] = []
    hook = block.attn.attn_drop.register_forward_hook(lambda m, i, out: maps.append(out))
    with torch.no_grad(), attention_backend(vit, "eager"):
        vit(images)
    hook.remove()
    place = torch.arange(tokens * tokens).view(tokens, tokens)
    place = torch.roll(place, shifts=(-block.shift_size[0], -block.shift_size[1]), dims=(0, 1))
    windows = place.unfold(0, window, window).unfold(1, window, window).reshape(-1, window * window)
    expected = torch.zeros(2, tokens * tokens)
    received = maps[0].mean(1).mean(1).view(2, len(windows), -1) / len(windows)
    for image in range(2):
        for w, numbers in enumerate(windows):
            expected[image, numbers] = received[image, w]
    torch.testing.assert_close(scores, expected)


def test_swin_refuses_sources_that_it_has_not() -> None:
    vit = swin(56, 7)
    with pytest.raises(UserError, match="mask_source='mean': a windowed model"):
        scores_and_outputs(vit, torch.randn(1, 3, 56, 56), describe(vit), source="mean")


def test_the_reference_of_kernels_agrees_with_what_the_engine_uses() -> None:
    vit, images = tiny_vit(reg_tokens=2), torch.randn(2, 1, 8, 8)
    from engine.models.attention import capture_queries_keys

    with torch.no_grad(), capture_queries_keys(vit) as (queries, keys):
        vit(images)
    scores, _ = scores_and_outputs(vit, images, describe(vit))
    torch.testing.assert_close(scores, attention_rollout_reference(queries, keys, num_prefix_tokens=3))
