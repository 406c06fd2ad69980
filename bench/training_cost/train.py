"""Compare optimizer steps of LetheViT with plain loops and those of other libraries: `python -m bench train`.

Every loop runs in a process of its own (`bench.harness.workers`), on the same images with the same batch. Speeds are
ratios formed within rounds. The time of the forget step includes its share of `prepare`: teacher passes and masks are
computed once for all forget images and used in every forget epoch.

MFU: flops of the products of a step (forward and backward pass of the student, and the forward passes of the original
that the loop makes in the step), counted by `torch.utils.flop_counter` on the plain model with explicit attention,
over the step's time and the rate of products measured in the same run (`bench.harness.matmul`). Recomputation
(gradient checkpointing), softmax, norms and the optimizer are not counted.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.cases import TRAIN_CPU, TRAIN_CUDA, TRAIN_QUICK, Model, StepCase, TrainCase
from bench.harness.matmul import QUICK_SHAPES, Kind, matmul_peak
from bench.harness.measure import Row, middle, size
from bench.harness.report import Report
from bench.harness.workers import Contender, race_workers
from bench.kernel_speed.kernel_targets import spread
from bench.kernel_speed.kernels import duration, print_targets
from bench.training_cost.peer_loops import SALUN_NOTE, SUPREME_NOTE, SalunStep, SupremeStep
from bench.training_cost.steps import EngineStep, PlainStep, digits
from engine.cli.console import console
from engine.errors import UserError
from engine.methods.lethe import LetheConfig
from engine.runtime.device import resolve_device

Case = dict[str, Any]

OURS, OURS_COMPILED = "ours", "ours, compiled"
# Targets of this engine: times as fast as the plain loops.
FP32_TARGET, BF16_TARGET = 1.5, 1.15
# A row is compared with the fastest loop of a group, by its median.
BEST_FP32, BEST_BF16, BEST_ANY = "best plain fp32", "best plain bf16", "best plain bf16, compiled too"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A contender, and data for its figures. kind: of its products. group: of the plain loops, as above, or none.

    teacher_passes: forward passes of a frozen model in every step.
    """

    contender: Contender
    kind: Kind
    groups: tuple[str, ...] = ()
    teacher_passes: int = 0


