"""Plan and launches of one rollout call on a GPU; the kernel is `rollout_kernel`."""

import dataclasses
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import _triton
from .rollout_kernel import FUSIONS, rollout_kernel


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile and parts of one call. parts_h, parts_i: shares of heads and of query blocks; both 1: one launch."""

    block_i: int
    block_j: int
    step_d: int
    whole: bool
    warps: int
    stages: int
    parts_h: int
    parts_i: int

    @property
    def persistent(self) -> bool:
        return self.parts_h * self.parts_i == 1


def plan(batch: int, heads: int, tokens: int, width: int, itemsize: int, fusion: str, processors: int) -> Plan:
    """Choose the tile by registers and shared memory, and the parts by the number of idle multiprocessors.

    One program an image if the batch has one for every multiprocessor. Otherwise parts: of the heads, which are
    independent under mean fusion, then of the query rows.
    """
    keys = triton.next_power_of_2(tokens)
    # Float32 products are fused multiply-adds, whose operands live in registers: smaller tiles, 16 features at a time.
    # `python -m bench compile` shows the registers; none of these spills.
    half = itemsize < 4
    whole = keys <= (256 if half else 64)
    if half and whole:
        # Two programs of four warps fit on a processor, and each hides the latency of the other. Fusing heads takes a
        # tile more, and adding up parts some registers.
        block_i, block_j, warps = 32, 256, 4 if fusion == "mean" and batch >= processors else 8
    elif half:
        block_i, block_j, warps = 64, 128 if fusion == "mean" else 64, 8
    else:
        block_i, block_j, warps = 32, 64, 4
    block_i, block_j = max(16, min(keys, block_i)), max(16, min(keys, block_j))
    parts_h = parts_i = 1
    if batch < processors:
        wanted = triton.cdiv(processors, batch)
        blocks = triton.cdiv(tokens, block_i)
        if fusion == "mean":
            parts_h = triton.cdiv(heads, triton.cdiv(heads, min(heads, wanted)))
        parts_i = triton.cdiv(blocks, triton.cdiv(blocks, min(blocks, triton.cdiv(wanted, parts_h))))
    return Plan(
        block_i=block_i,
        block_j=block_j,
        step_d=max(16, math.gcd(width, 64)) if half else 16,
        whole=whole,
        warps=warps,
        stages=2 if half else 1,
        parts_h=parts_h,
        parts_i=parts_i,
    )


def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    num_prefix_tokens: int,
    mode: str,
    head_fusion: str,
    residual: float,
    pool: str,
    scale: float,
    k: int | None,
    plan_as: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (scores [B, P] float32 or, with a k, mask [B, P] bool; finite [B] int8: whether each image's row is)."""
    batch, heads, tokens, width = queries[0].shape
    device, dtype = queries[0].device, queries[0].dtype
    chosen = plan_as or plan(batch, heads, tokens, width, dtype.itemsize, head_fusion, processors(device))
    if mode == "last":
        queries, keys = queries[-1:], keys[-1:]
    layers, parts, patches = len(queries), chosen.parts_h * chosen.parts_i, tokens - num_prefix_tokens
    rollout = mode == "rollout"
    gain = (1 - residual) if rollout else 1 / layers

    # By default the assembler spills a few numbers rather than use more than 128 registers.
    options = {"maxnreg": 255} if _triton.platform() == "cuda" else {}

    rows = _triton.empty((2, batch, parts, tokens), torch.float32, device)
    lse = rows if chosen.whole else _triton.empty((batch, heads + 1, tokens), torch.float32, device)
    result = _triton.empty((batch, patches), torch.float32 if k is None else torch.bool, device)
    finite = _triton.empty((batch,), torch.int8, device)

    def run(layer_low: int, layer_high: int, steps: tuple[int, int], programs: int, finish: bool) -> None:
        query, key = queries[layer_low], keys[layer_low]
        rollout_kernel[(batch, programs)](
            tuple(queries[layer_low:layer_high]),
            tuple(keys[layer_low:layer_high]),
            rows,
            lse,
            result,
            result.view(torch.int8) if k is not None else result,
            finite,
            *query.stride(),
            *key.stride(),
            batch,
            heads,
            tokens,
            k or 0,
            scale * math.log2(math.e),
            gain / heads if head_fusion == "mean" else gain,
            residual,
            *steps,
            chosen.parts_h,
            chosen.parts_i,
            LAYERS=layer_high - layer_low,
            D=width,
            STEP=chosen.step_d,
            BI=chosen.block_i,
            BJ=chosen.block_j,
            BN=triton.next_power_of_2(tokens),
            PREFIX=num_prefix_tokens,
            AVG=pool == "avg",
            SINGLE=parts == 1,
            ROLLOUT=rollout,
            FUSION=FUSIONS[head_fusion],
            WHOLE=chosen.whole,
            FINISH=finish,
            SCORES=k is None,
            MASK=k is not None,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            **options,
        )

    alike = all(
        query.stride() == queries[0].stride() and key.stride() == keys[0].stride()
        for query, key in zip(queries, keys, strict=True)
    )
    if chosen.persistent and alike:
        run(0, layers, (0, layers), 1, True)
    else:
        for step in range(layers):
            layer = layers - 1 - step
            run(layer, layer + 1, (step, step + 1), parts, False)
        run(0, 1, (layers, layers), 1, True)
    return result, finite
