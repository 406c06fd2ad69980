"""Index of a tar shard: key, label and the bytes of the image of each sample, from the headers alone.

A sample is the members of one key in WebDataset's sense: the name up to the first dot of its last part. `KEY.jpg`
(jpeg, png, webp, ...) is the image; `KEY.cls` (a whole number as text) or `label` in `KEY.json` is its label; other
members are ignored.

A name with more dots (`v1.0_7.jpg`) has the key up to its last dot, if its image and label both have it. WebDataset
would use `v1` as the key of all such members. Without a label of its own, an image like `KEY.mask.png` is a further
member of the sample KEY; if there is no such sample, the shard is refused, so that no image is left out silently.

Headers of regular members, and the long names of pax and GNU, are read here: Python's tarfile takes ten times as long.
A shard with anything else (links, sparse files, global headers) is read by tarfile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from engine.errors import UserError

BLOCK = 512
_IMAGES = frozenset((b"jpg", b"jpeg", b"png", b"webp"))
# Images if a key has none of those above; else a further member, such as a depth map.
_RARE_IMAGES = frozenset((b"bmp", b"ppm", b"pgm", b"tif", b"tiff"))
_SPACES = 8 * 0x20  # the checksum's own field counts as spaces
_SMALL, _WINDOW = 1 << 14, 1 << 18
_MOST_TAIL = 1 << 20
_ZEROS = bytes(BLOCK)


@dataclasses.dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard, in its order.

    Attributes:
        keys: Keys, UTF-8.
        labels: Labels.
        offsets, sizes: Position and length of each image in bytes.
    """

    keys: list[bytes]
    labels: list[int]
    offsets: list[int]
    sizes: list[int]


class _Unusual(Exception):
    """A header that only tarfile can read."""


class _Reader:
    """A file read in windows: many headers at once if members are small, a page if they are large."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path
        self.size = os.fstat(descriptor).st_size
        self.start, self.buffer = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes at an offset; fewer than `length` only at the end of the file. Offsets must not decrease."""
        first = offset - self.start
        if first + length > len(self.buffer):
            near = first < len(self.buffer) + _SMALL
            self.buffer = os.pread(self.descriptor, max(length, _WINDOW if near else 4096), offset)
            self.start, first = offset, 0
        return self.buffer[first : first + length]


def read_shard(path: Path) -> ShardSamples:
    """Return the index of a shard.

    Raises:
        UserError: The shard is damaged or cut short, or has an incomplete sample.
    """
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
    """Yield (name, offset, size) of every regular member."""
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
    """Return the path and the size of the next member in a pax header; other fields are not needed."""
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
    """Check that two blocks of zeros end the archive, and nothing but zeros follows."""
    tail = reader.read(position, 2 * BLOCK)
    if len(tail) < 2 * BLOCK:
        _cut_short(reader.path, "half of its end-of-archive mark is missing")
    if reader.size % BLOCK:
        _cut_short(reader.path, f"its {reader.size} bytes are no multiple of {BLOCK}")
    rest = os.pread(reader.descriptor, _MOST_TAIL, position)
    if rest.strip(b"\0") or reader.size - position > _MOST_TAIL:
        _fail(
            reader.path, f"continues after its end-of-archive mark at byte {position}; were archives joined with cat?"
        )


def _tarfile_members(reader: _Reader) -> Iterator[tuple[bytes, int, int]]:
    path = reader.path
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.encode("utf-8", "surrogateescape")
                if member.issym() or member.islnk() or member.issparse():
                    if _split(name)[1].rpartition(b".")[2] in _IMAGES | _RARE_IMAGES:
                        _fail(path, f"member {member.name!r} is a link or a sparse file; store images as plain files")
                elif member.isreg():
                    yield name, member.offset_data, member.size
            _check_end(reader, archive.offset)
    except (tarfile.TarError, OSError) as error:
        _fail(path, f"is damaged or cut short ({error}); copy or download it again")


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Return key and extension; no key for a hidden file or one without a dot."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :].lower()) if dot > base else (b"", b"")


