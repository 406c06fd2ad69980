"""Compare this project's kernels with the installed libraries, correctness first: `python -m bench kernels`.

On the CPU: images to masked images with everything counted, InfoNCE forward and backward, the shape LetheViT uses.
On CUDA: the same with Triton and torch.compile, over model sizes and batches, with the share of roofline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from bench.harness import roofline
from bench.harness.measure import Row, free_bytes, measure, middle, ratios, size
from bench.harness.report import Report
from bench.kernel_speed.kernel_peers import InfoNCECase, info_nce_contenders, mask_contenders, paired_contenders
from bench.kernel_speed.kernel_targets import CONTRAST, MASK, MASKING, RANKING, spread, targets_of
from bench.kernel_speed.rollout_peers import PLAIN, KernelCase, RolloutCase, kernel_contenders, rollout_contenders
from engine.cli.console import console
from engine.models.attention_masking import count_masked
from engine.models.spec import ModelSpec
from engine.models.vit import attention_info, attention_modules
from engine.runtime.device import resolve_device

Only = Literal["rollout", "info_nce", "mask"]
Case = dict[str, Any]

# Distributions of the contenders, in addition to those that every result names.
PEERS = ("fast-vit-rollout", "info-nce-pytorch", "open_clip_torch", "memeff", "inf-cl", "lightly")
SHARE = 0.05  # of the patches are masked
TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes to measure. models: name, timm's name, arguments, batches. paired: B, K, D. masked: B, pixels, patch."""

    models: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...]
    info_nce_batches: tuple[int, ...]
    info_nce_widths: tuple[int, ...]
    paired: tuple[int, int, int] = (256, 1, 1000)
    masked: tuple[int, int, int] = (256, 224, 16)
    rounds: int = 7


CPU = Plan(
    models=(
        ("ViT-B/16 224", "vit_base_patch16_224", {}, (8,)),
        ("ViT-S/16 224", "vit_small_patch16_224", {}, (32,)),
    ),
    info_nce_batches=(8_192, 65_536),
    info_nce_widths=(128,),
)
CUDA = Plan(
    models=tuple(
        (f"ViT-{size[0].upper()}/16 {pixels}", f"vit_{size}_patch16_{pixels}", {}, (1, 32, 256))
        for size in ("small", "base", "large")
        for pixels in (224, 384)
    ),
    info_nce_batches=(256, 1_024, 4_096, 16_384, 65_536),
    info_nce_widths=(128, 512),
    rounds=20,
)
QUICK = Plan(
    models=(
        (
            "tiny ViT",
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2},
            (4,),
        ),
    ),
    info_nce_batches=(64, 512),
    info_nce_widths=(16,),
    paired=(8, 1, 10),
    masked=(4, 32, 8),
    rounds=3,
)
# A single call of InfoNCE takes minutes on a CPU from here on.
ONCE_FROM = 32_768


def run_kernels(
    json_file: Path | None = None,
    device: str = "auto",
    quick: bool = False,
    only: Only | None = None,
    slow_peers: bool = False,
) -> dict[str, Any]:
    """Print and return the cases, their rows (one a contender) and the targets with their results."""
    where = resolve_device(device)
    plan = QUICK if quick else CUDA if where.type == "cuda" else CPU
    report = Report(environment={"peers": _versions(PEERS)})
    console.print(f"{_device_name(where)}, {torch.get_num_threads()} threads, load average {report.load[0]:.2f}")
    cases: list[Case] = []
    for op, section in (("rollout", _rollout), ("info_nce", _info_nce), ("mask", _mask)):
        if only in (None, op):
            for case in section(plan, where, slow_peers):
                cases.append(case)
                _print(case)
    targets = [target for case in cases for target in targets_of(case, plan.info_nce_batches[-1])]
    settings = {
        "device": _device_name(where),
        "quick": quick,
        "only": only,
        "slow_peers": slow_peers,
        "masked_share": SHARE,
        "temperature": TEMPERATURE,
        **dataclasses.asdict(plan),
    }
    print_targets(targets, quick)
    return report.write({"settings": settings, "cases": cases, "targets": targets}, json_file)


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _backends(device: torch.device) -> dict[str, str]:
    """Return this project's contenders by name; targets refer to the first."""
    return {"ours, triton": "triton", "ours, eager": "eager"} if device.type == "cuda" else {"ours": "eager"}


# --- what is measured -------------------------------------------------------------------------------------------------


