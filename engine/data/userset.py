"""Samples from a user's own map-style dataset, with checks of its items."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from engine.data.dict_datasets import as_image, as_pairs
from engine.data.samples import IdKind, Samples
from engine.errors import UserError

logger = logging.getLogger(__name__)

_CHECKED = 16  # items that are read twice; a mirror image of probability 1/2 is missed once in 65,536 times


def from_dataset(dataset: Dataset[Any] | Samples, name: str) -> Samples:
    """Return samples from a user's own map-style `torch.utils.data.Dataset` of (image, label), or of dicts.

    Dicts, and a `datasets.Dataset` of Hugging Face, are read as in `engine.data.dict_datasets`.

    An image is a PIL image, or a float tensor [C, H, W] that is normalised for the model. Ids come from the attribute
    `ids`, else they are the index as text. Labels come from `labels` or `targets` if these agree with the items, else
    from reading every item once.

    Args:
        dataset: The dataset.
        name: Name of the set, for messages.

    Raises:
        UserError: It is not a map-style dataset; a label is not a whole number; or an item changes from read to read. A
            random transform would be applied once and kept, and an evaluation would change from run to run.
    """
    if isinstance(dataset, Samples):
        return dataset
    with _kept_random_state():
        pairs = as_pairs(dataset, name)
    if not hasattr(pairs, "__getitem__") or not hasattr(pairs, "__len__"):
        raise UserError(
            f"{name}: expected engine.data.Samples or a map-style Dataset with __len__, got {type(dataset).__name__}"
        )
    count = len(pairs)
    with _kept_random_state():
        checked = _read_twice(pairs, count, name)
        labels = _labels(pairs, count, checked, name)
    ids = _ids(pairs, name)
    return Samples(
        name,
        [str(i) for i in range(count)] if ids is None else ids,
        labels,
        functools.partial(_of_item, pairs),
        _classes(pairs),
        id_kind=IdKind.of_rows(count, "items") if ids is None else IdKind("the dataset's `ids`"),
    )


def refuse_overlap(forget: Any, other: Any, name: str = "retain") -> None:
    """Check that a set shares no items with the forget set. Parts of one data source cause a warning alone.

    Overlap is detected for a `Subset` and the dataset itself, or two `Subset`s of it.

    Args:
        forget: The forget set.
        other: The other set.
        name: Name of the other set, for messages.

    Raises:
        UserError: They share items, so what is forgotten would also be retained.
    """
    if isinstance(forget, Samples) and isinstance(other, Samples):
        if forget.id_kind is None or forget.id_kind is not other.id_kind:
            return
        shared = [forget.ids[int(i)] for i in np.flatnonzero(other.ids.positions(forget.ids) >= 0)]
    else:
        (first, mine), (second, theirs) = _items_of(forget), _items_of(other)
        if first is not second or first is None:
            return
        everything = range(len(first))
        both = set(everything if mine is None else mine) & set(everything if theirs is None else theirs)
        shared = [str(position) for position in sorted(both)]
    if not shared:
        return
    message = f"{name}: {len(shared)} samples of the forget set are in it too, such as {shared[0]}; leave them out"
    if not isinstance(forget, Samples):
        raise UserError(message)
    logger.warning(message)


def _items_of(dataset: Any) -> tuple[Any, list[int] | None]:
    """Return the dataset that this one is a part of, and the positions in it; None for all positions."""
    if type(dataset) is not Subset:
        return dataset, None
    base, positions = _items_of(dataset.dataset)
    return base, [int(i) if positions is None else positions[int(i)] for i in dataset.indices]


def _of_item(dataset: Dataset[Any], index: int) -> Any:
    image = dataset[index][0]
    return as_image(image) if isinstance(image, (np.ndarray, bytes)) else image


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the global random generators after the context, since reading items may draw from them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _read_twice(dataset: Any, count: int, name: str) -> dict[int, int]:
    """Return labels by position of some items at equal distances, each read twice.

    An item that cannot be read is left to the loader, which reports it.

    Raises:
        UserError: An item changes from read to read.
    """
    labels: dict[int, int] = {}
    for index in np.unique(np.linspace(0, count - 1, min(count, _CHECKED)).astype(np.int64)).tolist():
        try:
            first = dataset[index]
            _check_pair(first, index, name)
            same = _equal(first[0], dataset[index][0])
        except UserError:
            raise
        except Exception:  # an image that does not decode: `--on-bad-image` decides, when it is loaded
            continue
        if not same:
            raise UserError(
                f"{name}: item {index} read twice gives two different images{_transform_of(dataset)}; pass the dataset "
                "with its evaluation transform, and let the engine augment: augment=flip or augment=crop"
            )
        labels[index] = _label(first[1], index, name)
    return labels


def _check_pair(item: Any, index: int, name: str) -> None:
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) < 2:
        raise UserError(f"{name}: item {index} is {type(item).__name__}; expected (image, label)")


def _equal(first: Any, second: Any) -> bool:
    a, b = (np.asarray(each.detach().cpu() if isinstance(each, torch.Tensor) else each) for each in (first, second))
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _transform_of(dataset: Any) -> str:
    """Return the transform of a dataset, or of the one that it is a part of, for messages."""
    while dataset is not None:
        transform = getattr(dataset, "transform", None) or getattr(dataset, "transforms", None)
        if transform is not None and not isinstance(dataset, torch.Tensor):
            return f": its transform {' '.join(repr(transform).split())} is random"
        dataset = getattr(dataset, "dataset", None)
    return ", so it is random"


def _labels(dataset: Any, count: int, checked: dict[int, int], name: str) -> np.ndarray:
    """Return the labels of all items: the dataset's list if it agrees with the items that were read, else theirs."""
    listed = getattr(dataset, "labels", None)
    if listed is None:
        listed = getattr(dataset, "targets", None)
    if listed is not None and hasattr(listed, "__len__") and hasattr(listed, "__iter__") and len(listed) == count:
        transform = getattr(dataset, "target_transform", None)
        try:
            given = [transform(label) for label in listed] if callable(transform) else listed
            labels = [_label(label, index, name) for index, label in enumerate(given)]
        except UserError:
            labels = []  # such as one-hot rows whose items hold the class
        if labels and all(labels[index] == label for index, label in checked.items()):
            return np.asarray(labels, dtype=np.int64)
    return np.asarray([_label(_item_label(dataset, i, name), i, name) for i in range(count)], dtype=np.int64)