def run_train(
    json_file: Path | None = None,
    quick: bool = False,
    device: str = "auto",
    only: str | None = None,
    threads: int | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Print and return the cases, their rows (one a loop) and the targets with their results.

    only: cases with this in their name. threads: of every loop; None: PyTorch's default. minutes: no case
    begins after that; those left out are named. The file is written after every case.
    """
    where = resolve_device(device)
    cases = _chosen(TRAIN_QUICK if quick else TRAIN_CUDA if where.type == "cuda" else TRAIN_CPU, only)
    threads = threads or torch.get_num_threads()
    report, began = Report(), time.perf_counter()
    console.print(f"{_device_name(where)}, {threads} threads, load average {report.load[0]:.2f}")
    peaks = _peaks(cases, where, threads, quick)
    settings = {
        "device": _device_name(where), "quick": quick, "only": only, "threads": threads, "minutes": minutes,
        "forget_epochs": LetheConfig().forget_epochs,
    }  # fmt: skip
    done: list[Case] = []

    def written() -> dict[str, Any]:
        targets = [target for case in done for target in case["targets"]]
        left = [case.name for case in cases[len(done) :]]
        results = {"settings": settings, "matmul": peaks, "cases": done, "not_begun": left, "targets": targets}
        return report.write(results, json_file)

    for case in cases:
        if minutes is not None and time.perf_counter() - began > 60 * minutes:
            break
        with console.status(escape(case.name)):
            done.append(_measured(case, where, threads, peaks, quick))
        _print(done[-1])
        written()
    results = written()
    if results["not_begun"]:
        console.print(f"not begun within {minutes:g} minutes: {'; '.join(results['not_begun'])}", soft_wrap=True)
    if results["targets"]:
        print_targets(results["targets"], quick)
    return results


def _chosen(cases: Sequence[TrainCase], only: str | None) -> list[TrainCase]:
    chosen = [case for case in cases if only is None or only in case.name]
    if not chosen:
        raise UserError(f"--only {only!r}: in no case's name; there are: {'; '.join(case.name for case in cases)}")
    return chosen


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# --- the loops --------------------------------------------------------------------------------------------------------


def loops_of(case: TrainCase, device: torch.device) -> list[Loop]:
    """Return the loops of a case, this engine's first."""
    step = case.step
    # Left out: each compilation takes time, and on CUDA explicit attention is not competitive.
    compiled = ("sdpa", "eager") if device.type == "cpu" and case.against == "all" else ("sdpa",)
    if case.against == "checkpointing":
        without = dataclasses.replace(step, checkpointing=False)
        plain = [_plain(each, "sdpa") for each in (step, without)]
        return [_ours(step, ", checkpointing"), _ours(without), *plain]
    loops = [_ours(step)]
    if case.against in ("all", "compiled"):
        loops.append(_ours(dataclasses.replace(step, compile=True)))
    for precision in ("fp32", "bf16"):
        of_precision = dataclasses.replace(step, precision=precision)
        if precision != step.precision:
            if case.against not in ("all", "uncompiled"):
                continue
            loops.append(_ours(of_precision, f", {precision}"))
        loops += [_plain(of_precision, attention) for attention in ("sdpa", "eager")]
    if case.against in ("all", "compiled"):
        loops += [_plain(dataclasses.replace(step, compile=True), attention) for attention in compiled]
    if case.against in ("all", "uncompiled"):
        kind: Kind = "tf32" if device.type == "cuda" else "fp32"
        loops += [
            _peer("SalUn's loop", SalunStep, step, SALUN_NOTE, "fp32"),
            _peer("supreme's loop", SupremeStep, step, SUPREME_NOTE, kind, 2 if step.phase == "forget" else 0),
        ]
    return loops


def _ours(step: StepCase, extra: str = "") -> Loop:
    name = (OURS_COMPILED if step.compile else OURS) + extra
    contender = Contender(name=name, build=functools.partial(EngineStep, step), parts=True)
    return Loop(contender=contender, kind=step.precision)


def _plain(step: StepCase, attention: str) -> Loop:
    extras = " compiled" * step.compile + ", checkpointing" * step.checkpointing
    contender = Contender(
        name=f"plain {step.precision} {attention}{extras}",
        build=functools.partial(PlainStep, step, attention=attention),
    )
    groups: tuple[str, ...] = ()
    if not step.checkpointing:
        uncompiled = BEST_FP32 if step.precision == "fp32" else BEST_BF16
        groups = (*(() if step.compile else (uncompiled,)), *((BEST_ANY,) if step.precision == "bf16" else ()))
    teachers = 2 if step.phase == "forget" else 0
    return Loop(contender=contender, kind=step.precision, groups=groups, teacher_passes=teachers)


def _peer(name: str, build: Any, step: StepCase, notes: dict[str, str], kind: Kind, teachers: int = 0) -> Loop:
    contender = Contender(name=name, build=functools.partial(build, step), note=notes[step.phase])
    return Loop(contender=contender, kind=kind, teacher_passes=teachers)


# --- what is measured -------------------------------------------------------------------------------------------------


def _peaks(cases: Sequence[TrainCase], device: torch.device, threads: int, quick: bool) -> dict[Kind, Row]:
    """Return the rate of products of every kind that a loop of the cases has."""
    kinds = sorted({loop.kind for case in cases for loop in loops_of(case, device)})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = QUICK_SHAPES if quick else None
        peaks = {kind: matmul_peak(kind, device, shapes, seconds=1.0 if quick else 8.0) for kind in kinds}
    finally:
        torch.set_num_threads(before)
    for kind, row in peaks.items():
        console.print(f"products in {kind}: at most {row['peak'] / 1e12:.3g} TFLOPS")
    return peaks


def _measured(case: TrainCase, device: torch.device, threads: int, peaks: dict[Kind, Row], quick: bool) -> Case:
    loops = loops_of(case, device)
    rows = race_workers(
        [loop.contender for loop in loops],
        device=device,
        threads=threads,
        rounds=3 if quick else 7,
        seconds=2.0 if quick else 15.0 if device.type == "cuda" else 60.0,
    )
    forward, training = flops_per_image(case.step.model)
    charged = len(digits(case.step, None)) * LetheConfig().forget_epochs
    for loop, row in zip(loops, rows, strict=True):
        if row["status"] != "measured":
            continue
        row.update(median=middle(row["seconds"]), least=min(row["seconds"]), most=max(row["seconds"]))
        row["images_per_second"] = row["batch"] / row["median"]
        row["flops"] = row["batch"] * (training + loop.teacher_passes * forward)
        row["mfu"] = row["flops"] / row["median"] / peaks[loop.kind]["peak"]
        row["prepare_a_step"] = row["prepare_seconds"] / charged * row["batch"] if case.step.phase == "forget" else 0.0
    best = _best(loops, rows)
    for row in rows:
        if row["status"] == "measured":
            row["times"] = {group: times_as_fast(row, other, prepare=False) for group, other in best.items()}
            row["times_with_prepare"] = {group: times_as_fast(row, other) for group, other in best.items()}
    return {
        "case": case.name,
        **dataclasses.asdict(case.step),
        "against": case.against,
        "flops_per_image": {"forward": forward, "forward and backward": training},
        "best": {group: row["contender"] for group, row in best.items()},
        "rows": rows,
        "targets": targets_of(case, rows, best),
    }


def flops_per_image(model: Model) -> tuple[int, int]:
    """Count the flops of the products in (a forward pass, a forward and backward pass) of one image, without memory."""
    with torch.device("meta"):
        network = model.spec().build()
        images = torch.empty(1, *_input_shape(network))
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # plain products, which all versions count
    with FlopCounterMode(display=False) as forward:
        logits = network(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def _input_shape(network: torch.nn.Module) -> tuple[int, ...]:
    embed: Any = network.patch_embed
    return (embed.proj.in_channels, *embed.img_size)


def _best(loops: Sequence[Loop], rows: Sequence[Row]) -> dict[str, Row]:
    """Return the fastest measured loop of every group."""
    best: dict[str, Row] = {}
    for loop, row in zip(loops, rows, strict=True):
        for group in loop.groups if row["status"] == "measured" else ():
            if group not in best or row["median"] < best[group]["median"]:
                best[group] = row
    if BEST_ANY in best and not any(loop.contender.name.endswith("compiled") for loop in loops):
        del best[BEST_ANY]  # nothing compiled took part: the same as BEST_BF16
    return best


def times_as_fast(row: Row, other: Row, *, prepare: bool = True) -> list[float]:
    """Return how many times as fast as the other, round by round.

    prepare: whether the row's time includes its share of `prepare`.
    """
    charge = row["prepare_a_step"] if prepare else 0.0
    pairs = zip(row["seconds"], other["seconds"], strict=True)
    return [(theirs + other["prepare_a_step"] * prepare) / (mine + charge) for mine, theirs in pairs]


def targets_of(case: TrainCase, rows: Sequence[Row], best: dict[str, Row]) -> list[dict[str, Any]]:
    """Return the targets of cases with both float32 and bf16.

    A target has text, passed (None if a plain loop was not measured), numbers.
    """
    if case.against not in ("all", "uncompiled") or case.step.precision != "bf16":
        return []
    targets = []
    named = {row["contender"]: row for row in rows}
    for group, least, mine in (
        (BEST_FP32, FP32_TARGET, [OURS]),
        (BEST_BF16, BF16_TARGET, [OURS]),
        *([(BEST_ANY, BF16_TARGET, [OURS, OURS_COMPILED])] if case.against == "all" else []),
    ):
        measured = [named[name] for name in mine if named[name]["status"] == "measured"]
        if not measured:
            passed: bool | None = False  # without this engine's row the target is missed
            numbers = "; ".join(f"{name}: {named[name]['status']}" for name in mine)
        elif group not in best:
            passed, numbers = None, "no such loop was measured"
        else:
            ours = min(measured, key=lambda row: row["median"])
            times = times_as_fast(ours, best[group])
            passed = middle(times) >= least
            numbers = f"{ours['contender']}: {spread(times)} x {best[group]['contender']}"
            if case.step.phase == "forget":
                numbers += f"; without prepare {spread(times_as_fast(ours, best[group], prepare=False))}"
        targets.append({"target": f"{case.step.name}: {least:g} x {group}", "passed": passed, "numbers": numbers})
    return targets


# --- what is printed --------------------------------------------------------------------------------------------------


def _print(case: Case) -> None:
    short = {BEST_FP32: "x fp32", BEST_BF16: "x bf16", BEST_ANY: "x bf16 or compiled"}
    columns = ["loop", "images/s", "min to max", *(short[group] for group in case["best"])]
    table = Table(title=escape(case["case"]), title_justify="left", header_style="bold")
    for column in [*columns, "peak", "faults/step", "first step", "MFU"]:
        table.add_column(column, justify="left" if column == "loop" else "right")
    below = [f"{short[group]}: {group}, {name}" for group, name in case["best"].items()]
    for row in case["rows"]:
        name = row["contender"]
        if row["status"] != "measured":
            table.add_row(name, row["status"].upper())
            below.append(f"{name}: {row['reason']}")
            continue
        table.add_row(
            name,
            *_speeds(row, 0.0, row["times"]),
            size(row["peak_bytes"]),
            f"{row['page_faults']:,.0f}",
            duration(row["first_seconds"]),
            f"{100 * row['mfu']:.0f}%",
        )
        if row["prepare_a_step"]:
            table.add_row(f"{name}, with prepare", *_speeds(row, row["prepare_a_step"], row["times_with_prepare"]))
            below.append(f"{name}: prepare is {duration(row['prepare_a_step'])} a step")
        if row["note"]:
            below.append(f"{name}: {row['note']}")
        if "parts" in row:
            below.append(f"{name}, by part: {_parts(row['parts'])}")
    console.print(table)
    for line in below:
        console.print(escape(line), style="dim", soft_wrap=True, highlight=False)


def _parts(parts: dict[str, float]) -> str:
    """Format the shares of a step in which the device is synchronised after every part."""
    whole = parts["all"]
    named = {part: seconds for part, seconds in parts.items() if part != "all"}
    named["other"] = whole - sum(named.values())
    shares = ", ".join(f"{part} {100 * seconds / whole:.1f}%" for part, seconds in named.items())
    return f"{shares} of {duration(whole)}"


def _speeds(row: Row, charge: float, times: dict[str, list[float]]) -> list[str]:
    """Format images a second, median and range, and the ratios."""
    speeds = [row["batch"] / (seconds + charge) for seconds in (row["median"], row["most"], row["least"])]
    return [f"{speeds[0]:.1f}", f"{speeds[1]:.1f} to {speeds[2]:.1f}", *(spread(each) for each in times.values())]
