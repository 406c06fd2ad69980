"""record.json: what was asked of a run, what it did and what came out, so that a later change of either shows.

One JSON object:

    {"format": 2,
     "entries": [{"number": 1, "kind": "request", "time": "2026-01-31T12:00:00Z", "content": {...},
                  "previous": 64 zeros, "sha256": "..."}, ...],
     "files": {"model.safetensors": sha256, ...},
     "head": sha256 of the last entry,
     "signature": null | {"algorithm": "Ed25519", "entries": n, "public_key": hex, "value": hex, "sha256": "..."}}

Canonical form, that of the file (with a line feed at its end) and of all that is hashed or signed: keys sorted, no
white space, ASCII with \\uXXXX for all other characters, no NaN or infinity. It is RFC 8785 but for two points: numbers
are spelled as Python's repr does (the shortest text that reads back as the same double; 1.0 and 1 differ), and
characters beyond ASCII are escaped, so that no transport changes them and a file name that is not UTF-8 can be kept.
A record has one form, so a change of white space is a change.

Chain: sha256 of an entry is over the canonical form of the entry without it; `previous` is that of the entry before, so
the last one (the head) stands for all. Entries of the kind `files` hold the SHA-256 of files in the run folder, a later
one in place of an earlier; `files` is what they say in the end.

What it shows: any change of a record, or of a file it covers, by somebody who did not compute all later hashes anew.
Without a signature somebody who did is not detected, unless the head is known from elsewhere. With one, and a
public key from a source that is trusted, nobody but the holder of the private key can make another record that holds.
Entries that were added after the signature are not signed before somebody signs again; and a record as it was signed
earlier still holds, so who kept it can put it back.

Ids: a record is kept for years after a deletion, and must not itself keep what was to be deleted. So it holds the
HMAC-SHA256 of each id under 32 random bytes of its own, which lie beside it in `record.salt`, readable by their owner.
Without a salt a hash would hide nothing: ids are file names and numbers, which anybody can guess and hash one by one.
So who has the salt can prove that an id was in the request (`contains`), and nobody else can; destroying the file makes
the record anonymous, and leaves it as sound as before. More than 1,000 ids are in `record.ids`, the canonical form of
{"bad_images": [...], "forget": [...]}, which the record covers.
What stays: the digest of the samples that were trained on. Who holds the ids and labels of all the others can tell by
it which single sample is missing. And files beside the record: config.yaml names the request's file or class and
the digest of the forget set, and report.html shows pictures of forgotten samples.
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
# More than any run writes: what a checker reads into memory and descends into must have an end.
_LARGEST = 16 * 2**20
_DEEPEST = 64


def canonical(value: Any) -> bytes:
    """The one form of a JSON value, see above. Raises ValueError for NaN and infinity, TypeError for other objects."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


