"""Preprocessing as options and files: read, checked, applied to the model and kept in its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchvision.transforms import InterpolationMode
from toys import tiny_vit

from engine.data import Preprocessing as FromData
from engine.data.preprocessing import Preprocessing
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.preprocessing import STATISTICS, Changes, origins, preprocessing_of, read_file
from engine.models.spec import spec_of


def colour() -> torch.nn.Module:
    return tiny_vit(in_chans=3)


def test_the_data_package_still_offers_it() -> None:
    assert FromData is Preprocessing


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mean": "0.5", "std": "0.25"}, {"mean": (0.5,), "std": (0.25,)}),
        ({"mean": "0.4,0.5,0.6", "std": "0.1, 0.2, 0.3"}, {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}),
        ({"mean": "imagenet", "std": "imagenet"}, dict(zip(("mean", "std"), STATISTICS["imagenet"], strict=True))),
        ({"mean": "openai", "std": "CLIP"}, dict(zip(("mean", "std"), STATISTICS["clip"], strict=True))),
        ({"crop_pct": 0.875}, {"crop_pct": 0.875}),
        ({"interpolation": "Bilinear"}, {"interpolation": "bilinear"}),
        ({"input_size": "224"}, {"input_size": (224, 224)}),
        ({"input_size": "224x192"}, {"input_size": (224, 192)}),
        ({}, {}),
    ],
)
def test_options_are_read(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert Changes.read(**given).values() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": "0.5"}, "--mean is given without --std"),
        ({"std": "imagenet"}, "--std is given without --mean"),
        ({"mean": "imagnet", "std": "imagenet"}, "did you mean 'imagenet'"),
        ({"mean": "0.5", "std": "0"}, "expected numbers above 0"),
        ({"mean": "0.5", "std": "0.5,-0.5,0.5"}, "expected numbers above 0"),
        ({"mean": "127.5", "std": "127.5"}, "divide by 255"),
        ({"crop_pct": 1.2}, r"crop_pct 1.2: expected a share in \(0, 1\]"),
        ({"crop_pct": 0.0}, "crop_pct 0.0"),
        (
            {"interpolation": "lanczos"},
            "interpolation 'lanczos' is not supported; take one by --interpolation: nearest",
        ),
        ({"input_size": "big"}, "input size 'big'"),
        ({"input_size": "0"}, "input size '0'"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Changes.read(**given)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_timms_keys_and_single_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("mean: [0.1, 0.2, 0.3]\nstd: [0.4, 0.5, 0.6]\ncrop_pct: 0.9\ninput_size: [3, 32, 32]\nurl: x\n")
    changes = Changes.read(file=path, crop_pct=0.8)
    assert changes.values() == {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.8,
        "input_size": (32, 32),
    }


def test_the_config_of_a_checkpoint_is_such_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architecture": "x", "pretrained_cfg": {"crop_mode": "squash", "num_classes": 3}}))
    assert read_file(path) == {"crop_mode": "squash"}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (  # ViT
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}, "resample": 2},
            {"input_size": (224, 224), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        ),
        (  # ConvNeXt
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224}, "crop_pct": 0.875},
            {"input_size": (224, 224), "crop_pct": 0.875, "crop_mode": "center"},
        ),
        (  # the same processor squashes from 384 pixels on
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 384}, "crop_pct": 0.875},
            {"input_size": (384, 384), "crop_pct": 1.0, "crop_mode": "squash"},
        ),
        (  # PIL's nearest filter is torch's nearest-exact
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 0},
            {"interpolation": "nearest-exact"},
        ),
        (  # DINOv2
            {
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "resample": 3,
            },
            {"input_size": (224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
        ),
    ],
)
def test_a_hugging_face_processor(tmp_path: Path, processor: dict[str, Any], expected: dict[str, Any]) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "X", "do_normalize": True, **processor}))
    found = Changes.read(file=path).values()
    assert found == {"mean": (0.5,) * 3, "std": (0.5,) * 3, **expected}


def test_a_hugging_face_processor_without_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5], "image_std": [0.5]}))
    assert Changes.read(file=path).values() == {"mean": (0.0,), "std": (1.0,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("men: 0.5", "unknown key 'men'; did you mean 'mean'"),
        ("- 1", "expected keys and values"),
        ("{", "is neither YAML nor JSON"),
        ("url: x", "holds none of"),
        ("image_mean: [0.5]\nimage_std: [0.5]\nrescale_factor: 1.0", "not scaled by 1 / 255"),
        ("image_mean: [0.5]\nimage_std: [0.5]\nresample: 1", "interpolation 'lanczos' is not supported"),
        ("mean: red\nstd: 1", "mean 'red'"),
        ("image_mean: [0.5]\nimage_std: [0.5]\ndo_pad: true\nsize: 224", "do_pad=True cannot be expressed"),
        ("image_mean: [0.5]\nimage_std: [0.5]\nsize: {shortest_edge: 224}", "images of many shapes"),
        ("image_mean: [0.5]\nimage_std: [0.5]\nsize: {height: big, width: 3}", "size .* is not supported"),
        ("image_mean: [0.5]\nimage_std: [0.5]\nrescale_factor: [1]", "rescale_factor .*expected a number"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Changes.read(file=path)
    with pytest.raises(UserError, match="cannot be read"):
        Changes.read(file=tmp_path / "missing")


# --- on a model -------------------------------------------------------------------------------------------------------


def test_changes_go_with_the_checkpoint(tmp_path: Path) -> None:
    model = load_checkpoint(save_checkpoint(colour(), tmp_path / "before"))
    changes = Changes.read(mean="imagenet", std="imagenet", crop_pct=0.8, interpolation="bilinear")
    assert origins(model, changes)["crop_pct"] == "given"
    changes.apply(model)
    used = preprocessing_of(load_checkpoint(save_checkpoint(model, tmp_path / "after")))
    assert (used.mean, used.std) == STATISTICS["imagenet"]
    assert (used.crop_pct, used.interpolation) == (0.8, InterpolationMode.BILINEAR)
    opened = timm.create_model(f"local-dir:{tmp_path / 'after'}", pretrained=True)
    assert tuple(opened.pretrained_cfg["mean"]) == STATISTICS["imagenet"][0]
    assert used.line() == (
        "8 x 8 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.8, bilinear"
    )  # fmt: skip


def test_where_values_come_from(tmp_path: Path) -> None:
    model = colour()
    assert origins(model, Changes())["mean"] == "default"
    Changes.read(mean="unit", std="unit").apply(model)
    opened = load_checkpoint(save_checkpoint(model, tmp_path))
    assert origins(opened, Changes()) == {
        "input_size": "checkpoint",
        "mean": "checkpoint",
        "std": "checkpoint",
        "crop_pct": "default",
        "interpolation": "default",
        "crop_mode": "default",
    }


def test_names_suit_any_number_of_channels_and_numbers_only_theirs() -> None:
    grey = tiny_vit()
    Changes.read(mean="imagenet", std="imagenet").apply(grey)
    assert preprocessing_of(grey).mean == pytest.approx((0.449,))
    with pytest.raises(UserError, match="3 numbers for a model of 1 channels"):
        Changes.read(mean="0.1,0.2,0.3", std="0.5").apply(grey)
    model = colour()
    Changes.read(mean="0.3", std="0.2").apply(model)
    assert preprocessing_of(model).std == (0.2,) * 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("interpolation", "lanczos", "interpolation 'lanczos' is not supported"),
        ("crop_mode", "border", "crop_mode 'border' is not supported; known: center, squash"),
        ("crop_pct", 1.5, "crop_pct 1.5"),
        ("std", (0.5, 0.0, 0.5), "expected numbers above 0"),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be(key: str, value: object, message: str) -> None:
    model = colour()
    model.pretrained_cfg = {**model.pretrained_cfg, key: value}
    with pytest.raises(UserError, match=message):
        preprocessing_of(model)


def test_squash_shows_the_whole_image_and_center_its_middle() -> None:
    model = colour()
    image = torch.zeros(3, 16, 32, dtype=torch.uint8)
    image[:, :, :4] = 255  # the left eighth
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 1.0, "interpolation": "bilinear"}
    assert preprocessing_of(model).resize(image).float().mean() == 0
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    squashed = preprocessing_of(model).resize(image)
    assert squashed.shape == (3, 8, 8)
    assert squashed.float().mean() == pytest.approx(255 / 8, rel=0.05)
    assert preprocessing_of(model).reduction(16, 32) == 2


def test_another_input_size_resamples_the_position_embedding(tmp_path: Path) -> None:
    model = colour()
    before = model.pos_embed.shape
    Changes.read(input_size="12x8").apply(model)
    assert preprocessing_of(model).size == (12, 8)
    assert model.pos_embed.shape[1] == 6 * 4 + 1 != before[1]
    opened = load_checkpoint(save_checkpoint(model, tmp_path))
    assert preprocessing_of(opened).size == (12, 8)
    assert spec_of(opened).model_args["img_size"] == [12, 8]
    images = torch.rand(2, 3, 12, 8)
    assert torch.equal(opened(images), model(images))


def test_the_models_own_input_size_changes_nothing() -> None:
    model = colour()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Changes.read(input_size="8").apply(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert spec_of(model).model_args == spec_of(colour()).model_args


def test_an_input_size_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--input-size 9x9: VisionTransformer takes 8 x 8 pixels"):
        Changes.read(input_size="9").apply(colour())
    fixed = colour()
    monkeypatch.delattr(type(fixed), "set_input_size")
    with pytest.raises(UserError, match="cannot be resized; leave --input-size out"):
        Changes.read(input_size="16").apply(fixed)
