"""Plots of results as PNG, in two styles and one palette that is distinct in grey and for the colour-blind."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression  # type: ignore[import-untyped,unused-ignore]

from engine.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

# Neighbours differ in brightness too; all of them stand out on white and on black.
PALETTE = (BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE)
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
# Height that a line of text in a column of labels takes.
LABEL_INCHES = 0.16


@dataclasses.dataclass(frozen=True)
class Style:
    """Colours of the page that a plot is for."""

    paper: str
    ink: str
    faint: str


LIGHT = Style(paper="#ffffff", ink="#3d4852", faint="#d9dee3")
DARK = Style(paper="#171c22", ink="#d5dbe1", faint="#3d4852")


def figure(
    style: Style, title: str, x: str, y: str = "", size: tuple[float, float] = (4.6, 3.2)
) -> tuple[Figure, Axes]:
    """Create one pair of axes. size: inches; text is 9 points or more, so that the default is legible on a phone."""
    made = Figure(figsize=size, layout="constrained", facecolor=style.paper)
    axes = made.add_subplot(facecolor=style.paper)
    # Of the whole figure, since long names of bars leave the axes little room.
    made.suptitle(
        _wrapped(title, 48), x=0.02, ha="left", fontsize=10, color=style.ink, fontweight="bold", parse_math=False
    )
    for set_label, text in ((axes.set_xlabel, x), (axes.set_ylabel, y)):
        set_label(text, fontsize=9, color=style.ink, parse_math=False)
    axes.tick_params(which="both", labelsize=9, colors=style.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.faint)
    axes.grid(color=style.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    return made, axes


def bars(
    axes: Axes, style: Style, names: Sequence[str], values: Sequence[float], texts: Sequence[str], own: str
) -> None:
    """Draw one bar a name, the first on top, with its text next to it.

    `own` is the name, or its start, to highlight.
    """
    colours = [VERMILLION if name.startswith(own) else BLUE for name in names]
    hatches = [HATCHES[1] if name.startswith(own) else HATCHES[0] for name in names]
    drawn = axes.barh(range(len(names)), values, color=colours, hatch=hatches, edgecolor=style.paper, height=0.7)
    axes.bar_label(drawn, labels=list(texts), padding=3, fontsize=9, color=style.ink)
    _name_rows(axes, names, max(values, default=0.0))


def stacks(axes: Axes, style: Style, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw one bar a name, made of `parts`: the name of each and its value for every bar."""
    left = [0.0] * len(names)
    for number, (part, values) in enumerate(parts.items()):
        axes.barh(
            range(len(names)), values, left=left, color=PALETTE[number % len(PALETTE)],
            hatch=HATCHES[number % len(HATCHES)], edgecolor=style.paper, height=0.7, label=part,
        )  # fmt: skip
        left = [before + value for before, value in zip(left, values, strict=True)]
    _name_rows(axes, names, max(left, default=0.0))


def _name_rows(axes: Axes, names: Sequence[str], longest: float) -> None:
    axes.set_yticks(range(len(names)), [_wrapped(name, 26) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.3 * longest or 1.0)  # room for the texts


def _wrapped(text: str, width: int) -> str:
    return "\n".join(wrapped for line in text.split("\n") for wrapped in textwrap.wrap(line, width) or [""])


def legend(made: Figure, axes: Axes, style: Style, below: bool = False) -> None:
    """Draw the legend next to the data if there is room, or below the axes."""
    if below:
        drawn = made.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=style.ink)
    else:
        drawn = axes.legend(fontsize=9, frameon=False, labelcolor=style.ink)
    for text in drawn.get_texts():
        text.set_parse_math(False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """Text next to the axes for one of their elements. x: None for a line across, which ends at the label."""

    text: str
    y: float
    x: float | None = None
    colour: str
    bold: bool = False


def label_column(made: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Draw names right of the axes in the order of their elements, with a thin line to each, for many series.

    Call it when limits and scales are set. The axes have to be as high as the labels are together: LABEL_INCHES each.
    """
    made.draw_without_rendering()  # the height of the axes is known only after this
    ordered = sorted(labels, key=lambda label: label.y)
    left, _ = axes.get_xlim()
    points = axes.transAxes.inverted().transform(axes.transData.transform([(left, label.y) for label in ordered]))
    step = LABEL_INCHES * made.dpi / axes.get_window_extent().height
    for label, place in zip(ordered, _apart([y for _, y in points], step), strict=True):
        axes.annotate(
            label.text, (1.0 if label.x is None else label.x, label.y), (1.09, place), annotation_clip=False,
            xycoords=axes.get_yaxis_transform() if label.x is None else "data", textcoords="axes fraction",
            color=label.colour, fontsize=9, fontweight="bold" if label.bold else "normal", va="center",
            parse_math=False,
            arrowprops={
                "arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5),
                "shrinkA": 1, "shrinkB": 0 if label.x is None else 3,
            },
        )  # fmt: skip


def _apart(wanted: Sequence[float], step: float) -> list[float]:
    """Return places in [0, 1] as near as possible to the wanted ones, which ascend, at least a step from each other."""
    steps = [step * number for number in range(len(wanted))]
    free = [place - taken for place, taken in zip(wanted, steps, strict=True)]
    moved = isotonic_regression(free, y_min=0, y_max=max(0.0, 1 - steps[-1]))
    return [float(place) + taken for place, taken in zip(moved, steps, strict=True)]


def png(made: Figure, words: str = "") -> bytes:
    """Render without a date or a version: the same numbers give the same bytes. words: a description to store in it."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=180, metadata={"Software": None, "Description": words or None})
    return buffer.getvalue()
