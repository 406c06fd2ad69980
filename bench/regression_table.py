"""The table of `pytest --benchmark`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.baseline import COUNTED, TIME, Verdict
from bench.measure import size


def lines(
    measured: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]],
    verdicts: Mapping[str, list[Verdict]],
    width: int,
) -> list[str]:
    """One line a case: time as a ratio to its reference, and what is counted with its change from the baseline."""
    table = Table("case", box=None, header_style="bold", pad_edge=False)
    for column in ("ratio", "baseline", "quotient", "threshold", *COUNTED):
        table.add_column(column, justify="right")
    for case, (times, counts) in measured.items():
        known = {verdict.measure: verdict for verdict in verdicts.get(case, [])}
        time = known.get(TIME)
        compared = [f"{value:.3f}" for value in (time.baseline, time.quotient, time.threshold)] if time else ["-"] * 3
        cells = [_amount(measure, counts[measure], known.get(measure)) for measure in COUNTED]
        table.add_row(case, f"{times[TIME]:.3f}", *compared, *cells)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def _amount(measure: str, count: float, verdict: Verdict | None) -> str:
    text = f"{count / 1e6:,.1f} M" if measure == "flops" else size(count)
    change = "" if verdict is None or verdict.now == verdict.baseline else f" ({100 * (verdict.quotient - 1):+.2f}%)"
    return f"{text}{change}"
