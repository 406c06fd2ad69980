"""mask_patches against its reference, a hand-made example, timm's patch order, and each error."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed
from torch import Tensor

from lethe_kernels import mask_patches
from lethe_kernels.mask import mask_patches_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64]


def make(
    batch: int, channels: int, grid: tuple[int, int], patch: tuple[int, int], seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    images = torch.randint(1, 100, shape, generator=generator).float()
    return images, torch.rand(batch, grid[0] * grid[1], generator=generator) < 0.4


def test_hand_made_example() -> None:
    images = torch.arange(1.0, 25.0).reshape(1, 1, 4, 6)
    mask = torch.tensor([[False, False, True, True, False, False]])  # a grid of 2 x 3
    expected = [
        [1, 2, 3, 4, -1, -1],
        [7, 8, 9, 10, -1, -1],
        [-1, -1, 15, 16, 17, 18],
        [-1, -1, 21, 22, 23, 24],
    ]
    assert mask_patches(images, mask, patch_size=2, value=-1.0)[0, 0].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0, 7.0, (1.0, 2, 3), torch.tensor([1, 2, 3])], ids=repr)
@pytest.mark.parametrize("channels_last", [False, True])
def test_matches_reference_and_keeps_dtype_and_layout(dtype: torch.dtype, value: Any, channels_last: bool) -> None:
    images, mask = make(3, 3, (2, 5), (3, 2))
    images = images.to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    out = mask_patches(images, mask, patch_size=(3, 2), value=value)
    plain = value.tolist() if isinstance(value, Tensor) else value
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=(3, 2), value=plain))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    assert out.data_ptr() != images.data_ptr()


def test_strided_images_and_mask() -> None:
    images, mask = make(2, 4, (3, 3), (2, 2))
    strided_images = images.repeat_interleave(2, dim=3)[:, 1:, :, ::2]
    strided_mask = mask.T.contiguous().T
    assert not strided_images.is_contiguous()
    assert not strided_mask.is_contiguous()
    out = mask_patches(strided_images, strided_mask, patch_size=2, value=[5.0, 6.0, 7.0])
    assert torch.equal(out, mask_patches_reference(images[:, 1:], mask, patch_size=(2, 2), value=[5.0, 6.0, 7.0]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2**32),
)
def test_any_grid(batch: int, channels: int, grid: tuple[int, int], patch: tuple[int, int], seed: int) -> None:
    images, mask = make(batch, channels, grid, patch, seed)
    out = mask_patches(images, mask, patch_size=patch)
    assert torch.equal(out, mask_patches_reference(images, mask, patch_size=patch))
    assert (out == 0).sum() == mask.sum() * channels * patch[0] * patch[1]  # make() draws no zeros
    assert torch.equal(mask_patches(out, mask, patch_size=patch), out)
    assert torch.equal(mask_patches(images, torch.zeros_like(mask), patch_size=patch), images)


def test_patch_order_is_the_token_order_of_timm() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(img_size=(8, 12), patch_size=4, in_chans=3, embed_dim=8)
    images = torch.randn(6, 3, 8, 12)  # image i has its patch i masked
    with torch.no_grad():
        changed = embed(mask_patches(images, torch.eye(6).bool(), patch_size=4)) != embed(images)
    assert torch.equal(changed.any(dim=2), torch.eye(6).bool())


def test_gradient_reaches_kept_pixels_and_value() -> None:
    images, mask = make(2, 3, (2, 3), (2, 2))
    images.requires_grad_()
    value = torch.zeros(3, requires_grad=True)
    mask_patches(images, mask, patch_size=2, value=value).sum().backward()
    masked = mask_patches(torch.zeros(2, 3, 4, 6), mask, patch_size=2, value=1.0)
    assert images.grad is not None
    assert torch.equal(images.grad, 1 - masked)
    assert value.grad is not None
    assert value.grad.tolist() == [4.0 * mask.sum().item()] * 3


IMAGES = torch.zeros(2, 3, 8, 12)
MASK = torch.zeros(2, 6, dtype=torch.bool)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"images": [[0.0]]}, "images is a list, expected a tensor of shape (B, C, H, W)"),
    ({"images": IMAGES[0]}, "images has shape (3, 8, 12), expected (B, C, H, W)"),
    ({"images": IMAGES[:0]}, "images has shape (0, 3, 8, 12), expected (B, C, H, W) with every size 1 or more"),
    ({"images": IMAGES > 0}, "images has dtype bool, expected a float or integer type"),
    (
        {"patch_size": 5},
        "images has shape (2, 3, 8, 12), expected height and width to be multiples of patch_size (5, 5)",
    ),
    (
        {"patch_size": (4, 5)},
        "images has shape (2, 3, 8, 12), expected height and width to be multiples of patch_size (4, 5)",
    ),
    (
        {"patch_size": 0},
        "patch_size is 0, expected a whole number from 1 to 8 (pixels, the image height at most)",
    ),
    (
        {"patch_size": (4, 16)},
        "patch_size is 16, expected a whole number from 1 to 12 (pixels, the image width at most)",
    ),
    (
        {"patch_size": 4.0},
        "patch_size is 4.0, expected a whole number from 1 to 8 (pixels, the image height at most)",
    ),
    (
        {"patch_size": None},
        "patch_size is None, expected a whole number from 1 to 8 (pixels, the image height at most)",
    ),
    ({"patch_size": (4, 4, 4)}, "patch_size is (4, 4, 4), expected a number of pixels or (height, width)"),
    ({"mask": MASK[0]}, "mask has shape (6,), expected (B, P)"),
    ({"mask": MASK.float()}, "mask has dtype float32, expected bool"),
    (
        {"mask": MASK[:, :5]},
        "mask has shape (2, 5), expected (2, 6) to match images (2, 3, 8, 12) in patches of (4, 4): a grid of (2, 3)",
    ),
    (
        {"mask": MASK[:1]},
        "mask has shape (1, 6), expected (2, 6) to match images (2, 3, 8, 12) in patches of (4, 4): a grid of (2, 3)",
    ),
    ({"mask": MASK.to("meta")}, "mask is on meta, expected cpu to match images"),
    ({"value": "000"}, "value is '000', expected a finite number that float32 can hold"),
    ({"value": None}, "value is None, expected a finite number that float32 can hold"),
    ({"value": float("nan")}, "value is nan, expected a finite number that float32 can hold"),
    ({"value": [0.0, 1.0]}, "value has 2 numbers, expected 3 to match images"),
    ({"value": [0.0, "1", 2.0]}, "value[1] is '1', expected a finite number that float32 can hold"),
    ({"value": torch.zeros(2)}, "value has shape (2,), expected (3,) to match the channels of images"),
    ({"value": torch.zeros(())}, "value has shape (), expected (C)"),
    ({"value": torch.zeros(3, device="meta")}, "value is on meta, expected cpu to match images"),
    ({"value": 1e6, "images": IMAGES.half()}, "value is 1000000.0, expected a finite number that float16 can hold"),
    ({"value": 0.5, "images": IMAGES.byte()}, "value is 0.5, expected a finite whole number that uint8 can hold"),
    ({"value": -1, "images": IMAGES.byte()}, "value is -1, expected a finite whole number that uint8 can hold"),
    (
        {"value": torch.zeros(3), "images": IMAGES.byte()},
        "value has dtype float32, expected uint8 to match images",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": IMAGES, "mask": MASK, "patch_size": 4, **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(f'mask_patches: {message}')}$"):
        mask_patches(arguments.pop("images"), arguments.pop("mask"), **arguments)
