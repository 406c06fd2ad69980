"""The Triton kernel of mask_patches and mask_tokens, interpreted: bit-equal to eager, whatever the strides."""

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_kernels import mask_patches
from lethe_kernels.mask import _mask_patches_op, mask_patches_reference, mask_tokens

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
LAYOUTS = [
    "contiguous",
    "channels_last",
    "transposed",
    "batch_inside",
    "row_gaps",
    "column_gaps",
    "misaligned",
    "expanded",
]


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same images, another way in memory."""
    batch, channels, height, width = images.shape
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return images.mT.contiguous().mT
    if layout == "batch_inside":
        return images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "row_gaps":
        return images.new_full((batch, channels, height, width + 3), 99)[..., 1:-2].copy_(images)
    if layout == "column_gaps":
        return images.new_full((batch, channels + 1, height, 2 * width), 99)[:, 1:, :, ::2].copy_(images)
    if layout == "misaligned":
        return images.new_full((images.numel() + 1,), 99)[1:].view(images.shape).copy_(images)
    return images.contiguous()


def make(
    batch: int, channels: int, grid: tuple[int, int], patch: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    images = torch.randint(1, 100, shape, generator=generator).to(dtype)
    return images, torch.rand(batch, grid[0] * grid[1], generator=generator) < 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_equal_to_eager_and_laid_out_alike(dtype: torch.dtype, layout: str) -> None:
    images, mask = make(3, 3, (2, 5), (3, 2), dtype)
    images = images[:, :, :, :1].expand(images.shape) if layout == "expanded" else laid_out(images, layout)
    before = images.clone()
    out, eager = (
        mask_patches(images, mask, patch_size=(3, 2), value=[1, 2, 3], backend=backend)
        for backend in ("triton", "eager")
    )
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=(3, 2), value=[1, 2, 3]))
    assert torch.equal(out, eager)
    assert out.dtype == dtype
    assert out.stride() == eager.stride() == torch.empty_like(images).stride()
    assert torch.equal(images, before)


def test_the_backend_that_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lethe_kernels import _triton

    allocated: list[Tensor] = []
    empty = _triton.empty
    monkeypatch.setattr(_triton, "empty", lambda *args: allocated.append(empty(*args)) or allocated[-1])
    images, mask = make(1, 1, (2, 2), (2, 2), torch.float32)
    for backend, launches in (("eager", 0), ("triton", 1), ("auto", 2)):
        mask_patches(images, mask, patch_size=2, backend=backend)
        assert len(allocated) == launches


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_grid_and_layout(
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    layout: str,
    mask_strided: bool,
    seed: int,
) -> None:
    images, mask = make(batch, channels, grid, patch, torch.float32, seed)
    images, mask = laid_out(images, layout), mask.T.contiguous().T if mask_strided else mask
    value = torch.arange(-1.0, -1 - channels, -1).repeat_interleave(2)[::2]
    out = mask_patches(images, mask, patch_size=patch, value=value, backend="triton")
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=patch, value=value.tolist()))
    assert out.stride() == torch.empty_like(images).stride()
    assert (out < 0).sum() == mask.sum() * channels * patch[0] * patch[1]  # make() draws none below 1
    again = mask_patches(out, mask, patch_size=patch, value=value, backend="triton")
    assert torch.equal(again, out)
    kept = mask_patches(images, torch.zeros_like(mask), patch_size=patch, backend="triton")
    assert torch.equal(kept, images)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "row_gaps"])
@pytest.mark.parametrize("size", [(48, 288, 16), (70, 308, 14)], ids=str)
def test_sizes_past_one_tile(layout: str, size: tuple[int, int, int]) -> None:
    height, width, patch = size
    images, mask = make(2, 3, (height // patch, width // patch), (patch, patch), torch.bfloat16)
    images = laid_out(images, layout)
    out = mask_patches(images, mask, patch_size=patch, value=-1.0, backend="triton")
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=(patch, patch), value=-1.0))


def test_nan_and_infinity_pass_or_are_overwritten() -> None:
    images = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).view(1, 1, 2, 2)
    mask = torch.tensor([[True, False, False, False]])
    for backend in ("triton", "eager"):
        out = mask_patches(images, mask, patch_size=1, backend=backend).flatten()
        assert out.tolist() == [0, torch.inf, -torch.inf, 0]
        assert out.signbit().tolist() == [False, False, True, True]


def test_nothing_outside_the_images_is_read_or_written() -> None:
    # Inside a larger buffer of NaN: a neighbour that leaked in would show.
    images, mask = make(2, 3, (2, 2), (5, 7), torch.float32)
    view = torch.full((4, 5, 14, 18), torch.nan)[1:3, 1:4, 2:12, 2:16].copy_(images)
    masks = torch.ones(4, 6, dtype=torch.bool)
    masks[1:3, 1:5] = mask
    out = mask_patches(view, masks[1:3, 1:5], patch_size=(5, 7), value=3.0, backend="triton")
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=(5, 7), value=3.0))


@pytest.mark.parametrize("dim", range(4))
def test_offsets_past_31_bits(dim: int) -> None:
    # Index 2 x stride 2^30 does not fit 32 bits. Of these 2 GiB only the pages that are written come to exist.
    shape, strides = [1, 1, 1, 1], [1, 1, 1, 1]
    shape[dim], strides[dim] = 3, 2**30
    images = torch.empty(2**31 + 1, dtype=torch.uint8).as_strided(shape, strides)
    images.copy_(torch.arange(1, 4).view(shape))
    patches = [3, 1] if dim == 0 else [1, images[0, 0].numel()]
    masks = torch.empty(2**31 + 1, dtype=torch.bool).as_strided(patches, [2**30, 2**30])
    for masked in (0, 2):  # so that either the mask or the pixel at index 2 decides
        masks.copy_(torch.arange(masks.numel()).view(patches) == masked)
        out = mask_patches(images, masks, patch_size=1, backend="triton")
        assert torch.equal(out, mask_patches_reference(images, masks, patch_size=(1, 1)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "row_gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_reference(layout: str, dtype: torch.dtype) -> None:
    images, mask = make(2, 3, (2, 3), (2, 4), dtype)
    upstream = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    upstream = laid_out(upstream, layout)
    kept = mask_patches_reference(torch.ones_like(images), mask, patch_size=(2, 4))
    for backend in ("triton", "eager"):
        leaf, value = images.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
        mask_patches(leaf, mask, patch_size=(2, 4), value=value, backend=backend).backward(upstream)
        assert leaf.grad is not None
        assert value.grad is not None
        assert torch.equal(leaf.grad, upstream * kept)
        truth = (upstream.double() * (1 - kept.double())).sum((0, 2, 3))
        torch.testing.assert_close(value.grad.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_an_infinite_gradient_of_a_kept_patch_does_not_reach_the_value() -> None:
    images = torch.ones(1, 1, 2, 4)
    value = torch.zeros(1, requires_grad=True)
    out = mask_patches(images, torch.tensor([[True, False]]), patch_size=2, value=value, backend="triton")
    out.backward(torch.tensor([1.0, 1.0, torch.inf, torch.nan]).expand(1, 1, 2, 4))
    assert value.grad is not None
    assert value.grad.tolist() == [4.0]


def test_gradcheck() -> None:
    images, mask = make(1, 2, (2, 1), (1, 2), torch.float64)
    value = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def call(images: Tensor, value: Tensor) -> Tensor:
        return mask_patches(images, mask, patch_size=(1, 2), value=value, backend="triton")

    assert torch.autograd.gradcheck(call, (images.requires_grad_(), value))
    assert torch.autograd.gradgradcheck(call, (images, value))


@pytest.mark.parametrize("backend", ["triton", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", [
    pytest.param(layout, marks=pytest.mark.slow if layout in ("transposed", "batch_inside", "row_gaps") else ())
    for layout in LAYOUTS[:-1]
])  # fmt: skip
def test_opcheck(backend: str, layout: str) -> None:
    images, mask = make(2, 3, (2, 3), (2, 2), torch.float32)
    fill = torch.zeros(3, requires_grad=True)
    images = laid_out(images, layout).requires_grad_()
    torch.library.opcheck(_mask_patches_op, (images, mask, fill, 2, 2, backend))


@pytest.mark.parametrize("backend", ["auto", "triton", "eager"])
@pytest.mark.parametrize("value", [-1.0, (1.0, 2.0, 3.0), torch.tensor([1.0, 2.0, 3.0])], ids=repr)
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: Any, value: Any, channels_last: bool) -> None:
    images, mask = make(2, 3, (2, 3), (2, 2), torch.float32)
    images = laid_out(images, "channels_last" if channels_last else "contiguous").requires_grad_()

    def call(images: Tensor) -> Tensor:
        return mask_patches(images, mask, patch_size=2, value=value, backend=backend) * 2

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(images)
    assert torch.equal(out, call(images))
    assert out.stride() == images.stride()
    (grad,) = torch.autograd.grad(out.sum(), images)
    (expected,) = torch.autograd.grad(call(images).sum(), images)
    assert torch.equal(grad, expected)


def make_tokens(dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (3, 7, 5)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape[:2], generator=generator) < 0.4
    return tokens, mask, torch.randn(shape[2], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "prefix", "transposed", "misaligned", "wide"])
def test_tokens(dtype: torch.dtype, layout: str) -> None:
    tokens, mask, token = make_tokens(dtype, (2, 3, 300) if layout == "wide" else (3, 7, 5))
    if layout == "prefix":  # patch tokens behind a class token
        tokens = torch.cat([torch.full_like(tokens[:, :1], torch.nan), tokens], 1)[:, 1:]
    if layout == "transposed":  # a convolution's output, flattened
        tokens, mask, token = tokens.mT.contiguous().mT, mask.T.contiguous().T, token.repeat_interleave(2)[::2]
    if layout == "misaligned":
        tokens = torch.cat([tokens.new_zeros(1), tokens.flatten()])[1:].view(tokens.shape)
    out, eager = (mask_tokens(tokens, mask, token, backend=backend) for backend in ("triton", "eager"))
    assert torch.equal(out, torch.stack([torch.where(m[:, None], token, t) for t, m in zip(tokens, mask, strict=True)]))
    assert torch.equal(out, eager)
    assert out.stride() == eager.stride() == torch.empty_like(tokens).stride()
    assert out.dtype == dtype


def test_tokens_gradcheck_opcheck_and_compile() -> None:
    tokens, mask, token = make_tokens(torch.float64, (1, 4, 2))
    tokens.requires_grad_()
    token.requires_grad_()
    for backend in ("triton", "eager"):

        def call(tokens: Tensor, token: Tensor, backend: Any = backend) -> Tensor:
            return mask_tokens(tokens, mask, token, backend=backend)

        assert torch.autograd.gradcheck(call, (tokens, token))
        torch.library.opcheck(_mask_patches_op, (tokens.mT.unsqueeze(3), mask, token, 1, 1, backend))
        torch._dynamo.reset()
        out = torch.compile(call, fullgraph=True, backend="aot_eager")(tokens, token)
        assert torch.equal(out, call(tokens, token))
        assert out.stride() == tokens.stride()


TOKENS, TOKEN_MASK, TOKEN = torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool), torch.zeros(4)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"tokens": [[0.0]]}, "tokens is a list, expected a tensor of shape (B, P, D)"),
    ({"tokens": TOKENS[0]}, "tokens has shape (6, 4), expected (B, P, D)"),
    ({"tokens": TOKENS[:, :, :0]}, "tokens has shape (2, 6, 0), expected (B, P, D) with every size 1 or more"),
    ({"tokens": TOKENS.int()}, "tokens has dtype int32, expected float16, bfloat16, float32 or float64"),
    ({"mask": TOKEN_MASK[0]}, "mask has shape (6,), expected (B, P)"),
    ({"mask": TOKEN_MASK.int()}, "mask has dtype int32, expected bool"),
    ({"mask": TOKEN_MASK[:, :5]}, "mask has shape (2, 5), expected (2, 6) to match tokens"),
    ({"mask": TOKEN_MASK[:1]}, "mask has shape (1, 6), expected (2, 6) to match tokens"),
    ({"mask": TOKEN_MASK.to("meta")}, "mask is on meta, expected cpu to match tokens"),
    ({"token": 0.0}, "token is a float, expected a tensor of shape (D)"),
    ({"token": TOKEN[None]}, "token has shape (1, 4), expected (D)"),
    ({"token": TOKEN[:3]}, "token has shape (3,), expected (4,) to match tokens"),
    ({"token": TOKEN.double()}, "token has dtype float64, expected float32 to match tokens"),
    ({"token": TOKEN.to("meta")}, "token is on meta, expected cpu to match tokens"),
    ({"backend": "trito"}, "backend is 'trito', expected 'auto', 'eager' or 'triton' (did you mean 'triton'?)"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_token_errors(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": TOKENS, "mask": TOKEN_MASK, "token": TOKEN, **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(f'mask_tokens: {message}')}$"):
        mask_tokens(arguments.pop("tokens"), arguments.pop("mask"), arguments.pop("token"), **arguments)
