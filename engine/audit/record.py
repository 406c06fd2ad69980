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

import dataclasses
import hashlib
import hmac
import json
import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.audit.signature import checker, signer
from engine.errors import UserError
from engine.runtime.files import replacing, sha256

RECORD, SALT, IDS = "record.json", "record.salt", "record.ids"
KINDS = ("request", "data", "code", "environment", "config", "weights", "metrics", "events", "files", "verdict")

_FORMAT = 2
_FIRST = "0" * 64
_HASH = re.compile("[0-9a-f]{64}")
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # of a file in the run folder itself
# The keys of each object and the types of their values.
_SHAPE = {"entries": (list,), "files": (dict,), "format": (int,), "head": (str,), "signature": (dict, type(None))}
_ENTRY = {"number": (int,), "content": (dict,), **dict.fromkeys(("kind", "time", "previous", "sha256"), (str,))}
_SIGNATURE = {"entries": (int,), **dict.fromkeys(("algorithm", "public_key", "value", "sha256"), (str,))}
# Largest record in bytes, and its deepest nesting: more than any run writes. A check reads and descends no further.
_LARGEST = 16 * 2**20
_DEEPEST = 64


def canonical(value: Any) -> bytes:
    """Return the canonical form of a JSON value, see the top of the file.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: An object is not a JSON value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


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
        document, problems = _read(folder)
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
            "previous": self.entries[-1]["sha256"] if self.entries else _FIRST,
        }
        if _is_deep({"entries": [entry]}):
            raise ValueError(f"record: the content of {kind!r} is nested too deeply; flatten it")
        self.entries.append({**entry, "sha256": _digest(entry)})

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
            if odd := [name for name in files if not _can_be_covered(name)]:
                raise ValueError(f"record: {odd[0]!r} is not the name of a file that can be covered")
            self.append("files", {"sha256": {name: sha256(folder / name) for name in files}})
        if key is not None:
            self.signature = _sign(self.entries, key)
        document = {
            "format": _FORMAT,
            "entries": self.entries,
            "files": _files(self.entries),
            "head": self.entries[-1]["sha256"],
            "signature": self.signature,
        }
        data = canonical(document) + b"\n"
        if len(data) > _LARGEST:
            raise UserError(f"{folder / RECORD} would have {len(data):,} bytes, more than {_LARGEST:,}; record less")
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
    document, problems = _read(folder)
    if document is None:
        return RecordCheck(problems=problems, entries=[], files={}, head="", signature="none", salt="none")
    entries = document["entries"]
    files = _files(entries)  # not document["files"]: the names of the entries were checked
    for name, expected in sorted(files.items()):
        if problem := _file_problem(folder / name, expected):
            problems.append(f"{name}: {problem}")
    salt, salt_digest = "none", _salt_digest(entries)
    if salt_digest is not None:
        salt = "present" if os.path.lexists(folder / SALT) else "destroyed"
        if salt == "present" and (problem := _file_problem(folder / SALT, salt_digest)):
            problems.append(f"{SALT}: {problem}")
    state = "none" if document["signature"] is None else "unchecked"
    if is_valid is not None:
        problem = _signature_problem(document, is_valid)
        problems += [f"{RECORD}: {problem}"] if problem else []
        state = "invalid" if problem else "valid"
    return RecordCheck(
        problems=problems,
        entries=[(entry["number"], _shown(entry["kind"]), _shown(entry["time"])) for entry in entries],
        files=files,
        head=_shown(document["head"]),
        signature=state,
        salt=salt,
    )


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
        raise UserError(f"{folder / RECORD} does not say which ids were asked for")
    listed = ids.get("forget")
    if listed is None:
        if problem := _file_problem(folder / IDS, _files(entries).get(IDS, "")):
            raise UserError(f"{folder / IDS} {problem}; restore it")
        listed = json.loads((folder / IDS).read_bytes())["forget"]
    if ids.get("form") == "plain":
        return sample_id in listed
    if problem := _file_problem(folder / SALT, str(ids.get("salt_sha256"))):
        raise UserError(
            f"{folder / SALT} {problem}; without the salt of this record nobody can tell which ids it means"
        )
    return hashed_ids([sample_id], (folder / SALT).read_bytes())[0] in listed


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _files(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    files: dict[str, str] = {}
    for entry in entries:
        if entry["kind"] == "files":
            files.update(entry["content"]["sha256"])
    return files


def _salt_digest(entries: Sequence[Mapping[str, Any]]) -> str | None:
    found = (entry["content"].get("ids") for entry in entries if entry["kind"] == "request")
    digests = (ids.get("salt_sha256") for ids in found if isinstance(ids, dict))
    return next((digest for digest in digests if isinstance(digest, str)), None)


def _can_be_covered(name: str) -> bool:
    # Not the salt: a record must pass the check without it.
    return bool(_NAME.fullmatch(name)) and name not in (RECORD, SALT)


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return (record, problems of its bytes); the record is None if the file cannot be read as one."""
    path = folder / RECORD
    if not os.path.lexists(path):
        raise UserError(f"{folder} holds no {RECORD}; name a folder that `lethe unlearn` or `lethe train` wrote")
    try:
        if problem := _irregular(path):
            return None, [f"{RECORD}: {problem}"]
        if path.stat().st_size > _LARGEST:
            return None, [f"{RECORD}: is larger than any record"]
        data = path.read_bytes()
    except OSError as error:
        return None, [f"{RECORD}: cannot be read ({error.strerror})"]
    try:
        document = json.loads(data.decode("ascii"))
        if _is_deep(document):
            return None, [f"{RECORD}: is nested more deeply than any record"]
        form = canonical(document) + b"\n"
    except (ValueError, RecursionError) as error:
        return None, [f"{RECORD}: is not canonical JSON ({_shown(str(error))})"]
    if problem := _misshapen(document):
        return None, [f"{RECORD}: {problem}"]
    problems = _broken_links(document)
    if form != data:
        problems.append(
            f"{RECORD}: is not in canonical form: white space, the order of keys or the spelling of a value was "
            "changed, or a key stands there twice"
        )
    return document, problems


