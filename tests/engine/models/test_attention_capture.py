"""Attention as the model computes it, of every kind: against explicit softmax in float64, and the masks from it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from toys import tiny_vit

from engine.errors import UserError
from engine.models.attention import attention_backend
from engine.models.attention_masking import mask_and_outputs, scores_and_outputs, top_mask
from engine.models.capture import assemble, attention_calls
from engine.models.vit import ViTInfo, attention_info, describe
from lethe_kernels import StreamedRollout, attention_rollout
from lethe_kernels.rollout import attention_rollout_reference

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
FLEX = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 64}

KINDS = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "eva02": ("eva02_tiny_patch14_224", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "rope": ("vit_small_patch16_rope_224", SMALL),
    "rope_ape": ("vit_base_patch16_rope_ape_224", SMALL),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", SMALL),
    "rope_reg": ("vit_betwixt_patch16_rope_reg4_gap_256", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "beitv2": ("beitv2_base_patch16_224", SMALL),
    "relpos": ("vit_relpos_small_patch16_224", SMALL),
    "relpos_mlp": ("vit_relpos_base_patch32_plus_rpn_256", SMALL),
    "srelpos": ("vit_srelpos_small_patch16_224", SMALL),
    "parallel_attention": ("vit_small_patch16_18x2_224", SMALL),
    "parallel_block": ("vit_tiny_patch16_224", {**SMALL, "block_fn": "parallel"}),
    "naflex": ("naflexvit_base_patch16_gap", FLEX),
    "naflex_parallel": ("naflexvit_base_patch16_par_gap", FLEX),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "pe": ("vit_pe_core_tiny_patch16_384", SMALL),
    "naflex_map": ("naflexvit_base_patch16_map", FLEX),
    "aimv2": ("aimv2_large_patch14_224", SMALL),
}


def build(kind: str) -> nn.Module:
    name, args = KINDS[kind]
    if args.get("block_fn") == "parallel":
        from timm.models.vision_transformer import ParallelScalingBlock

        args = {**args, "block_fn": ParallelScalingBlock}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():  # tables of biases and tokens begin at zero, and would not be seen
        if parameter.dim() and not key.endswith("norm.weight"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (1.0 if "relative_position" in key or "rel_pos" in key else 0.1) * noise
    return model


def images_of(info: ViTInfo) -> Tensor:
    return torch.randn(4, info.in_chans, *info.input_size, generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def explicit_maps(model: nn.Module) -> Any:
    """The maps [B, H, N, N] of every block, those of parallel attentions together, as explicit attention makes them;
    then what goes into attention pooling."""
    maps: list[list[Tensor]] = [[] for _ in model.blocks]
    pooled: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _m, inputs, _o, into=into: into.append(inputs[0]))
        for block, into in zip(model.blocks, maps, strict=True)
        for name, module in block.named_modules()
        if name.endswith("attn_drop")
    ]
    handles += [
        module.register_forward_pre_hook(lambda module, inputs: pooled.append((module, inputs[0])))
        for module in model.modules()
        if isinstance(module, AttentionPoolLatent)
    ]
    with attention_backend(model, "eager"):
        yield maps, pooled
    for handle in handles:
        handle.remove()


def pooling_row(module: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """softmax(q k^T scale) of the latent query [B, N], mean over heads."""
    heads = module.num_heads
    if module.pos_embed is not None:
        tokens = tokens + module.pos_embed.unsqueeze(0)
    q = module.q_norm(module.q(module.latent).unflatten(-1, (heads, -1)).transpose(1, 2))
    k = module.k_norm(module.kv(tokens).chunk(2, -1)[0].unflatten(-1, (heads, -1)).transpose(1, 2))
    return (q @ k.transpose(-2, -1) * module.scale).softmax(-1).mean(1)[:, 0]


def expected_row(model: nn.Module, images: Tensor, info: ViTInfo) -> Tensor:
    """The rollout's scores [B, P] from explicit maps, in the dtype of the model."""
    with torch.no_grad(), explicit_maps(model) as (maps, pooled):
        model(images)
    fused = [torch.cat(block, 1).mean(1) for block in maps]
    eye = torch.eye(fused[0].shape[-1], dtype=fused[0].dtype)
    start = eye[:1].expand(len(images), -1)
    if info.pool == "avg":
        start = torch.zeros_like(start)
        start[:, info.num_prefix_tokens :] = 1 / info.num_patches
    if info.pool == "map":
        with torch.no_grad():
            start = pooling_row(*pooled[0])
        start = nn.functional.pad(start, (eye.shape[0] - start.shape[1], 0))  # without prefix tokens in NaFlexVit
    row = start.unsqueeze(1)
    for each in reversed(fused):
        row = row @ (0.5 * eye + 0.5 * each)
    return row[:, 0, info.num_prefix_tokens :]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_class_row_is_that_of_explicit_softmax_in_float64(kind: str, implementation: str) -> None:
    model = build(kind).double()
    info = attention_info(model)
    images = images_of(info).double()
    expected = expected_row(model, images, info)
    with torch.no_grad(), attention_backend(model, implementation), attention_calls(model) as calls:
        model(images)
    found = assemble(calls, info.num_prefix_tokens + info.num_patches, info.num_prefix_tokens)
    pool = "token" if info.pool == "token" else "avg"
    options: dict[str, Any] = {"pool": pool, "scale": found.scale, "biases": found.biases, "start": found.start}
    row = attention_rollout_reference(found.queries, found.keys, num_prefix_tokens=info.num_prefix_tokens, **options)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-7)
    scores = attention_rollout(found.queries, found.keys, num_prefix_tokens=info.num_prefix_tokens, **options)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_hides_the_patches_that_explicit_attention_names(kind: str, implementation: str) -> None:
    model = build(kind)
    info = describe(model)
    assert isinstance(info, ViTInfo)
    images = images_of(info)
    with attention_backend(model, implementation):
        mask, logits = mask_and_outputs(model, images, info, 3)
        scores, _ = scores_and_outputs(model, images, info)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    expected = expected_row(model.double(), images.double(), info)
    torch.testing.assert_close(scores, expected.float(), rtol=0, atol=1e-5)
    assert torch.equal(mask, top_mask(expected, 3, "rollout"))


