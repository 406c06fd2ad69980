"""Pictures of a report as data URIs: figures as SVG, samples as PNG or, if they are photographs, JPEG.

Colours are those of Okabe and Ito and matplotlib's viridis, which readers with colour blindness can distinguish.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from engine.evaluate import Evaluation
from engine.report.data import GalleryItem

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
GREY, INK, FAINT = "#52606d", "#3d4852", "#d9dee3"
_NOT_TERMS = {"phase", "epoch", "step", "grad_norm", "lr", "event", "watched_accuracy", "back_to_step", "points_lost"}

# A curve is drawn through at most this many points, so that the file of a long run stays small.
_MOST_POINTS = 400
_BINS = 20
# Pixels of a gallery picture's longer side. Small images are enlarged to about this size, large ones are reduced to it.
_SIDE = 192


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Attributes:
        src: A data URI.
        alt: Description of the picture in words.
    """

    src: str
    alt: str


def loss_curves(history: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw one figure for each phase, with all terms of its loss by step."""
    pictures = []
    for phase, rows in _by_phase(history).items():
        terms = {key for row in rows for key, value in row.items() if key not in _NOT_TERMS and _is_number(value)}
        if not terms:
            continue
        figure, axes = new_figure(f"Loss, phase {phase}", "step", "loss")
        described = []
        for term, colour in zip(sorted(terms), _cycle(len(terms)), strict=True):
            points = [(row["step"], row[term]) for row in rows if _is_number(row.get(term))]
            steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
            _curve(axes, steps, values, term, colour)
            described.append(f"{term} from {values[0]:.3g} to {values[-1]:.3g} over {len(values)} steps")
        _steps_from_zero(axes, rows)
        legend(axes)
        pictures.append(Picture(svg(figure), f"Loss curve of phase {phase}: {'; '.join(described)}"))
    return pictures


def watched_curves(history: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw the watched accuracy, one figure for each watched phase, with a cross at each collapse."""
    pictures = []
    for phase, rows in _by_phase(history).items():
        watched = [row for row in rows if _is_number(row.get("watched_accuracy"))]
        seen = [(row["step"], 100 * row["watched_accuracy"]) for row in watched if "event" not in row]
        crosses = [(row["step"], 100 * row["watched_accuracy"]) for row in watched if row.get("event") == "collapse"]
        if not seen:
            continue
        figure, axes = new_figure(f"Watched accuracy, phase {phase}", "step", "accuracy (%)")
        axes.plot(*zip(*seen, strict=True), color=BLUE, marker="o", markersize=4, label="watched samples")
        if crosses:
            axes.plot(
                *zip(*crosses, strict=True), color=VERMILLION, marker="X", markersize=10, linestyle="", label="collapse"
            )
        _steps_from_zero(axes, rows)
        axes.set_ylim(-4, 104)
        legend(axes)
        values = [value for _, value in seen]
        pictures.append(
            Picture(
                svg(figure),
                f"Accuracy on the watched samples in phase {phase}: {values[0]:.1f}% at the first check, "
                f"{values[-1]:.1f}% at the last, lowest {min(values):.1f}%{'; it collapsed' if crosses else ''}",
            )
        )
    return pictures


def confidence_histograms(evaluations: Mapping[str, Evaluation]) -> list[Picture]:
    """Draw the probability of the true class, forget samples against test images.

    There is one figure for each model, all on the same axes.
    """
    edges = np.linspace(0, 1, _BINS + 1)
    shares = {
        (name, part): _shares(evaluation.predictions[part].confidence, edges)
        for name, evaluation in evaluations.items()
        for part in ("forget", "test")
    }
    highest = max((float(values.max()) for values in shares.values()), default=1.0)
    pictures = []
    for name, evaluation in evaluations.items():
        figure, axes = new_figure(name.capitalize(), "probability given to the true class", "share of samples (%)")
        axes.stairs(shares[name, "forget"], edges, fill=True, color=BLUE, alpha=0.55, label="forget samples")
        axes.stairs(shares[name, "test"], edges, color=VERMILLION, linewidth=2, label="test images")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.08 * highest)
        legend(axes, "upper center")
        forget, test = (float(np.mean(evaluation.predictions[part].confidence)) for part in ("forget", "test"))
        pictures.append(
            Picture(
                svg(figure),
                f"Histogram of confidence, model {name}: mean probability of the true class {100 * forget:.1f}% on "
                f"forget samples, {100 * test:.1f}% on test images",
            )
        )
    return pictures


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return 100 * np.histogram(values, edges)[0] / max(1, len(values))


