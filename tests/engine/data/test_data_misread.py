"""Data that used to be read wrongly without a word: now right, or one clear error."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refused
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.utils.data import Dataset, TensorDataset

from engine.data import Loader, Samples, from_dataset, open_source
from engine.data.samples import as_tensor
from engine.errors import UserError
from engine.models.preprocessing import preprocessing_of


def png(value: int = 0, mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def fill(root: Path, *files: str) -> Path:
    """Image files below a folder, all of one grey."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / file, "PPM" if file.endswith((".pgm", ".ppm")) else "PNG")
    return root


def shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))


# Folders


def test_classes_are_in_timms_order(tmp_path: Path) -> None:
    names = ["10", "9", "1", "b2", "B10", "apple", "Banana", "c", "a-b", "a"]
    fill(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val") for name in names))
    source = open_source(f"imagefolder:{tmp_path}")
    images, numbers = find_images_and_targets(str(tmp_path / "train"))
    assert {name: label for label, name in enumerate(source.train.class_names)} == numbers
    expected = {str(Path(path).relative_to(tmp_path / "train")): label for path, label in images}
    assert dict(zip(source.train.ids, source.train.labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__pycache__", "__MACOSX", ".git"])
def test_hidden_folders_are_no_classes(tmp_path: Path, hidden: str) -> None:
    fill(tmp_path, "train/a/0.png", "train/b/0.png", f"train/{hidden}/0.png", f"train/a/{hidden}/1.png", "val/a/0.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert source.train.class_names == ["a", "b"]
    assert source.train.ids == ["a/0.png", "b/0.png"]


def test_a_class_folder_without_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/0.png", "train/c/0.png", "val/a/0.png")
    (tmp_path / "train" / "b").mkdir()
    refused(f"imagefolder:{tmp_path}", "hold no images, the first: 'b'", "--class-map")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert open_source(f"imagefolder:{tmp_path}?classes={tmp_path / 'names.txt'}").train.labels.tolist() == [0, 2]


def test_a_stray_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/0.png", "train/stray.png", "val/a/0.png")
    refused(f"imagefolder:{tmp_path}", "train/stray.png lies in no class folder")


def test_torchvisions_suffixes_are_read_and_others_are_counted(tmp_path: Path, caplog: Any) -> None:
    fill(tmp_path, "train/a/0.PGM", "train/a/1.JPG", "train/a/2.tiff", "val/a/0.pgm")
    for name in ("x.gif", "y.gif", "z.heic", ".DS_Store", "._0.pgm"):
        (tmp_path / "train/a" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        source = open_source(f"imagefolder:{tmp_path}")
    assert source.train.ids == ["a/0.PGM", "a/1.JPG", "a/2.tiff"]
    assert "3 files" in caplog.text
    assert ".gif: 2, .heic: 1" in caplog.text


@pytest.mark.parametrize("word", ["valid", "dev", "val", "validation"])
def test_every_name_of_the_validation_split_is_known(tmp_path: Path, word: str) -> None:
    fill(tmp_path, "train/a/0.png", f"{word}/a/1.png", f"{word}/a/2.png", *(f"test/a/{i}.png" for i in range(5)))
    source = open_source(f"imagefolder:{tmp_path}")
    assert source.validation.ids == ["a/1.png", "a/2.png"]
    assert len(source.test) == 5
    tars = tmp_path / "tars"
    tars.mkdir()
    for name, count in (("train", 1), (word, 2), ("test", 5)):
        shard(tars / f"{name}-0.tar", *(m for i in range(count) for m in ((f"{i}.png", png()), (f"{i}.cls", b"0"))))
    assert len(open_source(f"webdataset:{tars}").validation) == 2


def test_folders_of_no_split_are_named(tmp_path: Path, caplog: Any) -> None:
    fill(tmp_path, "train/a/0.png", "holdout/a/0.png", "test/a/0.png")
    with caplog.at_level(logging.WARNING):
        open_source(f"imagefolder:{tmp_path}")
    assert "not read, since the name has no split: holdout" in caplog.text


# Shards


def parquet(path: Path, rows: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": png(i), "path": None} for i in rows], "label": [0] * len(rows)}), path)


@pytest.mark.parametrize("tail", ["", "-0123456789abcdef"])
def test_a_missing_parquet_shard_is_named(tmp_path: Path, tail: str) -> None:
    parquet(tmp_path / "test-00000-of-00001.parquet", range(2))
    for number in (0, 2):
        parquet(tmp_path / f"train-0000{number}-of-00003{tail}.parquet", range(2))
    refused(f"parquet:{tmp_path}", "1 of 3 shards are missing", "train-00001-of-00003")


@pytest.mark.parametrize(
    "names", [("train-0.parquet", "train-2.parquet"), ("train/0000.parquet", "train/0002.parquet")]
)
def test_a_gap_in_the_numbers_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in (*names, "test.parquet"):
        parquet(tmp_path / name, range(2))
    refused(f"parquet:{tmp_path}", "shards are missing")


def test_two_versions_of_the_shards_are_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet(tmp_path / f"{name}.parquet", range(2))
    refused(f"parquet:{tmp_path}", "two versions of the data")


def test_dots_in_tar_names_are_part_of_the_key(tmp_path: Path) -> None:
    members = [(f"c/v1.0_{i}.png", png(i)) for i in range(3)] + [(f"c/v1.0_{i}.cls", b"%d" % i) for i in range(3)]
    more = [("plain.png", png(9)), ("plain.mask.png", png(7)), ("plain.cls", b"3"), ("plain.coarse.json", b"{}")]
    shard(tmp_path / "train-0.tar", *members, *more)
    shard(tmp_path / "test-0.tar", ("a.png", png()), ("a.cls", b"0"))
    train = open_source(f"webdataset:{tmp_path}").train
    assert train.ids == ["c/v1.0_0", "c/v1.0_1", "c/v1.0_2", "plain"]
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert [np.asarray(train.image(i))[0, 0] for i in range(4)] == [0, 1, 2, 9]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("v1.0_1.png", png()),), "key 'v1.0_1' has an image and no label"),
        ((("v1.0_1.cls", b"0"),), "key 'v1.0_1' has a label and no image"),
        ((("x.json", b'{"label": 1}'), ("x.gif", b"")), "key 'x' has a label and no image"),
    ],
)
def test_members_without_a_partner_are_refused(tmp_path: Path, members: Any, message: str) -> None:
    shard(tmp_path / "train-0.tar", ("a.png", png()), ("a.cls", b"0"), *members)
    shard(tmp_path / "test-0.tar", ("a.png", png()), ("a.cls", b"0"))
    refused(f"webdataset:{tmp_path}", message)


# Datasets of users


class Own(Dataset[Any]):
    """Images of one value each; everything else as given."""

    def __init__(self, label: Any = None, **attributes: Any) -> None:
        self.label = label or (lambda i: i % 3)
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = torch.full((1, 8, 8), float(index))
        image[..., 0] = -1
        return getattr(self, "transform", lambda image: image)(image), self.label(index)


def test_labels_are_those_of_the_items() -> None:
    turned = Own(lambda i: 9 - i % 3, targets=[i % 3 for i in range(40)], target_transform=lambda y: 9 - y)
    assert from_dataset(turned, "mine").labels.tolist() == [9 - i % 3 for i in range(40)]
    wrapped = Own(lambda i: (i + 1) % 3, targets=[i % 3 for i in range(40)])
    assert from_dataset(wrapped, "mine").labels.tolist() == [(i + 1) % 3 for i in range(40)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: 0.5, "has the label 0.5; expected a whole number"),
        (lambda i: torch.tensor(0.25), "has the label 0.25; expected a whole number"),
        (lambda i: torch.eye(3)[i % 3], "has shape (3,) (one-hot, soft or several labels)"),
        (lambda i: float("nan"), "has the label nan; expected a whole number"),
        (lambda i: "cat", "has the label 'cat'; expected the number of its class"),
    ],
)
def test_soft_labels_are_refused(label: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_dataset(Own(label), "mine")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [int, np.int16, torch.tensor, float])
def test_whole_numbers_of_any_kind_are_labels(kind: Any) -> None:
    assert from_dataset(Own(lambda i: kind(i % 3)), "mine").labels.tolist() == [i % 3 for i in range(40)]


