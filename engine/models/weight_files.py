"""Find the file of weights in a folder, and read it as inert data.

A pickle is opened by `torch.load(weights_only=True)` alone. Settings that training scripts store with the weights
(argparse.Namespace, OmegaConf, yacs, pathlib, numpy scalars) become stand-ins that hold data and run no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from engine.errors import UserError

# Names of weights in folders of timm, Hugging Face and `engine.save_checkpoint`, in order of preference.
_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# Files of other contents in a folder of weights.
_NO_WEIGHTS = re.compile(
    r"(^|[._-])(optim(izer)?|optimizers|sched(uler)?|rng_state|random_states|scaler|training_args|trainer_state|stages)"
    r"([._-]|\d|$)"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file of weights.

    Attributes:
        contents: The tensors of a safetensors file, or the object in a pickle, as plain Python values and tensors.
        path: Path of the file, or of the index of its shards.
        passed_over: Names of files in the folder without weights.
    """

    contents: Any
    path: Path
    passed_over: tuple[str, ...] = ()


def read_weights(place: Path) -> WeightFile:
    """Read a file of weights, or the one in a folder.

    Raises:
        UserError: The folder has no or several such files, or the file is damaged or holds code.
    """
    path, passed_over = (place, ()) if place.is_file() else _find(place)
    return WeightFile(_read(path), path, passed_over)


def _find(folder: Path) -> tuple[Path, tuple[str, ...]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _SUFFIXES)
    passed_over = tuple(path.name for path in files if _no_weights(path))
    for name in _STANDARD:
        if (folder / name).is_file():
            return folder / name, passed_over
    found = [path for path in files if path.name not in passed_over]
    if not found:
        paired = f"; {', '.join(passed_over)} hold no weights of a model" if passed_over else ""
        raise UserError(
            f"checkpoint {folder} has no model.safetensors (nor .pth, .pt, .bin, .ckpt, .tar){paired}"
            f"{_elsewhere(folder)}"
        )
    if len(found) == 1:
        return found[0], passed_over
    if all(_SHARD.search(path.name) for path in found):
        raise UserError(
            f"checkpoint {folder} holds {len(found)} shards ({found[0].name}, ...) without their index "
            "(model.safetensors.index.json); copy it too"
        )
    listed = ", ".join(path.name for path in found[:6]) + (", ..." if len(found) > 6 else "")
    raise UserError(
        f"checkpoint {folder} holds {len(found)} files of weights ({listed}); name one: --checkpoint {found[0]}"
    )


def _elsewhere(folder: Path) -> str:
    """Return where the weights of a folder without weights are, as text; empty if that is not known."""
    if any(folder.glob("*.distcp")):
        return (
            "; it is a distributed checkpoint of PyTorch: write one file with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth`"
        )
    within = sorted(
        {path.parent for suffix in _SUFFIXES for path in folder.glob(f"*/*{suffix}") if not _no_weights(path)}
    )
    if not within:
        return ""
    more = f" (of {len(within)} folders in it with weights)" if len(within) > 1 else ""
    return f"; name the folder within it: --checkpoint {within[-1]}{more}"


def _no_weights(path: Path) -> bool:
    return bool(_NO_WEIGHTS.search(path.name.lower()))


def _read(path: Path) -> Any:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open(path, "rb") as handle:
        start = handle.read(16)
    if problem := _no_checkpoint(path, start):
        raise UserError(f"checkpoint {path}: {problem}")
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        return _read_safetensors(path)
    if start[:6] == b"\x93NUMPY" or path.suffix in (".npz", ".npy", ".h5", ".msgpack", ".onnx", ".engine"):
        raise UserError(f"checkpoint {path}: {path.suffix} is not a file of PyTorch weights; convert it to safetensors")
    return _read_pickle(path)


