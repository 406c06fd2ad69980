"""Common parts of the pages: their templates, and the formatting of numbers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from engine.runtime.files import replacing

MISSING = "\N{EN DASH}"  # not measured, or not measurable


@dataclasses.dataclass(frozen=True)
class Measure:
    """A row of a table.

    Attributes:
        name: Name of the measure.
        hint: Which direction is good, in a few words.
        definition: Definition, and how a value is read.
    """

    name: str
    hint: str
    definition: str


def render_template(name: str, **values: Any) -> str:
    """Render a page from a template of this folder, which may include others of it."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return _environment().get_template(name).render(written=written, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    # Ids, class names and paths are untrusted text: everything is escaped, nothing in the templates is `safe`.
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> str:
    return importlib.resources.files("engine.report").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, text: str) -> Path:
    """Write the page to `path` and return it; the file is replaced only by a complete page."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def usable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: float | None) -> str:
    """Format a fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}%" if value is not None and usable(value) else MISSING


def number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None and usable(value) else MISSING


def points(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f} points"


def count(value: int, what: str) -> str:
    return f"{value:,} {what}{'' if value == 1 else 's'}"


def unreadable(images: int, work: str) -> str:
    """Return the sentence on images of the request that cannot be read.

    Args:
        images: Number of the images.
        work: Work that was done without them.
    """
    return (
        f"{count(images, 'image')} of the request could not be read and took no part in {work}: no figure below covers "
        f"{'it' if images == 1 else 'these'}."
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested options as (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value_text(value)))
    return rows


def value_text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not finite"
    return str(value)
