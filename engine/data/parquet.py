"""Data source of images in parquet files, in the layouts of Hugging Face's datasets.

The first of these layouts that is found is used:

    FOLDER/train-00000-of-00002.parquet, FOLDER/train.parquet    a split word in the name of the file
    FOLDER/train/0000.parquet                                    or of its folder
    FOLDER/data/..., FOLDER/CONFIG/...                           the same one folder deeper, if only one has data

An image is encoded bytes, the path of a file (below the folder, or absolute), or a struct of `bytes` and `path`. A
label is a whole number, or text (plain or dictionary-encoded), whose classes are in timm's order. Names of numbers come
from Hugging Face's ClassLabel. Ids are the column `id`, else the positions of rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.columns import Columns, Labels, find_columns, one_numbering, read_labels
from engine.data.folders import existing_folder, is_hidden, note_not_read
from engine.data.rowgroups import ParquetImages
from engine.data.samples import IdKind, Samples
from engine.data.spec import DataOptions
from engine.data.webdataset.shards import SPLIT_WORDS, add_folders, by_split, check_sequence, split_word
from engine.errors import UserError


def open_parquet(location: str, options: DataOptions) -> dict[str, Samples]:
    """Return samples by split. An image is read when it is needed, a row group at a time.

    Args:
        location: The folder.
        options: Columns, if given.

    Raises:
        UserError: There are no training files, files are missing or damaged, or a column is not found.
    """
    folder = existing_folder("parquet", location)
    spec = f"parquet:{location}"
    found = _find(folder, spec, 2)
    if "train" not in found:
        others = f"; found {', '.join(found)}" if found else ""
        raise UserError(f"data source 'parquet:{folder}' has no train-*.parquet{others}")
    for files in found.values():
        check_sequence(files, spec)
    splits = by_split(found, spec)
    columns = {split: _columns(split, files, folder, options) for split, files in splits.items()}
    labels = one_numbering({split: _labels(split, files, columns[split], folder) for split, files in splits.items()})
    return {split: _split(split, files, columns[split], labels[split], folder) for split, files in splits.items()}


def _find(folder: Path, spec: str, deeper: int) -> dict[str, list[Path]]:
    """Return the files by split word."""
    files = _by_name(folder, spec)
    add_folders(files, folder, _parquet_files, spec)
    for word in SPLIT_WORDS:
        below = [path for path in sorted((folder / word).glob("*/**/*.parquet")) if not is_hidden(path.parent.name)]
        if below and _parquet_files(folder / word):
            raise UserError(
                f"data source {spec!r} has {word} files both in {folder / word} and below it, such as {below[0]}; move "
                "them into one folder"
            )
    if files or not deeper:
        return files
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    found = {path: splits for path in below if (splits := _find(path, spec, deeper - 1))}
    if len(found) > 1:
        raise UserError(
            f"data source {spec!r}: several folders of {folder} hold data: {', '.join(path.name for path in found)}; "
            f"name one, such as parquet:{next(iter(found))}"
        )
    return next(iter(found.values()), {})


def _parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder by name, without hidden ones; empty if it is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() == ".parquet" and not path.name.startswith(".")
    )


def _by_name(folder: Path, spec: str) -> dict[str, list[Path]]:
    """Return the files of a folder by the split word in their names; `WORD-*` take precedence over others."""
    found: dict[str, list[Path]] = {}
    unread: list[Path] = []
    for path in _parquet_files(folder):
        word = split_word(path.stem)
        if word is None:
            unread.append(path)
        else:
            found.setdefault(word, []).append(path)
    for word, files in found.items():
        usual = [path for path in files if path.name.startswith(f"{word}-")] or files
        found[word] = usual
        others = [path for path in files if path not in usual]
        if others:
            raise UserError(
                f"data source {spec!r}: both {usual[0].name} and {others[0].name} are {word} files; keep one kind"
            )
    note_not_read("parquet", folder, [path.name for path in unread])
    return found


def _damaged(split: str, folder: Path, error: Exception) -> UserError:
    reason = re.sub(r"\s+", " ", str(error))[:100]
    return UserError(f"data source 'parquet:{folder}': {split} is not parquet, or is cut short ({reason})")


def _columns(split: str, files: Sequence[Path], folder: Path, options: DataOptions) -> list[Columns]:
    import pyarrow
    import pyarrow.parquet

    found = []
    for path in files:
        try:
            schema = pyarrow.parquet.read_schema(path, memory_map=True)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(split, folder, error) from None
        found.append(find_columns(schema, f"parquet {split}", path, options))
    return found


def _labels(split: str, files: Sequence[Path], columns: Sequence[Columns], folder: Path) -> list[Labels]:
    import pyarrow

    try:
        return [read_labels(path, each, f"parquet {split}") for path, each in zip(files, columns, strict=True)]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(split, folder, error) from None


def _split(
    split: str, files: Sequence[Path], columns: Sequence[Columns], labels: tuple[np.ndarray, list[str]], folder: Path
) -> Samples:
    import pyarrow

    name = f"parquet {split}"
    try:
        images = ParquetImages(files, [each.image for each in columns], folder)
        ids = _ids(name, files, columns)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(split, folder, error) from None
    numbers, names = labels
    images.check_paths(name)
    count = len(numbers)
    return Samples(
        name,
        [str(i) for i in range(count)] if ids is None else ids,
        numbers,
        images.open,
        names,
        id_kind=IdKind.of_rows(count) if ids is None else IdKind("the column `id`"),
    )


def _ids(name: str, files: Sequence[Path], columns: Sequence[Columns]) -> list[str] | None:
    """Return the column `id`, None if no file has one."""
    import pyarrow.parquet

    with_ids = [each.has_ids for each in columns]
    if not any(with_ids):
        return None
    if not all(with_ids):
        lacking = files[with_ids.index(False)]
        raise UserError(f"{name}: {lacking} has no column 'id', and other files have; add it, or remove it from all")
    ids: list[Any] = []
    for path in files:
        column = pyarrow.parquet.read_table(path, columns=["id"], memory_map=True).column("id")
        if column.null_count:
            raise UserError(f"{name}: {column.null_count} rows of {path} have no id; fill the column, or remove it")
        ids += column.to_pylist()
    return [i.decode("utf-8", "backslashreplace") if isinstance(i, bytes) else str(i) for i in ids]
