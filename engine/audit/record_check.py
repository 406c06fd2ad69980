"""The check of a record: its bytes, the files that it covers, its salt and its signature."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.audit.record_format import (
    RECORD,
    SALT,
    covered_files,
    file_problem,
    read_document,
    shown,
    signed_message,
)
from engine.audit.signature import checker


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """Result of the check of a record, with a summary of its contents.

    If the record cannot be read, entries, files and head are empty, and signature and salt are "none".

    Attributes:
        problems: One line for each problem; empty: the record is intact.
        entries: (number, kind, time) of each entry.
        files: SHA-256 of each file that the record covers, by name.
        head: Hash of the last entry.
        signature: none | unchecked (no public key was given) | valid | invalid.
        salt: present | destroyed | none (no ids, or ids in plain text).
    """

    problems: list[str]
    entries: list[tuple[int, str, str]]
    files: dict[str, str]
    head: str
    signature: str
    salt: str

    def to_dict(self) -> dict[str, Any]:
        entries = [dict(zip(("number", "kind", "time"), entry, strict=True)) for entry in self.entries]
        return {"intact": not self.problems, **dataclasses.asdict(self), "entries": entries}


def verify_record(folder: Path, public_key: Path | None = None) -> list[str]:
    """Check a record and the files that it covers.

    Args:
        folder: Run folder.
        public_key: PEM file of an Ed25519 public key; the whole record must then be signed by its holder. None: the
            signature is not checked.

    Returns:
        One line for each problem; empty if the record is intact.

    Raises:
        UserError: The folder has no record, or there is no such key. The contents of a record or a file raise nothing.
    """
    return check_record(folder, public_key).problems


def check_record(folder: Path, public_key: Path | None = None) -> RecordCheck:
    """Check a record as `verify_record`, and return the problems with a summary of the record's contents."""
    folder = Path(folder)
    is_valid = None if public_key is None else checker(public_key)
    document, problems = read_document(folder)
    if document is None:
        return RecordCheck(problems=problems, entries=[], files={}, head="", signature="none", salt="none")
    entries = document["entries"]
    files = covered_files(entries)  # not document["files"]: the names of the entries were checked
    for name, expected in sorted(files.items()):
        if problem := file_problem(folder / name, expected):
            problems.append(f"{name}: {problem}")
    salt, salt_digest = "none", _salt_digest(entries)
    if salt_digest is not None:
        salt = "present" if os.path.lexists(folder / SALT) else "destroyed"
        if salt == "present" and (problem := file_problem(folder / SALT, salt_digest)):
            problems.append(f"{SALT}: {problem}")
    state = "none" if document["signature"] is None else "unchecked"
    if is_valid is not None:
        problem = _signature_problem(document, is_valid)
        problems += [f"{RECORD}: {problem}"] if problem else []
        state = "invalid" if problem else "valid"
    return RecordCheck(
        problems=problems,
        entries=[(entry["number"], shown(entry["kind"]), shown(entry["time"])) for entry in entries],
        files=files,
        head=shown(document["head"]),
        signature=state,
        salt=salt,
    )


def _salt_digest(entries: Sequence[Mapping[str, Any]]) -> str | None:
    found = (entry["content"].get("ids") for entry in entries if entry["kind"] == "request")
    digests = (ids.get("salt_sha256") for ids in found if isinstance(ids, dict))
    return next((digest for digest in digests if isinstance(digest, str)), None)


def _signature_problem(document: Mapping[str, Any], is_valid: Callable[[bytes, str], bool]) -> str:
    """Return why the whole record is not signed by the holder of the key; empty if it is."""
    signature, entries = document["signature"], document["entries"]
    if signature is None:
        return "carries no signature"
    count = signature["entries"]
    if not 1 <= count <= len(entries):
        return f"signature is over {shown(count)} entries, and there are {len(entries)}"
    if not is_valid(signed_message(count, entries[count - 1]["sha256"]), signature["value"]):
        return "signature is not one of this record by the holder of this key"
    if count < len(entries):
        return f"signature is over entries 1 to {count}; the {len(entries) - count} after them are not signed"
    return ""
