"""Sample ids in one Arrow array: no Python object for each id; taking, matching and counting run in C++."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import UserError

_CHUNK = 1 << 16  # ids that are converted to Python strings at a time while iterating


class Ids(Sequence[str]):
    """An immutable sequence of strings; equal to any other sequence of the same strings."""

    arrow: pa.Array

    def __init__(self, ids: Sequence[str] | pa.Array) -> None:
        if isinstance(ids, Ids):
            ids = ids.arrow
        elif not isinstance(ids, pa.Array):
            try:
                ids = pa.array(list(ids), type=pa.large_string())
            except UnicodeEncodeError as error:
                raise UserError(f"the id {error.object!r} is not UTF-8 text; rename it") from None
        self.arrow = ids

    @classmethod
    def from_bytes(cls, text: np.ndarray, ends: np.ndarray) -> Ids:
        """Return ids from concatenated text.

        Args:
            text: UTF-8 bytes of all ids, uint8.
            ends: End of each id in `text`, int64 [n].
        """
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text, dtype=np.uint8))]
        array = pa.Array.from_buffers(pa.large_string(), len(ends), buffers)
        array.validate(full=True)
        return cls(array)

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Ids: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.arrow[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from self.arrow.slice(start, _CHUNK).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return self.arrow.equals(other.arrow)
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[str]) -> Ids:
        return Ids(pa.concat_arrays([self.arrow, Ids(other).arrow]))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Ids({shown}{', ...' if len(self) > 3 else ''}; {len(self)})"

    def take(self, positions: np.ndarray) -> Ids:
        return Ids(self.arrow.take(pa.array(positions)))

    def positions(self, wanted: Sequence[str]) -> np.ndarray:
        """Return int64 [len(wanted)]: the first position of each wanted id, -1 if it is not there."""
        found = pc.index_in(Ids(wanted).arrow, value_set=self.arrow)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def remedy(self, unknown: str) -> str:
        """Return how an id that is not among these has to be changed to be one, as the end of a message, or ""."""
        parts = unknown.replace("\\", "/").split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if end != unknown and self.positions([end])[0] >= 0:
                return f"; {end!r} is one of them: write each id like that"
        longer = pc.indices_nonzero(pc.ends_with(self.arrow, f"/{parts[-1]}"))
        if len(longer) == 1:
            return f"; {self[longer[0].as_py()]!r} is one of them: write each id like that"
        return ""

    def normalised(self) -> Ids:
        """Return the ids in Unicode's form NFC, in which equal text is equal bytes."""
        return Ids(pc.utf8_normalize(self.arrow, form="NFC"))

    def first_double(self) -> str | None:
        """Return the first id that occurs a second time, or None."""
        if pc.count_distinct(self.arrow).as_py() == len(self):
            return None
        first = pc.index_in(self.arrow, value_set=self.arrow).to_numpy()
        return self[int(np.flatnonzero(first != np.arange(len(self)))[0])]
