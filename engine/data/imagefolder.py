"""Data source of images in folders: FOLDER/{train,validation,val,test}/CLASS/FILE."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.classes import natural_order
from engine.data.folders import existing_folder, is_hidden, is_image, note_left_out, note_not_read
from engine.data.ids import Ids
from engine.data.samples import IdKind, Samples
from engine.data.spec import DataOptions
from engine.data.webdataset.shards import SPLIT_WORDS, by_split
from engine.errors import UserError


def open_imagefolder(location: str, options: DataOptions) -> dict[str, Samples]:
    """Return samples by split. Classes are the folders of train/ in timm's order, without hidden folders.

    Args:
        location: The folder.
        options: Options of the source; with `classes`, an empty class folder is allowed.

    Raises:
        UserError: There are no training images, or the folders are not split and class folders.
    """
    folder = existing_folder("imagefolder", location)
    below = _folders_of(folder)
    roots = by_split({word: folder / word for word in SPLIT_WORDS if word in below}, f"imagefolder:{location}")
    if "train" not in roots:
        found = f"; found the folders {', '.join(below[:5])}" if below else ""
        raise UserError(f"data source 'imagefolder:{folder}' has no folder train/CLASS/FILE{found}")
    note_not_read("imagefolder", folder, set(below) - set(SPLIT_WORDS))
    classes = natural_order(_folders_of(roots["train"]))
    splits = {split: _folder_split(f"imagefolder {split}", root, classes) for split, root in roots.items()}
    if options.classes is None:
        _check_no_class_empty(splits["train"], roots["train"])
    return splits


def _folders_of(folder: Path) -> list[str]:
    return [entry.name for entry in _listed(folder) if entry.is_dir() and not is_hidden(entry.name)]


def _listed(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); allow it, or move the folder away") from None


def _check_no_class_empty(train: Samples, root: Path) -> None:
    """Check that each class has images. An empty class shifts later labels in torchvision, but not in timm.

    Raises:
        UserError: A class folder is empty.
    """
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if not counts.all():
        empty = [train.class_names[i] for i in np.flatnonzero(counts == 0)]
        raise UserError(
            f"{train.name}: {len(empty)} class folders of {root} hold no images, the first: {empty[0]!r}; remove or "
            "fill them, or fix the order of classes by --class-map FILE"
        )


def _folder_split(name: str, root: Path, classes: list[str]) -> Samples:
    number = {c: i for i, c in enumerate(classes)}
    left_out: list[str] = []
    ids = list(_images_below(str(root), "", (), left_out))
    stray = next((i for i in ids if "/" not in i), None)
    if stray is not None:
        raise UserError(f"{name}: {root / stray} lies in no class folder; move it to {root}/CLASS/, or remove it")
    note_left_out(name, root, left_out)
    by_text = {unicodedata.normalize("NFC", c): i for c, i in number.items()}
    if len(by_text) == len(number):  # a class may be in another Unicode form than in train/
        for c in {i.split("/", 1)[0] for i in ids} - number.keys():
            number[c] = by_text.get(unicodedata.normalize("NFC", c), -1)
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
        id_kind=IdKind(f"paths below {root.name}/"),
    )


def _images_below(root: str, below: str, above: tuple[str, ...], left_out: list[str]) -> Iterator[str]:
    """Yield paths relative to the root, by name within each folder as sorted(Path) does; links are followed.

    Hidden folders are skipped. Files that are not images by their names are added to `left_out`.
    """
    folder = f"{root}/{below}"
    if os.path.islink(folder.rstrip("/")):
        real = os.path.realpath(folder)
        if real in above or os.path.realpath(root).startswith(f"{real}/"):
            raise UserError(f"{folder} links to a folder above it; remove it")
        above = (*above, real)
    for entry in _listed(folder):
        if entry.is_dir():
            if not is_hidden(entry.name):
                yield from _images_below(root, f"{below}{entry.name}/", above, left_out)
        elif is_image(entry.name):
            yield below + entry.name
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path} is a broken link ({os.readlink(entry.path)}); repair or remove it")
        else:
            left_out.append(below + entry.name)


def _file_of(root: str, ids: Ids, index: int) -> str:
    return f"{root}/{ids[index]}"


def _open_file(root: str, ids: Ids, index: int) -> Image.Image:
    return Image.open(_file_of(root, ids, index))
