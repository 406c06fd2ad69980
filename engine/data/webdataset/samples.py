"""Samples in tar shards, read in any order: nothing is unpacked, copied or rewritten to leave samples out.

The index (key, label and position of every sample) is built once from the headers. It is stored in the folder of the
shards, or under ~/.cache/lethe if that folder cannot be written. It is valid for shards of the same names, sizes and
times.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.ids import Ids
from engine.data.samples import IdKind, Samples
from engine.data.webdataset.index import ShardSamples, read_shard
from engine.data.webdataset.shards import find_shards
from engine.errors import RunStopped, UserError
from engine.runtime.files import write_npz

logger = logging.getLogger(__name__)

_FORMAT = "lethe index 2"
_ARRAYS = ("counts", "labels", "offsets", "sizes", "id_text", "id_ends")
_OPEN_SHARDS = 64  # for each process; systems often allow 1,024 open files
_THREADS = 8  # shards whose headers are read at once, for network file systems


def open_webdataset(location: str) -> dict[str, Samples]:
    """Return train, validation and test samples of a folder or a pattern of shards.

    Raises:
        UserError: Shards are missing, damaged or compressed.
    """
    shards = find_shards(location, f"webdataset:{location}")
    return {split: _open_split(f"webdataset {split}", paths) for split, paths in shards.items()}


def _open_split(name: str, paths: Sequence[Path]) -> Samples:
    index = _load_or_build(name, paths)
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), index["counts"])
    reader = _Reader([str(path) for path in paths], shard, index["offsets"], index["sizes"])
    ids = Ids.from_bytes(index["id_text"], index["id_ends"])
    return Samples(name, ids, index["labels"], reader.open, where=reader.where, id_kind=IdKind("keys of tar members"))


class _Reader:
    """Reads images by number. A shard is opened when it is first read, in the process that reads it."""

    def __init__(self, paths: Sequence[str], shard: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.paths, self.shard, self.offsets, self.sizes = paths, shard, offsets, sizes

    def open(self, index: int) -> Image.Image:
        size = int(self.sizes[index])
        # pread does not move a file position, so worker processes may inherit open shards.
        content = os.pread(_opened(self.paths[self.shard[index]]).descriptor, size, int(self.offsets[index]))
        if len(content) < size:
            raise OSError(f"{len(content)} of {size} bytes are left; the shard has changed since it was opened")
        return Image.open(io.BytesIO(content))

    def where(self, index: int) -> str:
        return f"shard {self.paths[self.shard[index]]}"


class _Opened:
    """A descriptor that is closed once neither the cache of open shards nor a read refers to it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)  # None if open failed
        if descriptor is not None:
            os.close(descriptor)


_opened = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Opened)


def _load_or_build(name: str, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    state = _state(paths)
    names = hashlib.sha256("\0".join(str(path.resolve()) for path in paths).encode()).hexdigest()[:16]
    file = f".lethe-index-{names}.npz"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lethe"
    places = [paths[0].parent / file, home / file]
    for place in places:
        index = _load(place, state)
        if index is not None:
            return index
    logger.info("%s: reading the headers of %d shards, once", name, len(paths))
    index = _build(paths)
    for place in places:
        if _save(place, state, index):
            break
    else:
        logger.warning("%s: no place to keep the index (%s, %s); it is built anew each time", name, *places)
    return index


def _state(paths: Sequence[Path]) -> str:
    """Return a digest of what the index depends on: names, sizes and times of the shards."""
    digest = hashlib.sha256(_FORMAT.encode())
    for path in paths:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"shard {path}: {error.strerror}") from None
        digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _load(place: Path, state: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(place, allow_pickle=False) as stored:
            if str(stored["state"]) != state:
                return None
            return {key: stored[key] for key in _ARRAYS}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the index %s cannot be read (%s) and is built anew", place, error)
        return None


def _save(place: Path, state: str, index: dict[str, np.ndarray]) -> bool:
    try:
        write_npz(place, {"state": np.array(state), **index})
        return True
    except (OSError, RunStopped, UserError):  # no permission to write, or a full disk
        return False


def _build(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        shards = list(pool.map(_packed, paths))
    arrays = {key: np.concatenate([shard[key] for shard in shards]) for key in _ARRAYS[1:]}
    arrays["counts"] = np.array([len(shard["labels"]) for shard in shards], dtype=np.int64)
    arrays["id_ends"] = np.cumsum(arrays["id_ends"])
    return arrays


def _packed(path: Path) -> dict[str, np.ndarray]:
    """Return the samples of a shard as arrays; `id_ends` holds lengths until all shards are joined."""
    samples: ShardSamples = read_shard(path)
    for key in samples.keys:
        try:
            key.decode()
        except UnicodeDecodeError:
            raise UserError(f"shard {path}: the key {key!r} is not UTF-8; rename it") from None
    return {
        "labels": np.array(samples.labels, dtype=np.int64),
        "offsets": np.array(samples.offsets, dtype=np.int64),
        "sizes": np.array(samples.sizes, dtype=np.int64),
        "id_text": np.frombuffer(b"".join(samples.keys), dtype=np.uint8),
        "id_ends": np.array([len(key) for key in samples.keys], dtype=np.int64),
    }
