"""Images that are not square are resized and cropped as timm's evaluation transform does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from toys import tiny_vit

from engine.data.preprocessing import Preprocessing
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.preprocessing import Changes, preprocessing_of
from engine.models.spec import ModelSpec

SHAPES = [(40, 70), (500, 375), (333, 517)]


def preprocessing(size: tuple[int, int], crop_pct: float, crop_mode: str = "center") -> Preprocessing:
    return Preprocessing(size, (0.0,) * 3, (1.0,) * 3, crop_pct, InterpolationMode.BICUBIC, crop_mode)


def picture(height: int, width: int) -> np.ndarray:
    """Position in the colours: a shift by one pixel is seen in all of them."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * 40), np.sin(y / height * 40), np.sin((x / width + y / height) * 30)]
    return (128 + 120 * np.stack(waves, 2)).round().astype(np.uint8)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 32)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_timms_evaluation_transform(
    shape: tuple[int, int], crop_pct: float, size: tuple[int, int], crop_mode: str
) -> None:
    image = picture(*shape)
    transform = create_transform(
        (3, *size), is_training=False, crop_pct=crop_pct, crop_mode=crop_mode, normalize=False, interpolation="bicubic"
    )
    expected = transform(Image.fromarray(image)).int()
    found = preprocessing(size, crop_pct, crop_mode).resize(torch.from_numpy(image).permute(2, 0, 1)).int()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2  # of 255: the filters of tensors and of PIL round apart


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_an_image_that_is_decoded_smaller_is_not_enlarged(size: tuple[int, int], crop_pct: float) -> None:
    used = preprocessing(size, crop_pct)
    for height in range(60, 400, 7):
        for width in range(60, 400, 11):
            by = used.reduction(height, width)
            smaller = [math.ceil(height / by), math.ceil(width / by)]
            assert all(t <= s for t, s in zip(used._target(*smaller), smaller, strict=True)), (height, width, by)
            larger = [height / (by + 1), width / (by + 1)]
            assert any(t > s for t, s in zip(used._target(height, width), larger, strict=True)), (height, width, by)


def test_an_image_of_the_input_size_is_cropped_where_crop_pct_was_chosen(tmp_path: Path) -> None:
    image = torch.from_numpy(picture(32, 32)).permute(2, 0, 1)
    options = {"crop_pct": 0.75, "normalize": False, "interpolation": "bicubic"}
    transform = create_transform((3, 32, 32), is_training=False, **options)
    expected = transform(Image.fromarray(picture(32, 32))).int()
    model = tiny_vit(img_size=32, in_chans=3)
    assert torch.equal(preprocessing_of(model).resize(image), image)  # timm's default crop_pct was chosen by nobody
    assert "not of images of 32 x 32" in preprocessing_of(model).line()
    Changes.read(crop_pct=0.75).apply(model)
    used = preprocessing_of(load_checkpoint(save_checkpoint(model, tmp_path)))
    assert (used.resize(image).int() - expected).abs().max() <= 2
    assert (expected - image.int()).abs().max() > 50  # the crop is seen
    assert "not of images" not in used.line()
    assert torch.equal(used.resize(image.float()), image.float())  # the dataset's own transform made it


def test_crop_pct_of_a_training_script_is_chosen(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    settings = {"model": "test_vit", "crop_pct": 0.75}
    torch.save({"state_dict": model.state_dict(), "args": settings}, tmp_path / "x.pth")
    assert preprocessing_of(load_checkpoint(tmp_path / "x.pth")).crop_fitting


def test_the_preprocessing_of_a_model_builds_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_vit")
    monkeypatch.setattr(ModelSpec, "build", lambda *_, **__: 1 / 0)  # a quarter of a second for a ViT-B
    assert preprocessing_of(model).size == (160, 160)
