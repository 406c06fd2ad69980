"""Where the samples of a tar shard lie: key, label, and the bytes of the image, from the headers alone.

A sample is the members of one key, WebDataset's: the name up to the first dot of its last part. `KEY.jpg` (jpeg, png,
webp) is the image; `KEY.cls` (a whole number as text) or `label` in `KEY.json` is its label; other members are left.

Headers of regular members, and the long names of pax and GNU, are read here: Python's tarfile takes ten times as long.
A shard with anything else (links, sparse files, global headers) goes through tarfile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from engine.errors import UserError

BLOCK = 512
_IMAGES = frozenset((b"jpg", b"jpeg", b"png", b"webp"))
_SPACES = 8 * 0x20  # the checksum's own field counts as spaces
_SMALL, _WINDOW = 1 << 14, 1 << 18
_MOST_TAIL = 1 << 20
_ZEROS = bytes(BLOCK)


@dataclasses.dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard, in its order. offsets, sizes: bytes of the images."""

    keys: list[bytes]
    labels: list[int]
    offsets: list[int]
    sizes: list[int]


class _Unusual(Exception):
    """A header that is left to tarfile."""


class _Reader:
    """A file read in windows: many headers at once where members are small, a page where they are large."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path
        self.size = os.fstat(descriptor).st_size
        self.start, self.buffer = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes than `length` only at the end of the file. Offsets go forward from call to call."""
        first = offset - self.start
        if first + length > len(self.buffer):
            near = first < len(self.buffer) + _SMALL
            self.buffer = os.pread(self.descriptor, max(length, _WINDOW if near else 4096), offset)
            self.start, first = offset, 0
        return self.buffer[first : first + length]


