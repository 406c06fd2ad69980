"""Summary of the rows of `bench.quality.retrain_cost`: means over seeds, stability of the order, and a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import kendalltau  # type: ignore[import-untyped,unused-ignore]

from bench.harness.measure import mean_and_half_range, spread
from engine.cli.console import console
from engine.methods import list_methods

Row = dict[str, Any]

# Highlighted in tables and pictures: the published method and that of this project.
OWN = ("lethe", "lethe_plus")
# Figures of the summary, and their places in a row.
PLACES: dict[str, tuple[str, ...]] = {
    "seconds": ("seconds", "total"),
    "unlearn_seconds": ("seconds", "unlearn"),
    "evaluate_seconds": ("seconds", "evaluate"),
    "share": ("share",),
    "images_share": ("images_share",),
    "gap": ("gap", "average"),
    "gap_to_floor": ("gap_to_floor",),
    "forget": ("accuracy", "forget"),
    "retain": ("accuracy", "retain"),
    "test": ("accuracy", "test"),
    "efficacy": ("mia", "efficacy"),
    "auc": ("mia", "auc"),
    "agreement": ("agreement",),
    "score": ("score",),
    "joules": ("joules",),
    "money": ("money",),
}


def with_images(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `images_share`: images of their training steps over those of the retrain of their seed."""
    whole = {row["seed"]: sum(row["samples_seen"].values()) for row in rows if row["method"] == "retrain"}
    return [
        {
            **row,
            "images_share": sum(row["samples_seen"].values()) / whole[row["seed"]] if row["seed"] in whole else None,
        }
        for row in rows
    ]


def mean_of(values: Sequence[float]) -> Any:
    return sum(values) / len(values) if values else None


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return one entry a method, in the order of the registry."""
    entries = []
    for method in list_methods():
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            numbers = {key: over_seeds(chosen, path) for key, path in PLACES.items()}
            collapsed = sum(row["collapsed"] for row in chosen)
            entries.append({"method": method, "seeds": len(chosen), **numbers, "collapsed": collapsed})
    return entries


def rank_stability(rows: Sequence[Row]) -> dict[str, float] | None:
    """Measure whether seeds agree on the order of the methods by average gap: see `stability` in `retrain_cost`."""
    gaps: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["gap"] is not None and row["method"] != "retrain":
            gaps.setdefault(row["method"], {})[row["seed"]] = row["gap"]["average"]
    taus = []
    for one, other in itertools.combinations(sorted({seed for found in gaps.values() for seed in found}), 2):
        both = [(found[one], found[other]) for found in gaps.values() if one in found and other in found]
        if len(both) > 2:
            taus.append(float(kendalltau(*zip(*both, strict=True)).statistic))
    return {"mean": mean_of(taus), "least": min(taus)} if taus else None


def foresight(summary: Sequence[Row]) -> float | None:
    """Measure whether the score, which uses no retrained model, orders the methods as their gap does."""
    both = [(each["score"], each["gap"]) for each in summary if each["method"] != "retrain"]
    known = [(score["mean"], gap["mean"]) for score, gap in both if score and gap]
    return float(kendalltau(*zip(*known, strict=True)).statistic) if len(known) > 2 else None


def over_seeds(rows: Sequence[Row], path: Sequence[str]) -> dict[str, float] | None:
    """Return {mean, half_range} of the rows' values at a place; None if no row has a value."""
    values = _values(rows, path)
    return dict(zip(("mean", "half_range"), mean_and_half_range(values), strict=True)) if values else None


def _values(rows: Sequence[Row], path: Sequence[str]) -> list[float]:
    """Return the rows' values at a place; rows without one are left out."""
    found: list[Any] = list(rows)
    for step in path:
        found = [value[step] for value in found if value.get(step) is not None]
    return found


def print_task(name: str, entry: Row) -> None:
    shown = entry["samples"]
    table = Table(
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{name}: {shown['forget']} samples to forget, {shown['retain']} to retain, {shown['test']} for the test",
    )
    table.add_column("method", no_wrap=True)
    # Columns: (heading, key, digits, factor, whether its spread is shown too).
    columns: list[tuple[str, str, int, float, bool]] = [
        *((f"{key} %", key, 1, 100.0, True) for key in ("forget", "retain", "test")),
        ("MIA %", "efficacy", 1, 100.0, True),
        ("AUC", "auc", 3, 1.0, False),
        ("gap", "gap", 2, 1.0, True),
        ("/ floor", "gap_to_floor", 1, 1.0, False),
        ("agree %", "agreement", 1, 100.0, False),
        ("score", "score", 2, 1.0, False),
        ("total s", "seconds", 1, 1.0, True),
        ("images %", "images_share", 1, 100.0, True),
        ("joules", "joules", 0, 1.0, False),
        ("money", "money", 4, 1.0, False),
    ]
    columns = [column for column in columns if _values(entry["rows"], PLACES[column[1]])]
    for column in columns:
        table.add_column(column[0], justify="right", overflow="fold")
    table.add_row("untouched", *(_cell([entry["untouched"]], *column[1:]) for column in columns))
    for found in sorted(entry["summary"], key=lambda each: (each["gap"] or {"mean": math.inf})["mean"]):
        rows = [row for row in entry["rows"] if row["method"] == found["method"]]
        collapsed = f", {found['collapsed']} collapsed" if found["collapsed"] else ""
        table.add_row(found["method"] + collapsed, *(_cell(rows, *column[1:]) for column in columns))
    console.print(table)
    floor, stability = entry["noise_floor"], entry["stability"]
    if entry["foresight"] is not None:
        console.print(
            f"[dim]order of the methods by score, without a retrained model, and by gap: Kendall's tau "
            f"{entry['foresight']:.2f}[/dim]",
            soft_wrap=True,
        )
    if stability:
        console.print(
            f"[dim]order of the methods by gap between seeds: Kendall's tau {stability['mean']:.2f} in the mean, "
            f"{stability['least']:.2f} at least[/dim]",
            soft_wrap=True,
        )
    console.print(
        "[dim]mean (± half of the range over seeds); noise floor: "
        f"{'none with one reference' if floor is None else f'{floor:.2f} points'}, of {len(entry['references'])} "
        "retrained models; total: end-to-end wall-clock time, evaluation included; images: of training steps, "
        "as a share of the retrain's[/dim]",
        soft_wrap=True,
    )


def _cell(rows: Sequence[Row], key: str, digits: int, factor: float, spreads: bool) -> str:
    values = [factor * value for value in _values(rows, PLACES[key])]
    if not values:
        return "-"
    return spread(values if spreads else [mean_of(values)], digits)
