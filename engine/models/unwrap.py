"""Extract a state dict from a training script's file: its container, raw or EMA weights, and name prefixes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import UserError

Kind = Literal["raw", "ema"]

# Keys under which training scripts save weights, in timm's order of preference.
_CONTAINERS: dict[Kind, tuple[str, ...]] = {
    "ema": (
        "state_dict_ema",
        "model_ema",
        "ema_state_dict",
        "model_ema_state_dict",
        "ema_model",
        "ema_model_state_dict",
        "ema",
        "swa_model",
    ),
    "raw": (
        "state_dict",
        "model",
        "model_state_dict",
        "model_state",
        "net",
        "network",
        "weights",
        "params",
        "module",
    ),
}
# Keys of a container that may hold the state dict one level deeper.
_INNER = ("module", "state_dict", "model", "model_state_dict", "ema", "shadow", "params")
# Prefixes of names that wrappers of a model add.
_WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "net",
    "network",
    "timm_model",
    "backbone",
    "encoder",
    "vit",
    "trunk",
    "classifier",
    "_forward_module",
    "base_model",
)
_EMA_WRAPPERS = ("ema", "ema_model", "model_ema", "ema_net", "averaged_model", "teacher_ema")
# Buffers that a model computes itself, and counters of profilers and AveragedModel.
_HARMLESS = re.compile(
    r"(^|\.)(attn_mask|relative_position_index|relative_coords_table|n_averaged|total_ops|total_params)$"
)
# Parts of a training module other than the model: losses and metrics.
_TRAINING = re.compile(r"^(criterion|loss\w*|\w*_loss|metrics?|\w+_metrics?|\w*acc(uracy)?\w*|mixup\w*)\.")


@dataclasses.dataclass(frozen=True)
class StateDict:
    """Weights as a file held them.

    Attributes:
        tensors: Weights by name.
        container: Key that they were under, empty for a bare state dict.
        kind: raw or ema, if the file has both; None for a file with one kind that is not marked as EMA.
        stripped: Prefixes that were removed, outermost first.
        passed_over: Keys that are not weights of the model.
    """

    tensors: dict[str, Tensor]
    container: str = ""
    kind: Kind | None = None
    stripped: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


def choose(contents: Any, weights: Kind | None, name: str) -> StateDict:
    """Return the state dict of a file, EMA weights first.

    Args:
        contents: Contents of the file.
        weights: Kind to take; None: EMA weights if there are any, else raw ones.
        name: Name of the file, for errors.

    Raises:
        UserError: The file has no weights, or none of this kind.
    """
    if not isinstance(contents, Mapping):
        raise UserError(
            f"checkpoint {name}: is not a state dict (names to tensors) but a {_kind_of(contents)}; write the weights "
            "alone: torch.save(model.state_dict(), 'weights.pth')"
        )
    found = _candidates(contents)
    if not found:
        raise UserError(f"checkpoint {name}: is not a state dict (names to tensors); {_described(contents)}")
    has = sorted({each.kind or "raw" for each in found})
    wanted = [each for each in found if weights is None or (each.kind or "raw") == weights]
    if not wanted:
        raise UserError(
            f"checkpoint {name}: has no {weights} weights, only {has[0]} ones (under "
            f"{', '.join(repr(each.container) or 'no key' for each in found)}); leave --weights {weights} out"
        )
    wanted.sort(key=lambda each: each.kind != "ema")  # the sort is stable: timm's order within a kind
    chosen = wanted[0]
    if weights != "raw" and chosen.kind != "ema" and (nameless := _without_names(contents)):
        raise UserError(
            f"checkpoint {name}: its EMA weights ({nameless}) are a list without names, which cannot be matched with a "
            "model; save them as a state dict, or take the raw ones by --weights raw"
        )
    rivals = [each for each in wanted[1:] if each.kind == chosen.kind and not _same(each, chosen)]
    if chosen.container in (*_CONTAINERS["ema"], *_CONTAINERS["raw"], ""):
        rivals = [each for each in rivals if _alike(each, chosen)]
    if rivals:
        keys = ", ".join(each.container for each in (chosen, *rivals))
        raise UserError(
            f"checkpoint {name}: holds several state dicts ({keys}) of different weights; save the one that is meant "
            "alone, under the key 'state_dict'"
        )
    if chosen.kind is None and len(has) > 1:
        return dataclasses.replace(chosen, kind="raw")
    return chosen


def _candidates(contents: Mapping[Any, Any]) -> list[StateDict]:
    found = [
        each
        for kind, keys in _CONTAINERS.items()
        for key in keys
        if (each := _held(contents.get(key), key, "ema" if kind == "ema" else None)) is not None
    ]
    if found:
        found = _averaged_by_callbacks(contents, found)
    if not found and (tensors := _tensors(contents)):
        found = [StateDict(tensors)]
    if not found:
        found = [
            each
            for key, value in contents.items()
            if "optim" not in str(key).lower() and (each := _held(value, str(key), None)) is not None
        ]
    return [part for each in found for part in _split_ema(each)]


def _averaged_by_callbacks(contents: Mapping[Any, Any], found: list[StateDict]) -> list[StateDict]:
    """Add the EMA weights of Lightning's callbacks.

    `WeightAveraging` stores them in place of the raw ones.
    """
    current = _held(contents.get("current_model_state"), "current_model_state", "raw")
    if current is not None:
        found = [dataclasses.replace(e, kind="ema") if e.container == "state_dict" else e for e in found] + [current]
    callbacks = contents.get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if "ema" in re.split(r"[^a-z]+", str(key).lower()):
                held = _held(value, f"callbacks.{str(name).partition('{')[0]}.{key}", "ema")
                found = [*found, held] if held is not None else found
    return found


def _without_names(contents: Mapping[Any, Any]) -> str:
    """Return the key of EMA weights that are a list without names (`shadow_params`); empty if there is none."""
    for key in _CONTAINERS["ema"]:
        value = contents.get(key)
        for inner, item in value.items() if isinstance(value, Mapping) else ((None, value),):
            if isinstance(item, list) and len(item) > 1 and all(isinstance(each, Tensor) for each in item):
                return key if inner is None else f"{key}.{inner}"
    return ""


def _alike(one: StateDict, other: StateDict) -> bool:
    """Return whether two state dicts are of similar models, by the last parts of their names."""
    first, second = ({tuple(key.split(".")[-2:]) for key in each.tensors} for each in (one, other))
    return 2 * len(first & second) > min(len(first), len(second))


def _held(value: Any, container: str, kind: Kind | None, depth: int = 0) -> StateDict | None:
    """Return the state dict in a value: the value itself, or up to three levels deeper."""
    if not isinstance(value, Mapping) or not value or depth > 3:
        return None
    if tensors := _tensors(value):
        return StateDict(tensors, container, kind)
    for key in _INNER:
        if (inner := _held(value.get(key), f"{container}.{key}", kind, depth + 1)) is not None:
            return inner
    return None


def _tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name; empty for another dict."""
    tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
    named = sum("." in key for key in tensors)
    return {key: item.detach() for key, item in tensors.items()} if named and 2 * len(tensors) > len(value) else {}


