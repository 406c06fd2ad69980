"""The image processor of a Hugging Face checkpoint is the preprocessing, and is written back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import processor, saved, sets, tiny
from PIL import Image

import engine
from engine.data import Loader, Samples
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.huggingface import as_classifier
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import set_spec, spec_of

transformers = pytest.importorskip("transformers")
SQUARE = {"height": 32, "width": 32}


def picture(height: int = 40, width: int = 70) -> Image.Image:
    """A smooth colour image."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / 9 + phase) * np.cos(y / 7) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(planes, 2).round().astype(np.uint8))


def folder_with(image_processor: Any, folder: Path, name: str = "vit") -> Path:
    tiny(name).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def read(model: Any, image: Image.Image) -> torch.Tensor:
    """The image as the engine gives it to the model."""
    samples = Samples("one", ["0"], np.zeros(1, dtype=np.int64), lambda _i: image)
    loader = Loader(samples, preprocessing_of(model), batch_size=1, workers=0)
    return next(iter(loader.ordered())).images


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squash": ("ViTImageProcessor", {"size": SQUARE, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    "nearest-size": ("ViTImageProcessor", {"size": SQUARE, "resample": 0}),
    "squash-crop": ("DeiTImageProcessor", {"size": {"height": 37, "width": 37}, "crop_size": SQUARE}),
    "shortest-crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "odd-margin": ("CLIPImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": SQUARE}),
    "bit": ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE, "resample": 2}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE, "resample": 3}),
    "rescaled": ("ViTImageProcessor", {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]}),
    "raw-pixels": ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    "not-normalised": ("ViTImageProcessor", {"size": SQUARE, "do_normalize": False}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_as_the_processor_makes_them(name: str, tmp_path: Path) -> None:
    kind, options = PROCESSORS[name]
    image_processor = getattr(transformers, kind)(**options)
    model = load_checkpoint(folder_with(image_processor, tmp_path / "model"))
    expected = image_processor(picture(), return_tensors="pt")["pixel_values"].float()
    assert expected.shape == (1, 3, 32, 32)
    spread = float(expected.max() - expected.min())
    torch.testing.assert_close(read(model, picture()), expected, rtol=0, atol=0.01 * spread)


def test_the_size_is_the_processors_where_the_model_takes_any(tmp_path: Path) -> None:
    """DINOv2's checkpoints say image_size 518 and are used with 224."""
    image_processor = transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    model = load_checkpoint(folder_with(image_processor, tmp_path / "model", "dinov2"))
    assert preprocessing_of(model).size == (48, 48)
    assert model(read(model, picture(60, 60))).shape == (1, 4)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}, "takes images of 32 x 32 pixels"),
        ("ViTImageProcessor", {"size": SQUARE, "resample": 1}, "resample=1"),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "do_center_crop": False}, "many shapes"),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 30}, "crop_size": SQUARE}, "is larger than size"),
        ("ViTImageProcessor", {"size": {"longest_edge": 32}}, "longest_edge"),
    ],
)
def test_what_cannot_be_expressed_is_refused(kind: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = folder_with(getattr(transformers, kind)(**options), tmp_path / "model")
    with pytest.raises(UserError, match=words):
        preprocessing_of(load_checkpoint(folder))


def test_without_a_processor_pixels_are_refused_and_normalised_images_taken(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "model")
    model = load_checkpoint(tmp_path / "model")
    samples = Samples("forget", [str(i) for i in range(8)], np.arange(8) % 4, lambda _i: picture())
    with pytest.raises(UserError, match=r"no preprocessor_config\.json was found.*--mean and --std"):
        engine.unlearn(model, samples, samples, method="finetune", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no preprocessor_config"):
        read(model, picture())
    result = engine.unlearn(model, *sets(), method="finetune", config={"max_steps": 1, "batch_size": 8})
    assert result.samples_seen


def test_a_processor_may_be_given_with_the_module() -> None:
    model = as_classifier(tiny("vit"), processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]))
    assert preprocessing_of(model).mean == (0.1, 0.2, 0.3)
    assert preprocessing_of(model).std == (0.5, 0.6, 0.7)


def test_timm_wrapper_takes_its_configuration(tmp_path: Path) -> None:
    tiny("timm-wrapper").save_pretrained(tmp_path / "model")
    model = load_checkpoint(tmp_path / "model")
    assert preprocessing_of(model).mean == (0.1, 0.2, 0.3)
    assert preprocessing_of(model).std == (0.4, 0.5, 0.6)
    bare = tiny("timm-wrapper", pretrained_cfg=None)
    with pytest.raises(UserError, match="mean and std"):
        read(as_classifier(bare), picture())


def changed(model: Any, **values: Any) -> Any:
    """As `--mean` and its like change a model."""
    spec = spec_of(model)
    model.pretrained_cfg = {**model.pretrained_cfg, **values}
    new = dataclasses.replace(spec, pretrained_cfg={**spec.pretrained_cfg, **values})
    set_spec(model, new)
    return model


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_other_mean_and_std_are_written(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "model")
    if name == "vit":
        processor().save_pretrained(tmp_path / "model")
    model = changed(load_checkpoint(tmp_path / "model"), mean=(0.2, 0.3, 0.4), std=(0.6, 0.7, 0.8))
    save_checkpoint(model, tmp_path / "out")
    written = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    expected = written(picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read(model, picture()), expected, rtol=0, atol=0.02)
    again = load_checkpoint(tmp_path / "out")
    torch.testing.assert_close(read(again, picture(50, 40)), read(model, picture(50, 40)))


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_other_resizing_is_written(mode: str, crop_pct: float, tmp_path: Path) -> None:
    model = changed(load_checkpoint(saved(tiny("vit"), tmp_path / "a")), crop_mode=mode, crop_pct=crop_pct)
    save_checkpoint(model, tmp_path / "b")
    written = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b")
    expected = written(picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read(model, picture()), expected, rtol=0, atol=0.02)


def test_a_processor_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = saved(tiny("vit"), tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    with pytest.raises(UserError, match="image processor cannot be read") as raised:
        load_checkpoint(folder)
    assert "\n" not in str(raised.value)
