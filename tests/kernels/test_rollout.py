"""attention_rollout and rollout_topk_mask against float64, timm's own attention, hand-made maps, and each error."""

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layers, cast, make
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_kernels import attention_rollout, rollout_topk_mask
from lethe_kernels.rollout import (
    _rollout_row_eager,
    attention_rollout_reference,
    rollout_row_reference,
    topk_mask,
)

MODES, FUSIONS, POOLS = ["rollout", "last", "mean"], ["mean", "max", "min"], ["token", "avg"]
WAYS = list(itertools.product(MODES, FUSIONS, POOLS))


def from_maps(*maps: list[list[list[float]]]) -> tuple[Layers, Layers]:
    """Queries and keys (scale 1) whose attention is exactly these [H, N, N] maps, one a layer."""
    logits = [torch.tensor(one, dtype=torch.float64).log().unsqueeze(0) for one in maps]
    return [torch.eye(x.shape[-1], dtype=x.dtype).expand_as(x) for x in logits], [x.mT for x in logits]


def check_against_float64(assert_near: Any, queries: Layers, keys: Layers, dtype: torch.dtype, **options: Any) -> None:
    queries, keys = cast(queries, dtype), cast(keys, dtype)
    actual = attention_rollout(queries, keys, **options)
    assert actual.dtype == torch.float32
    truth = attention_rollout_reference(cast(queries, torch.float64), cast(keys, torch.float64), **options)
    # Half inputs are promised float32 arithmetic, so the error that counts is float32's.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    same_dtype = attention_rollout_reference(cast(queries, compute), cast(keys, compute), **options)
    assert_near(actual, [same_dtype], truth)


@pytest.mark.parametrize(("mode", "head_fusion", "pool"), WAYS)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(5, 1, 4), (17, 3, 8), (65, 2, 16), (197, 3, 64)])
def test_matches_float64_reference(
    assert_near: Any, tokens: int, heads: int, width: int, mode: str, head_fusion: str, pool: str
) -> None:
    queries, keys = make(tokens, heads, width)
    assert not any(x.is_contiguous() for x in (*queries, *keys))
    options = {"mode": mode, "head_fusion": head_fusion, "pool": pool}
    check_against_float64(assert_near, queries, keys, torch.float32, **options)