def read_shard(path: Path) -> ShardSamples:
    """Raises UserError, naming the shard, where it is damaged or cut short, or holds samples that are not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}") from None
    try:
        reader = _Reader(descriptor, path)
        try:
            return _group(reader, _members(reader))
        except _Unusual:
            return _group(reader, _tarfile_members(reader))
    finally:
        os.close(descriptor)


def _fail(path: Path, what: str) -> NoReturn:
    raise UserError(f"shard {path}: {what}")


def _cut_short(path: Path, what: str) -> NoReturn:
    _fail(path, f"is cut short: {what}; copy or download it again")


def _members(reader: _Reader) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every regular member."""
    path, size = reader.path, reader.size
    if size == 0:
        _fail(path, "is empty")
    position = 0
    name = b""  # from a pax or GNU header before the member
    override: int | None = None
    while True:
        header = reader.read(position, BLOCK)
        if len(header) < BLOCK:
            _cut_short(path, f"it ends after {size} bytes without an end-of-archive mark")
        if header[0] == 0 and header == _ZEROS:
            break
        _check(header, position, path)
        kind = header[156:157]
        length = _octal(header[124:136], position, path) if override is None else override
        data = position + BLOCK
        following = data + -(-length // BLOCK) * BLOCK
        if following > size:
            _cut_short(path, f"the member at byte {position} has {length} bytes and {size - data} are there")
        if kind in (b"0", b"\0", b"7"):
            yield name or _name(header), data, length
            name, override = b"", None
        elif kind == b"x":
            name, override = _pax(reader.read(data, length), name)
        elif kind == b"L":
            name = reader.read(data, length).rstrip(b"\0")
        elif kind == b"5":
            name, override = b"", None
        else:
            raise _Unusual
        position = following
    _check_end(reader, position)


def _check(header: bytes, position: int, path: Path) -> None:
    field = header[148:156]
    stored = field.rstrip(b"\0 ").lstrip()
    # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65521, and much faster than sum().
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + _SPACES
    try:
        right = (int(stored, 8) - total) % 65521 == 0
    except ValueError:
        right = False
    if right:
        return
    if position == 0 and header[:2] == b"\x1f\x8b":
        _fail(path, "is compressed; samples are read in any order, so decompress it (gunzip)")
    if position == 0:
        _fail(path, "is not a tar archive")
    _fail(path, f"has a damaged header at byte {position}; copy or download it again")


def _octal(field: bytes, position: int, path: Path) -> int:
    if field[0] & 0x80:
        raise _Unusual  # a number of 8 GiB or more
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        _fail(path, f"has a damaged header at byte {position}; copy or download it again")


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(records: bytes, name: bytes) -> tuple[bytes, int | None]:
    """The path and the size that a pax header gives the next member; other fields do not matter here."""
    size: int | None = None
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(records):
            raise _Unusual
        keyword, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            name = value
        elif keyword == b"size":
            size = int(value)
        elif keyword.startswith(b"GNU.sparse") or keyword == b"hdrcharset":
            raise _Unusual
        records = records[int(length) :]
    return name, size


def _check_end(reader: _Reader, position: int) -> None:
    """Two blocks of zeros end an archive, and nothing but zeros comes after."""
    tail = reader.read(position, 2 * BLOCK)
    if len(tail) < 2 * BLOCK:
        _cut_short(reader.path, "half of its end-of-archive mark is missing")
    if reader.size % BLOCK:
        _cut_short(reader.path, f"its {reader.size} bytes are no multiple of {BLOCK}")
    rest = os.pread(reader.descriptor, _MOST_TAIL, position)
    if rest.strip(b"\0") or reader.size - position > _MOST_TAIL:
        _fail(reader.path, f"goes on after its end-of-archive mark at byte {position}; were archives joined with cat?")


def _tarfile_members(reader: _Reader) -> Iterator[tuple[bytes, int, int]]:
    path = reader.path
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.encode("utf-8", "surrogateescape")
                if member.issym() or member.islnk() or member.issparse():
                    if _split(name)[1] in _IMAGES:
                        _fail(path, f"member {member.name!r} is a link or a sparse file; store images as plain files")
                elif member.isreg():
                    yield name, member.offset_data, member.size
            _check_end(reader, archive.offset)
    except (tarfile.TarError, OSError) as error:
        _fail(path, f"is damaged or cut short ({error}); copy or download it again")


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Key and extension; no key for a hidden file or one without a dot."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :].lower()) if dot > base else (b"", b"")


def _group(reader: _Reader, members: Iterator[tuple[bytes, int, int]]) -> ShardSamples:
    path = reader.path
    images: dict[bytes, tuple[int, int]] = {}
    labels: dict[bytes, int] = {}
    records: dict[bytes, tuple[int, int]] = {}
    for name, offset, size in members:
        key, extension = _split(name)
        if extension in _IMAGES:
            if key in images:
                _fail(path, f"key {_text(key)!r} has two images; keys must be unique")
            images[key] = (offset, size)
        elif extension == b"cls":
            content = reader.read(offset, size)
            try:
                labels[key] = int(content)
            except ValueError:
                _fail(path, f"key {_text(key)!r}: its label {_text(content[:40])!r} is not a whole number")
        elif extension == b"json":
            records[key] = (offset, size)
    if not images:
        _fail(path, "holds no images (KEY.jpg, jpeg, png or webp)")
    for key in labels:
        if key not in images:
            _fail(path, f"key {_text(key)!r} has a label and no image (KEY.jpg, jpeg, png or webp)")
    for key in images:
        if key not in labels:
            if key not in records:
                _fail(path, f"key {_text(key)!r} has an image and no label (KEY.cls, or KEY.json with `label`)")
            labels[key] = _json_label(reader, key, *records[key])
    return ShardSamples(
        list(images),
        [labels[key] for key in images],
        [offset for offset, _ in images.values()],
        [size for _, size in images.values()],
    )


def _json_label(reader: _Reader, key: bytes, offset: int, size: int) -> int:
    try:
        label = json.loads(os.pread(reader.descriptor, size, offset))["label"]
        if isinstance(label, int) and not isinstance(label, bool):
            return label
        what = f"its label {label!r} is not a whole number"
    except (ValueError, KeyError, TypeError):
        what = "its JSON has no `label`"
    _fail(reader.path, f"key {_text(key)!r}: {what}")


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")
