"""The string that names a data source: `KIND[:LOCATION][?image=COLUMN&label=COLUMN&classes=FILE]`.

One string travels through the command line, config.yaml, request stores and Python. Values are URL-encoded where they
hold `&`, `?`, `%` or `=`. A location that really contains `?` is left whole if it is there on disk.
"""

from __future__ import annotations

import dataclasses
import os
import re
from urllib.parse import quote, unquote

from engine.errors import UserError, nearest

_QUERY = re.compile(r"(?s)(.*)\?([\w-]+=[^&?]*(?:&[\w-]+=[^&?]*)*)")
# Options by key, with the option of the command line that sets them.
_FLAGS = {"image": "--image-column", "label": "--label-column", "classes": "--class-map"}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Options of a data source.

    Args:
        image: column of the images; None: found by its name or type.
        label: column of the labels; None: found by its name or type.
        classes: file of class names in the model's order; None: the data's own order.
    """

    image: str | None = None
    label: str | None = None
    classes: str | None = None


def parse_spec(spec: str) -> tuple[str, str, DataOptions]:
    """(kind, location, options) of a data spec. Raises UserError for an unknown option, naming those there are."""
    match = _QUERY.fullmatch(spec)
    if not match or _is_there(spec):
        kind, _, location = spec.partition(":")
        return kind, location, DataOptions()
    options: dict[str, str] = {}
    for part in match[2].split("&"):
        key, _, value = part.partition("=")
        if key not in _FLAGS:
            raise UserError(f"data source {spec!r}: unknown option {key!r}{nearest(key, _FLAGS)}")
        if not value:
            raise UserError(f"data source {spec!r}: the option {key}= has no value")
        if key in options:
            raise UserError(f"data source {spec!r}: the option {key}= is there twice; give it once")
        options[key] = unquote(value)
    kind, _, location = match[1].partition(":")
    return kind, location, DataOptions(**options)


def with_options(spec: str, *, image: str | None = None, label: str | None = None, classes: str | None = None) -> str:
    """The spec with options appended; the spec itself if there are none. Raises UserError for one that it has."""
    given = {"image": image, "label": label, "classes": classes}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return spec
    held = dataclasses.asdict(parse_spec(spec)[2])
    for key in given:
        if held[key] is not None:
            raise UserError(f"{_FLAGS[key]} {given[key]}: --data says {key}={held[key]} already; give it once")
    query = "&".join(f"{key}={quote(str(value), safe='/:,.~ ')}" for key, value in given.items())
    return f"{spec}{'&' if any(held.values()) else '?'}{query}"


def refuse_columns(kind: str, options: DataOptions) -> None:
    """Raises UserError for options of columns that data of this kind does not have."""
    for key in ("image", "label"):
        if getattr(options, key) is not None:
            raise UserError(f"{_FLAGS[key]} {getattr(options, key)}: {kind} data has no columns; leave it out")


def _is_there(spec: str) -> bool:
    return os.path.exists(os.path.expanduser(spec.partition(":")[2]))
