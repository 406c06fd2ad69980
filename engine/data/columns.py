"""Columns of images and labels in a parquet file, and the number of each label."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.classes import label_finder, natural_order
from engine.data.spec import DataOptions
from engine.errors import UserError

_IMAGE_NAMES = ("image", "images", "img", "imgs", "pixel", "pixels", "picture", "photo", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "target", "targets", "class", "category", "fine_label", "coarse_label", "cls")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns of one file.

    Attributes:
        image, label: Names of the columns.
        has_ids: There is a column `id`.
        class_names: Class names by number, if the file has them.
    """

    image: str
    label: str
    has_ids: bool
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels of one file.

    Attributes:
        file: Path, for errors.
        values: Whole numbers, int64 [n], or texts.
        class_names: Class names by number; empty for texts.
    """

    file: str
    values: np.ndarray | list[str]
    class_names: tuple[str, ...]


def find_columns(schema: Any, name: str, path: Path, options: DataOptions) -> Columns:
    """Return the columns of one file.

    Args:
        schema: Arrow schema of the file.
        name: Name of the split, for errors.
        path: Path of the file, for errors.
        options: Columns that are given.

    Raises:
        UserError: A column is missing, or several columns are candidates.
    """
    double = next((column for column in schema.names if schema.names.count(column) > 1), None)
    if double is not None:
        raise UserError(f"{name}: {path} has {schema.names.count(double)} columns {double!r}; rename all but one")
    features = _features(schema)
    image = _column(schema, name, path, "image", options.image, _like_images(schema, features))
    label = _column(schema, name, path, "label", options.label, _like_labels(schema, features))
    _check_image_type(schema.field(image).type, name, path, image)
    names = features.get(label, {}).get("names", [])
    if isinstance(names, Mapping):  # {"0": name, ...}
        names = [names[key] for key in sorted(names, key=int)]
    return Columns(image, label, "id" in schema.names, tuple(map(str, names)))


def _features(schema: Any) -> dict[str, Any]:
    """Return Hugging Face's description of each column, empty if there is none."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = info.get("features", {})
    except (ValueError, AttributeError):
        return {}
    if not isinstance(features, Mapping):
        return {}
    return {key: value for key, value in features.items() if isinstance(value, Mapping)}


def _like_images(schema: Any, features: Mapping[str, Any]) -> list[str]:
    declared = [column for column in schema.names if features.get(column, {}).get("_type") == "Image"]
    structs = [column for column in schema.names if _struct_fields(schema.field(column).type)]
    named = [column for column in schema.names if column.lower() in _IMAGE_NAMES]
    return _with_named(declared or structs, named)


def _like_labels(schema: Any, features: Mapping[str, Any]) -> list[str]:
    declared = [column for column in schema.names if features.get(column, {}).get("_type") == "ClassLabel"]
    named = [column for column in schema.names if column.lower() in _LABEL_NAMES]
    return _with_named(declared, named)


def _with_named(typed: Sequence[str], named: Sequence[str]) -> list[str]:
    """Return the columns of the right type and those of a usual name; of a dataset with both, either may be meant."""
    return [*typed, *(column for column in named if column not in typed)]


def _column(schema: Any, name: str, path: Path, kind: str, given: str | None, likely: Sequence[str]) -> str:
    found = ", ".join(schema.names)
    if given is not None:
        if given not in schema.names:
            raise UserError(f"{name}: {path} has no column {given!r} (--{kind}-column); found {found}")
        return given
    if kind in schema.names:
        return kind
    if len(likely) == 1:
        return likely[0]
    which = f"; it may be {' or '.join(likely)}" if likely else ""
    raise UserError(f"{name}: no column {kind!r}; found {found}{which}; name it with --{kind}-column")


def _struct_fields(kind: Any) -> list[str]:
    """Return which of `bytes` and `path` a struct type has."""
    import pyarrow.types as types

    if not types.is_struct(kind):
        return []
    return [field.name for field in kind if field.name in ("bytes", "path")]


