"""The order of classes: the label of each class name.

Without a list of names, classes are in timm's order: natural and case-blind (`1 2 ... 10`, `apple Banana`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.samples import Samples
from engine.errors import UserError


def natural_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of timm's `natural_key`; names that differ in case alone are in the order of their
    text.
    """
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[int | str]:
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_class_map(path: str | Path) -> list[str]:
    """Return the class names by label in a file.

    Args:
        path: Text with one name a line, the first with label 0; or JSON or YAML (by suffix) with a list of names,
            {name: label} or {label: name}, with labels 0, 1, 2, ...

    Raises:
        UserError: The file has another form.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"class map {path}: cannot be read ({reason}); give a file of class names") from None
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        names = _names_of(_parsed(path, text), path)
    else:
        names = [line.strip() for line in text.splitlines()]
        while names and not names[-1]:
            names.pop()
    if names and names[0].startswith("# "):
        raise UserError(f"class map {path}: it begins with the comment {names[0]!r}; remove it, every line is a class")
    if not names or not all(names):
        raise UserError(
            f"class map {path}: {'a name is empty' if names else 'it holds no names'}; write one name a line"
        )
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        raise UserError(f"class map {path}: the class {double!r} occurs twice; every class has one label")
    return names


def _parsed(path: Path, text: str) -> Any:
    import yaml

    try:
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        raise UserError(f"class map {path}: it is not valid {path.suffix[1:].upper()}") from None


def _names_of(content: Any, path: Path) -> list[str]:
    expected = "expected a list of names, {name: label} or {label: name}"
    if isinstance(content, list):
        pairs = list(enumerate(content))
    elif isinstance(content, Mapping) and all(type(value) is int for value in content.values()):
        if any(type(key) is int for key in content):
            raise UserError(f"class map {path}: names and labels are both numbers; write the names in quotes")
        pairs = [(value, key) for key, value in content.items()]
    elif isinstance(content, Mapping) and all(str(key).isdecimal() for key in content):
        pairs = [(int(key), value) for key, value in content.items()]
    else:
        raise UserError(f"class map {path}: it holds {type(content).__name__}; {expected}")
    names = dict(pairs)
    if sorted(names) != list(range(len(pairs))):
        raise UserError(f"class map {path}: its labels are not 0 to {len(pairs) - 1}, each once")
    odd = next((name for name in names.values() if isinstance(name, bool) or not isinstance(name, (str, int))), "")
    if odd != "":
        hint = "write no, yes, on and off in quotes" if isinstance(odd, bool) else expected
        raise UserError(f"class map {path}: a class name is not text but {odd!r}; {hint}")
    return [str(names[label]) for label in range(len(pairs))]


def relabelled(splits: Mapping[str, Samples], names: Sequence[str], where: str) -> dict[str, Samples]:
    """Return samples whose labels are positions in `names`, matched by the data's own class names.

    Data without class names keeps its labels and gets the names. Names without samples are allowed.

    Args:
        splits: Samples by split.
        names: Class names in the wanted order.
        where: Source of the names, for errors.

    Raises:
        UserError: A class of the data is not among the names, or a label has no name.
    """
    return {split: _relabelled(samples, list(names), where) for split, samples in splits.items()}


def nfc(name: str) -> str:
    """Return the name in Unicode's form NFC, in which equal text is equal; macOS writes names of folders in another
    form.
    """
    return unicodedata.normalize("NFC", name)


def label_finder(names: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function from a class name, in any Unicode form, to its label; None for other names."""
    exact = {name: label for label, name in enumerate(names)}
    forms = {nfc(name): label for label, name in enumerate(names)}

    def find(name: str) -> int | None:
        return exact[name] if name in exact else forms.get(nfc(name))

    return find


def _relabelled(samples: Samples, names: list[str], where: str) -> Samples:
    find = label_finder(names)
    held = np.unique(samples.labels)
    if not samples.class_names:
        if len(held) and held.max() >= len(names):
            raise UserError(f"{where}: it names {len(names)} classes, but {samples.name} has label {held.max()}")
        return samples.with_labels(samples.labels, names)
    unknown = [samples.class_names[label] for label in held if find(samples.class_names[label]) is None]
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} of {len(held)} classes of {samples.name} are not in it, the first: "
            f"{unknown[0]!r}; it begins {', '.join(map(repr, names[:3]))}"
        )
    found = map(find, samples.class_names)
    new = np.array([-1 if label is None else label for label in found], dtype=np.int64)
    return samples.with_labels(new[samples.labels], names)