def _split_ema(found: StateDict) -> list[StateDict]:
    """Split EMA weights from the raw ones of the same state dict (`model.*` and `ema_model.*`)."""
    averaged = {key: item for key, item in found.tensors.items() if key.partition(".")[0] in _EMA_WRAPPERS}
    rest = {key: item for key, item in found.tensors.items() if key not in averaged}
    if not averaged or not rest:
        return [found]
    shorter = {key.partition(".")[2]: item for key, item in averaged.items()}
    prefix = next(iter(averaged)).partition(".")[0] + "."
    return [
        StateDict(shorter, found.container, "ema", (prefix,)),
        dataclasses.replace(found, tensors=rest),
    ]


def _same(one: StateDict, other: StateDict) -> bool:
    """Return whether both have the same weights in the same order, for any prefix of their names."""
    pairs = zip(one.tensors.values(), other.tensors.values(), strict=False)
    return len(one.tensors) == len(other.tensors) and all(a is b or torch.equal(a, b) for a, b in pairs)


def fit(found: StateDict, expected: Iterable[str]) -> StateDict:
    """Remove the prefixes that keep the names from matching a model, and harmless extra keys.

    Args:
        found: The state dict.
        expected: Names in the model's state dict. Names that do not match are left, for the caller's error.
    """
    wanted = set(expected)
    best, score = found, -1
    frontier = [found]
    seen: set[frozenset[str]] = set()
    while frontier:
        current = frontier.pop(0)
        names = frozenset(current.tensors)
        if names in seen or len(seen) > 200:
            continue
        seen.add(names)
        reached = len(wanted & names)
        if reached > score:
            best, score = current, reached
        for prefix in sorted({key.partition(".")[0] for key in names if "." in key}):
            if prefix in (*_WRAPPERS, *_EMA_WRAPPERS) and (without := _without(current, prefix + ".")) is not None:
                frontier.append(without)
    return _without_extras(best, wanted)


def _without(found: StateDict, prefix: str) -> StateDict | None:
    """Return the state dict without a prefix of some or all names; None if two names would become one."""
    renamed: dict[str, Tensor] = {}
    for key, item in found.tensors.items():
        name = key.removeprefix(prefix)
        if name in renamed:
            return None
        renamed[name] = item
    return dataclasses.replace(found, tensors=renamed, stripped=(*found.stripped, prefix))


def _without_extras(found: StateDict, wanted: set[str]) -> StateDict:
    extras = [key for key in found.tensors if key not in wanted and (_HARMLESS.search(key) or _TRAINING.search(key))]
    kept = {key: item for key, item in found.tensors.items() if key not in extras}
    return dataclasses.replace(found, tensors=kept, passed_over=(*found.passed_over, *extras))


def _kind_of(value: Any) -> str:
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


def _described(contents: Mapping[Any, Any]) -> str:
    if "param_groups" in contents:
        return "it is the state of an optimizer; name the file with the model's weights"
    keys = ", ".join(repr(str(key)) for key in list(contents)[:8])
    return f"it holds {keys or 'nothing'}; save the weights under the key 'state_dict'"
