"""Data sources, each named by one string: digits, cifar10, cifar100, parquet:, imagefolder: and webdataset:."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.ids import Ids
from engine.data.samples import Samples
from engine.data.shards import SPLIT_WORDS, by_split
from engine.data.webdataset import open_webdataset
from engine.errors import UserError, nearest

VALIDATION_SHARE = 0.2
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The three splits of a data source; ids are unique within a split."""

    spec: str
    train: Samples
    validation: Samples
    test: Samples


def open_source(spec: str) -> Source:
    """Opens a data source by its spec string. Raises UserError for an unknown kind or a folder without data.

    digits; cifar10[:ROOT]; cifar100[:ROOT]
    parquet:FOLDER       train-*.parquet, validation-*, test-*: Hugging Face's image layout
    imagefolder:FOLDER   FOLDER/{train,validation,val,test}/CLASS/FILE
    webdataset:FOLDER    *.tar with one of the words train, validation, val, test in the name, or in folders so called
    webdataset:PATTERN   a path with `{split}`, which stands for each of these words, or with the word train in it: it
                         names the training shards, and with another word in its place the others. Wildcards (*, ?, [])
                         and braces ({000000..001280}, {a,b}) name many. All shards of a brace range have to be there;
                         for the other splits it stands for whatever numbers there are.

    Where there is no validation split, the fifth of the test samples whose ids hash lowest is validation; `val` alone
    counts as test, beside test as validation.
    """
    kind, _, location = spec.partition(":")
    if kind not in _SOURCES:
        raise UserError(f"unknown data source {spec!r}{nearest(kind, _SOURCES)}")
    splits = _SOURCES[kind](location)
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
    for split in (train, validation, test):
        _check_unique(split)
    return Source(spec, train, validation, test)


def _held_out(kind: str, samples: Samples) -> tuple[Samples, Samples]:
    """(validation, test) of the one split that there is."""
    fifth, rest = _lowest_fifth(samples)
    return samples.subset(fifth, f"{kind} validation"), samples.subset(rest, f"{kind} test")


def _lowest_fifth(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the fifth whose ids hash lowest, and of the rest: the same whoever asks, whatever the order."""
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
        raise UserError(f"{samples.name}: the id {double!r} stands twice{found}; ids must be unique within a split")


def _digits(location: str) -> dict[str, Samples]:
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
        natural=False,
    )
    # scikit-learn's digits have no split of their own: the fifth whose ids hash lowest is the test set.
    test, train = _lowest_fifth(everything)
    return {
        "train": everything.subset(train, "digits train"),
        "test": everything.subset(test, "digits test"),
    }


def _cifar(name: str) -> Callable[[str], dict[str, Samples]]:
    def opened(location: str) -> dict[str, Samples]:
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
            )
            for split, s in sets.items()
        }

    return opened


def _from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _parquet(location: str) -> dict[str, Samples]:
    import pyarrow.parquet

    folder = _folder("parquet", location)
    splits = {}
    for split in ("train", "validation", "test"):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            try:
                table = pyarrow.concat_tables([pyarrow.parquet.read_table(f, memory_map=True) for f in files])
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(
                    f"data source 'parquet:{folder}': {split} is not parquet, or is cut short ({str(error)[:100]})"
                ) from None
            splits[split] = _parquet_split(f"parquet {split}", table)
    if "train" not in splits:
        raise UserError(f"data source 'parquet:{folder}' has no train-*.parquet")
    return splits


def _parquet_split(name: str, table: Any) -> Samples:
    missing = [column for column in ("image", "label") if column not in table.column_names]
    if missing:
        raise UserError(f"{name}: no column {missing[0]!r}; found {', '.join(table.column_names)}")
    images = table.column("image").combine_chunks().field("bytes")
    ids = table.column("id").to_pylist() if "id" in table.column_names else [str(i) for i in range(table.num_rows)]
    labels = table.column("label")
    if labels.null_count:
        raise UserError(f"{name}: {labels.null_count} samples have no label; remove or label them")
    names: list[str] = []
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata:
        names = json.loads(metadata).get("info", {}).get("features", {}).get("label", {}).get("names", [])
    return Samples(
        name, [str(i) for i in ids], labels.to_numpy(), lambda i: Image.open(io.BytesIO(images[i].as_py())), names
    )


def _imagefolder(location: str) -> dict[str, Samples]:
    folder = _folder("imagefolder", location)
    roots = by_split(
        {word: folder / word for word in SPLIT_WORDS if (folder / word).is_dir()}, f"imagefolder:{location}"
    )
    if "train" not in roots:
        raise UserError(f"data source 'imagefolder:{folder}' has no folder train/CLASS/FILE")
    with os.scandir(roots["train"]) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    return {split: _folder_split(f"imagefolder {split}", root, classes) for split, root in roots.items()}


def _folder_split(name: str, root: Path, classes: list[str]) -> Samples:
    number = {c: i for i, c in enumerate(classes)}
    ids = list(_images_below(str(root), "", ()))
    labels = np.array([number.get(i.split("/", 1)[0], -1) for i in ids], dtype=np.int64)
    if not ids:
        raise UserError(f"{name}: {root} holds no images")
    if labels.min() < 0:
        raise UserError(f"{name}: {ids[int(labels.argmin())]!r} lies in a class folder that train/ does not have")
    files = Ids(ids)
    return Samples(
        name,
        files,
        labels,
        functools.partial(_open_file, str(root), files),
        classes,
        where=functools.partial(_file_of, str(root), files),
    )


def _images_below(root: str, below: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to the root, in the order of sorted(Path): by name within each folder, links followed."""
    folder = f"{root}/{below}"
    if os.path.islink(folder.rstrip("/")):
        real = os.path.realpath(folder)
        if real in above or os.path.realpath(root).startswith(f"{real}/"):
            raise UserError(f"{folder} is a link to a folder that it lies in; remove it")
        above = (*above, real)
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir():
            yield from _images_below(root, f"{below}{entry.name}/", above)
        elif os.path.splitext(entry.name)[1].lower() in _IMAGE_SUFFIXES:
            yield below + entry.name


def _file_of(root: str, ids: Ids, index: int) -> str:
    return f"{root}/{ids[index]}"


def _open_file(root: str, ids: Ids, index: int) -> Image.Image:
    return Image.open(_file_of(root, ids, index))


def _folder(kind: str, location: str) -> Path:
    folder = Path(location).expanduser()
    if not location or not folder.is_dir():
        raise UserError(
            f"data source '{kind}:{location}': {location or '(nothing)'} is not a folder; write {kind}:FOLDER"
        )
    return folder


_SOURCES: dict[str, Callable[[str], dict[str, Samples]]] = {
    "digits": _digits,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "parquet": _parquet,
    "imagefolder": _imagefolder,
    "webdataset": open_webdataset,
}
