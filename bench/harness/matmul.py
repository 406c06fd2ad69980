"""Measure the rate of matrix products that this device reaches, to which the MFU of a step refers.

The best of several products of large square and of MLP shape in one precision, timed in the same run. It is no data
sheet's number: nothing else runs during a product, operands are read from memory, and the result is written to memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from bench.harness.measure import Row, stopwatch, turns

Kind = Literal["fp32", "tf32", "bf16"]
Shape = tuple[int, int, int]

# M, K, N of [M, K] x [K, N]. Square, and the two products of ViT-S's and ViT-B's MLP (ViT-L's on CUDA) on the tokens
# of 16 (CUDA: 128) images.
CPU_SHAPES: tuple[Shape, ...] = (
    *((n, n, n) for n in (1024, 2048)),
    *((16 * 197, width, 4 * width) for width in (384, 768)),
    *((16 * 197, 4 * width, width) for width in (384, 768)),
)
CUDA_SHAPES: tuple[Shape, ...] = (
    *((n, n, n) for n in (4096, 8192)),
    *((128 * 197, width, 4 * width) for width in (768, 1024)),
    *((128 * 197, 4 * width, width) for width in (768, 1024)),
)
QUICK_SHAPES: tuple[Shape, ...] = ((128, 128, 128), (260, 64, 256))
# One timing takes at least about this many seconds.
_TIMING_SECONDS = 0.05


def matmul_peak(
    kind: Kind, device: torch.device, shapes: Sequence[Shape] | None = None, *, rounds: int = 5, seconds: float = 8.0
) -> Row:
    """Return `peak`, the highest rate of any shape in flops a second (2 M K N a product), and `shapes`, that of each.

    kind: fp32 products as PyTorch does them by default; tf32: with `set_float32_matmul_precision("high")`; bf16.
    """
    shapes = shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    with _precision("high" if kind == "tf32" else "highest"):
        pairs = {
            f"{m} x {k} x {n}": (
                torch.randn(m, k, generator=generator).to(device, dtype),
                torch.randn(k, n, generator=generator).to(device, dtype),
            )
            for m, k, n in shapes
        }
        counts = {name: _repeats(*pair, device) for name, pair in pairs.items()}
        rates: dict[str, list[float]] = {name: [] for name in pairs}
        for name in turns(list(pairs), rounds, seconds):
            left, right = pairs[name]
            taken, _ = stopwatch(lambda left=left, right=right, n=counts[name]: _products(left, right, n), device)  # type: ignore[misc]
            rates[name].append(counts[name] * flops(left.shape[0], left.shape[1], right.shape[1]) / taken)
    return {"kind": kind, "peak": max(max(each) for each in rates.values()), "shapes": rates}


def flops(m: int, k: int, n: int) -> int:
    """Return the flops of [M, K] x [K, N]: one multiplication and one addition each."""
    return 2 * m * k * n


def _products(left: torch.Tensor, right: torch.Tensor, count: int) -> torch.Tensor:
    out = left @ right
    for _ in range(count - 1):
        torch.matmul(left, right, out=out)
    return out


def _repeats(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> int:
    """Return the products of one timing, from the second of two: the first initialises the library."""
    _products(left, right, 2)
    began = time.perf_counter()
    stopwatch(lambda: _products(left, right, 1), device)
    return max(1, round(_TIMING_SECONDS / (time.perf_counter() - began)))


@contextlib.contextmanager
def _precision(name: Literal["highest", "high"]) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
