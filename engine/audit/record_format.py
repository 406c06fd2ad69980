"""The format of record.json: canonical form, hashes, chain, and the check of its bytes. See `engine.audit.record`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtime.files import sha256

RECORD, SALT, IDS = "record.json", "record.salt", "record.ids"
KINDS = ("request", "data", "code", "environment", "config", "weights", "metrics", "events", "files", "verdict")

FORMAT = 2
FIRST = "0" * 64
_HASH = re.compile("[0-9a-f]{64}")
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # of a file in the run folder itself
# The keys of each object and the types of their values.
_SHAPE = {"entries": (list,), "files": (dict,), "format": (int,), "head": (str,), "signature": (dict, type(None))}
_ENTRY = {"number": (int,), "content": (dict,), **dict.fromkeys(("kind", "time", "previous", "sha256"), (str,))}
_SIGNATURE = {"entries": (int,), **dict.fromkeys(("algorithm", "public_key", "value", "sha256"), (str,))}
# Largest record in bytes, and its deepest nesting: more than any run writes. A check reads and descends no further.
LARGEST = 16 * 2**20
DEEPEST = 64


def canonical(value: Any) -> bytes:
    """Return the canonical form of a JSON value, see `engine.audit.record`.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: An object is not a JSON value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical form of a JSON value, as hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def encode(document: Mapping[str, Any], path: Path) -> bytes:
    """Return the bytes of a record that is to be written to a path.

    Raises:
        UserError: It is too large.
    """
    data = canonical(document) + b"\n"
    if len(data) > LARGEST:
        raise UserError(f"{path} would have {len(data):,} bytes, more than {LARGEST:,}; record less")
    return data


def covered_files(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the SHA-256 of each file that the entries cover, by name; a later hash replaces an earlier one."""
    files: dict[str, str] = {}
    for entry in entries:
        if entry["kind"] == "files":
            files.update(entry["content"]["sha256"])
    return files


def can_be_covered(name: str) -> bool:
    """Return whether a record can cover a file of this name.

    It does not cover the salt: a record must pass the check without it.
    """
    return bool(_NAME.fullmatch(name)) and name not in (RECORD, SALT)


def read_document(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return (record, problems of its bytes); the record is None if the file cannot be read as one."""
    path = folder / RECORD
    if not os.path.lexists(path):
        raise UserError(f"{folder} holds no {RECORD}; name a folder that `lethe unlearn` or `lethe train` wrote")
    try:
        if problem := _irregular(path):
            return None, [f"{RECORD}: {problem}"]
        if path.stat().st_size > LARGEST:
            return None, [f"{RECORD}: is larger than any record"]
        data = path.read_bytes()
    except OSError as error:
        return None, [f"{RECORD}: cannot be read ({error.strerror})"]
    try:
        document = json.loads(data.decode("ascii"))
        if is_deep(document):
            return None, [f"{RECORD}: is nested more deeply than any record"]
        form = canonical(document) + b"\n"
    except (ValueError, RecursionError) as error:
        return None, [f"{RECORD}: is not canonical JSON ({shown(str(error))})"]
    if problem := _misshapen(document):
        return None, [f"{RECORD}: {problem}"]
    problems = _broken_links(document)
    if form != data:
        problems.append(
            f"{RECORD}: is not in canonical form: white space, the order of keys or the spelling of a value was "
            "changed, or a key occurs twice"
        )
    return document, problems


def is_deep(value: Any) -> bool:
    """Return whether containers are nested more than `DEEPEST` deep; without recursion, which could fail."""
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return False
        objects = [inner for outer in level if isinstance(outer, dict) for inner in outer.values()]
        level = [*objects, *(inner for outer in level if isinstance(outer, list) for inner in outer)]
    return bool(level)


def _misshapen(document: Any) -> str:
    """Return why a JSON value is not a record whose hashes can be checked; empty if it is one."""
    if problem := _unlike(document, _SHAPE):
        return problem
    if document["format"] != FORMAT:
        return f"has format {shown(document['format'])}, expected {FORMAT}"
    if not document["entries"]:
        return "has no entries"
    for number, entry in enumerate(document["entries"], 1):
        if problem := _unlike(entry, _ENTRY):
            return f"entry {number} {problem}"
        if entry["kind"] == "files" and not _is_file_list(entry["content"].get("sha256")):
            return f"entry {number} (files) is not a list of files and their hashes"
    signature = document["signature"]
    if signature is not None and (problem := _unlike(signature, _SIGNATURE)):
        return f"signature {problem}"
    return ""


def _unlike(value: Any, shape: Mapping[str, tuple[type, ...]]) -> str:
    """Return why a value is not an object of exactly these keys, with values of these types; empty if it is."""
    if not isinstance(value, dict):
        return "is not an object"
    for key in sorted({*shape, *value}):
        if key not in value:
            return f"has no key {key!r}"
        if key not in shape:
            return f"has a key {shown(repr(key))} that does not belong there"
        if type(value[key]) not in shape[key]:  # the exact type: for isinstance, true is an int
            return f"has another type of {key!r} than {shape[key][0].__name__}"
    return ""


def _is_file_list(value: Any) -> bool:
    return isinstance(value, dict) and all(
        can_be_covered(name) and isinstance(digest, str) and _HASH.fullmatch(digest) for name, digest in value.items()
    )


def _broken_links(document: Mapping[str, Any]) -> list[str]:
    """Return one line for each hash of a well-formed record that does not fit its content."""
    problems = []
    previous = FIRST
    for number, entry in enumerate(document["entries"], 1):
        name = f"{RECORD}: entry {number} ({shown(entry['kind'])})"
        if not _fits_its_hash(entry):
            problems.append(f"{name} was changed: its hash is not that of its content")
        if entry["number"] != number:
            problems.append(f"{name} has the number {shown(entry['number'])}")
        if entry["previous"] != previous:
            problems.append(f"{name} does not follow the entry before it")
        previous = entry["sha256"]
    if document["head"] != previous:
        problems.append(f"{RECORD}: head is not the hash of the last entry")
    if document["files"] != covered_files(document["entries"]):
        problems.append(f"{RECORD}: files are not those of its entries")
    if document["signature"] is not None and not _fits_its_hash(document["signature"]):
        problems.append(f"{RECORD}: signature was changed: its hash is not that of its content")
    return problems


def _fits_its_hash(value: Mapping[str, Any]) -> bool:
    return digest({key: inner for key, inner in value.items() if key != "sha256"}) == value["sha256"]


def _irregular(path: Path) -> str:
    """Return why a path is not a regular file; empty if it is.

    A symbolic link is not accepted: its target may change without a change of the folder.
    """
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a symbolic link, not a file"
    return "" if stat.S_ISREG(mode) else "is not a file"


def file_problem(path: Path, expected: str) -> str:
    """Return why a file does not have the SHA-256 that is expected; empty if it has."""
    try:
        if problem := _irregular(path):
            return problem
        return "" if sha256(path) == expected else "was changed: its hash is not the one recorded"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def shown(value: Any) -> str:
    """Return untrusted text for a terminal: at most 80 characters, without control characters."""
    text = re.sub("[^ -~]", "?", value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def signed_message(entries: int, head: str) -> bytes:
    """Return the bytes that are signed. The head stands for all entries up to its own."""
    return b"lethe record\n" + canonical({"entries": entries, "format": FORMAT, "head": head})
