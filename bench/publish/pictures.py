"""Plots of bench.html, by the kind of result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from bench.harness import plots
from bench.harness.measure import middle, size
from bench.harness.plots import Style
from bench.kernel_speed.kernels import duration
from bench.quality.retrain_summary import OWN
from engine.report.plots import BLUE, VERMILLION

Report = dict[str, Any]
# A figure, and its description.
Drawn = tuple[Figure, str]


def kernels(report: Report, style: Style) -> Iterator[Drawn]:
    """Draw two figures a case: median time and peak memory of every contender that was measured."""
    for case in report["cases"]:
        rows = [row for row in case["rows"] if row["status"] == "measured"]
        if not rows:
            continue
        names, title = [row["contender"] for row in rows], f"{case['work']}\n{case['case']}"
        yield _bars(style, title, "seconds, median", names, [row["median"] for row in rows], duration)
        yield _bars(
            style, title, "peak memory, MiB", names, [row["peak_bytes"] / 2**20 for row in rows],
            lambda mebibytes: size(mebibytes * 2**20),
        )  # fmt: skip


def data(report: Report, style: Style) -> Iterator[Drawn]:
    for case in report["decoding"]:
        names, values = zip(*((row["contender"], row["images_per_second"]) for row in case["rows"]), strict=True)
        title = case["work"].replace(": ", ":\n")
        yield _bars(style, title, "images a second and core", list(names), list(values), "{:.0f}".format)


def _bars(
    style: Style, title: str, x: str, names: list[str], values: list[float], text: Callable[[float], str]
) -> Drawn:
    figure, axes = plots.figure(style, title, x, size=(4.6, 1.3 + 0.42 * len(names)))
    plots.bars(axes, style, names, values, [text(value) for value in values], own="ours")
    words = "; ".join(f"{name} {text(value)}" for name, value in zip(names, values, strict=True))
    return figure, f"{title}, {x}: {words}".replace("\n", " ")


def train(report: Report, style: Style) -> Iterator[Drawn]:
    """Draw two figures a case: images a second of every loop, and the parts of this project's step.

    Speeds include the share of `prepare`.
    """
    for case in report["cases"]:
        rows = [row for row in case["rows"] if row["status"] == "measured"]
        if not rows:
            continue
        speeds = [row["batch"] / (row["median"] + row["prepare_a_step"]) for row in rows]
        names = [row["contender"] for row in rows]
        yield _bars(style, case["case"], "images a second", names, speeds, "{:.3g}".format)
        split = {row["contender"]: dict(row["parts"]) for row in rows if "parts" in row}
        if not split:
            continue
        for parts in split.values():
            whole = parts.pop("all")
            parts["other"] = whole - sum(parts.values())
        kinds = [kind for kind in next(iter(split.values())) if any(parts.get(kind) for parts in split.values())]
        figure, axes = plots.figure(
            style, f"{case['case']}: where the time goes", "seconds a step", size=(4.6, 2.0 + 0.42 * len(split))
        )
        values = {kind: [parts.get(kind, 0.0) for parts in split.values()] for kind in kinds}
        plots.stacks(axes, style, list(split), values)
        plots.legend(figure, axes, style, below=True)
        words = [
            f"{name}: " + ", ".join(f"{kind} {duration(parts.get(kind, 0.0))}" for kind in kinds)
            for name, parts in split.items()
        ]
        yield figure, f"{case['case']}, seconds a step by part: {'; '.join(words)}"


def retrain_cost(report: Report, style: Style) -> Iterator[Drawn]:
    """Draw a figure a task: average gap to retrained models against the share of a retrain's time."""
    for task, entry in report["tasks"].items():
        drawn = [found for found in entry["summary"] if found["gap"] and found["share"]]
        floor, untouched = entry["noise_floor"], (entry["untouched"].get("gap") or {}).get("average")
        figure, axes = plots.figure(
            style, f"{task}: gap to a retrain, and its cost", "time in % of a retrain (log)",
            f"average gap, points (log above {'the noise floor' if floor else '1'})",
            size=(6.4, max(4.0, 1.2 + plots.LABEL_INCHES * (len(drawn) + 2))),
        )  # fmt: skip
        axes.set_xscale("log")
        # What is not forgotten may be a hundred times as far away as what is: a linear scale would show that alone.
        axes.set_yscale("symlog", linthresh=floor or 1.0, linscale=0.5)
        words, labels = [], []
        if floor is not None:
            axes.axhspan(0, floor, color=style.faint, alpha=0.6)
            labels.append(plots.Label(text="noise floor", y=floor, colour=style.ink))
            words.append(f"noise floor {floor:.2f} points")
        if untouched is not None:
            axes.axhline(untouched, color=style.ink, linestyle="--", linewidth=1)
            labels.append(plots.Label(text="untouched, no time", y=untouched, colour=style.ink))
            words.append(f"untouched {untouched:.2f} points")
        for found in drawn:
            own = found["method"] in OWN
            colour, marker, points = (VERMILLION, "D", 8) if own else (BLUE, "o", 5)
            share, gap = found["share"], found["gap"]
            axes.errorbar(
                100 * share["mean"], gap["mean"], xerr=100 * share["half_range"], yerr=gap["half_range"],
                color=colour, marker=marker, markersize=points, markeredgecolor=style.ink, elinewidth=0.8, linestyle="",
            )  # fmt: skip
            labels.append(
                plots.Label(
                    text=found["method"], x=100 * share["mean"], y=gap["mean"],
                    colour=VERMILLION if own else style.ink, bold=own,
                )
            )  # fmt: skip
            words.append(f"{found['method']} {gap['mean']:.2f} points in {100 * share['mean']:.1f}% of the time")
        axes.set_ylim(bottom=0)
        most = axes.get_ylim()[1]
        decades = [factor * 10.0**power for power in range(-3, 4) for factor in (1, 2, 5)]
        axes.set_yticks([0.0, *(value for value in decades if (floor or 1.0) <= value <= most)])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        plots.label_column(figure, axes, labels)
        yield figure, f"{task}, average gap to retrained models: {'; '.join(words)}"


