"""Files that hold other weights than they seem to, and those that are no weights of a model."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toys import TINY, tiny_vit

from engine.errors import UserError
from engine.models.checkpoint import imported, load_checkpoint
from engine.models.vit import describe

ARCH = "vit_tiny_patch16_224"
SIZES = {key: TINY[key] for key in ("embed_dim", "depth", "num_heads")}
GIVEN: dict[str, Any] = {"architecture": ARCH, "model_args": SIZES}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny_vit(seed=1).state_dict()


@pytest.fixture(scope="module")
def other() -> Weights:
    return tiny_vit(seed=2).state_dict()


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def opened(path: Path, contents: Any, **options: Any) -> torch.nn.Module:
    torch.save(contents, path)
    return load_checkpoint(path, **{**GIVEN, **options})


def head(model: torch.nn.Module) -> torch.Tensor:
    return model.state_dict()["head.weight"]


def refused(place: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(place, **(options or GIVEN))
    return str(error.value)


# --- which weights ----------------------------------------------------------------------------------------------------


def test_two_models_in_one_file_are_not_chosen_between(tmp_path: Path, weights: Weights, other: Weights) -> None:
    torch.save({"model": other, "state_dict": prefixed(weights, "module.")}, tmp_path / "x.pth")
    assert "several state dicts (state_dict, model) of different weights" in refused(tmp_path / "x.pth")
    same = {"model": dict(weights), "state_dict": prefixed(weights, "module.")}
    assert torch.equal(head(opened(tmp_path / "same.pth", same)), weights["head.weight"])


def test_ema_weights_of_lightning_callbacks_go_first(tmp_path: Path, weights: Weights, other: Weights) -> None:
    contents = {
        "state_dict": prefixed(other, "model."),
        "callbacks": {"EMA{'decay': 0.9}": {"ema_state_dict": prefixed(weights, "model."), "step": 3}},
    }
    model = opened(tmp_path / "x.ckpt", contents)
    assert torch.equal(head(model), weights["head.weight"])
    assert imported(model)["weights"] == "ema"
    assert imported(model)["container"] == "callbacks.EMA.ema_state_dict"
    raw = load_checkpoint(tmp_path / "x.ckpt", **GIVEN, weights="raw")
    assert torch.equal(head(raw), other["head.weight"])


def test_weight_averaging_of_lightning_keeps_the_raw_ones_apart(
    tmp_path: Path, weights: Weights, other: Weights
) -> None:
    contents = {"state_dict": prefixed(weights, "model."), "current_model_state": prefixed(other, "model.")}
    model = opened(tmp_path / "x.ckpt", contents)
    assert torch.equal(head(model), weights["head.weight"])
    assert imported(model)["weights"] == "ema"
    assert torch.equal(head(load_checkpoint(tmp_path / "x.ckpt", **GIVEN, weights="raw")), other["head.weight"])


def test_ema_weights_without_names_are_not_left_out_silently(tmp_path: Path, weights: Weights, other: Weights) -> None:
    torch.save({"model": other, "ema": {"shadow_params": list(weights.values()), "decay": 0.9}}, tmp_path / "x.pth")
    assert "(ema.shadow_params) are a list without names" in refused(tmp_path / "x.pth")
    assert torch.equal(head(load_checkpoint(tmp_path / "x.pth", **GIVEN, weights="raw")), other["head.weight"])


# --- what the numbers are ---------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "int8": (lambda w: (w * 20).to(torch.int8), "is stored as int8, expected floating-point numbers"),
    "bool": (lambda w: w > 0, "is stored as bool"),
    "complex": (lambda w: w.to(torch.complex64), "is stored as complex64"),
    "sparse": (lambda w: w.to_sparse(), "save it dense"),
    "meta": (lambda w: w.to("meta"), "has a shape and no values"),
    "empty": (lambda w: torch.empty(0), "zero_to_fp32.py"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_weights_that_are_no_plain_numbers_are_refused(kind: str, tmp_path: Path, weights: Weights) -> None:
    change, expected = NUMBERS[kind]
    torch.save({key: change(value) if value.ndim == 2 else value for key, value in weights.items()}, tmp_path / "x.pth")
    assert expected in refused(tmp_path / "x.pth")


def test_weights_of_eight_bits_in_floating_point_are_read(tmp_path: Path, weights: Weights) -> None:
    rounded = {key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}
    model = opened(tmp_path / "x.pth", rounded)
    assert torch.equal(head(model), rounded["head.weight"].float())
    assert imported(model)["stored_as"] == "float8_e4m3fn"


# --- adapters, folders of shards, files that are something else -------------------------------------------------------


def test_adapters_are_named_and_a_merged_model_opens(tmp_path: Path, weights: Weights) -> None:
    adapter = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 32)}
    torch.save(
        {**weights, **{key.removeprefix("base_model.model."): t for key, t in adapter.items()}}, tmp_path / "l.pt"
    )
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    for name in ("l.pt", "adapter_model.safetensors"):
        message = refused(tmp_path / name)
        assert "merge_and_unload()" in message
        assert "class_token" not in message
    model = opened(tmp_path / "merged.pth", prefixed(weights, "base_model.model."))
    assert imported(model)["stripped"] == ["base_model.", "model."]


def test_the_folder_of_a_deepspeed_run_names_the_one_within(tmp_path: Path, weights: Weights) -> None:
    step = tmp_path / "global_step10"
    step.mkdir()
    torch.save({"module": weights, "optimizer": None}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert f"--checkpoint {step}" in refused(tmp_path)
    assert torch.equal(head(load_checkpoint(step, **GIVEN)), weights["head.weight"])


def test_a_distributed_checkpoint_says_how_to_make_one_file(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "dcp_to_torch" in refused(tmp_path)


def test_suffixes_in_capitals_are_found(tmp_path: Path, weights: Weights) -> None:
    torch.save(weights, tmp_path / "BEST.PTH")
    assert torch.equal(head(load_checkpoint(tmp_path, **GIVEN)), weights["head.weight"])


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best/model.pth", b"x")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "web page"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "gunzip"),
    "zip": (_zipped, "unpack it and name the file of weights in it (best/model.pth)"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_something_else_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    make, expected = FILES[kind]
    make(tmp_path / "x.pth")
    assert expected in refused(tmp_path / "x.pth")


# --- how the model is built -------------------------------------------------------------------------------------------


def test_images_that_are_no_squares_are_not_taken_for_squares(tmp_path: Path) -> None:
    weights = tiny_vit(img_size=[4, 16]).state_dict()  # 16 patches, as 8 x 8 pixels have
    for key, value in (("input_size", [1, 4, 16]), ("img_size", [4, 16])):
        model = opened(tmp_path / "x.pth", {"state_dict": weights, "args": {"model": ARCH, key: value}})
        assert describe(model).input_size == (4, 16)
    assert describe(load_checkpoint(tmp_path / "x.pth", model_args={**SIZES, "img_size": [8, 8]})).input_size == (8, 8)


@pytest.mark.parametrize(
    "changed", [{"num_heads": 5}, {"num_heads": 0}, {"depth": -1}, {"global_pool": "foo"}, {"embed_dim": 0}]
)
def test_arguments_that_no_model_can_be_built_with_are_named(
    changed: dict[str, Any], tmp_path: Path, weights: Weights
) -> None:
    torch.save(weights, tmp_path / "x.pth")
    assert str(changed)[1:-1] in refused(tmp_path / "x.pth", architecture=ARCH, model_args={**SIZES, **changed})


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "mark": ({}, "utf-8-sig"),
    "no_pretrained_cfg": ({"pretrained_cfg": None}, "utf-8"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_with_a_byte_order_mark_or_null_is_read(kind: str, tmp_path: Path, weights: Weights) -> None:
    changed, encoding = CONFIGS[kind]
    config = {"architecture": ARCH, "num_classes": 10, "model_args": TINY, **changed}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding=encoding)
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(head(load_checkpoint(tmp_path)), weights["head.weight"])


@pytest.mark.parametrize("name", [3, "timm/vit_tiny_patch16_224"])
def test_an_architecture_that_is_no_name_of_timm_is_refused(name: Any, tmp_path: Path, weights: Weights) -> None:
    config = {"architecture": name, "num_classes": 10, "model_args": TINY}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=str(name)):
        load_checkpoint(tmp_path)
