"""Data sources, each defined by one string: digits, cifar10, cifar100, parquet:, imagefolder: and webdataset:."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.classes import read_class_map, relabelled
from engine.data.imagefolder import open_imagefolder
from engine.data.parquet import open_parquet
from engine.data.samples import IdKind, Samples
from engine.data.spec import DataOptions, parse_spec, refuse_columns
from engine.data.webdataset.samples import open_webdataset
from engine.errors import UserError, nearest

VALIDATION_SHARE = 0.2
# Returns samples by split (train, validation, test) for a location and options.
Opener = Callable[[str, DataOptions], dict[str, Samples]]


@dataclasses.dataclass(frozen=True)
class Source:
    """The three splits of a data source; ids are unique within a split.

    Attributes:
        spec: The string that defines the source.
        train, validation, test: Samples of the splits.
    """

    spec: str
    train: Samples
    validation: Samples
    test: Samples


def open_source(spec: str) -> Source:
    """Open a data source by its spec string.

        digits; cifar10[:ROOT]; cifar100[:ROOT]
        parquet:FOLDER       train-*.parquet, validation-*, test-*: Hugging Face's image layouts, see
            engine/data/parquet.py
        imagefolder:FOLDER   FOLDER/{train,validation,val,test}/CLASS/FILE
        webdataset:FOLDER    *.tar with one of the words train, validation, val, test in the name, or in folders so
            called
        webdataset:PATTERN   a path with `{split}`, which stands for each of these words, or with the word train in it:
            it names the training shards, and with another word in its place the others. Wildcards (*, ?, []) and braces
            ({000000..001280}, {a,b}) name many. All shards of a brace range must exist; for the other splits it stands
            for any numbers.

    If there is no validation split, the fifth of the test samples with the lowest hashes of ids is validation. `val`
    (or `valid`, `dev`) counts as test if there is no test split, and as validation if there is.

    Options follow a `?`: `classes=FILE` (class names in the model's order, see `read_class_map`), and for parquet
    `image=COLUMN` and `label=COLUMN`: `parquet:FOLDER?image=img&label=fine_label`.

    Raises:
        UserError: The kind is unknown, or the folder has no data.
    """
    kind, location, options = parse_spec(spec)
    if kind not in _SOURCES:
        raise UserError(f"unknown data source {spec!r}{nearest(kind, _SOURCES)}")
    if kind != "parquet":
        refuse_columns(kind, options)
    names = read_class_map(options.classes) if options.classes else None
    splits = _SOURCES[kind](location, options)
    if names is not None:
        splits = relabelled(splits, names, f"class map {options.classes}")
    train, test = splits["train"], splits.get("test")
    validation = splits.get("validation")
    if validation is None and test is not None:
        validation, test = _held_out(kind, test)
    if test is None:
        validation, test = _held_out(kind, validation) if validation is not None else (None, None)
    if validation is None or test is None:
        raise UserError(
            f"data source {spec!r} has neither test nor validation samples; add files test-* or validation-*"
        )
    if not len(train) or not len(validation) + len(test):
        empty = "test" if len(train) else "training"
        raise UserError(f"data source {spec!r} holds no {empty} samples: its files are there, and without rows")
    for split in (train, validation, test):
        _check_unique(split)
    return Source(spec, train, validation, test)


def _held_out(kind: str, samples: Samples) -> tuple[Samples, Samples]:
    """Return validation and test samples from the only such split."""
    fifth, rest = _lowest_fifth(samples)
    return samples.subset(fifth, f"{kind} validation"), samples.subset(rest, f"{kind} test")


def _lowest_fifth(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the fifth with the lowest hashes of ids, and of the rest.

    The choice depends on the ids alone, not on their order.
    """
    hashes = np.array(
        [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in samples.ids], dtype=np.uint64
    )
    count = int(len(samples) * VALIDATION_SHARE)
    order = np.argsort(hashes, kind="stable")
    return np.sort(order[:count]), np.sort(order[count:])


def _check_unique(samples: Samples) -> None:
    double = samples.ids.first_double()
    if double is not None:
        places = [samples.where(i) for i, sample_id in enumerate(samples.ids) if sample_id == double]
        found = f" ({places[0]}, {places[1]})" if places[0] else ""
        raise UserError(f"{samples.name}: the id {double!r} occurs twice{found}; ids must be unique within a split")


def _digits(location: str, options: DataOptions) -> dict[str, Samples]:
    from sklearn.datasets import load_digits

    if location:
        raise UserError(f"data source 'digits:{location}': digits takes no location")
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    everything = Samples(
        "digits",
        [str(i) for i in range(len(pixels))],
        bunch.target,
        functools.partial(_from_array, pixels),
        [str(d) for d in range(10)],
        id_kind=IdKind.of_rows(len(pixels), "scikit-learn's images"),
    )
    # scikit-learn's digits have no split of their own: the fifth whose ids hash lowest is the test set.
    test, train = _lowest_fifth(everything)
    return {
        "train": everything.subset(train, "digits train"),
        "test": everything.subset(test, "digits test"),
    }


def _cifar(name: str) -> Opener:
    def opened(location: str, options: DataOptions) -> dict[str, Samples]:
        import torchvision.datasets

        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        root = location or str(Path.home() / ".cache" / "lethe")
        try:
            sets = {split: kind(root, train=split == "train", download=True) for split in ("train", "test")}
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data source {name!r}: could not be downloaded to {root} ({error}); place torchvision's folder there, "
                f"or name its place with {name}:ROOT"
            ) from None
        return {
            split: Samples(
                f"{name} {split}",
                [str(i) for i in range(len(s))],
                np.asarray(s.targets),
                functools.partial(_from_array, s.data),
                s.classes,
                natural=True,
                id_kind=IdKind.of_rows(len(s), f"{name}'s {split} images"),
            )
            for split, s in sets.items()
        }

    return opened


def _from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


_SOURCES: dict[str, Opener] = {
    "digits": _digits,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "parquet": open_parquet,
    "imagefolder": open_imagefolder,
    "webdataset": lambda location, options: open_webdataset(location),
}