@pytest.mark.parametrize("kind", ["relpos", "srelpos", "plain"])
def test_both_paths_of_the_rollout_pick_the_same_patches(kind: str) -> None:
    """Maps as they are made, and q, k and bias: relpos' bias was missing from the second, and 1 image of 8 agreed."""
    model = build(kind)
    info = attention_info(model)
    images = torch.cat([images_of(info), images_of(info).flip(0) + 0.5])
    streamed, _ = mask_and_outputs(model, images, info, 3)
    stream = StreamedRollout(num_prefix_tokens=info.num_prefix_tokens, pool="token" if info.pool == "token" else "avg")
    with torch.no_grad(), attention_calls(model) as calls:
        model(images)
    found = assemble(calls, info.num_prefix_tokens + info.num_patches, info.num_prefix_tokens)
    assert (found.biases is None) == (kind == "plain")
    scores = attention_rollout(
        found.queries, found.keys, num_prefix_tokens=stream.prefix, pool=stream.pool, scale=found.scale,
        biases=found.biases,
    )  # fmt: skip
    assert torch.equal(top_mask(scores, 3, "rollout"), streamed)


def test_masks_in_half_precision_have_the_bias_too() -> None:
    model = build("relpos")
    info, images = attention_info(model), images_of(attention_info(model))
    expected = expected_row(build("relpos").double(), images.double(), info)
    scores, _ = scores_and_outputs(model.bfloat16(), images.bfloat16(), info)
    assert (scores - expected.float()).abs().max() < 0.1 * expected.max()


def test_a_plain_model_keeps_its_masks_bit_for_bit() -> None:
    """The scores of `capture_queries_keys` and of the streamed maps, not those of the calls."""
    from engine.models.attention import capture_queries_keys, stream_attention

    model, images = tiny_vit(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    info = attention_info(model)
    stream = StreamedRollout()
    with torch.no_grad(), stream_attention(model, stream.add):
        model(images)
    assert torch.equal(scores_and_outputs(model, images, info)[0], stream.scores())
    half = model.bfloat16()
    with torch.no_grad(), capture_queries_keys(half) as (queries, keys):
        half(images.bfloat16())
    expected = attention_rollout(queries, keys, scale=half.blocks[0].attn.scale)
    assert torch.equal(scores_and_outputs(half, images.bfloat16(), info)[0], expected)


# --- calls ------------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """One attention call with the given options a block."""

    class Block(nn.Module):
        def __init__(self, options: dict[str, Any]) -> None:
            super().__init__()
            self.options = options

        def forward(self, x: Tensor) -> Tensor:
            q = x[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q, **self.options)[:, 0]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(options)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.randn(2, 1, 5, 5)},
        {"attn_mask": torch.tensor([True, True, False, True, True]).expand(5, 5)},
        {"attn_mask": torch.tensor([True, True, False, True, True]).view(1, 1, 1, 5)},
    ],
    ids=["plain", "scale", "float mask", "mask of each image", "hidden token", "hidden token in a row"],
)
def test_scale_and_masks_of_a_call_are_in_its_map(options: dict[str, Any]) -> None:
    model, x = Calls(**options), torch.randn(2, 5, 4)
    with attention_calls(model) as calls:
        model(x)
    found = assemble(calls, 5, 1)
    bias = 0 if found.biases is None else found.biases[0]
    probabilities = (found.queries[0] @ found.keys[0].mT * found.scale + bias).softmax(-1)
    torch.testing.assert_close((probabilities @ x[:, None])[:, 0], model(x))


