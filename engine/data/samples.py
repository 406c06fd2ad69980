"""Labelled images with stable ids: what every source gives, and what the loaders read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from engine.errors import UserError

# Decodes sample i into a PIL image, or a float tensor [C, H, W] that is already normalised.
Decode = Callable[[int], Any]


class Samples:
    """An indexable set of labelled images.

    ids: one stable string a sample. labels: int64 [n]. decode(i): the image of sample i, see `Decode`.
    class_names: names by label. natural: photographs, for which a mirrored copy shows the same thing.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        labels: np.ndarray,
        decode: Decode,
        class_names: Sequence[str] = (),
        natural: bool = True,
    ) -> None:
        self.name, self.ids, self.class_names, self.natural = name, list(ids), list(class_names), natural
        self.labels = np.asarray(labels, dtype=np.int64)
        self._decode = decode
        if len(self.ids) != len(self.labels):
            raise UserError(f"{name}: {len(self.ids)} ids for {len(self.labels)} labels")
        if len(self.labels) and self.labels.min() < 0:
            raise UserError(
                f"{name}: sample {self.ids[int(self.labels.argmin())]!r} has the negative label {self.labels.min()}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Any:
        """The image of a sample. Raises UserError with the sample's id where it does not decode."""
        try:
            return self._decode(index)
        except UserError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"{self.name}: image {self.ids[index]!r} does not decode ({type(error).__name__}: {reason}); "
                "repair or remove it"
            ) from error

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> Samples:
        chosen = np.asarray(indices, dtype=np.int64)
        decode = self._decode
        return Samples(
            name or self.name,
            [self.ids[i] for i in chosen],
            self.labels[chosen],
            lambda i: decode(int(chosen[i])),
            self.class_names,
            self.natural,
        )

    def fingerprint(self) -> str:
        """SHA-256 over ids and labels in order: which samples these are, without the images."""
        digest = hashlib.sha256()
        for sample_id, label in zip(self.ids, self.labels, strict=True):
            digest.update(f"{sample_id}\0{label}\n".encode())
        return digest.hexdigest()


def concatenate(first: Samples, second: Samples) -> Samples:
    """The samples of both, the first's before the second's; ids may repeat."""
    n = len(first)
    return Samples(
        f"{first.name} + {second.name}",
        first.ids + second.ids,
        np.concatenate([first.labels, second.labels]),
        lambda i: first.image(i) if i < n else second.image(i - n),
        first.class_names,
        first.natural,
    )


def from_dataset(dataset: Dataset[Any] | Samples, name: str) -> Samples:
    """Samples over a user's own map-style `torch.utils.data.Dataset` of (image, label).

    An image is a PIL image, or a float tensor [C, H, W] normalised as the model wants it. Ids come from the
    attribute `ids`, else are the index as text; labels from `labels` or `targets`, else from reading every item once.
    """
    if isinstance(dataset, Samples):
        return dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            f"{name}: expected engine.data.Samples or a map-style Dataset with __len__, got {type(dataset).__name__}"
        )
    count = len(dataset)
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if labels is None or len(labels) != count:
        labels = [dataset[i][1] for i in range(count)]
    ids = getattr(dataset, "ids", None) or [str(i) for i in range(count)]
    return Samples(
        name,
        ids,
        np.asarray([int(label) for label in labels], dtype=np.int64),
        lambda i: dataset[i][0],
        getattr(dataset, "classes", ()),
        natural=False,
    )


def as_tensor(image: Any, channels: int) -> torch.Tensor:
    """A PIL image as uint8 [C, H, W] in the model's channels; a tensor as it is."""
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != channels:
            raise UserError(f"an image tensor has shape {tuple(image.shape)}, expected ({channels}, H, W)")
        return image
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()
