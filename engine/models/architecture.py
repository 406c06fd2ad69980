"""Infer how a checkpoint's model is built, from the settings stored with the weights and from the shapes of the
weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from torch import Tensor, nn

from engine.errors import UserError, nearest

# Keys under which training scripts store their settings in a file of weights.
_SETTINGS = ("args", "hparams", "hyper_parameters", "config", "cfg")
_ARCH_KEYS = ("arch", "architecture", "model_name", "model", "timm_model", "backbone", "name")
_LABEL_KEYS = ("label_names", "class_names", "classes", "categories")
# Names of weights of LoRA and other adapters, and of the weights that they adapt.
_ADAPTER = re.compile(r"(^|[._])(lora_\w+|lora|base_layer|modules_to_save|ia3_l|hada_w\w+|lokr_w\w+|vera_\w+)(\.|$)")
# Settings that change the model, by timm's name for them.
_MODEL_KEYS = {"patch_size": "patch_size", "in_chans": "in_chans", "global_pool": "global_pool", "gp": "global_pool"}
# Likewise, of timm's ViTs and DeiTs alone.
_SIZES = ("depth", "embed_dim", "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """Description of a model that is stored with its weights; every part may be missing.

    Attributes:
        architecture: timm's name.
        source: Key or file that the name comes from.
        model_args: Arguments of timm.create_model.
        img_size: Image size of the training in pixels, the side of a square or [height, width].
        preprocessing: Keys of pretrained_cfg.
        label_names: Class names by label.
        unknown: A name of an architecture that timm does not have.
    """

    architecture: str | None = None
    source: str = ""
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    img_size: int | list[int] | None = None
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    label_names: list[str] = dataclasses.field(default_factory=list)
    unknown: str = ""


def described(contents: Any, path: Path) -> Described:
    """Read `arch`, `args`, `hparams` and the like of a file, and args.yaml or hparams.yaml in its folder.

    Args:
        contents: Contents of the file, as plain values and tensors.
        path: Path of the file.
    """
    places: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(contents, Mapping):
        places.append(("", contents))
        places += [(key, contents[key]) for key in _SETTINGS if isinstance(contents.get(key), Mapping)]
        places += [
            (f"{key}.model", item["model"]) for key, item in places[1:] if isinstance(item.get("model"), Mapping)
        ]
    for name in ("args.yaml", "hparams.yaml"):
        if settings := _yaml(path.parent / name):
            places.append((name, settings))
    architecture, source, unknown = _architecture(places)
    settings = {key: value for _, place in reversed(places) for key, value in place.items() if isinstance(key, str)}
    model_args = {ours: settings[key] for key, ours in _MODEL_KEYS.items() if isinstance(settings.get(key), (int, str))}
    if architecture is not None and architecture.startswith(("vit_", "deit")):
        model_args |= {key: settings[key] for key in _SIZES if type(settings.get(key)) is int}
    if isinstance(given := settings.get("model_kwargs"), Mapping):
        model_args |= dict(given)
    return Described(
        architecture=architecture,
        source=source,
        model_args=model_args,
        img_size=_img_size(settings),
        preprocessing=_preprocessing(settings),
        label_names=_label_names(settings),
        unknown=unknown,
    )


def _img_size(settings: Mapping[str, Any]) -> int | list[int] | None:
    """Return a side or [height, width]: `img_size`, `image_size`, or timm's `input_size` (channels, height, width)."""
    for key in ("img_size", "image_size", "input_size"):
        value = settings.get(key)
        given = value[-2:] if isinstance(value, list) and len(value) in (2, 3) else [value, value]
        sides = [side for side in given if type(side) is int and side > 0]
        if len(sides) == 2:
            return sides[0] if sides[0] == sides[1] else sides
    return None


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return found if isinstance(found, Mapping) else {}


def is_architecture(name: str) -> bool:
    """Return whether timm has an architecture; a tag of pretrained weights (`NAME.TAG`) is ignored."""
    return bool(timm.is_model(name.partition(".")[0]))


def _architecture(places: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str | None, str, str]:
    unknown = ""
    for where, place in places:
        for key in _ARCH_KEYS:
            name = place.get(key)
            if not isinstance(name, str) or not name:
                continue
            source = f"{where}.{key}".lstrip(".")
            name = name.removeprefix("timm/").removeprefix("hf-hub:timm/")
            if is_architecture(name):
                return name, source, ""
            if key != "name" and not unknown:
                unknown = f"{source} = {name!r}"
    return None, "", unknown


