"""Datasets of dicts and `datasets.Dataset`, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import NAMES, images, logits, processor, tiny
from PIL import Image

import engine
from engine.data import from_dataset
from engine.errors import UserError
from engine.models.huggingface import as_classifier

QUICK = {"max_steps": 2, "batch_size": 8}


class Dicts(torch.utils.data.Dataset[Any]):
    """Items that are dicts with the given keys."""

    def __init__(self, count: int = 8, image: str = "pixel_values", label: str = "labels", value: Any = None) -> None:
        self.count, self.image, self.label, self.value = count, image, label, value
        self.images = images(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        image = self.images[index] if self.value is None else self.value
        return {"note": "x", self.image: image, self.label: torch.tensor(index % 4)}


def pictures(count: int = 12) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def table(count: int = 12, **columns: Any) -> Any:
    """A `datasets.Dataset` of PNG images with class names; columns: in the place of its own, a feature each."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), **columns}
    values: dict[str, Any] = {"image": pictures(count), "label": [i % 4 for i in range(count)]}
    values |= {name: [i % 4 for i in range(count)] for name in columns}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.mark.parametrize("image", ["pixel_values", "image", "img"])
@pytest.mark.parametrize("label", ["label", "labels"])
def test_dicts_by_every_key(image: str, label: str) -> None:
    samples = from_dataset(Dicts(image=image, label=label), "forget")
    assert samples.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(samples.tensor(3, 3), images(8)[3])
    assert list(samples.ids) == [str(i) for i in range(8)]


def test_unknown_keys_are_named() -> None:
    with pytest.raises(UserError, match="forget: its items have the keys 'note', 'photo', 'label', expected image"):
        from_dataset(Dicts(image="photo", label="label"), "forget")
    with pytest.raises(UserError, match="'note', 'image', 'target', expected label under one of label, labels"):
        from_dataset(Dicts(image="image", label="target"), "forget")


def test_first_item_leaves_the_generators() -> None:
    class Random(Dicts):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "noise": torch.rand(1)}

    state = torch.random.get_rng_state()
    from_dataset(Random(0), "forget")
    torch.utils.data.TensorDataset(images(4), torch.arange(4))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((3, 32, 32)),
        np.zeros((3, 32, 32), dtype=np.float32),
        torch.zeros(3, 32, 32, dtype=torch.float64),
        [[[0.0] * 32] * 32] * 3,
    ],
    ids=["float64-array", "float32-array", "float64-tensor", "lists"],
)
def test_forms_of_normalised_images(value: Any) -> None:
    samples = from_dataset(Dicts(value=value), "forget")
    tensor = samples.tensor(0, 3)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 32, 32)


def test_uint8_arrays_are_pixels() -> None:
    array = np.asarray(pictures(1)[0])
    tensor = from_dataset(Dicts(image="image", value=array), "forget").tensor(0, 3)
    assert torch.equal(tensor, torch.from_numpy(array).permute(2, 0, 1))


def test_unlearning_with_dicts_as_the_trainer_takes_them() -> None:
    forget, retain = Dicts(8), Dicts(16)
    result = engine.unlearn(tiny("vit"), forget, retain, method="random_labels", config=QUICK)
    assert not torch.equal(logits(result.model, images()), logits(tiny("vit"), images()))


def test_a_datasets_dataset_is_taken_as_it_is() -> None:
    data = table()
    samples = from_dataset(data, "forget")
    assert samples.class_names == NAMES
    assert samples.labels.tolist() == [i % 4 for i in range(12)]
    assert np.array_equal(np.asarray(samples.image(5)), np.asarray(pictures()[5]))
    model = as_classifier(tiny("vit"), processor())
    result = engine.unlearn(model, data.select(range(4)), data.select(range(4, 12)), method="finetune", config=QUICK)
    assert result.samples_seen


def test_labels_are_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the items that are read to see whether a transform is random."""
    datasets = pytest.importorskip("datasets")
    data, decode, decoded = table(400), datasets.Image.decode_example, []

    def counted(*given: Any, **options: Any) -> Any:
        decoded.append(1)
        return decode(*given, **options)

    monkeypatch.setattr(datasets.Image, "decode_example", counted)
    assert from_dataset(data, "forget").labels.tolist() == [i % 4 for i in range(400)]
    assert len(decoded) <= 40


def test_a_random_transform_is_refused() -> None:
    noisy = table().with_transform(lambda rows: {**rows, "image": [torch.rand(3, 32, 32) for _ in rows["image"]]})
    with pytest.raises(UserError, match="read twice gives two different images"):
        from_dataset(noisy, "forget")


def test_order_and_format_of_a_datasets_dataset() -> None:
    data = table()
    chosen = from_dataset(data.select([7, 2]), "forget")
    assert chosen.labels.tolist() == [3, 2]
    assert np.array_equal(np.asarray(chosen.image(1)), np.asarray(pictures()[2]))
    for form in ("torch", "numpy"):
        formatted = from_dataset(data.with_format(form), "forget")
        assert formatted.labels.tolist() == [i % 4 for i in range(12)]
        assert np.array_equal(np.asarray(formatted.image(5)), np.asarray(pictures()[5]))


def test_a_transform_of_the_dataset_is_obeyed() -> None:
    """`with_transform` of the image processor, and labels that it changes."""
    prepare = processor()

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        found = prepare([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        return {**found, "label": [3 - label for label in rows["label"]]}

    samples = from_dataset(table().with_transform(transform), "forget")
    assert samples.labels.tolist() == [3 - i % 4 for i in range(12)]
    expected = prepare(pictures()[5], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(samples.tensor(5, 3), expected)


def test_columns_of_other_names() -> None:
    data = table().rename_column("image", "photo").rename_column("label", "fine_label")
    samples = from_dataset(data, "forget")
    assert (samples.class_names, samples.labels.tolist()) == (NAMES, [i % 4 for i in range(12)])
    datasets = pytest.importorskip("datasets")
    two = table(coarse_label=datasets.ClassLabel(names=NAMES)).rename_column("label", "fine_label")
    with pytest.raises(UserError, match="several label columns: fine_label, coarse_label"):
        from_dataset(two, "forget")


def test_datasets_that_are_refused() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"give one, such as dataset\['train'\]"):
        from_dataset(datasets.DatasetDict({"train": table()}), "forget")
    with pytest.raises(UserError, match="without streaming=True"):
        from_dataset(table().to_iterable_dataset(), "forget")
    text = datasets.Dataset.from_dict({"image": pictures(2), "label": ["cat", "dog"]})
    with pytest.raises(UserError, match="item 0 has the label 'cat'; expected the number of its class"):
        from_dataset(text.cast_column("image", datasets.Image()), "forget")
    soft = datasets.Dataset.from_dict({"image": pictures(2), "label": [[0.5, 0.5], [1.0, 0.0]]})
    with pytest.raises(UserError, match="the label of item 0 has shape"):
        from_dataset(soft.cast_column("image", datasets.Image()), "forget")


def test_images_left_encoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = table().cast_column("image", datasets.Image(decode=False))
    assert np.array_equal(np.asarray(from_dataset(data, "forget").image(5)), np.asarray(pictures()[5]))