def _rollout(plan: Plan, device: torch.device, _slow_peers: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, architecture, arguments, batches in plan.models:
        spec = ModelSpec(architecture=architecture, num_classes=1000, model_args=arguments, pretrained_cfg={})
        model = _attentive(spec.build(seed=0)).eval().to(device, dtype)
        info = attention_info(model)
        for batch in batches:
            images = torch.randn(batch, info.in_chans, *info.input_size, generator=torch.Generator().manual_seed(0))
            case = RolloutCase.of(model, info, images.to(device, dtype), count_masked(info, SHARE))
            backends = _backends(device)
            rows = measure(rollout_contenders(case, backends), device=device, rounds=plan.rounds)
            _add_extra_memory(rows, case.maps_bytes())
            shape = _shape(case)
            yield _case(
                MASKING, f"{name}, batch {batch}", rows, next(iter(backends)),
                **shape, masked_patches=case.k, maps_bytes=case.maps_bytes(), dtype=str(dtype),
            )  # fmt: skip
            if device.type == "cuda":
                rows = measure(kernel_contenders(KernelCase.of(case)), device=device, rounds=plan.rounds)
                cost = roofline.rollout_cost(**shape, itemsize=dtype.itemsize)
                _add_roofline(rows, cost, device, dtype)
                yield _case(RANKING, f"{name}, batch {batch}", rows, "ours, triton", **shape, dtype=str(dtype))


def _attentive(model: nn.Module) -> nn.Module:
    """Enlarge the attention weights: with small random ones the attention is uniform and there is nothing to rank."""
    with torch.no_grad():
        for module in attention_modules(model):
            module.qkv.weight.mul_(3)  # type: ignore[union-attr, operator]
    return model


def _shape(case: RolloutCase) -> dict[str, int]:
    """Return L, B, H, N, d: the arguments of `rollout_cost`."""
    modules = attention_modules(case.model)
    heads = int(modules[0].num_heads)  # type: ignore[arg-type]
    tokens = case.info.num_prefix_tokens + case.info.num_patches
    return {
        "layers": len(modules),
        "batch": len(case.images),
        "heads": heads,
        "tokens": tokens,
        "width": case.info.width // heads,
    }


def _info_nce(plan: Plan, device: torch.device, slow_peers: bool) -> Iterator[Case]:
    backends = _backends(device)
    ours = next(iter(backends))
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for width in plan.info_nce_widths:
            smaller: dict[str, int] = {}  # peak of each contender at the batch before
            for before, batch in zip((0, *plan.info_nce_batches), plan.info_nce_batches, strict=False):
                case = InfoNCECase.in_batch(*_pairs(batch, width, device, dtype), TEMPERATURE)
                contenders = info_nce_contenders(case, backends, slow_peers)
                too_large = _too_large(smaller, before, batch, dtype, device)
                rows = measure(
                    [contender for contender in contenders if contender.name not in too_large],
                    device=device,
                    rounds=plan.rounds,
                    once=device.type == "cpu" and batch >= ONCE_FROM,
                )
                rows += [
                    {"contender": name, "note": "", "status": "not run", "reason": reason}
                    for name, reason in too_large.items()
                ]
                smaller = {row["contender"]: row["peak_bytes"] for row in rows if "peak_bytes" in row}
                # float32 inputs may be multiplied in tf32: its peak is the bound that no kernel beats.
                kind = "tf32" if dtype == torch.float32 else dtype
                _add_roofline(rows, roofline.info_nce_cost(batch, batch, width, dtype.itemsize), device, kind)
                name = f"in-batch negatives, B={batch:,} D={width}, {str(dtype).removeprefix('torch.')}"
                shape = {"batch": batch, "width": width, "dtype": str(dtype)}
                yield _case(CONTRAST, name, rows, ours, **shape)
    batch, count, width = plan.paired
    anchors, positives = _pairs(batch, width, device, torch.float32)
    negatives = torch.randn(batch, count, width, generator=torch.Generator().manual_seed(1)).to(device)
    paired = InfoNCECase.paired(anchors, positives, negatives, TEMPERATURE)
    rows = measure(paired_contenders(paired, backends), device=device, rounds=10 * plan.rounds)
    yield _case(
        CONTRAST, f"paired negatives [{batch}, {count}, {width}]: LetheViT's shape", rows, ours,
        batch=batch, negatives=count, width=width, dtype="torch.float32",
    )  # fmt: skip


def _pairs(batch: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return anchors and positives similar to them, as in training: the loss is neither zero nor that of chance."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(batch, width, generator=generator)
    positives = anchors + 0.5 * torch.randn(batch, width, generator=generator)
    return anchors.to(device, dtype), positives.to(device, dtype)


def _too_large(
    smaller: dict[str, int], before: int, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Return contenders that stored B x B similarities at the smaller batch and would not fit at this one, and why."""
    free = free_bytes(device)
    reasons = {}
    for name, peak in smaller.items():
        quadratic = peak >= before**2 * dtype.itemsize
        if quadratic and peak * (batch / before) ** 2 > free:
            reasons[name] = (
                f"needs {size(batch**2 * dtype.itemsize)} for one matrix of similarities (computed: B x B x"
                f" {dtype.itemsize} bytes); its peak at B={before:,} was {size(peak)}, {size(free)} are free"
            )
    return reasons


def _mask(plan: Plan, device: torch.device, _slow_peers: bool) -> Iterator[Case]:
    batch, pixels, patch = plan.masked
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device)
    mask = (torch.rand(batch, (pixels // patch) ** 2, generator=generator) < SHARE).to(device)
    backends = _backends(device)
    rows = measure(mask_contenders(images, mask, patch, backends), device=device, rounds=3 * plan.rounds)
    yield _case(
        MASK, f"images [{batch}, 3, {pixels}, {pixels}], patches of {patch}", rows, next(iter(backends)),
        batch=batch, pixels=pixels, patch=patch, dtype="torch.float32",
    )  # fmt: skip


# --- what the rows say ------------------------------------------------------------------------------------------------


def _case(work: str, name: str, rows: list[Row], ours: str, **shape: Any) -> Case:
    """Add median, range and the multiple of this project's time to each measured row."""
    mine = _row(rows, ours)
    for row in rows:
        if row["status"] == "measured":
            row.update(median=middle(row["seconds"]), least=min(row["seconds"]), most=max(row["seconds"]))
            if mine["status"] == "measured":
                row["times_ours"] = ratios(row, mine)
    return {"work": work, "case": name, "shape": shape, "ours": ours, "rows": rows}


def _row(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row["contender"] == name)


def _add_extra_memory(rows: list[Row], maps_bytes: int) -> None:
    """Add the peak above that of the plain forward pass, in bytes and as a share of all layers' maps."""
    plain = _row(rows, PLAIN)
    for row in rows:
        if "peak_bytes" in row and "peak_bytes" in plain:
            row["extra_bytes"] = row["peak_bytes"] - plain["peak_bytes"]
            row["extra_of_maps"] = row["extra_bytes"] / maps_bytes


def _add_roofline(rows: list[Row], cost: roofline.Cost, device: torch.device, dtype: str | torch.dtype) -> None:
    if device.type != "cuda":
        return
    for row in rows:
        if "seconds" in row:
            row["of_roofline"] = roofline.share(cost, _device_name(device), dtype, middle(row["seconds"]))


# --- what is printed --------------------------------------------------------------------------------------------------


def _print(case: Case) -> None:
    title = f"{case['work']}: {case['case']}"
    table = Table("contender", title=escape(title), title_justify="left", header_style="bold")
    maps = "maps_bytes" in case["shape"]
    shares = any("of_roofline" in row for row in case["rows"])
    columns = ["median", "min to max", "x ours", "peak", *(["extra", "of maps"] if maps else [])]
    for column in [*columns, *(["roofline"] if shares else [])]:
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in case["rows"]:
        if row["status"] != "measured":
            why = escape(f"{row['status'].upper()}: {row['reason']}")  # "[bench]" in it is no markup
            table.add_row(row["contender"], *[""] * (len(table.columns) - 2), why)
            continue
        cells = [
            duration(row["median"]),
            f"{duration(row['least'])} to {duration(row['most'])}",
            spread(row["times_ours"]) if "times_ours" in row else "-",
            size(row["peak_bytes"]),
        ]
        if maps:
            extra = (
                [size(row["extra_bytes"]), f"{100 * row['extra_of_maps']:.1f}%"] if "extra_bytes" in row else ["-"] * 2
            )
            cells += extra
        if shares:
            share = row["of_roofline"]
            cells.append(f"{100 * share:.0f}%" if share is not None else "no peaks")
        first = f"first call {duration(row['first_seconds'])}" if "compile" in row["contender"] else ""
        table.add_row(row["contender"], *cells, row["note"] or first)
    console.print(table)
    if maps:
        console.print(
            f"[dim]{size(case['shape']['maps_bytes'])} are the attention maps of all layers; extra: above the peak of"
            f" '{PLAIN}'.[/dim]",
            soft_wrap=True,
        )


def print_targets(targets: list[dict[str, Any]], quick: bool) -> None:
    table = Table("target", "", "reached", title="targets", title_justify="left", header_style="bold")
    for target in targets:
        verdict = {True: "[green]PASS[/green]", False: "[red]MISSED[/red]", None: "NOT MEASURED"}[target["passed"]]
        table.add_row(escape(target["target"]), verdict, target["numbers"])
    console.print(table)
    if quick:
        console.print("[dim]--quick is a smoke test: its figures are no results.[/dim]")


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
