"""Datasets whose items are dicts: `datasets.Dataset` of Hugging Face, and map-style datasets that return dicts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from engine.errors import UserError

IMAGE_KEYS = ("pixel_values", "image", "img")
LABEL_KEYS = ("label", "labels")


class Pairs(Dataset[Any]):
    """Wrap a dataset of dicts as a dataset of (image, label).

    Args:
        dataset: Map-style; its items hold an image under `image_key` and a label under `label_key`.
        image_key, label_key: Keys of an item.
        labels: Labels of all items, if they are known without reading the items.
        classes: Class names by label.
    """

    def __init__(
        self,
        dataset: Any,
        image_key: str,
        label_key: str,
        labels: Sequence[Any] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.dataset, self.image_key, self.label_key = dataset, image_key, label_key
        self.labels, self.classes = labels, list(classes)
        self.ids = getattr(dataset, "ids", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        return as_image(item[self.image_key]), item[self.label_key]


def as_pairs(dataset: Any, name: str) -> Any:
    """Return a dataset whose items are dicts as `Pairs`; any other dataset unchanged.

    Args:
        dataset: Map-style; its items hold an image under one of `IMAGE_KEYS` and a label under one of `LABEL_KEYS`. A
            column of another name is found if it is the only one of its kind: Image, ClassLabel.
        name: Name of the set, for messages.

    Raises:
        UserError: The keys are not known; the message lists those that were found.
    """
    kind = _kind(dataset)
    if kind == "DatasetDict":
        raise UserError(f"{name}: a DatasetDict holds several sets; give one, such as dataset[{next(iter(dataset))!r}]")
    if kind == "IterableDataset":
        raise UserError(f"{name}: an IterableDataset has no length and no ids; load it without streaming=True")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    if kind == "Dataset":
        return _of_columns(dataset, name)
    try:
        first = dataset[0]
    except Exception:  # an image that does not decode: reading it later raises the error
        return dataset
    if not isinstance(first, Mapping):
        return dataset
    image_key = _key(list(first), IMAGE_KEYS, "image", name)
    label_key = _key(list(first), LABEL_KEYS, "label", name)
    return Pairs(dataset, image_key, label_key, classes=getattr(dataset, "classes", ()))


def _kind(dataset: Any) -> str:
    """Return the class name of an object of the package `datasets`, without importing it; empty for others."""
    for cls in type(dataset).__mro__:
        if cls.__module__.partition(".")[0] == "datasets":
            return cls.__name__ if cls.__name__ in ("DatasetDict", "IterableDataset", "Dataset") else ""
    return ""


def _key(keys: Sequence[str], wanted: Sequence[str], what: str, name: str, only: Sequence[str] = ()) -> str:
    """Return the key of images or labels.

    Args:
        keys: Keys of an item.
        wanted: Known names, in order of preference.
        what: image or label, for errors.
        name: Name of the set, for errors.
        only: Keys of the right type; one alone is accepted under any name.
    """
    for key in wanted:
        if key in keys:
            return key
    if len(only) == 1:
        return only[0]
    found = f"several {what} columns: {', '.join(only)}" if only else f"the keys {', '.join(map(repr, keys))}"
    raise UserError(
        f"{name}: its items have {found}, expected {what} under one of {', '.join(wanted)}; rename the one that is "
        f"meant, such as by dataset.rename_column(..., {what!r})"
    )


def _of_columns(dataset: Any, name: str) -> Pairs:
    """Wrap a `datasets.Dataset`: labels come from its column, without decoding images."""
    features = dataset.features
    transformed = dataset.format["type"] == "custom"
    # Its images as they are stored, unless the dataset has a transform of its own.
    items = dataset if transformed else dataset.with_format(None)
    keys = list(dataset[0]) if transformed else list(features)
    kinds = {column: type(features[column]).__name__ for column in features if column in keys}
    image_key = _key(keys, IMAGE_KEYS, "image", name, [column for column, kind in kinds.items() if kind == "Image"])
    label_key = _key(
        keys, LABEL_KEYS, "label", name, [column for column, kind in kinds.items() if kind == "ClassLabel"]
    )
    labels = None
    if label_key in features:
        labels = list(dataset.with_format(None).select_columns([label_key])[:][label_key])
        if transformed and not _agrees(dataset, label_key, labels):
            labels = None
    return Pairs(items, image_key, label_key, labels, getattr(features.get(label_key), "names", None) or ())


def _agrees(dataset: Any, key: str, labels: Sequence[Any]) -> bool:
    """Return whether the dataset's own transform keeps labels as they are stored; one sample of each class is read."""
    firsts = {str(label): index for index, label in reversed(list(enumerate(labels)))}
    return all(np.array_equal(np.asarray(dataset[index][key]), np.asarray(labels[index])) for index in firsts.values())


def as_image(value: Any) -> Any:
    """Return a PIL image, or a tensor [C, H, W], for the image of an item.

    Args:
        value: A PIL image, a tensor, an array or lists: floats [C, H, W] that are normalised, or uint8 [H, W] or [H, W,
            C]; or the encoded bytes or the path of an image, as from `datasets.Image(decode=False)`.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
        if value.dtype == np.uint8 and (value.ndim == 2 or value.shape[-1] in (3, 4)):
            return Image.fromarray(value)
        raise ValueError(
            f"an array of {value.dtype} {value.shape} is no image; expected uint8 [H, W, 3] or floats [C, H, W]"
        )
    return value
