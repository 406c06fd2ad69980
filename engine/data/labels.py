"""Match labels of the data with a model's classes by name."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.data.classes import nfc
from engine.data.samples import Samples
from engine.data.sources import Source
from engine.errors import UserError

_REMEDY = (
    "rename it, give the checkpoint's names of the classes by --class-map FILE, or keep the data's own numbers by "
    "--label-order data"
)


def match_names(found: Sequence[str], wanted: Sequence[str], who: str) -> np.ndarray:
    """Return the position in `wanted`, int64 [len(found)], of each name of the data.

    Names are compared as they are, in any Unicode form. If one has no equal, case, spaces, `_` and `-` are ignored, if
    that leaves one candidate.

    Args:
        found: Class names of the data by label.
        wanted: Class names of the model by label.
        who: Owner of the names `wanted`, for errors.

    Raises:
        UserError: The model does not have a class of the data, several of its classes match one name, or two names
            match the same class.
    """
    if list(found) == list(wanted):
        return np.arange(len(found))
    exact, forms, loose = (_places(wanted, form) for form in (str, nfc, _plain))
    mapping: dict[int, int] = {}
    for label, name in enumerate(found):
        places = exact.get(name) or forms.get(nfc(name)) or loose.get(_plain(name)) or []
        if not places:
            close = difflib.get_close_matches(name, wanted, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise UserError(
                f"class {name!r} of the data is not among the {len(wanted)} classes of {who} ({shown(wanted)}); "
                f"{hint}{_REMEDY}"
            )
        if len(places) > 1:
            raise UserError(
                f"class {name!r} of the data stands for several classes of {who} ({', '.join(map(str, places[:3]))}); "
                f"{_REMEDY}"
            )
        if places[0] in mapping:
            first = found[mapping[places[0]]]
            raise UserError(
                f"classes {first!r} and {name!r} of the data both stand for {wanted[places[0]]!r} of {who}; {_REMEDY}"
            )
        mapping[places[0]] = label
    order = np.empty(len(found), dtype=np.int64)
    order[list(mapping.values())] = list(mapping)
    return order


def _places(names: Sequence[str], form: Callable[[str], str]) -> Mapping[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[form(name)].append(place)
    return places


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", nfc(name).casefold()).strip()


def same_names(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two lists name the same classes in the same order."""
    return list(map(_plain, first)) == list(map(_plain, second))


def shown(names: Sequence[str]) -> str:
    """Return the first and the last name, in quotes."""
    return " ... ".join(repr(name) for name in (names if len(names) < 3 else (names[0], names[-1])))


def relabelled(samples: Samples, mapping: np.ndarray, names: Sequence[str]) -> Samples:
    """Return the same samples with label `mapping[label]`.

    Args:
        samples: The samples.
        mapping: New label of each label, int64.
        names: Class names by new label.
    """
    if len(samples) and samples.labels.max() >= len(mapping):
        raise UserError(
            f"{samples.name}: label {samples.labels.max()} has no class name; the data names {len(mapping)}"
        )
    changed = copy.copy(samples)
    changed.labels = mapping[samples.labels] if len(samples) else samples.labels
    changed.class_names = list(names)
    return changed


def relabelled_source(source: Source, mapping: np.ndarray, names: Sequence[str]) -> Source:
    """Return the source with its three splits relabelled, see `relabelled`."""
    train, validation, test = (
        relabelled(samples, mapping, names) for samples in (source.train, source.validation, source.test)
    )
    return dataclasses.replace(source, train=train, validation=validation, test=test)