def _preprocessing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's keys of the training's preprocessing; values that are not stored are left to the architecture."""
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = settings.get(key)
        if isinstance(value, list) and value and all(isinstance(each, (int, float)) for each in value):
            found[key] = [float(each) for each in value]
    if isinstance(pct := settings.get("crop_pct"), (int, float)) and 0 < pct <= 1:
        found["crop_pct"] = float(pct)
    if settings.get("interpolation") in ("bilinear", "bicubic", "nearest"):
        found["interpolation"] = settings["interpolation"]
    return found


def _label_names(settings: Mapping[str, Any]) -> list[str]:
    for key in _LABEL_KEYS:
        names = settings.get(key)
        if isinstance(names, list) and names and all(isinstance(name, (str, int)) for name in names):
            return [str(name) for name in names]
    for key, turned in (("class_to_idx", False), ("label2id", False), ("id2label", True), ("idx_to_class", True)):
        if isinstance(table := settings.get(key), Mapping) and table:
            try:
                pairs = {int(k if turned else v): str(v if turned else k) for k, v in table.items()}
            except (TypeError, ValueError):
                continue
            if sorted(pairs) == list(range(len(table))):
                return [pairs[label] for label in range(len(pairs))]
    return []


def names_of_config(config: Mapping[str, Any]) -> list[str]:
    """Return the class names by label of a config.json in timm's layout, stored as a list or a table; empty if there
    are none.

    Raises:
        UserError: The names have another form.
    """
    cfg = config.get("pretrained_cfg")
    for place in (config, cfg if isinstance(cfg, Mapping) else {}):
        given = place.get("label_names")
        table = "idx_to_class" if isinstance(given, Mapping) and all(str(k).isdecimal() for k in given) else "label2id"
        names = _label_names({table: given} if isinstance(given, Mapping) else {"label_names": given})
        if given and not names:
            raise UserError(
                f"config.json: label_names is {str(given)[:60]!r}, expected a list of names by label, or a table with "
                "the labels 0 to n - 1"
            )
        if names or (names := _label_names({key: place.get(key) for key in ("id2label", "label2id", "class_to_idx")})):
            return names
    return []


def read_label_names(path: Path) -> list[str]:
    """Return the class names by label in a file: one name a line, a JSON list, or JSON {name: label} or {label: name}.

    Raises:
        UserError: The file is missing, cannot be read, or does not hold one name for each label.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--label-names {path}: the file does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--label-names {path}: cannot be read ({error}); save it as UTF-8 text") from None
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"--label-names {path}: is not JSON ({error})") from None
        if isinstance(found, Mapping):
            turned = all(str(key).isdigit() for key in found)
            found = {"id2label": found} if turned else {"class_to_idx": found}
        else:
            found = {"classes": found}
        names = _label_names(found)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"--label-names {path}: holds {'the same name twice' if names else 'no names'}; expected one name a line "
            "by label, or JSON: a list, or {name: label} with the labels 0 to n - 1"
        )
    return names


def config_of(folder: Path) -> dict[str, Any] | None:
    """Return config.json of a folder in timm's layout; None if there is none.

    Raises:
        UserError: The file is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(
            f"checkpoint {folder}: config.json is not a timm configuration ({type(error).__name__}: {error})"
        ) from None
    return config if isinstance(config, dict) else None


def unknown_architecture(name: str) -> str:
    """Return the hint of an error message for a name that timm does not have."""
    return nearest(name, timm.list_models()).split(" known:")[0].rstrip(";")


def classifier_names(model: nn.Module) -> list[str]:
    """Return the names of the weights and biases of a model's head, or of DeiT's two heads."""
    head = model.get_classifier()  # type: ignore[operator]
    heads = {id(p) for each in (head if isinstance(head, tuple) else (head,)) for p in each.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in heads]


def inferred_args(model: nn.Module, weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm.create_model that the shapes of the weights determine.

    Args:
        model: The architecture with the arguments that are given, on the meta device.
        weights: The weights by name.
        given: Arguments that are given; they are never changed.
    """
    found: dict[str, Any] = {}
    expected = model.state_dict()
    if "patch_embed.proj.weight" in weights and weights["patch_embed.proj.weight"].ndim == 4:
        _, channels, height, width = weights["patch_embed.proj.weight"].shape
        if "patch_embed.proj.weight" in expected:
            _, now, *patch = expected["patch_embed.proj.weight"].shape
            if channels != now and "in_chans" not in given:
                found["in_chans"] = channels
            if [height, width] != patch and "patch_size" not in given and hasattr(model, "pos_embed"):
                found["patch_size"] = height if height == width else (height, width)
    size = inferred_size(model, weights)
    if size is not None and "img_size" not in given:
        found["img_size"] = size
    return found