@dataclasses.dataclass
class _Found:
    """Members of a shard by key.

    Attributes:
        images, rare: (offset, size) of images, and of images in rare formats.
        double: Keys with more than one image.
        labels: Contents of `.cls` members.
        records: (offset, size) of `.json` members.
    """

    images: dict[bytes, tuple[int, int]] = dataclasses.field(default_factory=dict)
    rare: dict[bytes, tuple[int, int]] = dataclasses.field(default_factory=dict)
    double: set[bytes] = dataclasses.field(default_factory=set)
    labels: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    records: dict[bytes, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, reader: _Reader, key: bytes, extension: bytes, offset: int, size: int) -> None:
        if extension in _IMAGES:
            if key in self.images:
                self.double.add(key)
            self.images[key] = (offset, size)
        elif extension in _RARE_IMAGES:
            self.rare[key] = (offset, size)
        elif extension == b"cls":
            self.labels[key] = reader.read(offset, size)
        elif extension == b"json":
            self.records[key] = (offset, size)


def _group(reader: _Reader, members: Iterator[tuple[bytes, int, int]]) -> ShardSamples:
    path = reader.path
    found, dotted = _Found(), _Found()
    for name, offset, size in members:
        key, extension = _split(name)
        if b"." in extension:
            stem, _, last = extension.rpartition(b".")
            dotted.add(reader, key + name[len(key) : len(key) + 1 + len(stem)], last, offset, size)
        else:
            found.add(reader, key, extension, offset, size)
    for each in (found, dotted):
        each.images = {**each.rare, **each.images}
    _take_whole_names(path, found, dotted)
    images, labels = found.images, found.labels
    for key in found.double:
        _fail(path, f"key {_text(key)!r} has two images; keys must be unique")
    if not images:
        _fail(path, "holds no images (KEY.jpg, jpeg, png or webp)")
    for key in labels:
        if key not in images:
            _fail(path, f"key {_text(key)!r} has a label and no image (KEY.jpg, jpeg, png or webp)")
    for key in found.records:
        if key not in images and _has_label(reader, *found.records[key]):
            _fail(path, f"key {_text(key)!r} has a label and no image (KEY.jpg, jpeg, png or webp)")
    numbers = []
    for key in images:
        if key in labels:
            numbers.append(_number(path, key, labels[key]))
        elif key in found.records:
            numbers.append(_json_label(reader, key, *found.records[key]))
        else:
            _fail(path, f"key {_text(key)!r} has an image and no label (KEY.cls, or KEY.json with `label`)")
    order = sorted(images, key=images.__getitem__)
    by_key = dict(zip(images, numbers, strict=True))
    return ShardSamples(
        order, [by_key[key] for key in order], [images[key][0] for key in order], [images[key][1] for key in order]
    )


def _take_whole_names(path: Path, found: _Found, dotted: _Found) -> None:
    """Add samples among the members whose names have further dots to `found`; see the top of this file."""
    for key, place in dotted.images.items():
        first = key[: key.index(b".", key.rfind(b"/") + 1)]
        if key in dotted.labels:
            found.labels[key] = dotted.labels[key]
        elif first in found.images:
            continue  # such as KEY.mask.png
        elif key in dotted.records:
            found.records[key] = dotted.records[key]
        else:
            _fail(path, f"key {_text(key)!r} has an image and no label (KEY.cls, or KEY.json with `label`)")
        found.images[key] = place
        if key in dotted.double:
            found.double.add(key)
    for key in dotted.labels:
        first = key[: key.index(b".", key.rfind(b"/") + 1)]
        if key not in dotted.images and first not in found.images:
            _fail(path, f"key {_text(key)!r} has a label and no image (KEY.jpg, jpeg, png or webp)")


def _number(path: Path, key: bytes, content: bytes) -> int:
    if re.fullmatch(rb"\s*[+-]?[0-9]+\s*", content):  # int() would take 1_0 for 10
        return int(content)
    _fail(path, f"key {_text(key)!r}: its label {_text(content[:40])!r} is not a whole number")


def _has_label(reader: _Reader, offset: int, size: int) -> bool:
    try:
        record = json.loads(os.pread(reader.descriptor, size, offset))
    except ValueError:
        return False
    return isinstance(record, dict) and "label" in record


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
