"""Parts of the sections of a proof: tables, figures, and numbers with their intervals in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.report.page import MISSING, Measure, number, usable
from engine.report.plots import Picture
from engine.report.proof.glossary import term
from engine.report.proof.plots import Number

SETS = {"forget": "Forget samples", "retain": "Retain samples", "test": "Test images"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The number.
        note: Its interval, or why there is no number.
    """

    text: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    measure: Measure
    cells: Sequence[Cell]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows under a heading."""

    heading: Measure
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a section.

    Attributes:
        columns: Names of the columns.
        groups: Rows by heading.
        marked: Column of the examined model, from 0; None if it has none.
    """

    columns: Sequence[str]
    groups: Sequence[Group]
    marked: int | None = 1


@dataclasses.dataclass(frozen=True)
class Figures:
    """Plots that belong together.

    Attributes:
        caption: Caption; may be empty.
        pictures: The plots.
    """

    caption: str
    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a proof.

    Attributes:
        title: Title.
        intro: The question that is answered.
        found: The findings, in sentences.
        figures: Plots.
        tables: Tables.
        note: Remark; may be empty.
    """

    title: str
    intro: str
    found: Sequence[str]
    figures: Sequence[Figures]
    tables: Sequence[Table]
    note: str = ""


class Used:
    """Collects the measures that a page shows, for its list of definitions.

    The list is needed since text that is shown on hover alone is lost on touch screens and paper.
    """

    def __init__(self) -> None:
        self.measures: dict[str, Measure] = {}

    def measure(self, key: str, direction: Any = None) -> Measure:
        self.measures[key] = term(key, direction)
        return self.measures[key]

    def defined(self) -> list[Measure]:
        return [measure for measure in self.measures.values() if measure.definition]


def plain(value: Any) -> str:
    return number(value, 3)


def signed_points(value: Any) -> str:
    """Format a share in percentage points, with its sign."""
    return f"{100 * value:+.1f}" if usable(value) else MISSING


def heading(text: str) -> Measure:
    return Measure(text, "", "")


def cell(found: Number | None, text: Callable[[Any], str]) -> Cell:
    if not found or not usable(found.get("value")):
        return Cell(MISSING, str((found or {}).get("reason", "")))
    notes = []
    if usable(found.get("low")) and usable(found.get("high")):
        notes.append(f"{text(found['low'])} to {text(found['high'])}")
    if usable(found.get("spread")):
        notes.append(f"spread {text(found['spread'])}")
    return Cell(text(found["value"]), "; ".join(notes))


def formatted(found: Number | None, text: Callable[[Any], str]) -> str:
    shown = cell(found, text)
    return f"{shown.text} ({shown.note})" if shown.note else shown.text


def value_of(found: Number | None) -> float | None:
    value = found.get("value") if found else None
    return float(value) if value is not None and usable(value) else None


def mean_of(numbers: Iterable[Number | None]) -> Number | None:
    """Return the mean of the values and of the ends of their intervals, over those that were measured."""
    there = [each for each in numbers if value_of(each) is not None and each is not None]
    if not there:
        return None
    keys = [key for key in ("value", "low", "high") if all(usable(each.get(key)) for each in there)]
    return {key: float(np.mean([each[key] for each in there])) for key in keys}


def range_of(numbers: Iterable[Number | None]) -> Number | None:
    """Return mean, lowest and highest value: the range of retrained models. For a single one it is its own interval."""
    there = [each for each in numbers if value_of(each) is not None and each is not None]
    if len(there) < 2:
        return there[0] if there else None
    values = [float(each["value"]) for each in there]
    return {"value": float(np.mean(values)), "low": min(values), "high": max(values)}


def by_place(
    lists: Iterable[Sequence[Number | None]], merge: Callable[[Iterable[Number | None]], Number | None]
) -> list[Number | None]:
    """Merge the numbers of several lists for each step or layer; empty lists are left out."""
    return [merge(each) for each in zip(*(one for one in lists if one), strict=True)]


def references_of(models: Mapping[str, Any]) -> list[str]:
    return [name for name in models if name not in ("model", "original")]


def retrained_column(references: Sequence[str]) -> str:
    return "Retrained" if len(references) < 2 else f"Retrained (mean of {len(references)})"


def retrained_range(references: Sequence[str]) -> str:
    return "retrained" if len(references) < 2 else f"retrained (range of {len(references)})"


def three_cells(
    by_name: Mapping[str, Number | None], references: Sequence[str], text: Callable[[Any], str]
) -> list[Cell]:
    """Return the cells of original, model and the mean of the references."""
    mean = mean_of(by_name.get(name) for name in references)
    return [cell(each, text) for each in (by_name.get("original"), by_name.get("model"), mean)]


def upwards(text: str) -> str:
    return text[:1].upper() + text[1:]
