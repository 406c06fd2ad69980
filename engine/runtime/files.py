"""Files that are complete or absent: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import RunStopped, UserError

_FULL = ("No space left on device", "file write failed", "basic_ios::clear: iostream error", "unexpected pos")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`, and rename it to `path` if the block succeeds.

    Raises:
        RunStopped: No space is left; the earlier `path` is unchanged.
        UserError: No file can be made in the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    intact = "the earlier file, if there was one, is intact"
    with full_disk(path, intact), writable(path):
        temporary.touch()
    try:
        with full_disk(path, intact):
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the error of a folder or file that cannot be made into UserError; that of a full disk stays."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); check what is there, and its rights") from None


@contextlib.contextmanager
def full_disk(path: Path, otherwise: str) -> Iterator[None]:
    """Turn the errors of a full disk into RunStopped.

    Args:
        path: File that is written, for the message.
        otherwise: State of the files after the error, for the message.
    """
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        if _is_full(error):
            raise RunStopped(f"no space left to write {path}; {otherwise}") from error
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException) -> bool:
    # safetensors and torch.save wrap the OSError in errors of their own; torch.save's have no other reason.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in _FULL)


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON; the file is complete or unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder with those above it.

    Raises:
        UserError: It cannot be made: a file is there, or the rights are missing.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; the file is complete or unchanged, and its folder is created."""
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file; None if there is none, or it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
