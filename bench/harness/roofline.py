"""Lower bound of the time of an operation on a card, from bytes, products and exponentials of the mathematics.

    seconds >= max(bytes / bandwidth, flops / rate, exponentials / exponential rate)

A share of roofline is that bound divided by the measured time. Each card's peaks are its own: a name that is not in
`PEAKS` has none, and those of another card are not used instead.

The counts are those of the mathematics, whatever a kernel does: each input is read once, each result written once,
each similarity computed once in the forward and once more in the backward.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """bytes: read and written. flops: of matrix products alone. exponentials: one a softmax entry."""

    bytes: int
    flops: int
    exponentials: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Rates a second. flops: by kind of product ("float32", "tf32", "bfloat16", "float16"), without sparsity."""

    bandwidth: float
    flops: dict[str, float]
    exponentials: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """seconds: the bound. limit: which of bytes, flops and exponentials sets it."""

    seconds: float
    limit: str


def _peaks(*, bandwidth: float, float32: float, tf32: float, half: float, sms: int, boost: float) -> Peaks:
    """Convert bandwidth in GB/s, rates in TFLOPS and boost clock in MHz."""
    # Results of ex2 per clock and multiprocessor at compute capability 8.0 and 9.0: CUDA C++ Programming Guide, table
    # "Throughput of Native Arithmetic Instructions".
    per_clock = 16
    return Peaks(
        bandwidth=bandwidth * 1e9,
        flops={"float32": float32 * 1e12, "tf32": tf32 * 1e12, "bfloat16": half * 1e12, "float16": half * 1e12},
        exponentials=per_clock * sms * boost * 1e6,
    )


# By the name that torch.cuda.get_device_name gives. Where a data sheet prints rates with sparsity, half of them.
PEAKS: dict[str, Peaks] = {
    # NVIDIA A100 Tensor Core GPU data sheet; multiprocessors and boost clock: A100 architecture whitepaper, table 4.
    "NVIDIA A100-SXM4-80GB": _peaks(bandwidth=2039, float32=19.5, tf32=156, half=312, sms=108, boost=1410),
    "NVIDIA A100-SXM4-40GB": _peaks(bandwidth=1555, float32=19.5, tf32=156, half=312, sms=108, boost=1410),
    "NVIDIA A100 80GB PCIe": _peaks(bandwidth=1935, float32=19.5, tf32=156, half=312, sms=108, boost=1410),
    "NVIDIA A100-PCIE-40GB": _peaks(bandwidth=1555, float32=19.5, tf32=156, half=312, sms=108, boost=1410),
    # NVIDIA H100 Tensor Core GPU data sheet; multiprocessors: H100 architecture whitepaper. The boost clock is the one
    # that its float32 rate stands for: 67 TFLOPS = 132 SMs x 128 lanes x 2 x 1.98 GHz, 51 = 114 x 128 x 2 x 1.755 GHz.
    "NVIDIA H100 80GB HBM3": _peaks(bandwidth=3350, float32=67, tf32=494.7, half=989.4, sms=132, boost=1980),
    "NVIDIA H100 PCIe": _peaks(bandwidth=2000, float32=51, tf32=378, half=756, sms=114, boost=1755),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column: the same processor with other memory.
    "NVIDIA H200": _peaks(bandwidth=4800, float32=67, tf32=494.7, half=989.4, sms=132, boost=1980),
}


def rollout_cost(layers: int, batch: int, heads: int, tokens: int, width: int, itemsize: int) -> Cost:
    """Count class-row attention rollout of L layers [B, H, N, d]: of the last layer only the class token's row.

    K of every layer is read, Q of all but the last, of which it is one row; scores are B N float32.
    """
    rows = (layers - 1) * tokens + 1
    return Cost(
        bytes=batch * heads * width * itemsize * (layers * tokens + rows) + 4 * batch * tokens,
        flops=2 * batch * heads * rows * tokens * width,
        exponentials=batch * heads * rows * tokens,
    )


def info_nce_cost(batch: int, candidates: int, width: int, itemsize: int, *, backward: bool = True) -> Cost:
    """Count InfoNCE of B anchors against M candidates (in-batch: M = B) of D features, both with a gradient.

    Forward: one product B x M x D, B log-sums written. Backward: the similarities again, and one product for each
    of the two gradients; inputs and log-sums read again, gradients written.
    """
    inputs = itemsize * width * (batch + candidates)
    products = 4 if backward else 1
    return Cost(
        bytes=inputs + 4 * batch + (2 * inputs + 4 * batch if backward else 0),
        flops=products * 2 * batch * candidates * width,
        exponentials=(2 if backward else 1) * batch * candidates,
    )


def predict(cost: Cost, peaks: Peaks, dtype: str | torch.dtype) -> Prediction:
    """Return the bound for products of `dtype`: a torch dtype, or "tf32". Raises ValueError for an unknown rate."""
    kind = str(dtype).removeprefix("torch.")
    if kind not in peaks.flops:
        raise ValueError(f"predict: dtype is {kind!r}, expected one of {', '.join(map(repr, peaks.flops))}")
    seconds = {
        "bytes": cost.bytes / peaks.bandwidth,
        "flops": cost.flops / peaks.flops[kind],
        "exponentials": cost.exponentials / peaks.exponentials,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return Prediction(seconds=seconds[limit], limit=limit)


def share(cost: Cost, device_name: str, dtype: str | torch.dtype, seconds: float) -> float | None:
    """Return the bound as a share of the measured seconds; None for a card whose peaks are not in `PEAKS`."""
    peaks = PEAKS.get(device_name)
    return predict(cost, peaks, dtype).seconds / seconds if peaks else None