@pytest.mark.parametrize(("mode", "head_fusion", "pool"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(assert_near: Any, dtype: torch.dtype, mode: str, head_fusion: str, pool: str) -> None:
    queries, keys = make(17, 3, 8)
    check_against_float64(assert_near, queries, keys, dtype, mode=mode, head_fusion=head_fusion, pool=pool)


@pytest.mark.parametrize("options", [
    {"scale": 1.0},
    {"scale": 0.05},
    {"residual": 0.0},
    {"residual": 0.9},
    {"residual": 1.0},
    {"num_prefix_tokens": 2},
    {"num_prefix_tokens": 5},
    {"num_prefix_tokens": 16},
    {"num_prefix_tokens": 0, "pool": "avg"},
    {"num_prefix_tokens": 5, "pool": "avg"},
    {"num_prefix_tokens": 5, "pool": "avg", "mode": "mean"},
], ids=str)  # fmt: skip
def test_options_match_float64_reference(assert_near: Any, options: dict[str, Any]) -> None:
    queries, keys = make(17, 2, 8, layers=4)
    check_against_float64(assert_near, queries, keys, torch.float32, **options)


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_depth_and_batch(assert_near: Any, layers: int, batch: int) -> None:
    queries, keys = make(7, 2, 4, layers=layers, batch=batch)
    check_against_float64(assert_near, queries, keys, torch.float32)


A_1 = [[[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 8, 1 / 8, 3 / 4]]]
A_2 = [[[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2]]]


@pytest.mark.parametrize(("options", "expected"), [
    # (5/8, 1/4, 1/8) times the rows (3/4, 1/8, 1/8), (1/8, 3/4, 1/8), (1/16, 1/16, 7/8)
    ({}, [0.2734375, 0.21875]),
    ({"residual": 0.0}, [11 / 32, 3 / 8]),
    ({"mode": "last"}, [1 / 2, 1 / 4]),
    ({"mode": "mean"}, [3 / 8, 1 / 4]),
    ({"mode": "last", "pool": "avg"}, [1 / 4, 3 / 8]),
    ({"mode": "mean", "pool": "avg"}, [9 / 32, 7 / 16]),
    # (3/16, 3/8, 7/16) times the same rows as the first
    ({"pool": "avg"}, [85 / 256, 29 / 64]),
], ids=str)  # fmt: skip
def test_hand_made_maps(options: dict[str, Any], expected: list[float]) -> None:
    scores = attention_rollout(*from_maps(A_1, A_2), scale=1.0, **options)
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("head_fusion", "expected"), [("mean", [1 / 4, 3 / 8]), ("max", [1 / 5, 2 / 5]), ("min", [1 / 3, 1 / 3])]
)
def test_hand_made_heads(head_fusion: str, expected: list[float]) -> None:
    two_heads = [[[1 / 2, 1 / 4, 1 / 4]] * 3, [[1 / 4, 1 / 4, 1 / 2]] * 3]
    scores = attention_rollout(*from_maps(two_heads), scale=1.0, mode="last", head_fusion=head_fusion)
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_default_scale_is_the_root_of_the_width() -> None:
    queries, keys = make(9, 2, 16)
    assert torch.equal(attention_rollout(queries, keys), attention_rollout(queries, keys, scale=0.25))


@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (True, 4), (False, 0)])
def test_agrees_with_the_attention_of_timm(class_token: bool, registers: int) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=0,
        class_token=class_token,
        reg_tokens=registers,
        global_pool="token" if class_token else "avg",
    ).eval()
    queries: Layers = []
    keys: Layers = []
    maps: Layers = []
    for block in model.blocks:
        block.attn.fused_attn = False  # so that the maps exist
        block.attn.qkv.weight.data *= 10  # away from uniform attention
        block.attn.q_norm.register_forward_hook(lambda _m, _i, out: queries.append(out))
        block.attn.k_norm.register_forward_hook(lambda _m, _i, out: keys.append(out))
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    prefix = model.num_prefix_tokens
    assert not queries[0].is_contiguous()
    rollout = torch.eye(16 + prefix)
    for attention in maps:
        rollout = (0.5 * attention.mean(dim=1) + 0.5 * torch.eye(16 + prefix)) @ rollout
    expected = rollout[:, 0, prefix:] if class_token else rollout[:, prefix:, prefix:].mean(dim=1)
    pool = "token" if class_token else "avg"
    scores = attention_rollout(queries, keys, num_prefix_tokens=prefix, pool=pool)
    assert scores.std() > 1e-3  # uniform scores would agree with nearly anything
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_sharp_heads_that_share_no_token_leave_a_row_to_renormalise() -> None:
    logits = torch.zeros(1, 2, 3, 3)
    logits[:, 0, :, 1] = 400.0  # both leasts, e^-400 and smaller, are zero in float32
    logits[:, 1, :, 2] = 400.0
    scores = attention_rollout([torch.eye(3).expand_as(logits)], [logits.mT], scale=1.0, mode="last", head_fusion="min")
    assert scores[0].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_autocast_does_not_round_the_scores() -> None:
    queries, keys = (cast(x, torch.float32) for x in make(17, 2, 8))
    plain = attention_rollout(queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_rollout(queries, keys), plain)


def test_no_gradient_and_inputs_untouched() -> None:
    queries, keys = make(9, 2, 4)
    before = [x.clone() for x in (*queries, *keys)]
    for x in (*queries, *keys):
        x.requires_grad_()
    for mode in MODES:
        assert not attention_rollout(queries, keys, mode=mode).requires_grad
    assert all(torch.equal(x, y) for x, y in zip((*queries, *keys), before, strict=True))


