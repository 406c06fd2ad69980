"""Plots of results as PNG, drawn alike: two styles, one palette that is told apart in grey and by the colour-blind."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

# Neighbours differ in brightness too; all of them stand out on white and on black.
PALETTE = (BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE)
MARKERS = ("o", "s", "^", "D", "v", "X")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


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
    """One pair of axes. size: inches; text is 9 points or more, so that the default is read on a phone."""
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


def look(number: int) -> tuple[str, str]:
    """(colour, marker) of the series with this number; eighteen series and more begin again."""
    turn = number // len(PALETTE)
    return PALETTE[number % len(PALETTE)], MARKERS[(number + turn) % len(MARKERS)]


def bars(
    axes: Axes, style: Style, names: Sequence[str], values: Sequence[float], texts: Sequence[str], own: str
) -> None:
    """A bar a name, the first on top, its text beside it; `own` is the name (or the start of it) that stands out."""
    colours = [VERMILLION if name.startswith(own) else BLUE for name in names]
    hatches = [HATCHES[1] if name.startswith(own) else HATCHES[0] for name in names]
    drawn = axes.barh(range(len(names)), values, color=colours, hatch=hatches, edgecolor=style.paper, height=0.7)
    axes.bar_label(drawn, labels=list(texts), padding=3, fontsize=9, color=style.ink)
    _name_rows(axes, names, max(values, default=0.0))


def stacks(axes: Axes, style: Style, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """A bar a name, made of `parts`: the name of each and its value for every bar."""
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
    """Beside the data where there is room, or below the axes."""
    if below:
        drawn = made.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=style.ink)
    else:
        drawn = axes.legend(fontsize=9, frameon=False, labelcolor=style.ink)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def png(made: Figure) -> bytes:
    """Without a date or a version in it: the same numbers give the same bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()
