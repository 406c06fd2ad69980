"""Plots of a proof: numbers with their intervals, by row (dots) or by layer and step (bands).

Models differ by colour and by the shape of mark and line, so that no reader depends on colour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from engine.report.page import number, percent, usable
from engine.report.plots import BLUE, FAINT, GREY, INK, ORANGE, VERMILLION, Picture, legend, new_figure, svg

Number = Mapping[str, Any]  # value, low, high

_MOST_TICKS = 9


@dataclasses.dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    line: str


MODEL = Style(BLUE, "o", "-")
ORIGINAL = Style(VERMILLION, "s", "--")
RETRAINED = Style(GREY, "D", "-.")
MODEL_TO_ORIGINAL = Style(VERMILLION, "o", "-")
MODEL_TO_RETRAINED = Style(BLUE, "s", "-")
ORIGINAL_TO_RETRAINED = Style(ORANGE, "^", "--")


@dataclasses.dataclass(frozen=True)
class Series:
    """Numbers of one model or pair of models.

    Attributes:
        name: Name in the legend.
        style: Colour, mark and line.
        numbers: {"value", "low", "high"} of each row or tick. None, or a value that is no number: not measured.
    """

    name: str
    style: Style
    numbers: Sequence[Number | None]

    def columns(self) -> np.ndarray:
        """Return value, low and high as [3, n], NaN if not measured. A missing end is replaced by the value."""
        rows: list[list[Any]] = []
        for each in self.numbers:
            value = each.get("value") if each else None
            if each is None or not usable(value):
                rows.append([np.nan] * 3)
            else:
                rows.append([value, *(each[end] if usable(each.get(end)) else value for end in ("low", "high"))])
        return np.array(rows, dtype=float).reshape(-1, 3).T


def dot_plot(
    title: str,
    axis: str,
    rows: Sequence[str],
    series: Sequence[Series],
    *,
    line: float | None = None,
    shares: bool = False,
) -> list[Picture]:
    """Draw a mark and a bar for each row and series.

    Args:
        title: Title of the figure.
        axis: Label of the axis.
        rows: Names of the rows.
        series: The numbers.
        line: Value to compare with; None: no line.
        shares: Show fractions in percent.

    Returns:
        One picture; none if nothing was measured.
    """
    drawn = _measured(series)
    if not drawn:
        return []
    height = 0.95 + 0.2 * len(drawn) + len(rows) * (0.16 + 0.12 * len(drawn))
    figure, axes = new_figure(_short(title, 30), axis, "", height=height)
    axes.grid(visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    scale = 100 if shares else 1
    if line is not None:
        axes.axvline(scale * line, color=INK, linewidth=1, linestyle=":")
    for place, (each, columns) in enumerate(drawn):
        value, low, high = scale * columns
        y = -np.arange(len(rows)) - 0.22 * (place - (len(drawn) - 1) / 2)
        axes.hlines(y, low, high, color=each.style.colour, linewidth=1.6)
        axes.plot(value, y, each.style.marker, color=each.style.colour, markersize=5, label=each.name)
    axes.set_yticks(-np.arange(len(rows)), [_short(row) for row in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.5 - len(rows), 0.5)
    legend(axes, "outside")
    text = "; ".join(
        f"{row}: "
        + ", ".join(f"{each.name} {_words(columns[:, i], shares)}" for each, columns in drawn if _has(columns, i))
        for i, row in enumerate(rows)
        if any(_has(columns, i) for _, columns in drawn)
    )
    against = "" if line is None else f". Dotted line at {_text(line, shares)}"
    return [Picture(svg(figure), f"Dot plot of {title}. {text}{against}")]


def band_plot(
    title: str,
    x: str,
    y: str,
    ticks: Sequence[str],
    series: Sequence[Series],
    *,
    line: float | None = None,
    shares: bool = False,
) -> list[Picture]:
    """Draw a line with its band for each series, over ticks at equal distances; otherwise as `dot_plot`."""
    drawn = _measured(series)
    if not drawn:
        return []
    figure, axes = new_figure(_short(title, 38), x, y, height=2.5 + 0.2 * len(drawn))
    scale = 100 if shares else 1
    places = np.arange(len(ticks))
    if line is not None:
        axes.axhline(scale * line, color=INK, linewidth=1, linestyle=":")
    for each, columns in drawn:
        _line(axes, places, scale * columns, each)
    every = -(-len(ticks) // _MOST_TICKS)
    shown = sorted({*range(0, len(ticks), every), len(ticks) - 1} - ({len(ticks) - 2} if every > 1 else set()))
    axes.set_xticks(shown, [_short(ticks[i]) for i in shown], parse_math=False)
    legend(axes, "outside")
    text = "; ".join(f"{each.name} {_course(columns, ticks, shares)}" for each, columns in drawn)
    against = "" if line is None else f". Dotted line at {_text(line, shares)}"
    return [Picture(svg(figure), f"{title} ({y}) by {x}. {text}{against}")]


def _line(axes: Axes, places: np.ndarray, columns: np.ndarray, series: Series) -> None:
    value, low, high = columns
    style = series.style
    axes.fill_between(places, low, high, color=style.colour, alpha=0.16, linewidth=0)
    axes.plot(
        places,
        value,
        style.line,
        color=style.colour,
        marker=style.marker,
        markersize=4,
        linewidth=1.6,
        label=series.name,
    )


def _measured(series: Sequence[Series]) -> list[tuple[Series, np.ndarray]]:
    found = [(each, each.columns()) for each in series]
    return [(each, columns) for each, columns in found if np.isfinite(columns[0]).any()]


def _course(columns: np.ndarray, ticks: Sequence[str], shares: bool) -> str:
    seen = [i for i in range(len(ticks)) if _has(columns, i)]
    ends = dict.fromkeys([seen[0], seen[-1]])
    return ", ".join(f"{_words(columns[:, i], shares)} at {ticks[i]}" for i in ends)


def _has(columns: np.ndarray, i: int) -> bool:
    return bool(np.isfinite(columns[0, i]))


def _words(columns: np.ndarray, shares: bool) -> str:
    value, low, high = columns.tolist()
    return f"{_text(value, shares)} ({_text(low, shares)} to {_text(high, shares)})"


def _text(value: float, shares: bool) -> str:
    return percent(value) if shares else number(value, 3)


def _short(text: str, most: int = 24) -> str:
    """Shorten a text to fit next to or above a plot; the table has the whole name."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
