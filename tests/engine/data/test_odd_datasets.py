"""Odd datasets of users: read right, or refused in one line that names the item."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision.transforms import InterpolationMode
from typer.testing import CliRunner

import engine
from engine.cli.app import app
from engine.data import from_dataset, open_source, refuse_overlap
from engine.data.classes import read_class_map
from engine.data.preprocessing import Preprocessing
from engine.errors import UserError
from engine.run.folder import check_apart

PIXELS = [np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(20)]
LABELS = [i % 3 for i in range(20)]


class Items(Dataset[Any]):
    def __init__(self, images: list[Any], **attributes: Any) -> None:
        self.images = images
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if self.images[index] is None:
            raise OSError("broken image")
        return self.images[index], LABELS[index]


IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]


def test_arrays_of_pixels_are_images() -> None:
    samples = from_dataset(Items(list(PIXELS)), "train")
    assert samples.tensor(3, 3).unique().tolist() == [30]
    assert samples.tensor(3, 3).dtype == torch.uint8


def test_whole_numbers_of_64_bits_are_no_normalised_image() -> None:
    samples = from_dataset(Items([torch.full((3, 8, 8), i) for i in range(20)]), "train")
    with pytest.raises(UserError, match="int64"):
        samples.tensor(0, 3)


def test_a_bad_image_in_a_subset_is_named() -> None:
    with pytest.raises(UserError, match=r"item 3 of 9 cannot be read \(OSError: broken image\).*targets"):
        from_dataset(Subset(Items([*IMAGES[:3], None, *IMAGES[4:]]), range(9)), "train")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([("tench", "Tinca tinca"), ("crane",), ("dog",)], ["tench, Tinca tinca", "crane", "dog"]),
        ({"b": 1, "a": 0, "c": 2}, ["a", "b", "c"]),
        ({2: "c", 0: "a", 1: "b"}, ["a", "b", "c"]),
        (np.array(["a", "b", "c"]), ["a", "b", "c"]),
        ([7, 8, 9], ["7", "8", "9"]),
        (3, []),
        (lambda: ["a"], []),
    ],
)
def test_class_names_are_text_by_label(classes: Any, names: list[str]) -> None:
    found = from_dataset(Items(IMAGES, classes=classes), "train").class_names
    assert found == names
    assert all(type(name) is str for name in found)


@pytest.mark.parametrize(
    ("ids", "part"), [(["a"] * 20, "'a' twice"), ([None] * 20, "'None' twice"), ({"a": 1}, "dict"), (3, "int")]
)
def test_ids_that_do_not_tell_items_apart_are_refused(ids: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        from_dataset(Items(IMAGES, ids=ids), "train")


def test_an_attribute_labels_that_is_a_number_is_not_read() -> None:
    assert from_dataset(Items(IMAGES, labels=3), "train").labels.tolist() == LABELS


# Floats that were not normalised


def preprocessing(mean: float, std: float) -> Preprocessing:
    return Preprocessing((8, 8), (mean,) * 3, (std,) * 3, 1.0, InterpolationMode.BICUBIC)


@pytest.mark.parametrize(
    ("scale", "mean", "std", "warned"), [(1, 0.5, 0.5, True), (255, 0.5, 0.5, True), (1, 0.0, 1.0, False)]
)
def test_floats_that_look_like_pixels_are_told(
    scale: int, mean: float, std: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = [torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255 * scale) for pixels in PIXELS]
    with caplog.at_level(logging.WARNING):
        preprocessing(mean, std).check(from_dataset(Items(images), "train"))
    assert ("taken as normalised" in caplog.text) == warned


def test_normalised_floats_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    images = [torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1) for pixels in PIXELS]
    with caplog.at_level(logging.WARNING):
        preprocessing(0.5, 0.5).check(from_dataset(Items(images), "train"))
    assert not caplog.records


# Sets that share samples


def test_samples_of_both_sets_are_refused() -> None:
    everything = Items(IMAGES)
    forget = Subset(Subset(everything, range(2, 20)), range(4))  # 2 to 5
    for other in (everything, Subset(everything, range(5, 20))):
        with pytest.raises(UserError, match=r"retain: . samples of the forget set are in it too, such as [25]"):
            refuse_overlap(forget, other)
    refuse_overlap(forget, Subset(everything, range(6, 20)))
    refuse_overlap(forget, Subset(Items(IMAGES), range(5, 20)))


def test_samples_of_one_source_are_told_by_their_ids(caplog: pytest.LogCaptureFixture) -> None:
    train = open_source("digits").train
    refuse_overlap(train.subset([0, 1]), train)
    assert "2 samples of the forget set" in caplog.text
    caplog.clear()
    refuse_overlap(train.subset([0, 1]), train.subset([2, 3]))
    refuse_overlap(from_dataset(Items(IMAGES), "forget"), from_dataset(Items(IMAGES), "retain"))
    assert not caplog.records


def test_unlearn_and_evaluate_refuse_a_set_that_holds_the_forget_samples() -> None:
    model, everything = timm.create_model("test_vit", num_classes=3, img_size=16), Items(IMAGES)
    forget = Subset(everything, range(4))
    with pytest.raises(UserError, match="retain: 4 samples"):
        engine.unlearn(model, forget, everything, method="finetune")
    with pytest.raises(UserError, match="test: 4 samples"):
        engine.evaluate(model, forget, Subset(everything, range(4, 9)), everything)


def test_evaluate_names_what_is_no_model() -> None:
    model, everything = timm.create_model("test_vit", num_classes=3, img_size=16), Items(IMAGES)
    sets = [Subset(everything, part) for part in (range(4), range(4, 9), range(9, 14))]
    with pytest.raises(UserError, match="OrderedDict"):
        engine.evaluate(model.state_dict(), *sets)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no-such-folder"):
        engine.evaluate(model, *sets, references="no-such-folder")


# Files that name classes, or are written at the end


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [("a.txt", "# my classes\na\nb\n", "comment '# my classes'"), ("a.yaml", "[yes, no]", "in quotes")],
)
def test_class_maps_that_would_move_labels_are_refused(tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=part):
        read_class_map(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "file/numbers.json"])
def test_a_file_of_numbers_is_checked_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    found = CliRunner().invoke(app, ["methods", "--json", str(tmp_path / name)])
    assert isinstance(found.exception, UserError)
    assert "--json" in str(found.exception)
    assert "finetune" not in found.output


# The folder of a checkpoint is not that of a run


@pytest.mark.parametrize("name", ["model", "model/model.safetensors", "link", "model/x.pth?arch=vit"])
def test_a_run_does_not_replace_the_checkpoint_that_it_reads(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for file in ("model.safetensors", "x.pth"):
        (tmp_path / "model" / file).touch()
    with pytest.raises(UserError, match="never changed"):
        check_apart(tmp_path / "model", [str(tmp_path / name)])
    check_apart(tmp_path / "other", [str(tmp_path / name), "timm:vit_tiny_patch16_224"])
