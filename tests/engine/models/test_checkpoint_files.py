"""Checkpoints as people have them: containers, prefixes, shards, EMA weights, settings beside the weights."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from toys import TINY, tiny_vit

import engine
from engine.errors import UserError
from engine.models.checkpoint import imported, load_checkpoint
from engine.models.checkpoint_source import CheckpointSource
from engine.models.spec import ModelSpec, spec_of

ARCH = "vit_tiny_patch16_224"
GIVEN: dict[str, Any] = {
    "architecture": ARCH,
    "model_args": {key: TINY[key] for key in ("embed_dim", "depth", "num_heads")},
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny_vit(seed=1).state_dict()


@pytest.fixture(scope="module")
def other() -> dict[str, torch.Tensor]:
    return tiny_vit(seed=2).state_dict()


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def equal(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("key", ["args", "hyper_parameters"])
def test_sizes_that_the_file_gives_for_a_vit_are_taken(key: str, weights: dict[str, Any], tmp_path: Path) -> None:
    settings = {"model": ARCH, **GIVEN["model_args"]}
    torch.save({"state_dict": weights, key: settings}, tmp_path / "x.ckpt")
    assert equal(load_checkpoint(tmp_path / "x.ckpt"), weights)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda w: w,
    "ordered": OrderedDict,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "ema_only": lambda w: {"model_ema": w},
    "nested_ema": lambda w: {"model_ema": {"module": w, "decay": 0.99}},
    "nested_state_dict": lambda w: {"model": {"state_dict": w}},
    "ema_none": lambda w: {"state_dict": w, "state_dict_ema": None},
    "ddp": lambda w: {"model": prefixed(w, "module.")},
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled_ddp": lambda w: {"state_dict": prefixed(w, "_orig_mod.module.")},
    "ddp_compiled": lambda w: {"state_dict": prefixed(w, "module._orig_mod.")},
    "lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.1", "callbacks": {}},
    "lightning_net": lambda w: {"state_dict": {**prefixed(w, "net."), "criterion.weight": torch.ones(10)}},
    "timm_wrapper": lambda w: prefixed(w, "timm_model."),
    "all_of_them": lambda w: {"state_dict": prefixed(w, "model.module._orig_mod.timm_model.")},
    "averaged": lambda w: {"n_averaged": torch.tensor(4), **prefixed(w, "module.")},
    "backbone_and_head": lambda w: {(key if "head" in key else f"backbone.{key}"): value for key, value in w.items()},
    "backbone_and_fc": lambda w: {
        (key.replace("head.", "fc.") if "head" in key else f"backbone.{key}"): value for key, value in w.items()
    },
    "profiled": lambda w: {**w, "total_ops": torch.zeros(1), "blocks.0.total_params": torch.zeros(1)},
    "parameters": lambda w: {key: torch.nn.Parameter(value) for key, value in w.items()},
    "unknown_key": lambda w: {"my_vit": w, "step": 3},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_file_opens_whatever_its_container_and_prefix(
    kind: str, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    torch.save(CONTAINERS[kind](weights), tmp_path / "x.pth")
    model = load_checkpoint(tmp_path / "x.pth", **GIVEN)
    assert equal(model, weights)
    assert imported(model)["weights"] == ("ema" if "ema_only" in kind or "nested_ema" in kind else "raw")


@pytest.mark.parametrize("name", ["a.pth", "b.pt", "c.bin", "d.ckpt", "e.pth.tar", "best.weights", "f.safetensors"])
def test_a_file_opens_whatever_its_name(name: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / name
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    assert equal(load_checkpoint(path, **GIVEN), weights)
    if "weights" not in name:
        assert equal(load_checkpoint(tmp_path, **GIVEN), weights), "the only file of its folder"


def test_old_files_that_are_no_zip_archives_open(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": weights}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert equal(load_checkpoint(tmp_path / "x.pth", **GIVEN), weights)


def test_ema_weights_are_first_and_raw_ones_can_be_asked_for(
    tmp_path: Path, weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    both = {
        "timm.pth": {"state_dict": other, "state_dict_ema": weights},
        "deit.pth": {"model": other, "model_ema": weights},
        "one_dict.ckpt": {"state_dict": {**prefixed(other, "model."), **prefixed(weights, "ema_model.module.")}},
    }
    for name, contents in both.items():
        torch.save(contents, tmp_path / name)
        default = load_checkpoint(tmp_path / name, **GIVEN)
        assert equal(default, weights)
        assert imported(default)["weights"] == "ema"
        assert equal(load_checkpoint(tmp_path / name, **GIVEN, weights="ema"), weights)
        raw = load_checkpoint(tmp_path / name, **GIVEN, weights="raw")
        assert equal(raw, other)
        assert imported(raw)["weights"] == "raw"


def test_kinds_of_weights_that_are_not_there(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": weights}, tmp_path / "raw.pth")
    torch.save({"state_dict_ema": weights}, tmp_path / "ema.pth")
    with pytest.raises(UserError, match="has no ema weights, only raw ones"):
        load_checkpoint(tmp_path / "raw.pth", **GIVEN, weights="ema")
    with pytest.raises(UserError, match="has no raw weights, only ema ones"):
        load_checkpoint(tmp_path / "ema.pth", **GIVEN, weights="raw")
    with pytest.raises(UserError, match="expected raw or ema"):
        load_checkpoint(f"{tmp_path / 'raw.pth'}?weights=best")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_open_and_a_missing_one_is_named(kind: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {}
    for shard, keys in zip(shards, (names[:9], names[9:]), strict=True):
        part = {key: weights[key] for key in keys}
        save_file(part, tmp_path / shard) if kind == "safetensors" else torch.save(part, tmp_path / shard)
        weight_map |= dict.fromkeys(keys, shard)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert equal(load_checkpoint(tmp_path, **GIVEN), weights)
    assert equal(load_checkpoint(index, **GIVEN), weights)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"shard {shards[1]} is missing \(1 of 2"):
        load_checkpoint(tmp_path, **GIVEN)
    save_file({names[0]: weights[names[0]]}, tmp_path / "model-00002-of-00002.safetensors")
    index.unlink()
    with pytest.raises(UserError, match=r"without their index|files of weights"):
        load_checkpoint(tmp_path, **GIVEN)


def test_files_without_weights_are_passed_over_and_candidates_named(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        torch.save({"state": {}}, tmp_path / name)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_checkpoint(tmp_path, **GIVEN)
    assert equal(model, weights)
    assert "optimizer.pt" in imported(model)["passed_over"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "last.pth")
    assert equal(load_checkpoint(tmp_path, **GIVEN), weights)
    torch.save(weights, tmp_path / "best.pth")
    with pytest.raises(UserError, match=rf"best\.pth, last\.pth.*--checkpoint {tmp_path / 'best.pth'}"):
        load_checkpoint(tmp_path, **GIVEN)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "adam.pth")
    with pytest.raises(UserError, match="state of an optimizer"):
        load_checkpoint(tmp_path / "adam.pth", **GIVEN)


def fake_class(monkeypatch: pytest.MonkeyPatch, module: str, name: str, base: type = object) -> Any:
    """A settings class of a package that is not installed."""
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    fake = types.ModuleType(module)
    setattr(fake, name, made)
    for parent in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, parent, fake)
    return made


def test_settings_beside_the_weights_are_read_as_data(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(model=ARCH, img_size=8, output=pathlib.PosixPath("/tmp/x"), lr=np.float64(0.1))
    omega = fake_class(monkeypatch, "omegaconf.dictconfig", "DictConfig")()
    omega.__dict__.update(_metadata=None, _content={"model_name": ARCH}, _parent=omega)
    yacs = fake_class(monkeypatch, "yacs.config", "CfgNode", dict)(arch=ARCH)
    for name, settings in {
        "args": {"args": args},
        "omega": {"hyper_parameters": omega},
        "yacs": {"config": yacs},
        "default": {"hparams": defaultdict(list, arch=ARCH), "best": np.float32(0.7), "conf": np.zeros((2, 2))},
        "arch": {"arch": ARCH, "metric": np.int64(3)},
    }.items():
        torch.save({"state_dict": weights, **settings}, tmp_path / f"{name}.pth")
        model = load_checkpoint(tmp_path / f"{name}.pth", model_args=GIVEN["model_args"])
        assert equal(model, weights), name
        assert spec_of(model).architecture == ARCH


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


class _Setting:
    pass


def test_pickles_with_code_are_refused_and_not_run(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, contents in enumerate(
        ({"state_dict": weights, "args": _Payload()}, _Payload(), {"w": argparse.Namespace(x=_Payload())})
    ):
        torch.save(contents, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=r"(posix|os)\.system.*torch\.save\(model\.state_dict\(\)"):
            load_checkpoint(tmp_path / f"{number}.pth", **GIVEN)
    torch.save(tiny_vit(), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"timm\.models\.vision_transformer\.VisionTransformer.*state_dict"):
        load_checkpoint(tmp_path / "whole.pth", **GIVEN)
    torch.save({"model": weights, "mine": _Setting()}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="_Setting"):
        load_checkpoint(tmp_path / "mine.pth", **GIVEN)
    assert not (tmp_path / "pwned").exists()


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    for name, contents, message in (
        ("list.pth", [1, 2], "not a state dict"),
        ("tensor.pth", torch.zeros(3), "not a state dict.*tensor"),
        ("empty.pth", {}, "holds nothing"),
        ("words.pth", {"a": 1, "b": "c"}, "it holds 'a', 'b'"),
    ):
        torch.save(contents, tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / name, **GIVEN)
    np.savez(tmp_path / "jax.npz", a=np.zeros(3))
    (tmp_path / "text.pth").write_text("hello, I am no checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name in ("jax.npz", "text.pth", "cut.safetensors"):
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / name, **GIVEN)
        assert "\n" not in str(error.value)


def test_the_folder_of_timms_train_script_says_architecture_and_preprocessing(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    torch.save({"epoch": 1, "arch": "vit_base_patch16_224", "state_dict": weights}, tmp_path / "model_best.pth.tar")
    args = {"model": ARCH, "img_size": None, "mean": [0.1], "std": [0.2], "crop_pct": 0.9, "interpolation": "bilinear"}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({**args, "model_kwargs": GIVEN["model_args"]}))
    model = load_checkpoint(tmp_path / "model_best.pth.tar", architecture=ARCH, model_args=GIVEN["model_args"])
    assert equal(model, weights)
    torch.save({"epoch": 1, "arch": ARCH, "state_dict": weights}, tmp_path / "model_best.pth.tar")
    model = load_checkpoint(tmp_path / "model_best.pth.tar")
    assert equal(model, weights)
    assert [model.pretrained_cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")] == [
        [0.1],
        [0.2],
        0.9,
        "bilinear",
    ]


def test_a_file_beside_its_config_json_is_opened_by_it(checkpoint: Path, other: dict[str, torch.Tensor]) -> None:
    torch.save({"model": prefixed(other, "module."), "model_ema": None}, checkpoint / "epoch_3.pth")
    assert equal(load_checkpoint(checkpoint / "epoch_3.pth"), other)
    (checkpoint / "model.safetensors").unlink()
    model = load_checkpoint(checkpoint)
    assert equal(model, other)
    assert imported(model)["stripped"] == ["module."]


def test_the_public_name_and_the_string_with_arguments(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"model": weights}, tmp_path / "x y.pth")
    source = CheckpointSource(place=str(tmp_path / "x y.pth"), weights="raw", **GIVEN)
    assert CheckpointSource.parse(str(source)) == source
    assert equal(engine.load_checkpoint(str(source)), weights)
    save_file(weights, tmp_path / "odd?name.safetensors")
    assert equal(engine.load_checkpoint(tmp_path / "odd?name.safetensors", **GIVEN), weights)


def test_half_precision_is_loaded_and_noted(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "x.pth")
        model = load_checkpoint(tmp_path / "x.pth", **GIVEN)
        assert model.head.weight.dtype == torch.float32
        assert torch.equal(model.head.weight.detach(), weights["head.weight"].to(dtype).float())
        assert imported(model)["stored_as"] == str(dtype).removeprefix("torch.")


def test_classes_sizes_and_channels_come_from_the_shapes(tmp_path: Path) -> None:
    for args, classes in (({"img_size": 32, "patch_size": 8, "in_chans": 3}, 7), ({"img_size": 12}, 2)):
        model = tiny_vit(seed=3, num_classes=classes, **args)
        torch.save(model.state_dict(), tmp_path / "x.pth")
        found = load_checkpoint(tmp_path / "x.pth", **GIVEN)
        assert spec_of(found).num_classes == classes
        images = torch.randn(2, args.get("in_chans", 1), args["img_size"], args["img_size"])
        assert torch.equal(found(images), model(images))


def test_swins_original_file_is_renamed_by_timms_filter(tmp_path: Path) -> None:
    args = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    model = ModelSpec(
        architecture="swin_tiny_patch4_window7_224", num_classes=5, model_args=args, pretrained_cfg={}
    ).build(seed=0)
    old = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): value
        for key, value in model.state_dict().items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save({"model": old}, tmp_path / "swin.pth")
    found = load_checkpoint(tmp_path / "swin.pth", architecture="swin_tiny_patch4_window7_224", model_args=args)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images), model.eval()(images))
