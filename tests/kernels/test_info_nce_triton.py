"""The Triton kernels of info_nce, in the interpreter: against float64, with results and scratch that start as NaN."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_info_nce import (
    FORMS,
    SIMILARITIES,
    SLOWEST_APART,
    Inputs,
    check_against_float64,
    check_compiled,
    loss_and_gradients,
    make,
    op_calls,
)
from torch import Tensor

from lethe_kernels import _info_nce_eager, info_nce
from lethe_kernels.info_nce import EPS, info_nce_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("batch", "features"), [(2, 10), (7, 7), (3, 100), (4, 197), (2, 577)])
def test_loss_and_gradients_match_float64_reference(
    assert_near: Any, form: str, similarity: str, batch: int, features: int
) -> None:
    inputs = make(form, batch, features)
    check_against_float64(assert_near, inputs, torch.float32, "triton", similarity=similarity, reduction="none")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(assert_near: Any, form: str, similarity: str, dtype: torch.dtype) -> None:
    check_against_float64(assert_near, make(form, 6, 33), dtype, "triton", similarity=similarity)


def test_one_anchor_one_feature_one_negative(assert_near: Any) -> None:
    check_against_float64(assert_near, make("own", 1, 1, negatives=1), torch.float32, "triton", similarity="dot")
    check_against_float64(assert_near, make("shared", 1, 1, negatives=1), torch.float32, "triton", similarity="dot")


def check_against_eager(assert_near: Any, inputs: Inputs, dtype: torch.dtype, **options: Any) -> None:
    """For sizes at which the reference takes too long; the eager path in float64 is compared with it elsewhere."""
    rounded = tuple(None if x is None else x.to(dtype) for x in inputs)

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        return loss_and_gradients(info_nce, rounded, dtype, 0.25, backend=backend, **options)

    truth, eager = results("eager", torch.float64), results("eager", dtype)
    for got, same_dtype, true in zip(results("triton", dtype), eager, truth, strict=True):
        assert_near(got, [same_dtype], true)


SIZES = [  # form, B, K or M, D
    ("own", 2, 1, 21843),
    ("own", 3, 19, 300),
    ("own", 1, 577, 10),
    pytest.param("shared", 2, 3, 21843, marks=pytest.mark.slow),
    pytest.param("shared", 7, 1000, 100, marks=pytest.mark.slow),
    pytest.param("shared", 40, 577, 16, marks=pytest.mark.slow),
    ("shared", 100, 7, 10),
    ("shared", 3, 40, 256),
    ("shared", 3, 40, 257),
    ("in-batch", 70, 0, 20),
    pytest.param("in-batch", 197, 0, 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("form", "batch", "negatives", "features"), SIZES)
def test_sizes(assert_near: Any, form: str, batch: int, negatives: int, features: int) -> None:
    check_against_eager(assert_near, make(form, batch, features, negatives), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    ("form", "batch", "negatives", "features"),
    [
        ("shared", 33, 40, 40),
        ("in-batch", 33, 0, 130),
        pytest.param("shared", 70, 130, 80, marks=pytest.mark.slow),
        pytest.param("in-batch", 40, 0, 256, marks=pytest.mark.slow),
    ],
)
def test_sizes_in_half_precision(
    assert_near: Any, dtype: torch.dtype, similarity: str, form: str, batch: int, negatives: int, features: int
) -> None:
    inputs = make(form, batch, features, negatives)
    check_against_eager(assert_near, inputs, dtype, similarity=similarity, reduction="none")


def test_float16_gradients_keep_their_digits_however_small_the_shares(assert_near: Any) -> None:
    """Shares of 1 / M, weighted by 1 / B and by a small upstream gradient, are below what float16 holds."""
    # Short vectors, so that the gradients themselves, of 1 / length, do not underflow.
    anchors, positives, negatives = ((x / 512).half() for x in make("shared", 20, 16, negatives=300) if x is not None)
    results = []
    for backend, dtype in [("triton", torch.float16), ("eager", torch.float16), ("eager", torch.float64)]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (anchors, positives, negatives)]
        loss = info_nce(*leaves, temperature=5.0, backend=backend)
        results.append(torch.autograd.grad(loss / 256, leaves))
    for got, same_dtype, true in zip(*results, strict=True):
        assert_near(got, [same_dtype], true)


def test_float16_with_lengths_far_from_one(assert_near: Any) -> None:
    anchors, positives, negatives = make("shared", 5, 16, negatives=40)
    assert negatives is not None
    lengths = torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]
    check_against_eager(assert_near, (anchors * 1e-3, positives * 1e3, negatives * lengths), torch.float16)


@pytest.mark.parametrize("form", ["shared", "in-batch"])
@pytest.mark.parametrize("programs", [1, pytest.param(3, marks=pytest.mark.slow), 512])
def test_any_division_of_the_columns_adds_up(
    assert_near: Any, monkeypatch: pytest.MonkeyPatch, form: str, programs: int
) -> None:
    from lethe_kernels._triton import info_nce_shared

    monkeypatch.setattr(info_nce_shared, "PROGRAMS", programs)
    check_against_eager(assert_near, make(form, 70, 12, negatives=150), torch.float32, reduction="none")


def test_splits_cover_every_tile_once() -> None:
    from lethe_kernels._triton.info_nce_shared import Launch, splits

    launch = Launch(64, 32, 16, warps=4)
    for rows in (1, 64, 65, 5000, 65536):
        for columns in (1, 32, 33, 5000, 65536):
            programs, tiles_each = splits(rows, columns, launch)
            tiles = math.ceil(columns / 32)
            assert (programs - 1) * tiles_each < tiles <= programs * tiles_each
            assert programs == 1 or programs * math.ceil(rows / 64) <= 512


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x[..., :3], math.nan)], dim=-1)[..., :-3]


def backwards_rows(x: Tensor) -> Tensor:
    return torch.cat([x.flip(0), x.flip(0)]).view(2, *x.shape).transpose(0, 1).flip(0)[:, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [misaligned, transposed, padded, backwards_rows])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_layouts_change_nothing(form: str, layout: Any, dtype: torch.dtype) -> None:
    inputs = tuple(None if x is None else x.to(dtype).contiguous() for x in make(form, 5, 20, negatives=3))
    moved = tuple(None if x is None else layout(x) for x in inputs)
    for x, y in zip(inputs, moved, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
    alone = (inputs[0], moved[1], inputs[2])  # strides that differ between the inputs
    plain, *others = (
        loss_and_gradients(info_nce, each, dtype, 0.25, backend="triton") for each in (inputs, moved, alone)
    )
    for other in others:
        for got, expected in zip(other, plain, strict=True):
            assert torch.equal(got, expected)


def test_rows_may_be_one_row_repeated(assert_near: Any) -> None:
    anchors, positives, negatives = make("shared", 4, 10, negatives=6)
    assert negatives is not None
    repeated = (anchors[:1].expand(4, -1), positives[:1].expand(4, -1), negatives.expand(4, -1, -1))
    check_against_eager(assert_near, repeated, torch.float32)
    check_against_eager(assert_near, (*repeated[:2], negatives[:1].expand(40, -1)), torch.float32)


def test_far_apart_rows_are_copied() -> None:
    from lethe_kernels._triton.info_nce_shared import _addressable

    near = torch.empty(2, 3)
    assert _addressable(near) is near
    far = torch.empty(2, 2**23, device="meta")[:, :3]
    assert _addressable(far).is_contiguous()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck(form: str, similarity: str) -> None:
    leaves = [x.detach().requires_grad_() for x in make(form, 2, 2, negatives=2) if x is not None]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(temperature: Tensor, *inputs: Tensor) -> Tensor:
        return info_nce(*inputs, temperature=temperature, similarity=similarity, reduction="none", backend="triton")

    assert torch.autograd.gradcheck(loss, (temperature, *leaves))


@pytest.mark.parametrize("form", FORMS)
def test_zero_upstream_gradient_gives_exactly_zero(form: str) -> None:
    leaves = [x.float().requires_grad_() for x in make(form, 3, 4) if x is not None]
    leaves.append(torch.tensor(0.2, requires_grad=True))
    loss = info_nce(*leaves[:-1], temperature=leaves[-1], reduction="none", backend="triton")
    for gradient in torch.autograd.grad(loss, leaves, torch.zeros_like(loss)):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_asked_for(form: str) -> None:
    inputs = make(form, 3, 4)
    every = loss_and_gradients(info_nce, inputs, torch.float32, 0.25, backend="triton")[1:]
    count = sum(x is not None for x in inputs)
    for wanted in range(count + 1):
        leaves = [None if x is None else x.float().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        temperature = torch.tensor(0.25, requires_grad=wanted == count)
        loss = info_nce(*leaves, temperature=temperature, backend="triton")
        (gradient,) = torch.autograd.grad(loss, [temperature if wanted == count else leaves[wanted]])
        assert torch.equal(gradient, every[wanted])


@pytest.mark.parametrize("form", FORMS)
def test_same_input_same_bits(form: str) -> None:
    inputs = make(form, 5 if form == "own" else 40, 10, negatives=70)
    first, second = (loss_and_gradients(info_nce, inputs, torch.float32, 0.25, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("form", "zeroed"), [(form, i) for form in FORMS for i in range(3) if (form, i) != (FORMS[0], 2)]
)
def test_zero_vectors(assert_near: Any, form: str, zeroed: int) -> None:
    inputs = make(form, 3, 4)
    target = inputs[zeroed]
    assert target is not None
    target[0] = 0
    check_against_float64(assert_near, inputs, torch.float32, "triton", similarity="cosine", reduction="none")


@pytest.mark.parametrize("length", [0.5, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_about_eps(assert_near: Any, form: str, length: float) -> None:
    """Below eps a vector is divided by eps, and the gradient keeps its radial part."""
    inputs = tuple(None if x is None else x / x.norm(dim=-1, keepdim=True) * length * EPS for x in make(form, 3, 4))
    check_against_float64(assert_near, inputs, torch.float32, "triton", reduction="none")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_extreme_similarities_stay_finite(form: str, similarity: str) -> None:
    inputs = tuple(None if x is None else x.float() * 100 for x in make(form, 4, 8))
    for backend in ("triton", "eager"):
        results = loss_and_gradients(info_nce, inputs, torch.float32, 1e-3, similarity=similarity, backend=backend)
        assert all(result.isfinite().all() for result in results)
    truth = loss_and_gradients(info_nce_reference, inputs, torch.float64, 1e-3, similarity=similarity)
    assert results[0].item() == pytest.approx(truth[0].item(), rel=1e-5)


@pytest.mark.parametrize("gap", [-80.0, -30.0, -9.0, -1.0, 0.0, 1.0, 20.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_losses_keep_their_digits(gap: float, dtype: torch.dtype, paired: bool) -> None:
    one = torch.ones(1, 1, dtype=dtype)
    negatives = ((1 + gap) * one)[None] if paired else (1 + gap) * one
    loss = info_nce(one, one, negatives, temperature=1.0, similarity="dot", backend="triton")
    expected = max(gap, 0) + math.log1p(math.exp(-abs(gap)))
    assert loss.item() == pytest.approx(expected, rel=32 * torch.finfo(dtype).eps, abs=0)


def test_a_skipped_negative_may_be_alone_in_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another rank: anchor b leaves out negative skip + b, wherever that falls."""
    monkeypatch.setattr(_info_nce_eager, "CPU_CHUNK", 4)
    leaves = [x.requires_grad_() for x in make("shared", 3, 4, negatives=65) if x is not None]
    anchors, positives, negatives = leaves
    temperature = torch.tensor(0.25, dtype=torch.float64)
    for skip in (0, 5, 64):
        seen = [negatives[torch.arange(65) != skip + row] for row in range(3)]
        expected = torch.stack(
            [info_nce_reference(anchors[[row]], positives[[row]], seen[row], temperature=0.25) for row in range(3)]
        )
        for backend in ("triton", "eager"):
            losses = torch.ops.lethe.info_nce_shared(*leaves, temperature, True, skip, backend)[0]
            torch.testing.assert_close(losses, expected)
            gradients = [torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (losses, expected)]
            torch.testing.assert_close(*gradients)


