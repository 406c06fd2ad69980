"""record.json: the request, the events and the results of a run, hashed so that a later change is detected.

One JSON object:

    {"format": 2,
     "entries": [{"number": 1, "kind": "request", "time": "2026-01-31T12:00:00Z", "content": {...},
                  "previous": 64 zeros, "sha256": "..."}, ...],
     "files": {"model.safetensors": sha256, ...},
     "head": sha256 of the last entry,
     "signature": null | {"algorithm": "Ed25519", "entries": n, "public_key": hex, "value": hex, "sha256": "..."}}

Canonical form: keys sorted, no white space, ASCII with \\uXXXX for all other characters, no NaN or infinity. The file
has it, with a line feed at its end, and so has all that is hashed or signed. It is RFC 8785 with two exceptions:
    numbers are spelled as by Python's repr: the shortest text that reads back as the same double; 1.0 and 1 differ
    characters beyond ASCII are escaped: no transport changes them, and a file name that is not UTF-8 can be kept
A record has one form, so a change of white space is a change.

Chain: `sha256` of an entry is over the canonical form of the entry without that key. `previous` is the hash of the
entry before, so the hash of the last entry (the head) stands for all. Entries of the kind `files` hold the SHA-256 of
files in the run folder; a later hash of a file replaces an earlier one. The key `files` holds the hashes that result.

What is detected: any change of a record, or of a file it covers, by somebody who did not compute all later hashes anew.
Without a signature, somebody who did is not detected, unless the head is known from elsewhere. With a signature, and a
public key from a trusted source, only the holder of the private key can make another record that passes the check.
Two limits remain. Entries added after the signature are unsigned until somebody signs again. A record as it was signed
earlier still passes, so whoever kept a copy can put it back.

Ids: a record is kept for years after a deletion, and must not itself keep what was to be deleted. So it holds the
HMAC-SHA256 of each id under 32 random bytes of its own. They are in `record.salt` in the same folder, which only its
owner can read. Without a salt a hash would hide nothing: ids are file names and numbers, which anybody can guess and
hash one by one. Whoever has the salt can prove that an id was in the request (`contains`), and nobody else can.
Destroying the file makes the record anonymous, and the record still passes the check. More than 1,000 ids are in
`record.ids`, the canonical form of {"bad_images": [...], "forget": [...]}, which the record covers.

What stays: the digest of the samples that were trained on. Whoever holds the ids and labels of all the others can
derive from it which single sample is missing. Other files of the run folder stay as well: config.yaml names the
request's file or class and the digest of the forget set, and report.html shows pictures of forgotten samples.
"""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.audit.record_format import (
    FIRST,
    FORMAT,
    IDS,
    KINDS,
    RECORD,
    SALT,
    can_be_covered,
    covered_files,
    digest,
    encode,
    file_problem,
    is_deep,
    read_document,
    signed_message,
)
from engine.audit.signature import signer
from engine.errors import UserError
from engine.runtime.files import replacing, sha256


class Record:
    """A record that is being written, or one that entries are added to.

    Attributes:
        entries: Entries in order, each with its hash.
        signature: The object `signature` of the file; None if the record is not signed.
    """

    def __init__(self, entries: Sequence[dict[str, Any]] = (), signature: dict[str, Any] | None = None) -> None:
        self.entries, self.signature = list(entries), signature

    @classmethod
    def start(cls, folder: Path) -> Record:
        """Return an empty record; an earlier one in the folder belongs to another run and is removed."""
        for name in (RECORD, SALT, IDS):
            (folder / name).unlink(missing_ok=True)
        return cls()

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Return the record of a run folder.

        Raises:
            UserError: The folder has no record, or the bytes of the record were changed.
        """
        document, problems = read_document(folder)
        if document is None or problems:
            raise UserError(f"{folder}: {problems[0]}; `lethe verify-record {folder}` lists all that is wrong")
        return cls(document["entries"], document["signature"])

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Add an entry.

        Args:
            kind: One of `KINDS`.
            content: JSON values. They must not name people, since an entry cannot be removed.

        Raises:
            ValueError: The kind is unknown, or the content is nested too deeply.
        """
        if kind not in KINDS:
            raise ValueError(f"record: kind {kind!r}, expected one of {', '.join(KINDS)}")
        entry = {
            "number": len(self.entries) + 1,
            "kind": kind,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "content": json.loads(json.dumps(content, allow_nan=False)),  # as read back: keys are text, no tuples
            "previous": self.entries[-1]["sha256"] if self.entries else FIRST,
        }
        if is_deep({"entries": [entry]}):
            raise ValueError(f"record: the content of {kind!r} is nested too deeply; flatten it")
        self.entries.append({**entry, "sha256": digest(entry)})

    def seal(self, folder: Path, files: Sequence[str] = (), key: Path | None = None) -> None:
        """Add the hashes of files, sign the head, and write record.json.

        record.json is replaced in one step.

        Args:
            folder: Run folder.
            files: Names of files in the folder that the record covers, as they are now.
            key: PEM file of an Ed25519 private key. None: an earlier signature is kept, for the entries that it was
                made over.

        Raises:
            ValueError: A file is not one that a record can cover.
            UserError: The key cannot sign, or the record is too large.
        """
        if files:
            if odd := [name for name in files if not can_be_covered(name)]:
                raise ValueError(f"record: {odd[0]!r} is not the name of a file that can be covered")
            self.append("files", {"sha256": {name: sha256(folder / name) for name in files}})
        if key is not None:
            self.signature = _sign(self.entries, key)
        document = {
            "format": FORMAT,
            "entries": self.entries,
            "files": covered_files(self.entries),
            "head": self.entries[-1]["sha256"],
            "signature": self.signature,
        }
        data = encode(document, folder / RECORD)
        with replacing(folder / RECORD) as temporary:
            temporary.write_bytes(data)