def _check_image_type(kind: Any, name: str, path: Path, column: str) -> None:
    import pyarrow.types as types

    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_string, types.is_large_string)
    if not _struct_fields(value) and not any(test(value) for test in tests):
        raise UserError(
            f"{name}: the column {column!r} of {path} holds {kind}; expected encoded images as bytes, paths of files, "
            "or a struct of `bytes` and `path`"
        )


def read_labels(path: Path, columns: Columns, name: str) -> Labels:
    """Return the labels of one file.

    Args:
        path: Path of the file.
        columns: Its columns.
        name: Name of the split, for errors.

    Raises:
        UserError: Labels are missing, soft or negative.
    """
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types as types

    column = pyarrow.parquet.read_table(path, columns=[columns.label], memory_map=True).column(0).combine_chunks()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind, what = column.type, f"{name}: the column {columns.label!r} of {path}"
    if types.is_null(kind) or column.null_count:
        raise UserError(f"{name}: {column.null_count} samples of {path} have no label; remove or label them")
    if types.is_string(kind) or types.is_large_string(kind):
        texts = column.to_pylist()
        if not all(texts):
            raise UserError(f"{what} holds an empty text in row {texts.index('')}; remove or label such samples")
        return Labels(str(path), texts, ())
    if types.is_floating(kind):
        values = column.to_numpy(zero_copy_only=False)
        soft = values[~np.isfinite(values) | (values != np.floor(values))]
        if len(soft):
            raise UserError(f"{what} holds {soft[0]}; expected whole numbers or text, the classes")
    elif not (types.is_integer(kind) or types.is_boolean(kind)):
        raise UserError(f"{what} holds {kind}; expected a whole number or text, the class of a row")
    numbers = column.cast(pyarrow.int64()).to_numpy(zero_copy_only=False)
    if len(numbers) and numbers.min() < 0:
        raise UserError(
            f"{what} holds the negative label {numbers.min()} (-1: not published); expected 0 or more: leave "
            "such rows out, or give another split"
        )
    if columns.class_names and len(numbers) and numbers.max() >= len(columns.class_names):
        raise UserError(f"{what} holds {numbers.max()}, but names {len(columns.class_names)} classes")
    return Labels(str(path), numbers, columns.class_names)


def one_numbering(splits: Mapping[str, Sequence[Labels]]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Return labels int64 [n] and class names of each split, in one numbering.

    Text: classes are those of the training samples, in timm's order. Numbers: the names are those of the first file;
    labels of a file with another order are matched by name.

    Args:
        splits: Labels of the files of each split.

    Raises:
        UserError: The labels of two files do not fit together.
    """
    train = splits["train"]
    texts = {each.file: isinstance(each.values, list) for files in splits.values() for each in files}
    if len(set(texts.values())) > 1:
        text, number = (next(file for file, value in texts.items() if value is wanted) for wanted in (True, False))
        raise UserError(f"parquet: labels are text in {text} and numbers in {number}; use one of the two in all files")
    if next(iter(texts.values())):
        names = natural_order({text for each in train for text in each.values})
    else:
        every = [*train, *(each for files in splits.values() for each in files)]  # training files first
        names = list(next((each.class_names for each in every if each.class_names), ()))
    return {split: (_joined([_numbers(each, names) for each in files]), names) for split, files in splits.items()}


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _numbers(labels: Labels, names: Sequence[str]) -> np.ndarray:
    """Return the labels of a file as positions in `names`."""
    find = label_finder(names)
    if isinstance(labels.values, list):
        unknown = next((text for text in labels.values if find(text) is None), None)
        if unknown is not None:
            raise UserError(f"parquet: {labels.file} has the label {unknown!r}, which no training sample has")
        return np.array([find(text) for text in labels.values], dtype=np.int64)
    if not labels.class_names or list(labels.class_names) == list(names):
        return labels.values
    unknown = next((name for name in labels.class_names if find(name) is None), None)
    if unknown is not None:
        raise UserError(
            f"parquet: {labels.file} names the class {unknown!r}, which the other files do not name; write all files "
            "with the same class names"
        )
    return np.array([find(name) for name in labels.class_names], dtype=np.int64)[labels.values]