def test_nan_gives_nan() -> None:
    for form in FORMS:
        anchors, positives, negatives = (None if x is None else x.float() for x in make(form, 3, 4))
        assert anchors is not None
        anchors = anchors.clone()
        anchors[1, 2] = math.nan
        losses = info_nce(anchors, positives, negatives, reduction="none", backend="triton")
        assert losses.isnan().tolist() == [False, True, False]


def test_autocast_does_not_round_the_similarities() -> None:
    inputs = tuple(None if x is None else x.float() for x in make("shared", 5, 64))
    plain = info_nce(*inputs, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(*inputs, backend="triton"), plain)


@pytest.mark.parametrize("form", SLOWEST_APART)
def test_opcheck(form: str) -> None:
    for op, arguments in op_calls(form, "triton"):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("form", SLOWEST_APART)
def test_compiles_into_one_graph(form: str) -> None:
    check_compiled(form, backend="triton")


FEW = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORM, SIMILARITY, SEED = st.sampled_from(FORMS), st.sampled_from(SIMILARITIES), st.integers(0, 2**32)


@FEW
@given(FORM, SIMILARITY, st.integers(2, 6), st.integers(1, 9), st.floats(1e-3, 10), st.floats(1e-3, 1e3), SEED)
def test_loss_is_finite_and_never_negative(
    form: str, similarity: str, batch: int, features: int, temperature: float, size: float, seed: int
) -> None:
    inputs = tuple(None if x is None else x.float() * size for x in make(form, batch, features, seed=seed))
    options: dict[str, Any] = {"similarity": similarity, "reduction": "none", "backend": "triton"}
    losses = info_nce(*inputs, temperature=temperature, **options)
    assert losses.isfinite().all()
    assert (losses >= 0).all()


@FEW
@given(FORM, st.floats(-20, 20), SEED)
def test_dot_ignores_a_constant_added_to_every_similarity(form: str, constant: float, seed: int) -> None:
    anchors, *others = make(form, 3, 4, seed=seed)
    anchors_1 = torch.cat([anchors, torch.ones_like(anchors[:, :1])], dim=-1)
    others_1 = [None if x is None else torch.cat([x, torch.full_like(x[..., :1], constant)], dim=-1) for x in others]
    shifted = info_nce(anchors_1, *others_1, similarity="dot", backend="triton")
    torch.testing.assert_close(shifted, info_nce(anchors, *others, similarity="dot", backend="triton"))


@FEW
@given(FORM, st.floats(1e-3, 1e3), SEED)
def test_gradients_of_cosine_are_tangential(form: str, length: float, seed: int) -> None:
    inputs = tuple(None if x is None else x * length for x in make(form, 3, 4, seed=seed))
    _, *gradients, _ = loss_and_gradients(info_nce, inputs, torch.float64, 0.3, backend="triton")
    for x, gradient in zip([x for x in inputs if x is not None], gradients, strict=True):
        assert (x * gradient).sum(dim=-1).abs().max() < 1e-12
