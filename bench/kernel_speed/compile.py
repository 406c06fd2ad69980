"""Compile every production configuration of the Triton kernels for GPUs that are not present, and check the result.

The launchers of `lethe_kernels._triton` are called unchanged, with tensors without memory, under a driver that has
only a target. So the compiled kernels are those that would be launched there, with their block sizes, specialisation
for aligned pointers and unit strides, and number of launches.

Registers, stack (spills) and matrix instructions are read from the machine code with the tools of Triton's wheel.
Occupancy follows from registers, shared memory and threads; the predicted time is the bound of
`bench.harness.roofline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.harness.report import Report
from bench.harness.roofline import PEAKS, Cost, info_nce_cost, predict, rollout_cost
from engine.errors import UserError, nearest
from lethe_kernels import _triton
from lethe_kernels._triton import info_nce, info_nce_shared, mask, rollout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU. shared: bytes of a program at most, and of a multiprocessor. matrix: names of matrix instructions."""

    gpu: GPUTarget
    shared: int
    shared_processor: int
    registers: int
    threads: int
    matrix: str
    cards: tuple[str, ...] = ()


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". MI300X: CDNA 3 white paper: four
# SIMDs a compute unit, each 512 registers for 64 lanes; 64 KiB of shared memory.
TARGETS = {
    "sm_80": Target(
        gpu=GPUTarget("cuda", 80, 32), shared=163 << 10, shared_processor=164 << 10, registers=65536, threads=2048,
        matrix=r"\bHMMA\b", cards=("NVIDIA A100-SXM4-80GB",),
    ),
    "sm_90": Target(
        gpu=GPUTarget("cuda", 90, 32), shared=227 << 10, shared_processor=228 << 10, registers=65536, threads=2048,
        matrix=r"\bHG?MMA\b", cards=("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    ),
    "sm_100": Target(
        gpu=GPUTarget("cuda", 100, 32), shared=227 << 10, shared_processor=228 << 10, registers=65536, threads=2048,
        matrix=r"\b(UTC)?HMMA\b",
    ),
    "gfx942": Target(
        gpu=GPUTarget("hip", "gfx942", 64), shared=64 << 10, shared_processor=64 << 10, registers=131072, threads=2048,
        matrix=r"\bv_mfma",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a launcher. products: whether half precision must use matrix instructions."""

    name: str
    dtype: str
    launch: Callable[[], object]
    products: bool
    cost: Cost | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel of one case on one target. predicted: lower bound in seconds of the whole case on each card."""

    case: str
    dtype: str
    target: str
    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float
    matrix_instructions: int
    predicted: dict[str, float]
    problems: list[str]


class _Driver:
    """The part of a Triton driver that compilation uses."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Compile kernels for `target` instead of launching them; yields the list to which they are added.

    Raises UserError in a process whose kernels are interpreted.
    """
    if _triton.INTERPRETED:
        raise UserError("compiling ahead of time: TRITON_INTERPRET is set, so kernels are interpreted; unset it")
    compiled: list[Any] = []
    seen: list[JITFunction] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        seen.append(self)
        if all(kernel is not other for other in compiled):
            compiled.append(kernel)
        return kernel

    driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        for function in seen:
            function.device_caches.clear()  # they are by device, and every target was device 0


def _machine_code(kernel: Any, target: Target) -> tuple[int, int, str]:
    """Return (registers a thread, bytes spilled a thread, instructions as text)."""
    if target.gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        counts = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s", text)}
        return counts["vgpr_count"] + counts["agpr_count"], counts["private_segment_fixed_size"], text
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    counts = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"], text


def _examine(case: Case, kernel: Any, name: str) -> Compiled:
    target = TARGETS[name]
    registers, spilled, text = _machine_code(kernel, target)
    shared, threads = kernel.metadata.shared, kernel.metadata.num_warps * target.gpu.warp_size
    programs = min(
        target.threads // threads,
        target.registers // (registers * threads),
        target.shared_processor // shared if shared else target.threads,
    )
    matrix = len(re.findall(target.matrix, text))
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes a thread")
    if shared > target.shared:
        problems.append(f"needs {shared} bytes of shared memory, {target.shared} at most")
    # Not every kernel of a case multiplies, so the case as a whole is checked too (`compile_case`).
    predicted = {}
    if case.cost:
        predicted = {card: predict(case.cost, PEAKS[card], DTYPES[case.dtype]).seconds for card in target.cards}
    return Compiled(
        case=case.name,
        dtype=case.dtype,
        target=name,
        kernel=kernel.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        occupancy=programs * threads / target.threads,
        matrix_instructions=matrix,
        predicted=predicted,
        problems=problems,
    )


def rollout_cases() -> Iterator[Case]:
    """Yield ViT-T to H at 224, 384 and up, head widths 16 to 128, a full batch.

    Some with other options, and one image.
    """
    shapes = [
        (5, 2, 16), (65, 4, 32), (197, 3, 64), (197, 6, 64), (197, 12, 64), (197, 16, 64), (197, 8, 96),
        (257, 16, 80), (577, 12, 64), (577, 16, 64), (577, 8, 128), (1601, 16, 64), (1601, 16, 128),
    ]  # fmt: skip
    other_ways = [(1, "mean", "rollout"), (256, "max", "rollout"), (256, "mean", "mean")]
    for shape, dtype in itertools.product(shapes, DTYPES):
        (tokens, heads, width), ways = shape, [(256, "mean", "rollout")]
        if shape in ((197, 12, 64), (257, 16, 80), (577, 12, 64), (1601, 16, 128)):
            ways += other_ways
        layers = 24 if heads == 16 else 12
        for batch, fusion, mode in ways:
            cost = None
            if fusion == "mean" and mode == "rollout":
                cost = rollout_cost(layers, batch, heads, tokens, width, DTYPES[dtype].itemsize)
            yield Case(
                name=f"rollout B={batch} N={tokens} H={heads} d={width} {fusion} {mode}",
                dtype=dtype,
                launch=functools.partial(
                    _launch_rollout, layers, batch, tokens, heads, width, dtype, head_fusion=fusion, mode=mode
                ),
                products=True,
                cost=cost,
            )


def _launch_rollout(
    layers: int, batch: int, tokens: int, heads: int, width: int, dtype: str, *, head_fusion: str, mode: str
) -> None:
    qkv = torch.empty(batch, tokens, 3, heads, width, dtype=DTYPES[dtype], device="meta").permute(2, 0, 3, 1, 4)
    rollout.launch(
        [qkv[0]] * layers,
        [qkv[1]] * layers,
        num_prefix_tokens=1,
        mode=mode,
        head_fusion=head_fusion,
        residual=0.5,
        pool="token",
        scale=width**-0.5,
        k=10,
        # Number of multiprocessors, which is not part of a target: 132 is an H100's.
        plan_as=rollout.plan(batch, heads, tokens, width, DTYPES[dtype].itemsize, head_fusion, 132),
    )


def info_nce_cases() -> Iterator[Case]:
    """Yield the paired form on logits of 10 to 21,843 classes, and in-batch negatives of 64 to 21,843 features."""
    for width, dtype in itertools.product((10, 100, 1000, 21843), DTYPES):
        yield Case(
            name=f"info_nce paired B=256 K=1 D={width}",
            dtype=dtype,
            launch=functools.partial(_launch_paired, 256, 1, width, dtype),
            products=False,
            cost=paired_cost(256, 1, width, DTYPES[dtype].itemsize),
        )
    for (width, batch), dtype in itertools.product(
        ((64, 65536), (80, 8192), (100, 8192), (128, 8192), (128, 65536), (256, 8192), (1000, 256), (21843, 256)),
        DTYPES,
    ):
        backward = width <= info_nce_shared.WHOLE_ROW  # wider, it is products of the library's
        yield Case(
            name=f"info_nce in-batch B={batch} D={width}" + ("" if backward else " forward"),
            dtype=dtype,
            launch=functools.partial(_launch_in_batch, batch, width, dtype, backward),
            products=True,
            cost=info_nce_cost(batch, batch, width, DTYPES[dtype].itemsize, backward=backward),
        )


def paired_cost(batch: int, negatives: int, width: int, itemsize: int) -> Cost:
    """Count forward and backward of the paired form: all rows read twice, gradients of the anchors written."""
    rows = batch * (2 + negatives)
    return Cost(
        bytes=itemsize * width * (2 * rows + batch),
        flops=4 * width * batch * (1 + negatives),
        exponentials=2 * batch * (1 + negatives),
    )


def _launch_paired(batch: int, negatives: int, width: int, dtype: str) -> None:
    anchors, positives = (torch.empty(batch, width, dtype=DTYPES[dtype], device="meta") for _ in range(2))
    negatives_BKD = torch.empty(batch, negatives, width, dtype=DTYPES[dtype], device="meta")
    temperature = torch.empty((), device="meta")
    losses, *statistics = info_nce.paired_forward(anchors, positives, negatives_BKD, temperature, True)
    needs = [True, False, False, False]
    info_nce.paired_backward(losses, anchors, positives, negatives_BKD, temperature, statistics, True, needs)


def _launch_in_batch(batch: int, width: int, dtype: str, backward: bool) -> None:
    anchors, positives = (torch.empty(batch, width, dtype=DTYPES[dtype], device="meta") for _ in range(2))
    temperature = torch.empty((), device="meta")
    losses, *statistics = info_nce_shared.shared_forward(anchors, positives, None, temperature, True, 0)
    if backward:
        needs = [True, True, False, False]
        info_nce_shared.shared_backward(losses, anchors, positives, None, temperature, statistics, True, 0, needs)


def mask_cases() -> Iterator[Case]:
    """Yield masked images at 224, planar and channels last, and masked tokens of ViT-B."""
    for dtype in DTYPES:
        for layout, memory_format in (("planar", torch.contiguous_format), ("channels_last", torch.channels_last)):
            images = torch.empty(256, 3, 224, 224, dtype=DTYPES[dtype], device="meta")
            yield Case(
                name=f"mask_patches B=256 224 {layout}",
                dtype=dtype,
                launch=functools.partial(_launch_mask, images.to(memory_format=memory_format), (16, 16)),
                products=False,
                cost=Cost(bytes=2 * images.nbytes + 256 * 196, flops=0, exponentials=0),
            )
        tokens = torch.empty(256, 196, 768, dtype=DTYPES[dtype], device="meta")
        yield Case(
            name="mask_tokens B=256 P=196 D=768",
            dtype=dtype,
            launch=functools.partial(_launch_mask, tokens.mT.unsqueeze(3), (1, 1)),
            products=False,
            cost=Cost(bytes=2 * tokens.nbytes + 256 * 196, flops=0, exponentials=0),
        )


def _launch_mask(images: Tensor, patch_size: tuple[int, int]) -> None:
    patches = images.shape[2] * images.shape[3] // (patch_size[0] * patch_size[1])
    selected = torch.empty(len(images), patches, dtype=torch.bool, device="meta")
    mask.mask_patches_triton(images, selected, images.new_empty(images.shape[1]), patch_size)


OPS = {"rollout": rollout_cases, "info_nce": info_nce_cases, "mask": mask_cases}


def compile_case(case: Case, target: str) -> list[Compiled]:
    """Compile every kernel that one call launches for the target, and check it."""
    with compiling_for(TARGETS[target].gpu) as kernels:
        case.launch()
    results = [_examine(case, kernel, target) for kernel in kernels]
    if case.products and case.dtype != "fp32" and not any(result.matrix_instructions for result in results):
        for result in results:
            result.problems.append("uses no matrix instruction")
    return results


def run_compile(targets: list[str], ops: list[str], match: str, json_path: Path | None) -> int:
    """Print the table, a line a kernel, for the cases whose name and type contain `match`.

    Return the number of problems.
    """
    for given, known, what in ((targets, TARGETS, "--target"), (ops, OPS, "--only")):
        for name in given:
            if name not in known:
                raise UserError(f"{what} {name!r}{nearest(name, known)}")
    report, console = Report(), Console()
    results: list[Compiled] = []
    cases = [case for op in ops or OPS for case in OPS[op]() if match in f"{case.name} {case.dtype}"]
    if not cases:
        raise UserError(f"--match {match!r}: no case has that in its name, such as 'N=197 H=12' or 'bf16'")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for target, case in progress.track(list(itertools.product(targets or TARGETS, cases))):
            results += compile_case(case, target)
    _print(console, results)
    report.write({"kernels": [dataclasses.asdict(result) for result in results]}, json_path)
    return sum(len(result.problems) for result in results)


def _print(console: Console, results: list[Compiled]) -> None:
    table = Table("case", "dtype", "target", "kernel", "warps", "regs", "spill", "shared", "occ.", "matrix", "at best")
    bounds = set()  # printed once a case
    for one in results:
        best = [f"{card.split()[1][:4]} {seconds * 1e6:,.0f} us" for card, seconds in one.predicted.items()]
        key = one.case, one.dtype, one.target
        table.add_row(
            one.case, one.dtype, one.target, one.kernel.strip("_").removesuffix("_kernel"), str(one.warps),
            str(one.registers), str(one.spilled_bytes), f"{one.shared_bytes:,}", f"{one.occupancy:.0%}",
            str(one.matrix_instructions), ", ".join(best) if key not in bounds else "",
            style="red" if one.problems else "",
        )  # fmt: skip
        bounds.add(key)
    console.print(table)
    problems = [f"{one.case} {one.dtype} {one.target} {one.kernel}: {what}" for one in results for what in one.problems]
    console.print(*problems, sep="\n")
    console.print(f"{len(results)} kernels compiled, {len(problems)} problems")