def _item_label(dataset: Any, index: int, name: str) -> Any:
    try:
        item = dataset[index]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: item {index} of {len(dataset)} cannot be read ({type(error).__name__}: {str(error)[:100]}), so "
            "its label is not known; leave it out, or give the dataset an attribute `targets`, the labels of all items"
        ) from error
    _check_pair(item, index, name)
    return item[1]


def _label(label: Any, index: int, name: str) -> int:
    """Return a label as a whole number.

    Raises:
        UserError: The label is soft, one-hot or missing; the message has the item.
    """
    if isinstance(label, (int, np.integer)):  # the usual ones
        return int(label)
    if isinstance(label, (str, bytes)) or label is None:
        raise UserError(f"{name}: item {index} has the label {label!r}; expected the number of its class")
    value = np.asarray(label.detach().cpu() if isinstance(label, torch.Tensor) else label)
    if value.size != 1 or value.dtype.kind not in "biuf":
        raise UserError(
            f"{name}: the label of item {index} has shape {value.shape} (one-hot, soft or several labels); expected "
            "the number of its class, such as label.argmax()"
        )
    number = value.reshape(()).item()
    if not np.isfinite(number) or number != int(number):
        raise UserError(f"{name}: item {index} has the label {number}; expected a whole number, the class")
    return int(number)


def _ids(dataset: Any, name: str) -> list[str] | None:
    """Return the dataset's own ids (a list, an array or a tensor), None if it has none."""
    ids = getattr(dataset, "ids", None)
    if ids is None or callable(ids):
        return None
    if not hasattr(ids, "__iter__") or isinstance(ids, (str, bytes, Mapping)):
        raise UserError(f"{name}: its `ids` are {type(ids).__name__}; expected a list of one id an item")
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        if ids.ndim != 1:
            raise UserError(f"{name}: its `ids` have shape {tuple(ids.shape)}; expected one id an item")
        ids = ids.tolist()
    ids = [i.decode() if isinstance(i, bytes) else str(i.item() if hasattr(i, "item") else i) for i in ids]
    double = next((i for i, times in Counter(ids).items() if times > 1), None)
    if double is not None:
        raise UserError(f"{name}: its `ids` hold {double!r} twice; ids must be unique within a split")
    return ids or None


def _classes(dataset: Any) -> list[str]:
    """Return the names in the attribute `classes`, by label; none if it holds something else.

    A dict has the labels itself: {name: label} or {label: name}. Several names of one class, as in ImageNet, are
    joined.
    """
    classes = getattr(dataset, "classes", ())
    if isinstance(classes, Mapping):
        pairs = [(k, v) if isinstance(k, (int, np.integer)) else (v, k) for k, v in classes.items()]
        if sorted(map(str, (label for label, _ in pairs))) != sorted(map(str, range(len(pairs)))):
            return []
        classes = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    if not isinstance(classes, (Sequence, np.ndarray)) or isinstance(classes, (str, bytes)):
        return []
    return [", ".join(map(str, each)) if isinstance(each, (list, tuple)) else str(each) for each in classes]
