"""Output of the command: tables and progress bars."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engine.core.result import Progress as Report
from engine.evaluate.membership import DIRECTION
from engine.runtime.progress import format_numbers

# Of several ranks, only the first one prints.
_SILENT = int(os.environ.get("RANK", "0")) > 0

# A file or a pipe has no width; 150 columns are enough for every table.
console = Console(width=None if sys.stdout.isatty() else 150, quiet=_SILENT)


_COLOURS = {"PASS": "green", "FAIL": "red", "INSUFFICIENT EVIDENCE": "yellow"}


def coloured(status: str) -> str:
    """Return the status of a verdict or a gate as rich markup."""
    return f"[{_COLOURS[status]}]{status}[/]"


@contextlib.contextmanager
def progress_bars() -> Iterator[Report]:
    """Yield the callback of `engine.unlearn`, which draws one bar for each phase."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=_SILENT), transient=False) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, step: int, total: int, numbers: dict[str, float]) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, numbers="")
            bars.update(tasks[phase], completed=step, numbers=format_numbers(numbers))

        yield report


def print_metrics(metrics: Mapping[str, Any], name: str = "unlearned", judged: bool = False) -> None:
    """Print the table original / unlearned / retrained of one metrics.json."""
    table = Table(header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in ("forget", "retain", "test", "MIA", "AUC", "gap", "agree"):
        table.add_column(column, justify="right")
    if "original" in metrics:
        _row(table, "untouched", metrics["original"])
    _row(table, name, metrics)
    reference = metrics.get("reference")
    if reference:
        count = reference["count"]
        floor = metrics.get("noise_floor")
        table.add_row(
            f"retrained, {count}" if count > 1 else "retrained",
            *_four(reference),
            f"{floor['average']:.2f}" if floor else "-",
            f"{100 * floor['agreement']['top1']:.1f}" if floor else "-",
        )
    console.print(table)
    console.print(
        f"[dim]forget, retain, test: accuracy in percent. MIA, percent: {DIRECTION['efficacy']}. "
        f"AUC: {DIRECTION['auc']}.[/dim]",
        soft_wrap=True,
    )
    if reference:
        console.print(
            "[dim]gap: mean absolute difference to the retrained model in forget, retain and test accuracy and MIA, in "
            "points; in the last row, between retrained models: the noise floor. agree: percent of the forget "
            "samples on "
            "which both give the same class.[/dim]",
            soft_wrap=True,
        )
        _print_gap_to_mean(metrics.get("gap_to_mean", {}))
    elif not judged:
        console.print(
            "[dim]No retrained model was given (--reference DIR): the numbers above have nothing to be "
            "compared with.[/dim]",
            soft_wrap=True,
        )


def print_seconds(seconds: Mapping[str, float]) -> None:
    shown = ", ".join(f"{key.replace('_', ' ')} {value:.1f} s" for key, value in seconds.items() if key != "data")
    share = (
        f"; unlearning took {100 * seconds['unlearn'] / seconds['retrain']:.0f}% of the retrain"
        if seconds.get("retrain")
        else ""
    )
    phases = sum(value for key, value in seconds.items() if key.endswith("_phase"))
    waiting = f"; {100 * seconds['data'] / phases:.0f}% of the phases was waiting for data" if phases else ""
    console.print(f"time: {shown}{share}{waiting}", soft_wrap=True)


def _print_gap_to_mean(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the gap to the mean of the references, as of `engine.evaluate.gap.gap_report`."""
    if not found:
        return

    def shown(name: str, scale: float = 1.0) -> str:
        numbers = found[name]
        return f"{scale * numbers['value']:.2f} ({scale * numbers['low']:.2f} to {scale * numbers['high']:.2f})"

    parts = [f"gap to the mean of the references {shown('average')} points"]
    if "noise_floor" in found:
        parts.append(f"a reference to the others {shown('noise_floor')}")
    if "share_of_untouched" in found:
        parts.append(f"{shown('share_of_untouched', 100)}% of the untouched model's")
    console.print(f"{'; '.join(parts)}; 95% intervals", soft_wrap=True)


def _row(table: Table, name: str, numbers: Mapping[str, Any]) -> None:
    gap = f"{numbers['gap']['average']:.2f}" if "gap" in numbers else "-"
    agreement = f"{100 * numbers['reference']['agreement']['top1']:.1f}" if "reference" in numbers else "-"
    table.add_row(name, *_four(numbers), gap, agreement)


def _four(numbers: Mapping[str, Any]) -> list[str]:
    accuracy, mia = numbers["accuracy"], numbers["mia"]
    return [
        *(f"{100 * accuracy[key]:.1f}" for key in ("forget", "retain", "test")),
        f"{100 * mia['efficacy']:.1f}",
        f"{mia['auc']:.3f}",
    ]