def sample_pictures(item: GalleryItem) -> dict[str, Picture]:
    """Draw the pictures of a gallery item.

    Returns:
        image; attention, where lighter patches have more of it; masked, where hidden patches are black and outlined.
        Only image if the attention cannot be read.
    """
    height, width = item.image.shape[:2]
    longer = max(height, width)
    small = longer <= _SIDE // 2
    # Enlarged by whole pixels, so that they and the patches keep sharp edges.
    zoom = _SIDE // longer if small else min(1.0, _SIDE / longer)
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    base = np.asarray(Image.fromarray(item.image).resize((round(width * zoom), round(height * zoom)), method))
    what = f"forget sample {item.id} of class {item.label}"
    pictures = {"image": Picture(_photo(base, small), f"Image: {what}")}
    if item.scores is None or item.mask is None:
        return pictures
    scores, mask = _to_pixels(item.scores, base.shape), _to_pixels(item.mask, base.shape)
    low, high = float(item.scores.min()), float(item.scores.max())
    relative = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    colours = matplotlib.colormaps["viridis"](relative)[..., :3] * 255
    grey = base.mean(-1, keepdims=True)
    masked = np.where(mask[..., None], 0, base)
    masked[_outline(mask)] = [int(VERMILLION[i : i + 2], 16) for i in (1, 3, 5)]
    hidden = f"{int(item.mask.sum())} of {item.mask.size} patches hidden"
    return {
        **pictures,
        "attention": Picture(_photo(0.35 * grey + 0.65 * colours, small), f"Attention of the original model: {what}"),
        "masked": Picture(_photo(masked, small), f"Masked image, {hidden}: {what}"),
    }


def _to_pixels(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.arange(shape[0]) * grid.shape[0] // shape[0]
    columns = np.arange(shape[1]) * grid.shape[1] // shape[1]
    return grid[rows[:, None], columns[None, :]]


def _outline(mask: np.ndarray, thickness: int = 3) -> np.ndarray:
    """Return the rim of a masked area, inside it; the border of the picture counts as rim."""
    padded = np.pad(mask, thickness)
    inner = np.ones_like(mask)
    for down in (0, thickness, 2 * thickness):
        for across in (0, thickness, 2 * thickness):
            inner &= padded[down : down + mask.shape[0], across : across + mask.shape[1]]
    return mask & ~inner


def _photo(pixels: np.ndarray, lossless: bool) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))
    if lossless:  # blocks of equal pixels: small as PNG, blurred by JPEG
        image.save(buffer, "PNG", optimize=True)
        return _uri("image/png", buffer.getvalue())
    image.save(buffer, "JPEG", quality=85)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", buffer.getvalue())


def new_figure(title: str, x: str, y: str, height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", parse_math=False)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return figure, axes


def _steps_from_zero(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    last = max(row["step"] for row in rows)
    axes.set_xlim(-0.04 * max(last, 1), 1.04 * max(last, 1))


def legend(axes: Axes, place: Literal["best", "upper center", "outside"] = "best") -> None:
    """Add a legend; "outside" puts it below the axes."""
    options: dict[str, Any] = {"fontsize": 9, "frameon": False, "labelcolor": INK}
    if place == "outside":  # below the axes, for plots that leave no room inside
        handles, labels = axes.get_legend_handles_labels()
        box = axes.figure.legend(handles, labels, loc="outside lower left", ncols=1, **options)
    else:
        box = axes.legend(loc=place, **options)
    for text in box.get_texts():
        text.set_parse_math(False)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """Draw the values and their running mean.

    If there are many values, they are drawn faint; if there are few, the mean is left out.
    """
    window = len(values) // 30
    if window < 2:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(values) == 1 else "", label=label)
        return
    axes.plot(_thinned(steps), _thinned(values), color=colour, alpha=0.3, linewidth=0.8)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(
        _thinned(steps[window - 1 :]), _thinned(smooth), color=colour, linewidth=1.8, label=f"{label} (running mean)"
    )


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return means of neighbours, so that at most `_MOST_POINTS` are left."""
    block = math.ceil(len(values) / _MOST_POINTS)
    return np.array([values[i : i + block].mean() for i in range(0, len(values), block)])


def _cycle(count: int) -> list[str]:
    colours = [BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY]
    return [colours[i % len(colours)] for i in range(count)]


def _by_phase(history: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows by phase; a repeated name, as of a method's alternating phases, is numbered."""
    phases: dict[str, list[Mapping[str, Any]]] = {}
    before, times, key = None, collections.Counter[str](), ""
    for row in history:
        if "phase" not in row or "step" not in row:
            continue
        name = str(row["phase"])
        if name != before or row["step"] < phases[key][-1]["step"]:
            times[name] += 1
            key = name if times[name] == 1 else f"{name} ({times[name]})"
        before = name
        phases.setdefault(key, []).append(row)
    return phases


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
