"""Class names of a model: those of its checkpoint, or ImageNet's by the number of classes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.errors import UserError
from engine.models.info import num_classes_of
from engine.models.spec import set_spec, spec_of

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # placeholder that transformers writes if no names were given
_WORDNET = re.compile(r"n\d{8}")
_MIN_MATCHING = 0.9  # share of names that must match for a list to count as ImageNet's


def label_names(model: nn.Module) -> list[str]:
    """Return the class names by label in the checkpoint; empty if it has none.

    Raises:
        UserError: The list has another length than the head.
    """
    try:
        spec = spec_of(model)
    except UserError:  # not a timm model: no names are stored
        return []
    names = spec.label_names
    if not names or all(_PLACEHOLDER.fullmatch(name) for name in names):
        return []
    classes = num_classes_of(model)
    if len(names) != classes:
        raise UserError(
            f"the checkpoint gives {len(names)} class names for a head of {classes} classes; correct label_names in "
            "its config.json, or keep the data's own numbers by --label-order data"
        )
    return names


def set_label_names(model: nn.Module, names: Sequence[str]) -> None:
    """Set the class names for a model's checkpoints; does nothing if their number differs from the head's."""
    try:
        spec = spec_of(model)
    except UserError:
        return
    if len(names) == spec.num_classes:
        set_spec(model, dataclasses.replace(spec, extra={**spec.extra, "label_names": list(names)}))


def names_for(model: nn.Module, found: Sequence[str]) -> tuple[list[str], str]:
    """Return the class names of a model by label, in the form that the data uses, and their source.

    The names are empty if there are none. WordNet ids (n01440764) are matched with ImageNet's order if the checkpoint
    has no names, or ImageNet's names in words.

    Args:
        model: The model.
        found: Class names of the data.
    """
    names = label_names(model)
    wordnet = bool(found) and all(_WORDNET.fullmatch(name) for name in found)
    synsets = imagenet_synsets(num_classes_of(model)) if wordnet else ()
    if synsets and (not names or _are_imagenet(names, synsets)):
        return list(synsets), f"ImageNet's order of {len(synsets)} classes (timm)"
    return names, "the checkpoint"


def _are_imagenet(names: Sequence[str], synsets: Sequence[str]) -> bool:
    """Return whether names in words are those of the synsets, in the same order."""
    words = imagenet_words(len(synsets))
    same = sum(
        name.split(",")[0].casefold() == word.split(",")[0].casefold() for name, word in zip(names, words, strict=True)
    )
    return same >= _MIN_MATCHING * len(synsets)


@functools.cache
def imagenet_synsets(classes: int) -> tuple[str, ...]:
    """Return the WordNet ids by label of timm's ImageNet models with so many classes; empty if there are none."""
    info = _imagenet(classes)
    return tuple(info.label_names()) if info else ()


@functools.cache
def imagenet_words(classes: int) -> tuple[str, ...]:
    """Return the names in words by label of timm's ImageNet models with so many classes; empty if there are none."""
    info = _imagenet(classes)
    return tuple(info.label_descriptions()) if info else ()


def _imagenet(classes: int) -> Any:
    from timm.data import imagenet_info

    subset = imagenet_info.infer_imagenet_subset({"num_classes": classes})
    return imagenet_info.ImageNetInfo(subset) if subset else None