def append_to_record(
    folder: Path, kind: str, content: Mapping[str, Any], files: Sequence[str] = (), key: Path | None = None
) -> None:
    """Add an entry to the record of a finished run, and the hashes of files as they are now.

    Earlier entries are kept, so a file that was changed before is still detected, unless it is among `files`.

    Args:
        folder: Run folder.
        kind, content: As of `Record.append`.
        files, key: As of `Record.seal`.

    Raises:
        UserError: The folder has no record, or the bytes of the record were changed.
    """
    record = Record.open(Path(folder))
    record.append(kind, content)
    record.seal(Path(folder), files, key)


def recorded(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return the content of the last entry of a kind, one of `KINDS`, in the record of a run folder.

    Returns:
        The content; None if the folder has no record, or the record has no such entry.

    Raises:
        UserError: The bytes of the record were changed. The files that it covers are not read; see `verify_record`.

    Example:
        >>> recorded(reference, "data")["samples"]["retain_sha256"]  # `Samples.fingerprint()` of the training samples
    """
    if not os.path.lexists(Path(folder) / RECORD):
        return None
    entries = Record.open(Path(folder)).entries
    return next((entry["content"] for entry in reversed(entries) if entry["kind"] == kind), None)


def hashed_ids(ids: Sequence[str], salt: bytes) -> list[str]:
    """Return the HMAC-SHA256 of each id as hex, sorted, so that their order reveals nothing about the ids."""
    return sorted(hmac.digest(salt, i.encode("utf-8", "surrogatepass"), "sha256").hex() for i in ids)


def contains(folder: Path, sample_id: str) -> bool:
    """Return whether an id was in the request of a run.

    Raises:
        UserError: The folder has no record, the record or its list of ids is damaged, or the salt was destroyed.
    """
    folder = Path(folder)
    entries = Record.open(folder).entries
    ids = next((entry["content"].get("ids") for entry in entries if entry["kind"] == "request"), None)
    if not isinstance(ids, dict):
        raise UserError(f"{folder / RECORD} has no list of the ids of the request")
    listed = ids.get("forget")
    if listed is None:
        if problem := file_problem(folder / IDS, covered_files(entries).get(IDS, "")):
            raise UserError(f"{folder / IDS} {problem}; restore it")
        listed = json.loads((folder / IDS).read_bytes())["forget"]
    if ids.get("form") == "plain":
        return sample_id in listed
    if problem := file_problem(folder / SALT, str(ids.get("salt_sha256"))):
        raise UserError(f"{folder / SALT} {problem}; without the salt of this record its ids cannot be identified")
    return hashed_ids([sample_id], (folder / SALT).read_bytes())[0] in listed


def _sign(entries: Sequence[Mapping[str, Any]], key: Path) -> dict[str, Any]:
    value, public_key = signer(key)(signed_message(len(entries), entries[-1]["sha256"]))
    signature = {"algorithm": "Ed25519", "entries": len(entries), "public_key": public_key, "value": value}
    return {**signature, "sha256": digest(signature)}  # damage to it is detected without a public key too
