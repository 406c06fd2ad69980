"""The table of `pytest --benchmark`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.measure import size
from bench.regression.against import Compared
from bench.regression.baseline import COUNTED, TIME, Verdict


def lines(
    measured: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]],
    verdicts: Mapping[str, list[Verdict]],
    width: int,
) -> list[str]:
    """Format one line a case: time as a ratio to its reference, and counts with their change from the baseline."""
    table = Table("case", box=None, header_style="bold", pad_edge=False)
    for column in ("ratio", "baseline", "quotient", "threshold", *COUNTED):
        table.add_column(column, justify="right")
    for case, (times, counts) in measured.items():
        known = {verdict.measure: verdict for verdict in verdicts.get(case, [])}
        time = known.get(TIME)
        compared = [f"{value:.3f}" for value in (time.baseline, time.quotient, time.threshold)] if time else ["-"] * 3
        cells = [_amount(measure, counts[measure], known.get(measure)) for measure in COUNTED]
        table.add_row(case, f"{times[TIME]:.3f}", *compared, *cells)
    return _printed(table, width)


def lines_against(
    compared: Mapping[str, Compared], verdicts: Mapping[str, list[Verdict]], revision: str, width: int
) -> list[str]:
    """Format one line a case: the time of a call in the working tree and in the revision, and counts."""
    table = Table("case", box=None, header_style="bold", pad_edge=False)
    for column in ("time", revision, "quotient", "threshold", "rounds", *COUNTED):
        table.add_column(column, justify="right")
    for case, found in compared.items():
        known = {verdict.measure: verdict for verdict in verdicts[case]}
        time = known[TIME]
        cells = [_amount(measure, found.counts[0][measure], known[measure]) for measure in COUNTED]
        table.add_row(
            case, *(f"{1e3 * seconds:.3g} ms" for seconds in (time.now, time.baseline)), f"{time.quotient:.3f}",
            f"{time.threshold:.3f}", str(found.rounds), *cells,
        )  # fmt: skip
    return _printed(table, width)


def _printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def _amount(measure: str, count: float, verdict: Verdict | None) -> str:
    text = f"{count / 1e6:,.1f} M" if measure == "flops" else size(count)
    change = "" if verdict is None or verdict.now == verdict.baseline else f" ({100 * (verdict.quotient - 1):+.2f}%)"
    return f"{text}{change}"
