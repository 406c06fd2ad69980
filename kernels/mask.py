"""Overwrite whole patches of images, or the tokens of patches, with a constant.

    out[b, c, y, x] = value[c]             if mask[b, (y // ph) * (W // pw) + x // pw]
                      images[b, c, y, x]   otherwise

Token form: tokens are images with D channels and a grid of P x 1 patches of one pixel, so it is the same op. A
patch of one constant embeds to the same token wherever it lies, so a model that runs on masked tokens needs
neither the masked images nor a second patch embedding.

Legend: B images, C channels, H x W pixels, patches of ph x pw pixels, a grid of gh x gw = P patches in
row-major order (left to right, then top to bottom), which is the order of the tokens of a ViT, D features.

Source: LetheViT, arXiv 2508.01569 (top-attended patches set to zero). A zero before normalisation is
value = -mean / std of each channel after it.

Cost: no flops; bytes 2 B C H W itemsize for images in and out, plus B P for the mask; 2 B P D itemsize for tokens.
The eager path also writes and reads a pixel mask of B H W bytes. Backward costs the same again for the images; for
the value it reads the gradient once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backend import (
    Backend,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    compute_dtype,
    dtype_name,
    resolve_backend,
)


def mask_patches_reference(
    images_BCHW: Tensor, mask_BP: Tensor, *, patch_size: tuple[int, int], value: float | Sequence[float] = 0.0
) -> Tensor:
    """Overwrite patch by patch, in the dtype of the images."""
    batch, channels, height, width = images_BCHW.shape
    patch_h, patch_w = patch_size
    values = [value] * channels if isinstance(value, (int, float)) else value
    out_BCHW = images_BCHW.clone()
    for image in range(batch):
        patch = 0
        for top in range(0, height, patch_h):
            for left in range(0, width, patch_w):
                if mask_BP[image, patch]:
                    for channel in range(channels):
                        out_BCHW[image, channel, top : top + patch_h, left : left + patch_w] = values[channel]
                patch += 1
    return out_BCHW


def _mask_patches_eager(images_BCHW: Tensor, mask_BP: Tensor, fill_C: Tensor, patch_size: tuple[int, int]) -> Tensor:
    batch, _, height, width = images_BCHW.shape
    patch_h, patch_w = patch_size
    grid = (batch, height // patch_h, 1, width // patch_w, 1)
    pixels = (batch, height // patch_h, patch_h, width // patch_w, patch_w)
    pixel_mask_B1HW = mask_BP.reshape(grid).expand(pixels).reshape(batch, 1, height, width)
    # Into `out`, because the layout that `where` would choose depends on the strides of all three operands.
    return torch.where(pixel_mask_B1HW, fill_C.view(1, -1, 1, 1), images_BCHW, out=torch.empty_like(images_BCHW))


@torch.library.custom_op("lethe::mask_patches", mutates_args=())
def _mask_patches_op(
    images_BCHW: Tensor, mask_BP: Tensor, fill_C: Tensor, patch_h: int, patch_w: int, backend: str
) -> Tensor:
    if backend == "triton":
        from ._triton.mask import mask_patches_triton

        with torch.cuda.device_of(images_BCHW):
            return mask_patches_triton(images_BCHW, mask_BP, fill_C, (patch_h, patch_w))
    return _mask_patches_eager(images_BCHW, mask_BP, fill_C, (patch_h, patch_w))


@_mask_patches_op.register_fake
def _(images_BCHW: Tensor, mask_BP: Tensor, fill_C: Tensor, patch_h: int, patch_w: int, backend: str) -> Tensor:
    return torch.empty_like(images_BCHW)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask_BP, _, *ctx.options = inputs
    ctx.save_for_backward(mask_BP)


def _backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
    (mask_BP,) = ctx.saved_tensors
    batch, channels, height, width = grad_BCHW.shape
    patch_h, patch_w, backend = ctx.options
    grad_images, grad_fill_C = None, None
    if ctx.needs_input_grad[0]:
        zero_C = grad_BCHW.new_zeros(1).expand(channels)
        grad_images = _mask_patches_op(grad_BCHW, mask_BP, zero_C, patch_h, patch_w, backend)
    if ctx.needs_input_grad[2]:
        grid = (height // patch_h, width // patch_w)
        # Sums of patches first: they are small, and selecting among them (rather than multiplying with the mask)
        # keeps an infinite gradient of a kept patch out.
        patches = grad_BCHW.unflatten(3, (grid[1], patch_w)).unflatten(2, (grid[0], patch_h))
        sums_BCgg = patches.sum(dim=(3, 5), dtype=compute_dtype(grad_BCHW.dtype))
        kept_BCgg = torch.where(mask_BP.reshape(batch, 1, *grid), sums_BCgg, 0)
        grad_fill_C = kept_BCgg.sum(dim=(0, 2, 3)).to(grad_BCHW.dtype)
    return grad_images, None, grad_fill_C, None, None, None


_mask_patches_op.register_autograd(_backward, setup_context=_setup_context)


def _patch_size(op: str, patch_size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    sizes = tuple(patch_size) if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if len(sizes) != 2:
        raise ValueError(f"{op}: patch_size is {patch_size!r}, expected a number of pixels or (height, width)")
    return (
        check_int(op, "patch_size", sizes[0], 1, height, "pixels, the image height at most"),
        check_int(op, "patch_size", sizes[1], 1, width, "pixels, the image width at most"),
    )


def _check_mask(op: str, mask: Tensor, shape: tuple[int, int], like: str) -> None:
    check_tensor(op, "mask", mask, "B, P")
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask has dtype {dtype_name(mask.dtype)}, expected bool")
    check_shape(op, "mask", mask, shape, like)


def _fill(op: str, value: float | Sequence[float] | Tensor, images_BCHW: Tensor) -> Tensor:
    """Return the value as a tensor [C] in the dtype and on the device of the images."""
    channels, dtype = images_BCHW.shape[1], images_BCHW.dtype
    if isinstance(value, Tensor):
        check_tensor(op, "value", value, "C")
        check_shape(op, "value", value, (channels,), "the channels of images")
        check_device(op, "value", value, images_BCHW.device, "images")
        if (value.is_floating_point() and not dtype.is_floating_point) or value.is_complex():
            raise ValueError(
                f"{op}: value has dtype {dtype_name(value.dtype)}, expected {dtype_name(dtype)} to match images"
            )
        return value.to(dtype)

    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    kind = "number" if dtype.is_floating_point else "whole number"
    expected = f"a finite {kind} that {dtype_name(dtype)} can hold"

    def checked(argument: str, element: object) -> float:
        number = check_number(op, argument, element, expected)
        if not limits.min <= number <= limits.max or (not dtype.is_floating_point and number % 1):
            raise ValueError(f"{op}: {argument} is {element!r}, expected {expected}")
        return number

    if isinstance(value, str) or not isinstance(value, Sequence):
        return images_BCHW.new_full((1,), checked("value", value)).expand(channels)
    if len(value) != channels:
        raise ValueError(f"{op}: value has {len(value)} numbers, expected {channels} to match images")
    numbers = [checked(f"value[{channel}]", element) for channel, element in enumerate(value)]
    return torch.tensor(numbers, dtype=dtype, device=images_BCHW.device)


def mask_patches(
    images: Tensor,
    mask: Tensor,
    *,
    patch_size: int | tuple[int, int],
    value: float | Sequence[float] | Tensor = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Return a copy of images in which the masked patches are set to a constant.

    Gradient flows to the pixels that are kept and to `value`.

    Args:
        images: Images [B, C, H, W], float or integer.
        mask: Bool [B, P], True for patches to overwrite. P = (H / height) * (W / width), in row-major order.
        patch_size: Pixels, or (height, width) in pixels; must divide H and W.
        value: One number, C numbers, or a tensor [C] (float tensors are rounded to the dtype of the images).
        backend: "auto" (Triton if it can run), "triton" or "eager".

    Returns:
        Images [B, C, H, W] in the dtype and memory format of the input.

    Raises:
        ValueError: A shape, dtype, device or value does not fit.
        RuntimeError: The backend "triton" cannot run.
    """
    op = "mask_patches"
    check_tensor(op, "images", images, "B, C, H, W")
    if images.dtype == torch.bool or images.is_complex():
        raise ValueError(f"{op}: images has dtype {dtype_name(images.dtype)}, expected a float or integer type")
    batch, _, height, width = images.shape
    sizes = _patch_size(op, patch_size, height, width)
    if height % sizes[0] or width % sizes[1]:
        raise ValueError(
            f"{op}: images has shape {tuple(images.shape)}, expected height and width to be multiples"
            f" of patch_size {sizes}"
        )
    grid = (height // sizes[0], width // sizes[1])
    like = f"images {tuple(images.shape)} in patches of {sizes}: a grid of {grid}"
    _check_mask(op, mask, (batch, grid[0] * grid[1]), like)
    check_device(op, "mask", mask, images.device, "images")
    fill = _fill(op, value, images)
    return _mask_patches_op(images, mask, fill, *sizes, resolve_backend(op, backend, images.device))


def mask_tokens(tokens: Tensor, mask: Tensor, token: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return a copy of tokens in which the masked ones are set to one token.

    Gradient flows to the tokens that are kept and to `token`.

    Args:
        tokens: Tokens [B, P, D], float.
        mask: Bool [B, P], True for tokens to overwrite.
        token: The replacement [D], in the dtype of the tokens.
        backend: "auto" (Triton if it can run), "triton" or "eager".

    Returns:
        Tokens [B, P, D] in the layout of the input.

    Raises:
        ValueError: A shape, dtype or device does not fit.
        RuntimeError: The backend "triton" cannot run.
    """
    op = "mask_tokens"
    check_tensor(op, "tokens", tokens, "B, P, D")
    check_float(op, "tokens", tokens)
    _check_mask(op, mask, (tokens.shape[0], tokens.shape[1]), "tokens")
    check_device(op, "mask", mask, tokens.device, "tokens")
    check_tensor(op, "token", token, "D")
    check_shape(op, "token", token, (tokens.shape[2],), "tokens")
    check_dtype(op, "token", token, tokens.dtype, "tokens")
    check_device(op, "token", token, tokens.device, "tokens")
    # The patches go down, not across: a row of the kernel's tile is then a token, and its columns the features.
    as_images = tokens.transpose(1, 2).unsqueeze(3)
    return _mask_patches_op(as_images, mask, token, 1, 1, resolve_backend(op, backend, tokens.device)).squeeze(3).mT