def _no_checkpoint(path: Path, start: bytes) -> str:
    """Return the kind of a file that holds no weights, by its first bytes; empty for others."""
    if not start:
        return "the file is empty; copy it again"
    if start.startswith(b"version https://"):
        return "it is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return "it is a web page, not a file of weights; download the file itself"
    if start[:2] == b"\x1f\x8b":
        return f"it is compressed; unpack it first: gunzip {path}"
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        inside = [name for name in names if name.lower().endswith(_SUFFIXES)]
        if inside and not any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return f"it is a zip archive of files; unpack it and name the file of weights in it ({inside[0]})"
    return ""


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"checkpoint {path}: {path.name} is damaged or cut short ({error}); copy it again") from None


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {index}: is not an index of shards (no `weight_map`); copy it again") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"checkpoint {index.parent}: shard {missing[0]} is missing ({len(missing)} of {len(names)} that "
            f"{index.name} lists); copy it into the folder"
        )
    weights: dict[str, Any] = {}
    for name in names:
        if os.path.basename(name) != name:
            raise UserError(f"checkpoint {index}: names a shard outside its folder ({name}); copy the files again")
        held = _read(index.parent / name)
        weights |= {key: held[key] for key, shard in weight_map.items() if shard == name and key in held}
    lost = sorted(set(weight_map) - set(weights))
    if lost:
        raise UserError(
            f"checkpoint {index.parent}: {lost[0]} is not in {weight_map[lost[0]]} as {index.name} states; copy the "
            "shards again"
        )
    return weights


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(_refusal(path, error)) from None
    return plain(loaded)


def _refusal(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    lines = str(error).splitlines() or [type(error).__name__]
    holds = f"it holds {found[1]}" if found else lines[0][:80]
    return (
        f"checkpoint {path}: {path.name} is not a plain state dict, or is damaged, and is not opened since a pickle "
        f"can run code ({holds}); where it was made, write the weights alone: "
        "torch.save(model.state_dict(), 'weights.pth'), or save them as model.safetensors"
    )


class _Record:
    """Constructor arguments and state of an object of a settings class."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __new__(cls, *args: Any) -> _Record:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict:
    """Create a plain dict in place of a subclass of dict (yacs' CfgNode, EasyDict, AttributeDict)."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict(args[0]) if args and isinstance(args[0], Mapping) else OrderedDict()


def _default_dict(*args: Any) -> Any:
    return OrderedDict()


def _path(*parts: str) -> str:
    return "/".join(str(part) for part in parts).replace("//", "/")


def _sequence(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], Iterable) else list(args)


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a Python number for a numpy scalar; None if it is not a number."""
    code = dtype.args[0] if isinstance(dtype, _Record) and dtype.args else None
    if not isinstance(code, str) or not re.fullmatch(r"[biuf]\d", code) or not isinstance(data, bytes):
        return None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    kind = np.dtype(code).newbyteorder(">" if order == ">" else "<")
    return np.frombuffer(data, kind)[0].item() if len(data) == kind.itemsize else None


def _stand_ins() -> list[Any]:
    records = [
        "argparse.Namespace",
        "types.SimpleNamespace",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "typing.Any",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Bytes")),
        *(f"builtins.{kind}" for kind in ("str", "int", "float", "bool", "slice", "range", "bytes")),
    ]
    dicts = [
        "yacs.config.CfgNode",
        "easydict.EasyDict",
        "addict.addict.Dict",
        "mmengine.config.config.ConfigDict",
        "mmcv.utils.config.ConfigDict",
        "ml_collections.config_dict.config_dict.ConfigDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "builtins.dict",
    ]
    kinds = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
    paths = [f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in kinds]
    return [
        *((_Record, name) for name in records),
        *((_Dict, name) for name in dicts),
        *((_path, name) for name in paths),
        *((_sequence, f"builtins.{name}") for name in ("list", "tuple", "frozenset")),
        (_default_dict, "collections.defaultdict"),
        *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


_STAND_INS = _stand_ins()


def plain(value: Any, depth: int = 0) -> Any:
    """Return stand-ins as dicts, lists and numbers, and tensors unchanged; None if there is no such form."""
    if depth > 12:
        return None
    if isinstance(value, _Record):
        state = value.state
        if isinstance(state, Mapping) and "_content" in state:  # OmegaConf
            return plain(state["_content"], depth + 1)
        if isinstance(state, Mapping) and "_val" in state:
            return plain(state["_val"], depth + 1)
        return plain(dict(state), depth + 1) if isinstance(state, Mapping) and state else None
    if isinstance(value, Mapping):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    return value if isinstance(value, (str, int, float, bool, torch.Tensor)) else None