class Record:
    """A record in the making, or one that is being added to."""

    def __init__(self, entries: Sequence[dict[str, Any]] = (), signature: dict[str, Any] | None = None) -> None:
        self.entries, self.signature = list(entries), signature

    @classmethod
    def start(cls, folder: Path) -> Record:
        """An empty record; an earlier one in the folder is of another run, and removed."""
        for name in (RECORD, SALT, IDS):
            (folder / name).unlink(missing_ok=True)
        return cls()

    @classmethod
    def open(cls, folder: Path) -> Record:
        """The record of a run folder. Raises UserError where there is none, or one whose own bytes were changed."""
        document, problems = _read(folder)
        if document is None or problems:
            raise UserError(f"{folder}: {problems[0]}; `lethe verify-record {folder}` lists all that is wrong")
        return cls(document["entries"], document["signature"])

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Adds an entry. content: JSON values; nothing in it that names people, since it cannot be taken out again."""
        if kind not in KINDS:
            raise ValueError(f"record: kind {kind!r}, expected one of {', '.join(KINDS)}")
        entry = {
            "number": len(self.entries) + 1,
            "kind": kind,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "content": json.loads(json.dumps(content, allow_nan=False)),  # as it will be read: keys are text, no tuples
            "previous": self.entries[-1]["sha256"] if self.entries else _FIRST,
        }
        if _is_deep({"entries": [entry]}):
            raise ValueError(f"record: the content of {kind!r} is nested too deeply; flatten it")
        self.entries.append({**entry, "sha256": _digest(entry)})

    def seal(self, folder: Path, files: Sequence[str] = (), key: Path | None = None) -> None:
        """Covers files of the folder as they are now, signs the head if there is a key, and writes record.json.

        key: PEM file of an Ed25519 private key. Without one an earlier signature stays, for the entries that it was
        made over. record.json is replaced in one step.
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
    """Adds an entry to the record of a finished run, and covers `files` (names in the folder) as they are now.

    Earlier entries stay as they are, so files that were changed before are still detected, unless they are named here.
    Raises UserError where there is no record, or its own bytes were changed. key: as of `Record.seal`.
    """
    record = Record.open(Path(folder))
    record.append(kind, content)
    record.seal(Path(folder), files, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """What a record says and whether it holds.

    problems: a line for each; empty = intact. entries: (number, kind, time) of each. files: SHA-256 of those covered.
    All but problems are empty where the record cannot be read.
    signature: none | unchecked (no public key was given) | valid | invalid.
    salt: present | destroyed | none (no ids, or as they are).
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
    """What is wrong with a record and the files it covers, a line for each; empty = intact.

    public_key: PEM file of an Ed25519 public key by whose holder the whole record must be signed. Raises UserError
    where there is no record or no such key; never for what a record or a file holds.
    """
    return check_record(folder, public_key).problems


def check_record(folder: Path, public_key: Path | None = None) -> RecordCheck:
    """The same, with what else the record says."""
    folder = Path(folder)
    is_valid = None if public_key is None else checker(public_key)
    document, problems = _read(folder)
    if document is None:
        return RecordCheck(problems=problems, entries=[], files={}, head="", signature="none", salt="none")
    entries = document["entries"]
    files = _files(entries)  # not document["files"]: these names were looked at
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
    """The content of the last entry of a kind; None where the folder has no record, or the record no such entry.

    Such as `recorded(reference, "data")["samples"]["retain_sha256"]`, the `Samples.fingerprint()` of what a model was
    trained on. Raises UserError where the record's own bytes were changed; for the files there is `verify_record`.
    """
    if not os.path.lexists(Path(folder) / RECORD):
        return None
    entries = Record.open(Path(folder)).entries
    return next((entry["content"] for entry in reversed(entries) if entry["kind"] == kind), None)


def hashed_ids(ids: Sequence[str], salt: bytes) -> list[str]:
    """HMAC-SHA256 of each id, sorted: their order says nothing of the ids."""
    return sorted(hmac.digest(salt, i.encode("utf-8", "surrogatepass"), "sha256").hex() for i in ids)


def contains(folder: Path, sample_id: str) -> bool:
    """Whether an id was in the request of a run.

    Raises UserError where that cannot be told: no record, a damaged one, or a salt that was destroyed.
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
    # Not the salt: a record must hold without it.
    return bool(_NAME.fullmatch(name)) and name not in (RECORD, SALT)


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """(record, what is wrong with its own bytes); no record where it cannot be read as one."""
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
    """Whether containers lie in each other more than `_DEEPEST` deep; without a call a level, which could fail."""
    level = [value]
    for _ in range(_DEEPEST):
        if not level:
            return False
        objects = [inner for outer in level if isinstance(outer, dict) for inner in outer.values()]
        level = [*objects, *(inner for outer in level if isinstance(outer, list) for inner in outer)]
    return bool(level)


def _misshapen(document: Any) -> str:
    """In what a JSON value is not a record whose hashes can be checked; empty where it is one."""
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
    """In what a value is not an object of exactly these keys, with values of these types; empty where it is."""
    if not isinstance(value, dict):
        return "is not an object"
    for key in sorted({*shape, *value}):
        if key not in value:
            return f"has no key {key!r}"
        if key not in shape:
            return f"has a key {_shown(repr(key))} that does not belong there"
        if type(value[key]) not in shape[key]:  # exactly: to isinstance, true is an int
            return f"has another type of {key!r} than {shape[key][0].__name__}"
    return ""


def _is_file_list(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _can_be_covered(name) and isinstance(digest, str) and _HASH.fullmatch(digest) for name, digest in value.items()
    )


def _broken_links(document: Mapping[str, Any]) -> list[str]:
    """Where the hashes of a well-formed record do not fit what they stand for."""
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
    """In what a path is not a plain file. A link is none: what it points to may change with the folder left alone."""
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
    """Text that nobody vouches for: short, and without characters that a terminal obeys."""
    text = re.sub("[^ -~]", "?", value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _message(entries: int, head: str) -> bytes:
    """What is signed. The head stands for all entries up to its own."""
    return b"lethe record\n" + canonical({"entries": entries, "format": _FORMAT, "head": head})


def _sign(entries: Sequence[Mapping[str, Any]], key: Path) -> dict[str, Any]:
    value, public_key = signer(key)(_message(len(entries), entries[-1]["sha256"]))
    signature = {"algorithm": "Ed25519", "entries": len(entries), "public_key": public_key, "value": value}
    return {**signature, "sha256": _digest(signature)}  # so that damage to it shows without a public key too


def _signature_problem(document: Mapping[str, Any], is_valid: Callable[[bytes, str], bool]) -> str:
    """Why the holder of the key does not vouch for the whole record; empty where he does."""
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