def test_grouped_queries_are_read_with_their_keys() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)

    class Grouped(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    model = Grouped()
    with attention_calls(model) as calls:
        out = model(q)
    found = assemble(calls, 5, 1)
    value = k.repeat_interleave(2, 1)
    torch.testing.assert_close((found.queries[0] @ found.keys[0].mT * found.scale).softmax(-1) @ value, out)


def test_the_capture_leaves_the_model_as_it_was() -> None:
    model = build("eva02")
    images = images_of(attention_info(model))
    with torch.no_grad():
        before = model(images)
        with attention_backend(model, "eager"), attention_calls(model):
            model(images)
            assert all(block.attn.fused_attn for block in model.blocks)
        assert torch.equal(model(images), before)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_a_compiled_model_is_captured() -> None:
    model = build("rope")
    info, images = attention_info(model), images_of(attention_info(model))
    expected, _ = scores_and_outputs(model, images, info)
    model.compile(backend="eager")
    with torch.no_grad():
        model(images)
    compiled = model._compiled_call_impl
    scores, _ = scores_and_outputs(model, images, info)
    assert torch.equal(scores, expected)
    assert model._compiled_call_impl is compiled


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = build("beit"), itertools.count()
    model.register_forward_pre_hook(lambda _m, _i: (next(passes), None)[1])
    attention_info(model)
    attention_info(model)
    assert next(passes) == 1


def test_a_wrapped_model_is_captured() -> None:
    class Holder(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

    model = build("eva02")
    info, images = attention_info(model), images_of(attention_info(model))
    expected, _ = scores_and_outputs(model, images, info)
    assert attention_info(Holder(model)).grid == info.grid
    assert torch.equal(scores_and_outputs(Holder(model), images, info)[0], expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("samvit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, "attends within windows"),
        ("xcit_nano_12_p16_224", {"depth": 2}, "attends over channels"),
        ("convit_tiny", {"depth": 2}, "does not compute attention by scaled_dot_product_attention"),
        ("cait_xxs24_224", {"depth": 2}, "block 1 of 2 makes no attention call"),
        ("pvt_v2_b0", {}, "is no column of blocks"),
        ("levit_128s", {}, "is not a Vision Transformer of timm"),
        ("crossvit_tiny_240", {}, "is not a Vision Transformer of timm"),
        ("pit_ti_224", {}, "is no column of blocks"),
        ("mixer_s32_224", {}, "is not a Vision Transformer of timm"),
        ("swinv2_cr_tiny_224", {}, "SwinTransformerV2Cr"),
        ("resnet18", {}, "is not a Vision Transformer of timm"),
    ],
)
def test_other_attention_is_refused_in_words(name: str, args: dict[str, Any], words: str) -> None:
    model = timm.create_model(name, num_classes=5, **args).eval()
    with pytest.raises(UserError, match=words) as error:
        attention_info(model)
    assert "\n" not in str(error.value)
    assert not isinstance(describe(model), ViTInfo)


def test_differential_attention_is_refused() -> None:
    layers = pytest.importorskip("timm.layers.diff_attention")
    model = tiny_vit(attn_layer=layers.DiffAttention, num_heads=2)
    with pytest.raises(UserError, match="block 1 combines 2 attention maps"):
        attention_info(model)


def test_causal_attention_is_refused() -> None:
    model = build("eva02")
    forward = model.blocks[0].attn.forward
    sdpa = nn.functional.scaled_dot_product_attention

    def causal(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sdpa(torch.zeros(1, 3, 17, 16), torch.zeros(1, 3, 17, 16), torch.zeros(1, 3, 17, 16), is_causal=True)
        return forward(x, *args, **kwargs)

    model.blocks[0].attn.forward = causal
    with pytest.raises(UserError, match="is causal"):
        attention_info(model)


# --- Swin -------------------------------------------------------------------------------------------------------------


def test_the_rule_of_swin_reads_cosine_attention() -> None:
    args: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=5, img_size=64, **args)
    model.eval().double()
    info = attention_info(model)
    assert (info.windowed, info.grid, info.patch_size) == (True, (8, 8), (8, 8))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    attention = model.layers[-1].blocks[-1].attn
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    scores, _ = scores_and_outputs(model, images, info)
    handle.remove()
    x = seen[0]
    with torch.no_grad():
        qkv = nn.functional.linear(
            x, attention.qkv.weight, torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        )
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
        logits = logits * attention.logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp()
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
        bias = 16 * table[attention.relative_position_index.view(-1)].view(16, 16, -1).permute(2, 0, 1).sigmoid()
        received = (logits + bias).softmax(-1).mean(1).mean(1)
    grid = received.view(2, 2, 2, 4, 4).transpose(2, 3).reshape(2, 64) / 4
    torch.testing.assert_close(scores.double(), grid, rtol=0, atol=1e-6)