def test_a_random_transform_is_refused_and_draws_nothing() -> None:
    from torchvision.transforms import Compose, RandomHorizontalFlip

    random = Own(transform=Compose([RandomHorizontalFlip()]))
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"two different images: its transform .*RandomHorizontalFlip.*augment=flip"):
        from_dataset(torch.utils.data.Subset(random, range(30)), "mine")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ids", [np.arange(100, 140), torch.arange(100, 140), [f"{i}" for i in range(100, 140)]])
def test_ids_may_be_arrays(ids: Any) -> None:
    assert from_dataset(Own(ids=ids), "mine").ids == [str(i) for i in range(100, 140)]


def test_nothing_is_mirrored_unless_the_source_is_known_to_allow_it(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/0.png", "val/a/0.png")
    from toys import tiny_vit

    for samples in (open_source(f"imagefolder:{tmp_path}").train, Samples("s", ["0"], np.array([0]), lambda i: None)):
        assert Loader(samples, preprocessing_of(tiny_vit()), batch_size=1, augment="auto").augment == "none"


# Pixels


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 256, 257, 32768, 65535]], dtype=np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"x.{suffix}")
        with Image.open(tmp_path / f"x.{suffix}") as image:
            assert as_tensor(image, 1).flatten().tolist() == [0, 0, 1, 1, 128, 255]
            assert as_tensor(image, 3)[2].flatten().tolist() == [0, 0, 1, 1, 128, 255]
    with pytest.raises(ValueError, match="grey levels from 0 to 70000 of mode I; store it with 8 bits"):
        as_tensor(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), 1)


@pytest.mark.parametrize("mode", ["1", "CMYK", "RGBA", "LA", "P"])
def test_other_modes_are_as_pil_converts_them(mode: str) -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
    assert np.array_equal(as_tensor(image, 3).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_a_tensor_dataset_is_as_it_was() -> None:
    samples = from_dataset(TensorDataset(torch.zeros(3, 1, 8, 8), torch.tensor([2, 0, 1])), "mine")
    assert samples.labels.tolist() == [2, 0, 1]
    assert samples.ids == ["0", "1", "2"]
