"""Encoded images of parquet files, read a row group at a time; the last row groups stay in memory."""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import UserError

# Bytes of row groups that a process keeps; at least one is kept, of any size.
_CACHE_BYTES = 256 << 20
# Rows are decoded in pieces of about this many bytes: an Arrow array of bytes holds 2 GiB at most.
_PIECE_BYTES = 256 << 20


class _RowGroup:
    """The image column of a row group: arrays of consecutive rows, `starts` the first row of each."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self.arrays = arrays
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])
        self.nbytes = sum(array.nbytes for array in arrays)

    def value(self, row: int) -> Any:
        piece = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.arrays[piece][row - int(self.starts[piece])].as_py()


def _shortened(path: str) -> str:
    """Return a path for a message; a wrong value, such as an image in base64, may be very long."""
    return path if len(path) <= 200 else f"{path[:60]}..."


class ParquetImages:
    """Open the image of a row, with rows counted over all files.

    Args:
        files: Files in the order of their rows.
        columns: Image column of each file.
        folder: Folder of the data source; paths in the column are relative to the file's folder or to it.
    """

    def __init__(self, files: Sequence[Path], columns: Sequence[str], folder: Path) -> None:
        import pyarrow.parquet

        self.files, self.columns, self.folder = list(files), list(columns), folder
        groups: list[tuple[int, int]] = []
        rows = [0]
        self._metadata = [pyarrow.parquet.read_metadata(path, memory_map=True) for path in self.files]
        for number, metadata in enumerate(self._metadata):
            for group in range(metadata.num_row_groups):
                groups.append((number, group))
                rows.append(metadata.row_group(group).num_rows)
        self.groups, self.starts = groups, np.cumsum(rows)
        self._kept: collections.OrderedDict[int, _RowGroup] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": collections.OrderedDict()}

    def open(self, index: int) -> Image.Image:
        """Return the image of a row, not yet decoded."""
        value = self._value(index)
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
        else:
            content, path = (value, None) if isinstance(value, bytes) else (None, value)
        if content is not None:
            return Image.open(io.BytesIO(content))
        if not path:
            raise ValueError("the row has neither bytes nor a path")
        return Image.open(self._place(self._file_of(index), path))

    def check_paths(self, name: str) -> None:
        """Check that image files exist, for columns of paths; the first of each file is checked.

        Raises:
            UserError: It does not exist.
        """
        import pyarrow.parquet
        import pyarrow.types as types

        firsts = dict(zip((number for number, _ in reversed(self.groups)), reversed(self.starts[:-1]), strict=True))
        for number, first in firsts.items():
            kind = pyarrow.parquet.read_schema(self.files[number], memory_map=True).field(self.columns[number]).type
            value = kind.value_type if types.is_dictionary(kind) else kind
            held = [field.name for field in value] if types.is_struct(value) else []
            if "bytes" in held or (not held and not (types.is_string(value) or types.is_large_string(value))):
                continue
            path = self._value(int(first))
            path = path["path"] if isinstance(path, dict) else path
            if path and not os.path.isfile(self._place(number, path)):
                raise UserError(
                    f"{name}: the column {self.columns[number]!r} of {self.files[number]} names the file "
                    f"{_shortened(path)!r}, which is neither in {self.files[number].parent} nor in {self.folder}"
                )

    def _file_of(self, index: int) -> int:
        return self.groups[int(np.searchsorted(self.starts, index, side="right")) - 1][0]

    def _place(self, number: int, path: str) -> Path:
        """Return the file of a path in the column: relative to the file's folder, or else to the data source's."""
        paired = self.files[number].parent / path
        return paired if os.path.exists(paired) else self.folder / path  # Path.exists raises for long names

    def _value(self, index: int) -> Any:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._group(group).value(index - int(self.starts[group]))

    def _group(self, number: int) -> _RowGroup:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        read = self._read(number)
        room = _CACHE_BYTES - read.nbytes
        while self._kept and sum(group.nbytes for group in self._kept.values()) > room:
            self._kept.popitem(last=False)
        self._kept[number] = read
        return read

    def _read(self, number: int) -> _RowGroup:
        import pyarrow.parquet

        file, group = self.groups[number]
        metadata = self._metadata[file]
        with pyarrow.parquet.ParquetFile(self.files[file], metadata=metadata, memory_map=True) as opened:
            facts = metadata.row_group(group)
            rows = max(1, facts.num_rows * _PIECE_BYTES // max(1, facts.total_byte_size))
            # use_threads=False: worker processes are forked.
            batches = opened.iter_batches(rows, row_groups=[group], columns=[self.columns[file]], use_threads=False)
            return _RowGroup([batch.column(0) for batch in batches])
