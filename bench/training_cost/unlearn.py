"""Measure how the cost of unlearning grows, and compare fitted with expected exponents: `python -m bench unlearn`.

All sizes of a curve are measured in every round. A curve passes if its exponent is within the tolerance of the
expected one and that of its two largest sizes is not above it: an accidental O(N^2) with a small factor is steep only
at large sizes. Otherwise the table has LOOK, which does not change the exit code.

The JSON, below the heading of `bench.harness.report`:

    {"settings": {...},
     "curves": [{"section": "forget" | "retain" | "dataset" | "resolution" | "model" | "info_nce" | "ranks",
                 "name": str, "quantity": "seconds" | "bytes", "variable": str, "sizes": [number, ...],
                 "labels": [str, ...], "values": [[of each round, ...] of each size, ...], "note": str,
                 "exponent": float, "uncertainty": float, "exponent_of_largest_two": float,
                 "expected": float, "tolerance": float, "why": str, "within": bool}],
     "skipped": [{"section": str, "reason": str}]}

sizes are in units of `variable`; labels are their names in tables. For uncertainty see
`bench.training_cost.unlearn_curves.Fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from bench.harness import plots
from bench.harness.cases import SCALING
from bench.harness.measure import middle, size
from bench.harness.report import Report
from bench.kernel_speed.kernels import duration
from bench.publish import pictures
from bench.training_cost.unlearn_curves import SECTIONS, Setting, SkippedError
from engine.cli.console import console
from engine.errors import UserError, nearest
from engine.runtime.allocator import keeping_freed_memory
from engine.runtime.device import resolve_device


def run_unlearn(
    json_file: Path | None = None,
    device: str = "auto",
    quick: bool = False,
    only: Sequence[str] = (),
    plot: Path | None = None,
) -> dict[str, Any]:
    """Print and return the curves. only: sections by name. Raises UserError for an unknown section."""
    for name in only:
        if name not in SECTIONS:
            raise UserError(f"--only {name}: no such section{nearest(name, SECTIONS)}")
    report, setting = Report(), Setting(resolve_device(device), quick)
    console.print(f"{setting.device}, {torch.get_num_threads()} threads, load average {report.load[0]:.2f}")
    curves: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with keeping_freed_memory(setting.device):  # as within a run of the engine
        for name in only or SECTIONS:
            try:
                for curve in SECTIONS[name](setting, SCALING[name]):
                    curves.append(curve.judged(name))
                    console.print(f"[dim]{name}: {escape(curve.name)}[/dim]")
            except SkippedError as reason:
                skipped.append({"section": name, "reason": str(reason)})
    _print(curves, skipped, quick)
    if plot and curves:
        names = [f"{curve['section']} {curve['name']}" for curve in curves]
        pictures.write(pictures.scaling({"curves": curves}, plots.LIGHT), names, plot)
    settings = {"device": str(setting.device), "quick": quick, "threads": torch.get_num_threads()}
    return report.write({"settings": settings, "curves": curves, "skipped": skipped}, json_file)


def _print(curves: Sequence[dict[str, Any]], skipped: Sequence[dict[str, str]], quick: bool) -> None:
    table = Table("cost", "of", title="cost ~ size^exponent", title_justify="left", header_style="bold")
    for column in ("from", "to", "exponent", "last two", "expected"):
        table.add_column(column, justify="right")
    table.add_column("")
    table.add_column("why that is expected")
    for curve in curves:
        shown = size if curve["quantity"] == "bytes" else duration
        table.add_row(
            f"{curve['name']}, {curve['quantity']}",
            f"{curve['variable']}, {curve['labels'][0]} to {curve['labels'][-1]}",
            shown(middle(curve["values"][0])),
            shown(middle(curve["values"][-1])),
            f"{curve['exponent']:.2f} ± {curve['uncertainty']:.2f}",
            f"{curve['exponent_of_largest_two']:.2f}",
            f"{curve['expected']:.2f} ± {curve['tolerance']:.2f}",
            verdict(curve),
            "; ".join(filter(None, (curve["why"], curve["note"]))),
        )
    console.print(table)
    for each in skipped:
        console.print(escape(f"{each['section']}: SKIPPED, {each['reason']}"), soft_wrap=True)
    if quick:
        console.print("[dim]--quick is a smoke test: its exponents are no results.[/dim]")


def verdict(curve: dict[str, Any]) -> str:
    """Return the verdict in rich's markup."""
    return "[green]PASS[/green]" if curve["within"] else "[red]LOOK[/red]"
