"""A griffe extension that brings docstrings into the form that the site renders.

The section `Example:` is read as `Examples:`, the name that griffe has for it. In docstrings without Google sections, a
paragraph of lines `name: what it is`, where each name is a parameter or an attribute, becomes a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Examples?):$", flags=re.M)
_DESCRIBED = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


class Rendered(griffe.Extension):
    """Rewrite every docstring that is loaded."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _rewrite(cls, set(cls.members))


def _rewrite(obj: griffe.Object, names: set[str]) -> None:
    if obj.docstring is None:
        return
    if _SECTION.search(obj.docstring.value):
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
    else:
        obj.docstring.value = _as_list(obj.docstring.value, names)


def _as_list(text: str, names: set[str]) -> str:
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _DESCRIBED.match(line)
        if found and set(found["names"].split(", ")) <= names:
            lines += [] if inside or not lines or not lines[-1] else [""]
            lines.append(f"* `{found['names']}`: {found['text']}")
            inside = True
        elif inside and line and not line.startswith(" "):  # a description that goes on, or prose after the list
            lines.append(f"    {line}")
        else:
            inside = inside and bool(line)
            lines.append(line)
    return "\n".join(lines)