def scaling(report: Report, style: Style) -> Iterator[Drawn]:
    """Draw a log-log figure a curve: every round, the fitted power and the expected one through the same centre."""
    for curve in report["curves"]:
        verdict = "" if curve["within"] else "  LOOK"
        figure, axes = plots.figure(
            style, f"{curve['name']}{verdict}", f"{curve['variable']} (log)", f"{curve['quantity']} (log)"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes, medians = curve["sizes"], [middle(rounds) for rounds in curve["values"]]
        for number, (x, rounds) in enumerate(zip(sizes, curve["values"], strict=True)):
            axes.plot(
                [x] * len(rounds), rounds, "o", color=plots.PALETTE[0], markersize=4, alpha=0.6,
                label="" if number else "measured",
            )  # fmt: skip
        for name, exponent, colour, line in (
            ("fitted", curve["exponent"], plots.PALETTE[0], "-"),
            ("expected", curve["expected"], plots.PALETTE[1], "--"),
        ):
            through = middle([median / x**exponent for x, median in zip(sizes, medians, strict=True)])
            axes.plot(
                sizes, [through * x**exponent for x in sizes], line, color=colour, label=f"{name}: {exponent:.2f}"
            )
        axes.set_xticks(sizes, curve["labels"], parse_math=False)
        # Powers of ten may all lie outside: the ends are named instead, or their middle where they are close.
        least, most = min(medians), max(medians)
        named = [least, most] if most > 1.2 * least else [middle(medians)]
        say = size if curve["quantity"] == "bytes" else duration
        axes.set_yticks(named, [say(value) for value in named], parse_math=False)
        axes.minorticks_off()
        plots.legend(figure, axes, style)
        yield (
            figure,
            f"{curve['name']}, {curve['quantity']} by {curve['variable']} from {curve['labels'][0]} to "
            f"{curve['labels'][-1]}: exponent {curve['exponent']:.2f}, expected {curve['expected']:.2f}",
        )


def write(drawn: Iterable[Drawn], names: Sequence[str], file: Path) -> None:
    """Write a light PNG of each with its description; if there are several, the file name has the name of each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, (figure, words) in zip(names, drawn, strict=True):
        slug = "-".join(re.findall(r"\w+", name.lower()))
        target = file if len(names) == 1 else file.with_name(f"{file.stem}-{slug}{file.suffix}")
        target.write_bytes(plots.png(figure, words))


PICTURES: dict[str, Callable[[Report, Style], Iterator[Drawn]]] = {
    "kernels": kernels,
    "train": train,
    "data": data,
    "retrain-cost": retrain_cost,
    "leaderboard-yardstick": retrain_cost,
    "leaderboard-yardstick-class": retrain_cost,
    "leaderboard-digits": retrain_cost,
    "scaling": scaling,
}