def _is_deep(value: Any) -> bool:
    """Return whether containers are nested more than `_DEEPEST` deep; without recursion, which could fail."""
    level = [value]
    for _ in range(_DEEPEST):
        if not level:
            return False
        objects = [inner for outer in level if isinstance(outer, dict) for inner in outer.values()]
        level = [*objects, *(inner for outer in level if isinstance(outer, list) for inner in outer)]
    return bool(level)


def _misshapen(document: Any) -> str:
    """Return why a JSON value is not a record whose hashes can be checked; empty if it is one."""
    if problem := _unlike(document, _SHAPE):
        return problem
    if document["format"] != _FORMAT:
        return f"has format {_shown(document['format'])}, expected {_FORMAT}"
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
            return f"has a key {_shown(repr(key))} that does not belong there"
        if type(value[key]) not in shape[key]:  # the exact type: for isinstance, true is an int
            return f"has another type of {key!r} than {shape[key][0].__name__}"
    return ""


def _is_file_list(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _can_be_covered(name) and isinstance(digest, str) and _HASH.fullmatch(digest) for name, digest in value.items()
    )


def _broken_links(document: Mapping[str, Any]) -> list[str]:
    """Return one line for each hash of a well-formed record that does not fit its content."""
    problems = []
    previous = _FIRST
    for number, entry in enumerate(document["entries"], 1):
        name = f"{RECORD}: entry {number} ({_shown(entry['kind'])})"
        if not _fits_its_hash(entry):
            problems.append(f"{name} was changed: its hash is not that of its content")
        if entry["number"] != number:
            problems.append(f"{name} has the number {_shown(entry['number'])}")
        if entry["previous"] != previous:
            problems.append(f"{name} does not follow the entry before it")
        previous = entry["sha256"]
    if document["head"] != previous:
        problems.append(f"{RECORD}: head is not the hash of the last entry")
    if document["files"] != _files(document["entries"]):
        problems.append(f"{RECORD}: files are not those of its entries")
    if document["signature"] is not None and not _fits_its_hash(document["signature"]):
        problems.append(f"{RECORD}: signature was changed: its hash is not that of its content")
    return problems


def _fits_its_hash(value: Mapping[str, Any]) -> bool:
    return _digest({key: inner for key, inner in value.items() if key != "sha256"}) == value["sha256"]


def _irregular(path: Path) -> str:
    """Return why a path is not a regular file; empty if it is.

    A symbolic link is not accepted: its target may change without a change of the folder.
    """
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a symbolic link, not a file"
    return "" if stat.S_ISREG(mode) else "is not a file"


def _file_problem(path: Path, expected: str) -> str:
    try:
        if problem := _irregular(path):
            return problem
        return "" if sha256(path) == expected else "was changed: its hash is not the one recorded"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _shown(value: Any) -> str:
    """Return untrusted text for a terminal: at most 80 characters, without control characters."""
    text = re.sub("[^ -~]", "?", value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _message(entries: int, head: str) -> bytes:
    """Return the bytes that are signed. The head stands for all entries up to its own."""
    return b"lethe record\n" + canonical({"entries": entries, "format": _FORMAT, "head": head})


def _sign(entries: Sequence[Mapping[str, Any]], key: Path) -> dict[str, Any]:
    value, public_key = signer(key)(_message(len(entries), entries[-1]["sha256"]))
    signature = {"algorithm": "Ed25519", "entries": len(entries), "public_key": public_key, "value": value}
    return {**signature, "sha256": _digest(signature)}  # damage to it is detected without a public key too


def _signature_problem(document: Mapping[str, Any], is_valid: Callable[[bytes, str], bool]) -> str:
    """Return why the whole record is not signed by the holder of the key; empty if it is."""
    signature, entries = document["signature"], document["entries"]
    if signature is None:
        return "carries no signature"
    count = signature["entries"]
    if not 1 <= count <= len(entries):
        return f"signature is over {_shown(count)} entries, and there are {len(entries)}"
    if not is_valid(_message(count, entries[count - 1]["sha256"]), signature["value"]):
        return "signature is not one of this record by the holder of this key"
    if count < len(entries):
        return f"signature is over entries 1 to {count}; the {len(entries) - count} after them are not signed"
    return ""
