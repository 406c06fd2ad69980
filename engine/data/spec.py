"""The string that defines a data source: `KIND[:LOCATION][?image=COLUMN&label=COLUMN&classes=FILE]`.

The same string is used on the command line, in config.yaml, in request stores and in Python. Values with `&`, `?`, `%`
or `=` are URL-encoded. A location that contains `?` is not split if it exists on disk.
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

    Attributes:
        image: Column of the images; None: found by its name or type.
        label: Column of the labels; None: found by its name or type.
        classes: File of class names in the model's order; None: the data's own order.
    """

    image: str | None = None
    label: str | None = None
    classes: str | None = None


def parse_spec(spec: str) -> tuple[str, str, DataOptions]:
    """Return kind, location and options of a data spec.

    Raises:
        UserError: An option is unknown; the message lists the known ones.
    """
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
    """Return the spec with options appended; the same spec if none is given.

    Args:
        spec: The spec.
        image, label, classes: See `DataOptions`.

    Raises:
        UserError: The spec has the option already.
    """
    given = {"image": image, "label": label, "classes": classes}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return spec
    held = dataclasses.asdict(parse_spec(spec)[2])
    for key in given:
        if held[key] is not None:
            raise UserError(f"{_FLAGS[key]} {given[key]}: --data has {key}={held[key]} already; give it once")
    query = "&".join(f"{key}={quote(str(value), safe='/:,.~ ')}" for key, value in given.items())
    return f"{spec}{'&' if any(held.values()) else '?'}{query}"


def refuse_columns(kind: str, options: DataOptions) -> None:
    """Check that no column is given for data without columns.

    Raises:
        UserError: One is given.
    """
    for key in ("image", "label"):
        if getattr(options, key) is not None:
            raise UserError(f"{_FLAGS[key]} {getattr(options, key)}: {kind} data has no columns; leave it out")


def _is_there(spec: str) -> bool:
    return os.path.exists(os.path.expanduser(spec.partition(":")[2]))
