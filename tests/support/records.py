"""Records by hand, the format's hashes without the code under test, and keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from engine.audit.record import Record
from engine.audit.record_format import RECORD


def made(folder: Path, key: Path | None = None) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"covered")
    record = Record.start(folder)
    record.append("request", {"forget": 1, "ids": {"form": "plain", "forget": ["x"]}})
    record.append("metrics", {"accuracy": 0.1, "tiny": 1e-7, "text": "\u00e9\n", "none": None, "list": [1, 2.0]})
    record.seal(folder, ["a.txt"], key)
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_bytes())


def overwrite(path: Path, data: bytes) -> None:
    """Other content for a file that is there; many times faster than a file that is cut to nothing first."""
    with open(path, "r+b") as handle:
        handle.write(data)
        handle.truncate()


def digest(value: dict[str, Any]) -> str:
    """As the format says, without the code under test."""
    rest = {key: inner for key, inner in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def forge(folder: Path, document: dict[str, Any]) -> None:
    """Writes a record with every hash computed anew, as somebody would who covers up a change."""
    previous = "0" * 64
    for number, entry in enumerate(document["entries"], 1):
        entry.update(number=number, previous=previous)
        entry["sha256"] = previous = digest(entry)
    document["head"] = previous
    overwrite(folder / RECORD, json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def make_keys(folder: Path) -> Path:
    """Two pairs (mine, theirs), and what is no key of ours (locked, curve, noise)."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    public = (s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    plain = (s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    for name in ("mine", "theirs"):
        key = ed25519.Ed25519PrivateKey.generate()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(*plain))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*public))
    locked = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"word"))
    (folder / "locked.pem").write_bytes(locked)
    curve = ec.generate_private_key(ec.SECP256R1())
    (folder / "curve.pem").write_bytes(curve.private_bytes(*plain))
    (folder / "curve.pub").write_bytes(curve.public_key().public_bytes(*public))
    (folder / "noise.pem").write_bytes(b"\x00not a key")
    return folder
