"""Data sources, each named by one string: digits, cifar10, cifar100, parquet:FOLDER, imagefolder:FOLDER."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.samples import Samples
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
    """Opens a data source by its spec string. Raises UserError for an unknown kind or a folder without data."""
    kind, _, location = spec.partition(":")
    if kind not in _SOURCES:
        raise UserError(f"unknown data source {spec!r}{nearest(kind, _SOURCES)}")
    splits = _SOURCES[kind](location)
    train, test = splits["train"], splits.get("test")
    validation = splits.get("validation")
    if validation is None and test is not None:
        validation, test = _hold_out(test)
    if test is None:
        validation, test = _hold_out(validation) if validation is not None else (None, None)
    if validation is None or test is None:
        raise UserError(
            f"data source {spec!r} has neither test nor validation samples; add files test-* or validation-*"
        )
    for split in (train, validation, test):
        _check_unique(split)
    return Source(spec, train, validation, test)


def _hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """The fifth whose ids hash lowest, as validation, and the rest: the same whoever asks, whatever the order."""
    hashes = np.array(
        [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in samples.ids], dtype=np.uint64
    )
    count = int(len(samples) * VALIDATION_SHARE)
    order = np.argsort(hashes, kind="stable")
    return (
        samples.subset(np.sort(order[:count]), samples.name.replace("test", "validation")),
        samples.subset(np.sort(order[count:])),
    )


def _check_unique(samples: Samples) -> None:
    if len(set(samples.ids)) != len(samples.ids):
        seen: set[str] = set()
        double = next(i for i in samples.ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise UserError(f"{samples.name}: the id {double!r} stands twice; ids must be unique within a split")


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
    test, train = _hold_out(everything)
    return {
        "train": train.subset(range(len(train)), "digits train"),
        "test": test.subset(range(len(test)), "digits test"),
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
    splits = {}
    for split, directory in (("train", "train"), ("validation", "validation"), ("test", "val"), ("test", "test")):
        root = folder / directory
        if root.is_dir():
            splits[split] = root
    if "train" not in splits:
        raise UserError(f"data source 'imagefolder:{folder}' has no folder train/CLASS/FILE")
    classes = sorted(p.name for p in splits["train"].iterdir() if p.is_dir())
    return {split: _folder_split(f"imagefolder {split}", root, classes) for split, root in splits.items()}


def _folder_split(name: str, root: Path, classes: list[str]) -> Samples:
    number = {c: i for i, c in enumerate(classes)}
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    ids = [p.relative_to(root).as_posix() for p in files]
    unknown = [i for i in ids if i.split("/")[0] not in number]
    if unknown:
        raise UserError(f"{name}: {unknown[0]!r} lies in a class folder that train/ does not have")
    if not files:
        raise UserError(f"{name}: {root} holds no images")
    labels = np.array([number[i.split("/")[0]] for i in ids])
    return Samples(name, ids, labels, lambda i: Image.open(files[i]), classes)


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
}
