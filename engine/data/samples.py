"""Labelled images with stable ids, the common form of all data sources."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.data.ids import Ids
from engine.errors import UserError

# Opens sample i: a PIL image, or a normalised float tensor [C, H, W].
Decode = Callable[[int], Any]
# (height, width) of an image -> factor by which it may be decoded smaller.
Reduce = Callable[[int, int], int]

_FINGERPRINT_CHUNK = 1 << 16  # ids that are converted to text at a time


class BadImageError(UserError):
    """An image that cannot be read or used; the message has its id and file. `--on-bad-image skip` leaves it out."""


@dataclasses.dataclass(frozen=True)
class IdKind:
    """Kind of the ids of a data source.

    Attributes:
        what: Description for messages, such as "paths below train/".
        rows: Number of rows of the whole split if ids are positions of rows, which are valid for that number alone;
            else None.
    """

    what: str
    rows: int | None = None

    @classmethod
    def of_rows(cls, count: int, of: str = "rows") -> IdKind:
        return cls(f"positions of {of}, 0 to {count - 1}, of these {count} alone", count)


class Samples:
    """An indexable set of labelled images.

    Args:
        name: Name of the set, for messages.
        ids: One stable string for each sample.
        labels: int64 [n].
        decode: Returns the image of sample i, see `Decode`.
        class_names: Class names by label.
        natural: Photographs, whose mirror image is known to have the same label.
        where: Returns the file or shard of sample i, for errors.
        id_kind: Kind of the ids.

    Raises:
        UserError: The numbers of ids and labels differ, or a label is negative.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        labels: np.ndarray,
        decode: Decode,
        class_names: Sequence[str] = (),
        natural: bool = False,
        where: Callable[[int], str] | None = None,
        id_kind: IdKind | None = None,
    ) -> None:
        self.name, self.class_names, self.natural = name, list(class_names), natural
        self.ids, self.id_kind = Ids(ids), id_kind
        self.labels = np.asarray(labels, dtype=np.int64)
        self._decode, self._where = decode, where
        if len(self.ids) != len(self.labels):
            raise UserError(f"{name}: {len(self.ids)} ids for {len(self.labels)} labels")
        if len(self.labels) and self.labels.min() < 0:
            raise UserError(
                f"{name}: sample {self.ids[int(self.labels.argmin())]!r} has the negative label {self.labels.min()}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int, reduce: Reduce | None = None) -> Any:
        """Return the decoded image of a sample.

        Args:
            index: Position of the sample.
            reduce: Factor by which the image may be smaller than stored; JPEGs are then decoded at 1/2, 1/4 or 1/8.

        Raises:
            BadImageError: It cannot be decoded; the message has its id and file.
        """
        return self._checked(index, lambda: self._open(index, reduce))

    def tensor(self, index: int, channels: int, reduce: Reduce | None = None) -> torch.Tensor:
        """Return the image of a sample as uint8 [C, H, W], or as the float tensor that it is.

        Args:
            index: Position of the sample.
            channels: Channels of the model.
            reduce: See `image`.

        Raises:
            BadImageError: It cannot be decoded, or holds values that are not finite.
        """
        image = self._checked(index, lambda: as_tensor(self._open(index, reduce), channels))
        if image.dtype != torch.uint8 and not torch.isfinite(image).all():
            raise BadImageError(f"{self.place(index)} holds values that are not finite")
        return image

    def place(self, index: int) -> str:
        """Return set, id and, if it is known, the file of a sample, for messages."""
        inside = self.where(index)
        return f"{self.name}: image {self.ids[index]!r}{inside and f' in {inside}'}"

    def where(self, index: int) -> str:
        """Return the file or shard of a sample, empty if it is not known."""
        return self._where(index) if self._where else ""

    def _open(self, index: int, reduce: Reduce | None) -> Any:
        image = self._decode(index)
        if isinstance(image, Image.Image):
            times = reduce(image.height, image.width) if reduce else 1
            if times > 1:
                # Pillow takes the smallest of 1/1, 1/2, 1/4, 1/8 that is no smaller than this; other formats ignore it.
                image.draft(None, (image.width // times, image.height // times))
            image.load()
        return image

    def _checked(self, index: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise BadImageError(
                f"{self.place(index)} does not decode ({type(error).__name__}: {reason}); repair or remove it, or "
                "leave such images out with on_bad_image=skip"
            ) from error

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> Samples:
        """Return the samples at some positions, in that order, with another name if given."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Samples(
            name or self.name,
            self.ids.take(chosen),
            self.labels[chosen],
            functools.partial(_of_chosen, self._decode, chosen),
            self.class_names,
            self.natural,
            functools.partial(_of_chosen, self._where, chosen) if self._where else None,
            self.id_kind,
        )

    def with_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> Samples:
        """Return the same samples with other labels and class names."""
        return Samples(self.name, self.ids, labels, self._decode, class_names, self.natural, self._where, self.id_kind)

    def of_classes(self, labels: np.ndarray) -> Samples:
        """Return the samples whose label is among `labels`; the same object if all are."""
        found = np.isin(self.labels, labels)
        return self if found.all() else self.subset(np.flatnonzero(found))

    def positions(self, ids: Sequence[str], source: str) -> np.ndarray:
        """Return the position, int64 [n], of each id.

        An id with the same text in another Unicode form (NFC, NFD) is found, unless two ids of the set have that text.

        Args:
            ids: The ids.
            source: Source of the ids, for errors.

        Raises:
            UserError: An id is not in the set.
        """
        positions = self.ids.positions(ids)
        if (positions < 0).any():
            positions = self._in_any_form(ids, positions, source)
        unknown = [i for i, position in zip(ids, positions.tolist(), strict=True) if position < 0]
        if unknown:
            kind = f", {self.id_kind.what}" if self.id_kind else ""
            raise UserError(
                f"{source}: {len(unknown)} of {len(ids)} ids are not in {self.name}, the first: "
                f"{', '.join(map(repr, unknown[:3]))}; its ids look like {self.ids[0]!r}{kind}"
                f"{self.ids.remedy(unknown[0])}"
            )
        return positions

    def _in_any_form(self, ids: Sequence[str], positions: np.ndarray, source: str) -> np.ndarray:
        """Return `positions` with those of ids that the set has in another Unicode form."""
        missing = np.flatnonzero(positions < 0)
        wanted = Ids([ids[int(i)] for i in missing]).normalised()
        own = self.ids.normalised()
        found = own.positions(wanted)
        last = len(own) - 1 - own[::-1].positions(wanted)
        for first, second in zip(found.tolist(), last.tolist(), strict=True):
            if 0 <= first < second:
                raise UserError(
                    f"{source}: the id {self.ids[first]!r} is in {self.name} in two Unicode forms (samples {first} and "
                    f"{second}), and the list has it in a third; write it as in the data"
                )
        positions = positions.copy()
        positions[missing] = found
        return positions

    def fingerprint(self) -> str:
        """Return the SHA-256 over ids and labels in order, which identifies the samples without their images."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _FINGERPRINT_CHUNK):
            part = slice(start, start + _FINGERPRINT_CHUNK)
            lines = map("{}\0{}\n".format, self.ids[part], self.labels[part].tolist())
            digest.update("".join(lines).encode())
        return digest.hexdigest()


def _of_chosen(function: Callable[[int], Any], chosen: np.ndarray, index: int) -> Any:
    return function(int(chosen[index]))


def concatenate(first: Samples, second: Samples) -> Samples:
    """Return the samples of both sets, the first set first; ids may repeat."""
    return Samples(
        f"{first.name} + {second.name}",
        first.ids + second.ids,
        np.concatenate([first.labels, second.labels]),
        functools.partial(_of_either, first._decode, second._decode, len(first)),
        first.class_names,
        first.natural and second.natural,
        functools.partial(_of_either, first._where, second._where, len(first))
        if first._where and second._where
        else None,
    )


def _of_either(first: Callable[[int], Any], second: Callable[[int], Any], count: int, index: int) -> Any:
    return first(index) if index < count else second(index - count)


def evenly_spaced(samples: Samples, count: int, why: str = "part") -> Samples:
    """Return at most `count` samples at equal distances, so that sorted classes are all represented."""
    if len(samples) <= count:
        return samples
    return samples.subset(np.linspace(0, len(samples) - 1, count).astype(np.int64), f"{samples.name} ({why})")


def image_digest(samples: Samples) -> str:
    """Return the SHA-256 of the pixels of some samples: ids and labels alone do not identify numbered images."""
    digest = hashlib.sha256()
    for index in range(len(samples)):
        pixels = np.asarray(samples.image(index))
        digest.update(f"{pixels.shape} {pixels.dtype}\n".encode())
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def as_tensor(image: Any, channels: int) -> torch.Tensor:
    """Return a PIL image as uint8 [C, H, W] in the model's channels; a tensor is returned unchanged.

    16-bit grey levels are scaled to 8 bits: PIL's own conversion clips all above 255. Transparency is dropped, as in
    `Image.convert`.

    Args:
        image: A PIL image or a tensor.
        channels: Channels of the model.

    Raises:
        UserError: The type, shape or number of channels does not fit.
    """
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise UserError(
                f"an image tensor holds {str(image.dtype).removeprefix('torch.')}; expected uint8 pixels, or floats "
                "that are normalised for the model"
            )
        if image.ndim != 3 or image.shape[0] != channels:
            raise UserError(f"an image tensor has shape {tuple(image.shape)}, expected ({channels}, H, W)")
        return image
    if channels not in (1, 3):
        raise UserError(
            f"the model takes {channels} channels, and images have 1 (grey) or 3 (colour); give a dataset of "
            f"tensors ({channels}, H, W), from Python"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    # A view: torch resizes interleaved pixels faster than planes, to the same bits.
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey levels of 16 bits to 8 bits, 65535 to 255. Others must be 0 to 255: their scale is not known."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    if values.size and not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(
            f"grey levels from {values.min()} to {values.max()} of mode {image.mode}; store it with 8 bits"
        )
    if values.dtype.kind == "f" and values.size and values.max() <= 1 and (values != np.floor(values)).any():
        raise ValueError(f"grey levels from {values.min()} to {values.max()} of mode F; store it with 8 bits")
    return Image.fromarray(np.round(values).astype(np.uint8))