def inferred_size(model: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """Return the side in pixels of the square image that a position embedding is made for.

    None if the size is the model's own or the image is not a square.
    """
    table, patch = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    own = getattr(model, "pos_embed", None)
    if table is None or patch is None or own is None or table.ndim != 3 or patch.ndim != 4:
        return None
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    tokens = table.shape[1] - prefix
    side = round(max(tokens, 0) ** 0.5)
    if side < 1 or side * side != tokens or patch.shape[-1] != patch.shape[-2]:
        return None
    same = tuple(table.shape[1:2]) == tuple(own.shape[1:2]) and _patch(model) == patch.shape[-1]
    return None if same else side * int(patch.shape[-1])


def _patch(model: nn.Module) -> int:
    return int(getattr(model, "patch_embed").patch_size[0])  # noqa: B009


def advice(model: nn.Module, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a remedy for weights that do not fit a model, as text; empty if none is known.

    Args:
        model: The model.
        expected: Its state dict.
        found: The weights of the file by name.
    """
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if any(_ADAPTER.search(key) for key in extra):
        return (
            "it holds an adapter (LoRA or another of peft) apart from the weights: merge it where it was made, "
            "model = model.merge_and_unload(), and save that model's state_dict()"
        )
    if any(tensor.numel() == 0 for tensor in found.values()):
        return (
            "its tensors are empty, as ZeRO-3 and FSDP leave them in the file of one rank: gather the shards first, by "
            "zero_to_fp32.py in the folder of a DeepSpeed checkpoint"
        )
    if any(key.startswith(("conv_proj", "encoder.layers.encoder_layer_")) for key in extra):
        return "these are the names of torchvision's ViT, not timm's; load a timm model"
    if not set(expected) & set(found):
        return _name_advice(expected, found)
    if "cls_token" in missing and not any(key.startswith("cls") for key in extra):
        return "it has no class token: --model-arg class_token=False --model-arg global_pool=avg"
    if {"norm.weight"} <= missing and {"fc_norm.weight"} <= extra:
        return "it was trained with --model-arg global_pool=avg"
    if {"fc_norm.weight"} <= missing and {"norm.weight"} <= extra:
        return "it was trained with --model-arg global_pool=token"
    if {"reg_token"} & extra:
        return f"it has register tokens: --model-arg reg_tokens={found['reg_token'].shape[1]}"
    if any(".q_norm." in key for key in extra):
        return "it normalises queries and keys: --model-arg qk_norm=True"
    if any(key.endswith((".ls1.gamma", ".gamma_1")) for key in extra):
        return "it has layer scale: --model-arg init_values=1e-5"
    depths = [_depth(keys) for keys in (expected, found)]
    widths = [
        keys["patch_embed.proj.weight"].shape[0] for keys in (expected, found) if "patch_embed.proj.weight" in keys
    ]
    wrong = []
    if all(depths) and depths[0] != depths[1]:
        wrong.append(f"--model-arg depth={depths[1]}")
    if len(widths) == 2 and widths[0] != widths[1]:
        wrong.append(f"--model-arg embed_dim={widths[1]} --model-arg num_heads=N")
    if wrong:
        return f"it is another size of the architecture: take the right --arch, or {' '.join(wrong)}"
    return _position_advice(model, expected, found)


def _name_advice(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a remedy for weights of which none has a name of the model."""
    prefixes = Counter(key[: -len(own)] for own in expected for key in found if key.endswith(f".{own}"))
    prefix, count = max(prefixes.items(), key=lambda item: item[1], default=("", 0))
    if 2 * count > len(expected):
        return (
            f"the weights of the model are below {prefix!r}: save the state_dict() of that module, with its classifier"
        )
    return "no weight in it has a name of this architecture; give the one that it was trained with (--arch)"


def _position_advice(model: nn.Module, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    tables = [keys["pos_embed"] for keys in (expected, found) if "pos_embed" in keys]
    if len(tables) < 2 or tables[0].shape == tables[1].shape:
        return ""
    size = inferred_size(model, found)
    if size is not None:
        return f"it was trained on images of another size: --model-arg img_size={size}"
    tokens = tables[1].shape[1]
    return (
        f"it has {tokens} positions: give the image's size, --model-arg img_size=[HEIGHT,WIDTH], and "
        "--model-arg class_token=False if there is no class token"
    )


def _depth(keys: Mapping[str, Tensor]) -> int:
    numbers = [int(key.split(".")[1]) for key in keys if key.startswith("blocks.") and key.split(".")[1].isdigit()]
    return max(numbers, default=-1) + 1
