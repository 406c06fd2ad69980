"""Triton kernel of `lethe_kernels.mask`, whose docstring has the formula, the legend and the cost.

One program copies a tile of one image, rows x columns, and overwrites the masked elements. Columns are adjacent in
memory, so that reads and writes are whole lines:

    planar            rows are (channel, y), columns are x
    transposed        the same with x and y exchanged; a convolution's tokens are this
    channels inside   rows are y, columns are (x, channel)

The divisions that find channel and patch are done for rows and for columns, never for each element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from . import Scalar


@triton.jit
def _mask_patches_kernel(
    images_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    fill_ptr: tl.tensor,
    out_ptr: tl.tensor,
    channels: Scalar,
    height: Scalar,
    width: Scalar,
    patch_h: Scalar,
    patch_w: Scalar,
    image_b: Scalar,
    image_c: Scalar,
    image_h: Scalar,
    image_w: Scalar,
    mask_b: Scalar,
    mask_h: Scalar,
    mask_w: Scalar,
    fill_c: Scalar,
    out_b: Scalar,
    out_c: Scalar,
    out_h: Scalar,
    out_w: Scalar,
    CHANNELS_INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    rows = height if CHANNELS_INSIDE else channels * height
    cols = width * channels if CHANNELS_INSIDE else width
    row_tiles, col_tiles = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    tile = tl.program_id(0)
    image = (tile // (row_tiles * col_tiles)).to(tl.int64)
    row_R1 = ((tile // col_tiles) % row_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    col_1C = (tile % col_tiles * COLS + tl.arange(0, COLS))[None, :]
    inside_RC = (row_R1 < rows) & (col_1C < cols)
    if CHANNELS_INSIDE:
        y, x, channel = row_R1, col_1C // channels, col_1C % channels
    else:
        y, x, channel = row_R1 % height, col_1C, row_R1 // height

    # 64 bits wherever a stride multiplies: a tensor may hold more than 2^31 elements.
    patch_y, patch_x = (y // patch_h).to(tl.int64), (x // patch_w).to(tl.int64)
    y, x, channel = y.to(tl.int64), x.to(tl.int64), channel.to(tl.int64)
    masked_RC = tl.load(
        mask_ptr + image * mask_b + patch_y * mask_h + patch_x * mask_w,
        mask=inside_RC,
        other=0,
    )
    fill = tl.load(fill_ptr + channel * fill_c, mask=channel < channels, other=0)
    pixels_RC = tl.load(
        images_ptr + image * image_b + channel * image_c + y * image_h + x * image_w,
        mask=inside_RC,  # and not what the mask keeps alone: loads of single elements would cost more than they spare
        other=0,
    )
    tl.store(
        out_ptr + image * out_b + channel * out_c + y * out_h + x * out_w,
        tl.where(masked_RC, fill, pixels_RC),
        mask=inside_RC,
    )


def _launch(rows: int, cols: int) -> tuple[int, int]:
    """Return (ROWS, COLS): 2,048 elements, 16 a thread; at most 256 wide: 224 or 672 columns waste few threads."""
    width = min(triton.next_power_of_2(cols), 256)
    return min(triton.next_power_of_2(rows), 2048 // width), width


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides, 0 for a size of 1: any number is right there, and 0 keeps wide loads possible."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]


def mask_patches_triton(images_BCHW: Tensor, mask_BP: Tensor, fill_C: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Run the operation of `lethe_kernels.mask`; inputs may have any strides, the result has those of `empty_like`."""
    batch, channels, height, width = images_BCHW.shape
    result_BCHW = _triton.empty((images_BCHW.numel(),), images_BCHW.dtype, images_BCHW.device)
    result_BCHW = result_BCHW.as_strided(images_BCHW.shape, torch.empty_like(images_BCHW, device="meta").stride())
    out_BCHW, mask_Bgg = result_BCHW, mask_BP.unflatten(1, (height // patch_size[0], width // patch_size[1]))

    # The result has no gaps, so the elements of the dimension with stride 1 are adjacent in memory.
    channels_inside = channels > 1 and out_BCHW.stride(1) == 1
    if not channels_inside and height > 1 and out_BCHW.stride(2) == 1:
        images_BCHW, mask_Bgg, out_BCHW = images_BCHW.mT, mask_Bgg.mT, out_BCHW.mT
        height, width, patch_size = width, height, (patch_size[1], patch_size[0])
    rows, cols = (height, width * channels) if channels_inside else (channels * height, width)
    tile_rows, tile_cols = _launch(rows, cols)
    tiles = batch * triton.cdiv(rows, tile_rows) * triton.cdiv(cols, tile_cols)
    _mask_patches_kernel[(tiles,)](
        images_BCHW,
        mask_Bgg,
        fill_C,
        out_BCHW,
        channels,
        height,
        width,
        *patch_size,
        *_strides(images_BCHW),
        *_strides(mask_Bgg),
        *fill_C.stride(),
        *_strides(out_BCHW),
        CHANNELS_INSIDE=channels_inside,
        ROWS=tile_rows,
        COLS=tile_cols,
        num_warps=4,
    )
    return result_BCHW
