"""The Triton kernels of the rollout, in the interpreter: against float64, in each layout, and what may not matter."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import Layers, cast, make
from torch import Tensor

from lethe_kernels import attention_rollout, rollout_topk_mask
from lethe_kernels._triton.rollout import Plan, launch, plan
from lethe_kernels.rollout import attention_rollout_reference, topk_mask

pytestmark = pytest.mark.usefixtures("poisoned")

MODES, FUSIONS, POOLS = ["rollout", "last", "mean"], ["mean", "max", "min"], ["token", "avg"]
WAYS = list(itertools.product(MODES, FUSIONS, POOLS))
DEFAULTS: dict[str, Any] = {
    "num_prefix_tokens": 1,
    "mode": "rollout",
    "head_fusion": "mean",
    "residual": 0.5,
    "pool": "token",
    "scale": 0.3,
}


def check(
    assert_near: Any, queries: Layers, keys: Layers, dtype: torch.dtype, plan_as: Plan | None = None, **options: Any
) -> Tensor:
    """Scores of the kernel, no further from float64 than twice what eager is."""
    queries, keys = cast(queries, dtype), cast(keys, dtype)
    options = {**DEFAULTS, "scale": queries[0].shape[-1] ** -0.5, **options}
    scores, finite = launch(queries, keys, k=None, plan_as=plan_as, **options)
    truth = attention_rollout_reference(cast(queries, torch.float64), cast(keys, torch.float64), **options)
    eager = attention_rollout(queries, keys, backend="eager", **options)
    assert_near(scores, [eager], truth)
    assert finite.tolist() == [1] * len(finite)
    return scores


FULL_SIZES = [(577, 2, 64, 1), (577, 3, 64, 40), (1601, 1, 32, 1), (1601, 1, 32, 3)]


def small_tiles(*, parts_h: int = 1, parts_i: int = 1) -> Plan:
    """A plan with more than one tile of keys and of queries from 17 tokens on."""
    return Plan(block_i=16, block_j=16, step_d=16, whole=False, warps=4, stages=2, parts_h=parts_h, parts_i=parts_i)


@pytest.mark.parametrize(("mode", "head_fusion", "pool"), WAYS)
@pytest.mark.parametrize("layout", ["whole", pytest.param("tiles", marks=pytest.mark.slow), "parts"])
def test_ways_match_float64(assert_near: Any, layout: str, mode: str, head_fusion: str, pool: str) -> None:
    queries, keys = make(21, 2, 8, layers=3, batch=1)
    tiles = plan(1, 2, 21, 8, 4, head_fusion, 1)
    assert tiles.whole
    assert tiles.persistent
    if layout == "tiles":
        tiles = small_tiles()
    elif layout == "parts":
        tiles = small_tiles(parts_h=2 if head_fusion == "mean" else 1, parts_i=2)
    options = {"mode": mode, "head_fusion": head_fusion, "pool": pool, "num_prefix_tokens": 2, "residual": 0.3}
    check(assert_near, queries, keys, torch.float32, tiles, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 80, 96, 128])
def test_widths_and_dtypes(assert_near: Any, width: int, dtype: torch.dtype) -> None:
    queries, keys = make(21, 2, width, layers=2, batch=1)
    check(assert_near, queries, keys, dtype)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [(5, 1), (16, 1), (17, 5), (50, 2), (65, 64), (197, 1), pytest.param(257, 4, marks=pytest.mark.slow)],
)
def test_token_counts_and_prefixes(assert_near: Any, tokens: int, prefix: int, fusion: str) -> None:
    queries, keys = make(tokens, 2, 16, layers=2, batch=1)
    check(assert_near, queries, keys, torch.float16, head_fusion=fusion, num_prefix_tokens=prefix)


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "processors"),
    [
        (257, 2, 64, 1),
        (257, 2, 64, 40),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in FULL_SIZES),
    ],
)
def test_full_size(assert_near: Any, tokens: int, heads: int, width: int, processors: int) -> None:
    queries, keys = make(tokens, heads, width, layers=2, batch=1)
    chosen = plan(1, heads, tokens, width, 2, "mean", processors)
    assert chosen.persistent == (processors == 1)
    check(assert_near, queries, keys, torch.bfloat16, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [3, 12])
def test_a_vit_of_patch_16_at_full_depth(assert_near: Any, heads: int) -> None:
    queries, keys = make(197, heads, 64, layers=12, batch=1)
    check(assert_near, queries, keys, torch.bfloat16)


@pytest.mark.parametrize("layout", ["whole", pytest.param("tiles", marks=pytest.mark.slow), "parts"])
def test_mask_is_of_the_highest_scores(layout: str) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(21, 2, 8, layers=2))
    tiles = {"whole": None, "tiles": small_tiles(), "parts": small_tiles(parts_h=2, parts_i=2)}[layout]
    options = {**DEFAULTS, "num_prefix_tokens": 2}
    scores, _ = launch(queries, keys, k=None, plan_as=tiles, **options)
    for k in (0, 1, 7, 18, 19):
        mask, finite = launch(queries, keys, k=k, plan_as=tiles, **options)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, topk_mask(scores, k))
        assert finite.tolist() == [1, 1]


@pytest.mark.parametrize("options", [
    pytest.param({"scale": 1.0}, marks=pytest.mark.slow),
    {"scale": 0.05},
    {"residual": 0.0},
    pytest.param({"residual": 1.0}, marks=pytest.mark.slow),
    pytest.param({"num_prefix_tokens": 0, "pool": "avg"}, marks=pytest.mark.slow),
    {"num_prefix_tokens": 5, "pool": "avg"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["whole", "parts"])
def test_options(assert_near: Any, layout: str, options: dict[str, Any]) -> None:
    queries, keys = make(17, 2, 8, layers=4)
    tiles = small_tiles(parts_h=2, parts_i=2) if layout == "parts" else None
    check(assert_near, queries, keys, torch.float32, tiles, **options)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_depth_and_batch(assert_near: Any, layers: int, batch: int, parts: int) -> None:
    queries, keys = make(7, 2, 4, layers=layers, batch=batch)
    tiles = dataclasses.replace(plan(batch, 2, 7, 4, 4, "mean", 1), parts_h=parts)
    check(assert_near, queries, keys, torch.float32, tiles)


def strided(x: Tensor) -> Tensor:
    """The same numbers with a gap between features, a misaligned start, and NaN in between."""
    batch, heads, tokens, width = x.shape
    room = torch.full((batch, tokens, heads, 2 * width + 3), float("nan"), dtype=x.dtype)
    view = room.as_strided(
        (batch, heads, tokens, width), (room.stride(0), room.stride(2), room.stride(1), 2), storage_offset=1
    )
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", ["whole", "tiles"])
def test_strided_and_misaligned_inputs_are_read_in_place(layout: str) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(19, 2, 8))
    tiles = small_tiles() if layout == "tiles" else None
    plain, _ = launch(
        [x.contiguous() for x in queries], [x.contiguous() for x in keys], k=None, plan_as=tiles, **DEFAULTS
    )
    gaps, _ = launch([strided(x) for x in queries], [strided(x) for x in keys], k=None, plan_as=tiles, **DEFAULTS)
    assert torch.equal(gaps, plain)
    mixed, _ = launch(
        [strided(queries[0]), *queries[1:]], [*keys[:2], keys[2].contiguous()], k=None, plan_as=tiles, **DEFAULTS
    )
    assert torch.equal(mixed, plain)


def test_rows_beside_the_inputs_are_not_read() -> None:
    queries, keys = (cast(x, torch.float32) for x in make(19, 2, 8))
    wide = []
    for x in (*queries, *keys):
        room = torch.full((4, 3, 25, 11), float("nan"))
        room[1:3, :2, 3:22, :8] = x
        wide.append(room[1:3, :2, 3:22, :8])
    expected = attention_rollout(queries, keys, backend="triton")
    assert torch.equal(attention_rollout(wide[:3], wide[3:], backend="triton"), expected)


def test_the_same_input_gives_the_same_bits() -> None:
    queries, keys = (cast(x, torch.bfloat16) for x in make(65, 3, 16))
    first, again = (attention_rollout(queries, keys, backend="triton") for _ in range(2))
    assert torch.equal(first, again)


def test_ties_go_to_the_lowest_index() -> None:
    layers = [torch.zeros(2, 2, 12, 16)]
    mask = rollout_topk_mask(layers, layers, k=4, num_prefix_tokens=2, backend="triton")
    assert mask.tolist() == [[True] * 4 + [False] * 6] * 2
    keys = torch.zeros(1, 1, 12, 16)
    keys[..., [3, 7, 9], 0] = 50.0  # three winners, as equal as the losers are
    queries = torch.ones(1, 1, 12, 16)
    chosen = rollout_topk_mask([queries], [keys], k=5, num_prefix_tokens=2, mode="last", backend="triton")
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 2, 5, 7]


def test_scores_that_underflow_still_order() -> None:
    keys = torch.zeros(1, 1, 9, 16)
    keys[0, 0, :, 0] = torch.tensor([0.0, -30.0, 0.0, -10.0, -80.0, -87.0, -95.0, -100.0, -200.0])
    queries = torch.zeros(1, 1, 9, 16)
    queries[..., 0] = 1.0
    options: dict[str, Any] = {"scale": 1.0, "mode": "last", "backend": "triton"}
    scores = attention_rollout([queries], [keys], **options)
    assert scores[0].argsort(descending=True, stable=True).tolist() == [1, 2, 0, 3, 4, 5, 6, 7]
    for k in range(9):
        assert torch.equal(rollout_topk_mask([queries], [keys], k=k, **options), topk_mask(scores, k))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", ["whole", "tiles"])
def test_large_logits_do_not_overflow(assert_near: Any, layout: str, fusion: str) -> None:
    queries, keys = make(20, 2, 16, layers=2)
    tiles = small_tiles() if layout == "tiles" else None
    scores = check(assert_near, [30 * x for x in queries], keys, torch.float32, tiles, head_fusion=fusion, scale=1.0)
    assert scores.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "layer"), [("queries", 0), ("keys", 1)])
@pytest.mark.parametrize("k", [None, 3])
def test_values_that_are_not_finite_are_named(k: int | None, name: str, layer: int, value: float, fusion: str) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(9, 2, 8))
    {"queries": queries, "keys": keys}[name][layer][1, 1, 0, 0] = value  # token 0: read in every layer
    options: dict[str, Any] = {"head_fusion": fusion, "backend": "triton"}
    op = "attention_rollout" if k is None else "rollout_topk_mask"
    call = attention_rollout if k is None else functools.partial(rollout_topk_mask, k=k)
    with pytest.raises(ValueError, match=rf"^{op}: {name}\[{layer}\] holds NaN or infinity, expected finite values$"):
        call(queries, keys, **options)


def test_public_functions_agree_with_eager_and_auto_is_triton_here(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(33, 2, 16))
    eager = attention_rollout(queries, keys, backend="eager")
    torch.testing.assert_close(attention_rollout(queries, keys, backend="triton"), eager, rtol=1e-5, atol=1e-7)
    assert torch.equal(rollout_topk_mask(queries, keys, k=7), rollout_topk_mask(queries, keys, k=7, backend="eager"))
    monkeypatch.setattr("lethe_kernels._triton.rollout.launch", lambda *args, **options: pytest.fail("auto is triton"))
    with pytest.raises(pytest.fail.Exception, match="auto is triton"):
        attention_rollout(queries, keys)


def test_what_the_kernel_does_not_take_is_named() -> None:
    for tensors, reason in (
        ([torch.zeros(1, 1, 4, 8, dtype=torch.float64)], "float64 is not supported"),
        ([torch.zeros(1, 1, 4, 130)], "heads are 130 wide, 128 at most"),
    ):
        with pytest.raises(RuntimeError, match=rf"^attention_rollout: backend 'triton' cannot run: {reason}\."):
            attention_rollout(tensors, tensors, backend="triton")
        attention_rollout(tensors, tensors)  # auto takes eager


FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEED = st.integers(0, 2**32)


@FEW
@given(st.sampled_from(WAYS), st.integers(3, 12), st.integers(1, 3), st.floats(0, 1), st.integers(1, 3), SEED)
def test_whole_row_sums_to_one(
    way: tuple[str, str, str], tokens: int, heads: int, residual: float, parts: int, seed: int
) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(tokens, heads, 3, layers=2, seed=seed))
    mode, head_fusion, _ = way
    # Without prefix tokens, and from the uniform row, the scores are the whole row.
    tiles = dataclasses.replace(plan(2, heads, tokens, 3, 4, head_fusion, 1), parts_i=parts)
    options: dict[str, Any] = {"mode": mode, "head_fusion": head_fusion, "pool": "avg", "residual": residual}
    scores, _ = launch(queries, keys, num_prefix_tokens=0, scale=0.6, k=None, plan_as=tiles, **options)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))


@FEW
@given(st.sampled_from(WAYS), st.integers(1, 3), st.randoms(use_true_random=False), SEED)
def test_permuting_patches_permutes_scores(way: tuple[str, str, str], prefix: int, random: Any, seed: int) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(prefix + 6, 2, 3, layers=2, seed=seed))
    order = random.sample(range(6), 6)
    tokens = [*range(prefix), *(prefix + patch for patch in order)]
    mode, head_fusion, pool = way
    options: dict[str, Any] = {"num_prefix_tokens": prefix, "mode": mode, "head_fusion": head_fusion, "pool": pool}
    plain = attention_rollout(queries, keys, backend="triton", **options)
    moved = attention_rollout([x[:, :, tokens] for x in queries], [x[:, :, tokens] for x in keys], **options)
    torch.testing.assert_close(moved, plain[:, order], rtol=1e-5, atol=1e-6)


@FEW
@given(st.integers(1, 5), SEED)
def test_adding_a_constant_to_a_row_of_logits_changes_nothing(heads: int, seed: int) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(10, heads, 4, layers=2, seed=seed))
    shifted = [x.clone() for x in keys]
    for x in shifted:
        x += 0.5  # adds 0.5 sum_d q to every logit of a row
    torch.testing.assert_close(
        attention_rollout(queries, shifted, backend="triton"),
        attention_rollout(queries, keys, backend="triton"),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(("batch", "heads", "tokens", "fusion", "processors", "expected"), [
    (256, 12, 197, "mean", 132, (1, 1)),  # the batch fills the card: one launch
    (132, 12, 197, "mean", 132, (1, 1)),
    (131, 12, 197, "mean", 132, (2, 1)),
    (32, 12, 197, "mean", 132, (4, 2)),
    (1, 12, 197, "mean", 132, (12, 7)),
    (1, 12, 197, "max", 132, (1, 7)),  # heads depend on each other: rows alone
    (1, 5, 197, "mean", 4, (3, 2)),  # 5 heads by two: 3 parts, none of them empty
], ids=str)  # fmt: skip
def test_plan_parts(
    batch: int, heads: int, tokens: int, fusion: str, processors: int, expected: tuple[int, int]
) -> None:
    chosen = plan(batch, heads, tokens, 64, 2, fusion, processors)
    assert (chosen.parts_h, chosen.parts_i) == expected
    assert chosen.persistent == (expected == (1, 1))