class Products(TorchDispatchMode):
    """Records the shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.shapes.append((args[0].shape[-2], args[0].shape[-1], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "pool", "expected"), [
    ("last", "token", [(1, 4, 11)]),
    ("last", "avg", [(10, 4, 11)]),
    ("mean", "token", [(1, 4, 11)] * 3),
    ("rollout", "token", [(1, 4, 11), (11, 4, 11), (1, 11, 11), (11, 4, 11), (1, 11, 11)]),
])  # fmt: skip
def test_computes_only_the_rows_it_needs(mode: str, pool: str, expected: list[tuple[int, int, int]]) -> None:
    queries, keys = make(11, 2, 4)
    options: dict[str, Any] = {"mode": mode, "pool": pool, "head_fusion": "mean", "residual": 0.5, "scale": 0.5}
    with Products() as products:
        _rollout_row_eager(queries, keys, num_prefix_tokens=1, **options)
    assert products.shapes == expected


FEW = settings(max_examples=30, deadline=None)
WAY = st.sampled_from(WAYS)
SEED = st.integers(0, 2**32)


@FEW
@given(WAY, st.integers(3, 12), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.floats(0, 1), SEED)
def test_whole_row_sums_to_one_and_is_a_share(
    way: tuple[Any, Any, Any], tokens: int, heads: int, layers: int, prefix: int, residual: float, seed: int
) -> None:
    queries, keys = make(tokens, heads, 3, layers=layers, seed=seed)
    mode, head_fusion, pool = way
    options: dict[str, Any] = {
        "num_prefix_tokens": prefix,
        "mode": mode,
        "head_fusion": head_fusion,
        "residual": residual,
        "pool": pool,
        "scale": 0.6,
    }
    for row in (rollout_row_reference, _rollout_row_eager):
        row_BN = row(queries, keys, **options)
        assert (row_BN >= 0).all()
        torch.testing.assert_close(row_BN.sum(dim=1), torch.ones(2, dtype=torch.float64))


@FEW
@given(WAY, st.integers(1, 3), st.randoms(use_true_random=False), SEED)
def test_permuting_patches_permutes_scores(way: tuple[str, str, str], prefix: int, random: Any, seed: int) -> None:
    queries, keys = make(prefix + 6, 2, 3, seed=seed)
    order = random.sample(range(6), 6)
    tokens = [*range(prefix), *(prefix + patch for patch in order)]
    mode, head_fusion, pool = way
    options: dict[str, Any] = {
        "num_prefix_tokens": prefix,
        "mode": mode,
        "head_fusion": head_fusion,
        "pool": pool,
    }
    moved = attention_rollout([x[:, :, tokens] for x in queries], [x[:, :, tokens] for x in keys], **options)
    torch.testing.assert_close(moved, attention_rollout(queries, keys, **options)[:, order])


@FEW
@given(WAY, SEED)
def test_order_of_heads_and_a_common_shift_of_keys_change_nothing(way: tuple[Any, Any, Any], seed: int) -> None:
    queries, keys = make(7, 3, 4, seed=seed)
    mode, head_fusion, pool = way
    scores = attention_rollout(queries, keys, mode=mode, head_fusion=head_fusion, pool=pool)
    flipped = ([x.flip(1) for x in queries], [x.flip(1) for x in keys])
    shifted = (queries, [x + 0.7 for x in keys])  # adds q . 0.7 to every logit of a row
    for other in (flipped, shifted):
        torch.testing.assert_close(attention_rollout(*other, mode=mode, head_fusion=head_fusion, pool=pool), scores)


@FEW
@given(WAY, SEED)
def test_images_do_not_see_each_other(way: tuple[Any, Any, Any], seed: int) -> None:
    queries, keys = make(6, 2, 3, batch=3, seed=seed)
    mode, head_fusion, pool = way
    together = attention_rollout(queries, keys, mode=mode, head_fusion=head_fusion, pool=pool)
    for image in range(3):
        one = slice(image, image + 1)
        alone = attention_rollout(
            [x[one] for x in queries], [x[one] for x in keys], mode=mode, head_fusion=head_fusion, pool=pool
        )
        torch.testing.assert_close(alone, together[one])


@FEW
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_topk_mask_sends_ties_to_the_lowest_index(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k]
    mask = topk_mask(torch.tensor([scores]).float(), k)
    assert mask.dtype == torch.bool
    assert mask[0].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("k", [0, 1, 3, 64, 100])
def test_uniform_attention_masks_the_first_k(k: int) -> None:
    layers = [torch.zeros(2, 1, 101, 4)]
    mask = rollout_topk_mask(layers, layers, k=k)
    assert torch.equal(mask, (torch.arange(100) < k).expand(2, 100))


@pytest.mark.parametrize(("mode", "head_fusion", "pool"), WAYS)
@pytest.mark.parametrize("k", [0, 1, 3, 14])
def test_mask_covers_the_k_highest_scores(k: int, mode: str, head_fusion: str, pool: str) -> None:
    queries, keys = make(17, 2, 4, batch=3)
    options: dict[str, Any] = {"mode": mode, "head_fusion": head_fusion, "pool": pool}
    options.update(num_prefix_tokens=3, residual=0.3, scale=0.8)
    scores = attention_rollout_reference(queries, keys, **options)
    mask = rollout_topk_mask(queries, keys, k=k, **options)
    assert mask.shape == (3, 14)
    assert mask.sum(dim=1).tolist() == [k] * 3
    for image in range(3):
        assert set(mask[image].nonzero().flatten().tolist()) == set(scores[image].topk(k).indices.tolist())


def spoiled(value: float, layer: int, token: int) -> Layers:
    layers = [torch.ones(2, 3, 5, 4) for _ in range(3)]
    layers[layer][1, 2, token, 3] = value
    return layers


L = [torch.ones(2, 3, 5, 4) for _ in range(3)]
NOT_FINITE = "holds NaN or infinity, expected finite values"
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"queries": L[0]}, "queries is a Tensor, expected a list or tuple of tensors (B, H, N, d), one a layer"),
    ({"keys": None}, "keys is a NoneType, expected a list or tuple of tensors (B, H, N, d), one a layer"),
    ({"queries": []}, "queries is empty, expected one tensor a layer, first layer first"),
    ({"keys": L[:2]}, "keys has 2 layers, expected 3 to match queries"),
    ({"queries": [None] * 3}, "queries[0] is a NoneType, expected a tensor of shape (B, H, N, d)"),
    ({"queries": [L[0][0]] * 3}, "queries[0] has shape (3, 5, 4), expected (B, H, N, d)"),
    ({"keys": [L[0], L[0], L[0][0]]}, "keys[2] has shape (3, 5, 4), expected (B, H, N, d)"),
    (
        {"queries": [L[0][:, :, :0]] * 3},
        "queries[0] has shape (2, 3, 0, 4), expected (B, H, N, d) with every size 1 or more",
    ),
    (
        {"queries": [L[0][..., :0]] * 3},
        "queries[0] has shape (2, 3, 5, 0), expected (B, H, N, d) with every size 1 or more",
    ),
    (
        {"queries": [L[0], L[0][:, :2], L[0]]},
        "queries[1] has shape (2, 2, 5, 4), expected (2, 3, 5, 4) to match queries[0]",
    ),
    (
        {"keys": [L[0], L[0], L[0][:, :, :4]]},
        "keys[2] has shape (2, 3, 4, 4), expected (2, 3, 5, 4) to match queries[0]",
    ),
    (
        {"queries": [x.int() for x in L]},
        "queries[0] has dtype int32, expected float16, bfloat16, float32 or float64",
    ),
    ({"queries": [L[0], L[0].half(), L[0]]}, "queries[1] has dtype float16, expected float32 to match queries[0]"),
    ({"keys": [x.double() for x in L]}, "keys[0] has dtype float64, expected float32 to match queries[0]"),
    ({"keys": [L[0], L[0], L[0].to("meta")]}, "keys[2] is on meta, expected cpu to match queries[0]"),
    (
        {"num_prefix_tokens": 5},
        "num_prefix_tokens is 5, expected a whole number from 0 to 4 (at least one of N is a patch)",
    ),
    (
        {"num_prefix_tokens": -1},
        "num_prefix_tokens is -1, expected a whole number from 0 to 4 (at least one of N is a patch)",
    ),
    (
        {"num_prefix_tokens": True},
        "num_prefix_tokens is True, expected a whole number from 0 to 4 (at least one of N is a patch)",
    ),
    ({"num_prefix_tokens": 0}, "num_prefix_tokens is 0, expected 1 or more for pool='token'; use pool='avg'"),
    (
        {"mode": "lst"},
        "mode is 'lst', expected 'rollout', 'last' or 'mean' (did you mean 'last'?)",
    ),
    ({"head_fusion": "sum"}, "head_fusion is 'sum', expected 'mean', 'max' or 'min'"),
    ({"pool": "map"}, "pool is 'map', expected 'token' or 'avg'"),
    ({"residual": -0.1}, "residual is -0.1, expected a number from 0 to 1"),
    ({"residual": 1.5}, "residual is 1.5, expected a number from 0 to 1"),
    ({"residual": "half"}, "residual is 'half', expected a number from 0 to 1"),
    ({"scale": 0.0}, "scale is 0.0, expected a finite number above 0"),
    ({"scale": -1}, "scale is -1, expected a finite number above 0"),
    ({"scale": float("inf")}, "scale is inf, expected a finite number above 0"),
    ({"queries": spoiled(float("nan"), 0, 1)}, f"queries[0] {NOT_FINITE}"),
    ({"queries": spoiled(float("inf"), 2, 0)}, f"queries[2] {NOT_FINITE}"),
    ({"keys": spoiled(float("nan"), 1, 4)}, f"keys[1] {NOT_FINITE}"),
    ({"keys": spoiled(float("inf"), 2, 4)}, f"keys[2] {NOT_FINITE}"),
    (
        {"keys": spoiled(3e38, 2, 4), "queries": [x * 10 for x in L]},
        "queries and keys are finite but too large, their products overflow; expected finite scores",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": L, "keys": L, **changes}
    queries, keys = arguments.pop("queries"), arguments.pop("keys")
    with pytest.raises(ValueError, match=f"^{re.escape(f'attention_rollout: {message}')}$"):
        attention_rollout(queries, keys, **arguments)
    with pytest.raises(ValueError, match=f"^{re.escape(f'rollout_topk_mask: {message}')}$"):
        rollout_topk_mask(queries, keys, k=1, **arguments)


@pytest.mark.parametrize("k", [-1, 5, 1.0, None, True])
def test_k_out_of_range(k: Any) -> None:
    message = f"k is {k!r}, expected a whole number from 0 to 4 (the number of patches)"
    with pytest.raises(ValueError, match=f"^{re.escape(f'rollout_topk_mask: {message}')}$"):
        rollout_topk_mask(L, L, k=k)
    with pytest.raises(ValueError, match=f"^{re.escape(f'topk_mask: {message}')}$"):
        topk_mask(torch.zeros(2, 4), k)


def test_topk_mask_of_one_row_needs_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^topk_mask: scores has shape \(4,\), expected \(B, P\)$"):
        topk_mask(torch.zeros(4), 1)
