"""Files that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import RunStopped

_FULL = ("No space left on device", "file write failed", "basic_ios::clear: iostream error", "unexpected pos")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, and renames it to `path` if the block ends well.

    Raises RunStopped where there is no space left; the earlier `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk(path, "the earlier file, if there was one, is intact"):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk(path: Path, otherwise: str) -> Iterator[None]:
    """Turns the errors of a full disk into RunStopped, with what is left to the user."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        if _is_full(error):
            raise RunStopped(f"no space left to write {path}; {otherwise}") from error
        raise


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException) -> bool:
    # safetensors and torch.save wrap the OSError in errors of their own; torch.save's say only that a write failed.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in _FULL)


def write_json(path: Path, values: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
