"""Forget requests: read the forget set from a file of ids or a shorthand."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.data.classes import label_finder
from engine.data.samples import Samples
from engine.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ForgetRequest:
    """A request resolved against the training samples.

    Attributes:
        spec: The request as it was given.
        indices: Sorted positions in the training samples.
        duplicates: Number of repeated ids, which were merged.
        provenance: Further columns of the request file by id.
    """

    spec: str
    indices: np.ndarray
    duplicates: int
    provenance: dict[str, dict[str, str]]

    def split(self, train: Samples) -> tuple[Samples, Samples]:
        """Return forget set and retain set: the named samples and all others."""
        keep = np.ones(len(train), dtype=bool)
        keep[self.indices] = False
        return train.subset(self.indices, f"{train.name} (forget)"), train.subset(
            np.flatnonzero(keep), f"{train.name} (retain)"
        )


def read_forget_request(spec: str, train: Samples) -> ForgetRequest:
    """Resolve a forget request.

    Args:
        spec: A file (text, CSV with an `id` column, JSON lines), `class:NAME` or `random:FRACTION@SEED`.
        train: The training samples.

    Raises:
        UserError: An id is not in the data, or the forget set or the retain set would be empty.
    """
    provenance: dict[str, dict[str, str]] = {}
    duplicates = 0
    if spec.startswith("class:"):
        indices = _of_class(spec.removeprefix("class:"), train)
    elif spec.startswith("random:"):
        indices = _random(spec, train)
    else:
        rows = _read_rows(Path(spec))
        named = {row.pop("id"): row for row in map(dict, rows)}
        positions = train.positions(list(named), f"forget request {spec}")
        _check_rows(named, train, spec)
        indices = np.unique(positions)  # an id may occur in two Unicode forms
        duplicates = len(rows) - len(indices)
        provenance = {train.ids[at]: row for at, row in zip(positions.tolist(), named.values(), strict=True) if row}
    if len(indices) == 0:
        raise UserError(f"forget request {spec}: names no samples; nothing to forget")
    if len(indices) == len(train):
        raise UserError(
            f"forget request {spec}: names all {len(train)} samples and leaves nothing to retain; train a new "
            "model instead"
        )
    return ForgetRequest(spec, indices, duplicates, provenance)


def _check_rows(named: Mapping[str, Mapping[str, str]], train: Samples, spec: str) -> None:
    """Check that positions in a list are for the current number of rows.

    Raises:
        UserError: The field `rows` of the list has another number.
    """
    rows = train.id_kind.rows if train.id_kind else None
    for sample_id, row in named.items():
        if rows is not None and row.get("rows", str(rows)) != str(rows):
            raise UserError(
                f"forget request {spec}: its ids are positions among {row['rows']} rows (the id {sample_id!r}), and "
                f"{train.name} has {rows} now, so they name other images; make the list again from the data as it is"
            )


def _of_class(name: str, train: Samples) -> np.ndarray:
    names = train.class_names or [str(i) for i in range(int(train.labels.max()) + 1)]
    label = label_finder(names)(name)
    if label is None:
        raise UserError(f"forget request 'class:{name}': no such class{nearest(name, names)}")
    if names.count(names[label]) > 1:
        labels = [str(place) for place, each in enumerate(names) if each == names[label]]
        raise UserError(
            f"forget request 'class:{name}': {len(labels)} classes have that name (labels {', '.join(labels)}); give a "
            "file of ids, or names of their own by --class-map FILE"
        )
    return np.flatnonzero(train.labels == label)


def _random(spec: str, train: Samples) -> np.ndarray:
    match = re.fullmatch(r"random:(0?\.\d+|1(?:\.0*)?|0)@(\d+)", spec)
    if not match:
        raise UserError(f"forget request {spec!r}: expected random:FRACTION@SEED, such as random:0.1@0")
    count = round(float(match[1]) * len(train))
    return np.sort(np.random.default_rng(int(match[2])).permutation(len(train))[:count])


def _decoded(content: bytes, path: Path) -> str:
    """Return UTF-8 text.

    Raises:
        UserError: Another encoding; the message names the likely one and the command that converts it.
    """
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text:
            return text
    except UnicodeDecodeError:
        pass
    if content.startswith(b"\x1f\x8b"):
        raise UserError(f"forget request {path}: is compressed; decompress it: gunzip {path}")
    encoding = _likely_encoding(content)
    if encoding is None:
        raise UserError(f"forget request {path}: not a text file of ids")
    raise UserError(
        f"forget request {path}: not a text file of ids in UTF-8, but {encoding}, as it seems; convert it: "
        f"iconv -f {encoding} -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
    )


def _likely_encoding(content: bytes) -> str | None:
    """Return the name of an encoding for iconv, None for content that is not text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = [content[start::2].count(0) for start in (0, 1)]
    if max(zeros) > 0.2 * len(content):
        return "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "CP1252" if all(letter.isprintable() or letter.isspace() for letter in text) else None


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"forget request {path}: no such file; give a file of ids, class:NAME or random:FRACTION@SEED"
        ) from None
    except OSError as error:
        raise UserError(f"forget request {path}: not a text file of ids ({error.strerror})") from None
    text = _decoded(content, path)
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                given = row["id"]
                rows.append({key: str(value) for key, value in row.items()})
            except (ValueError, AttributeError, KeyError, TypeError):
                raise UserError(f"forget request {path}: line {number} is not a JSON object with an `id`") from None
            if isinstance(given, bool) or not isinstance(given, (str, int)):
                raise UserError(
                    f"forget request {path}: line {number} has the id {json.dumps(given)[:80]}; expected text or a "
                    "whole number"
                )
        return rows
    if path.suffix.lower() == ".csv":
        return _csv_rows(lines, path)
    if lines and lines[0].lstrip()[0] in "[{" and path.suffix.lower() == ".json":
        raise UserError(
            f"forget request {path}: JSON is not read; give a text file of one id a line, a .csv with a column `id`, "
            'or a .jsonl of one {"id": ...} a line'
        )
    return [{"id": line.strip()} for line in lines]


# Names of columns that hold ids in other people's files.
_LIKE_ID = {
    "id",
    "ids",
    "image_id",
    "sample_id",
    "image",
    "img",
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "name",
}


def _csv_rows(lines: list[str], path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(lines)
    found = list(reader.fieldnames or ())
    if found.count("id") != 1:
        what = "several columns" if "id" in found else "no column"
        other = next((name for letter, name in ((";", "semicolons"), ("\t", "tabs")) if letter in "".join(found)), None)
        hint = f"; it is separated by {other}, as it seems: separate it by commas" if other and len(found) == 1 else ""
        close = [name for name in found if name.strip().lower() in _LIKE_ID]
        if not hint and "id" not in found and len(close) == 1:
            hint = f"; if {close[0]!r} holds the ids, rename it to `id`"
        raise UserError(f"forget request {path}: {what} `id`; found {', '.join(found or ['nothing'])}{hint}")
    rows = []
    for row in reader:
        if None in row:  # further ids would be lost
            raise UserError(
                f"forget request {path}: the row of {row['id']!r} (line {reader.line_num}) has more fields than the "
                f"header's {len(found)}; write one id a line, and put values with commas into quotes"
            )
        rows.append({key: value or "" for key, value in row.items()})
    return rows
