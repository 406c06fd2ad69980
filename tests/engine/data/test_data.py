from __future__ import annotations

import hashlib
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import few, tiny_vit

import engine.data.ids as ids_module
import engine.data.samples as samples_module
from engine.data import Loader, Samples, from_dataset, open_source, read_forget_request
from engine.data.ids import Ids
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.models.preprocessing import preprocessing_of


def loader(samples: Samples, **options: object) -> Loader:
    return Loader(samples, preprocessing_of(tiny_vit()), **{"batch_size": 8, **options})


def test_digits_have_disjoint_splits_with_stable_ids() -> None:
    first, second = open_source("digits"), open_source("digits")
    splits = [set(s.ids) for s in (first.train, first.validation, first.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 1797
    assert first.train.fingerprint() == second.train.fingerprint()
    assert first.train.labels[first.train.ids.index("0")] == 0 if "0" in first.train.ids else True


def test_validation_is_the_fifth_of_the_test_ids_that_hash_lowest(parquet_folder) -> None:
    source = open_source(f"parquet:{parquet_folder(test=20)}")
    ids = [f"test/{i:04d}.png" for i in range(20)]
    lowest = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[:4]
    assert sorted(source.validation.ids) == sorted(lowest)
    assert sorted(source.test.ids) == sorted(set(ids) - set(lowest))


def test_parquet_without_ids_counts(parquet_folder) -> None:
    assert open_source(f"parquet:{parquet_folder(train=12, ids=False)}").train.ids == [str(i) for i in range(12)]


def test_imagefolder_ids_are_paths_below_the_split(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 5)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 8), (i, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert source.train.ids == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (len(source.validation), len(source.test)) == (2, 8)
    (tmp_path / "val" / "fox").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "fox" / "0.png")
    with pytest.raises(UserError, match="class folder that train/ does not have"):
        open_source(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data source 'digit'; did you mean 'digits'"),
        ("parquet:/nowhere", "is not a folder"),
        ("parquet:", "is not a folder"),
        ("digits:x", "takes no location"),
    ],
)
def test_wrong_sources(spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert message in str(error.value)


def test_parquet_that_is_cut_short_or_empty(parquet_folder, tmp_path: Path) -> None:
    folder = parquet_folder()
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="train is not parquet, or is cut short"):
        open_source(f"parquet:{folder}")
    file.unlink()
    with pytest.raises(UserError, match=r"no train-\*\.parquet"):
        open_source(f"parquet:{folder}")


def test_an_image_that_does_not_decode_names_its_id(parquet_folder) -> None:
    source = open_source(f"parquet:{parquet_folder(spoil={3: b'not an image'})}")
    with pytest.raises(UserError, match=r"image 'train/0003\.png' does not decode"):
        list(loader(source.train).ordered())


def test_values_that_are_not_finite_name_the_sample() -> None:
    images = torch.randn(6, 1, 8, 8)
    images[4, 0, 0, 0] = float("nan")
    samples = from_dataset(torch.utils.data.TensorDataset(images, torch.arange(6)), "mine")
    with pytest.raises(UserError, match="mine: image '4' holds values that are not finite"):
        list(loader(samples).ordered())


def test_own_datasets_keep_order_labels_and_values() -> None:
    images = torch.randn(6, 1, 8, 8)
    samples = from_dataset(torch.utils.data.TensorDataset(images, torch.arange(6)), "mine")
    batch = next(iter(loader(samples).ordered()))
    assert torch.equal(batch.images, images)
    assert batch.labels.tolist() == list(range(6))
    with pytest.raises(UserError, match=r"expected engine\.data\.Samples or a map-style Dataset"):
        from_dataset([1, 2].__iter__(), "mine")  # type: ignore[arg-type]


# Forget requests


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def test_request_files_in_three_forms_agree(tmp_path: Path, train: Samples) -> None:
    ids = [train.ids[5], train.ids[2], train.ids[9]]
    (tmp_path / "a.txt").write_text("\n".join([*ids, "", ids[0]]))
    (tmp_path / "a.csv").write_text("reason,id\n" + "".join(f"asked,{i}\n" for i in ids))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{i}", "case": 7}}\n' for i in ids))
    requests = [read_forget_request(str(tmp_path / f"a.{kind}"), train) for kind in ("txt", "csv", "jsonl")]
    assert all(r.indices.tolist() == [2, 5, 9] for r in requests)
    assert [r.duplicates for r in requests] == [1, 0, 0]
    assert requests[1].provenance[ids[0]] == {"reason": "asked"}
    assert requests[2].provenance[ids[0]] == {"case": "7"}


def test_split_is_a_partition(train: Samples) -> None:
    forget, retain = read_forget_request("random:0.1@3", train).split(train)
    assert len(forget) == round(0.1 * len(train))
    assert set(forget.ids).isdisjoint(retain.ids)
    assert set(forget.ids) | set(retain.ids) == set(train.ids)
    for subset in (forget, retain):
        where = [train.ids.index(i) for i in subset.ids[:5]]
        assert train.labels[where].tolist() == subset.labels[:5].tolist()
        assert np.array_equal(np.asarray(train.image(where[3])), np.asarray(subset.image(3)))


def test_shorthands(train: Samples) -> None:
    assert set(train.labels[read_forget_request("class:7", train).indices]) == {7}
    assert (
        read_forget_request("random:0.1@3", train).indices.tolist()
        == read_forget_request("random:0.1@3", train).indices.tolist()
    )
    assert (
        read_forget_request("random:0.1@3", train).indices.tolist()
        != read_forget_request("random:0.1@4", train).indices.tolist()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nobody\nme\n", "2 of 2 ids are not in digits train, the first: 'nobody', 'me'"),
        ("\n\n", "names no samples"),
        (None, "no such file"),
    ],
)
def test_wrong_request_files(tmp_path: Path, train: Samples, content: str | None, message: str) -> None:
    file = tmp_path / "ids.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        read_forget_request(str(file), train)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.csv", "name\n1\n", "no column `id`; found name"),
        ("ids.jsonl", '{"id": "1"}\n{"name": 1}\n', "line 2 is not a JSON object with an `id`"),
        ("ids.txt", b"\xff\xfe\x00\x80", "not a text file"),
    ],
)
def test_malformed_request_files(tmp_path: Path, train: Samples, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_forget_request(str(tmp_path / name), train)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("class:eleven", "no such class"),
        ("random:0.1", "expected random:FRACTION@SEED"),
        ("random:0@1", "names no samples"),
        ("random:1@1", "leaves nothing to retain"),
    ],
)
def test_wrong_shorthands(train: Samples, spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_forget_request(spec, train)
    assert message in str(error.value)


# Loaders


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_is_every_sample_once_in_an_order_of_seed_and_epoch_alone(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    samples = few(open_source_cached(), count)
    order = [i for b in loader(samples, batch_size=batch_size, seed=seed).epoch(epoch) for i in b.index.tolist()]
    assert sorted(order) == list(range(count))
    whole = next(iter(loader(samples, batch_size=count, seed=seed).epoch(epoch)))
    assert order == whole.index.tolist()


_CACHE: list[Samples] = []


def open_source_cached() -> Samples:
    if not _CACHE:
        _CACHE.append(open_source("digits").train)
    return _CACHE[0]


def test_epochs_differ_in_order(train: Samples) -> None:
    l = loader(few(train, 50), batch_size=50)  # noqa: E741
    assert next(iter(l.epoch(0))).index.tolist() != next(iter(l.epoch(1))).index.tolist()


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_augmentation_is_the_same_for_every_batch_size_and_worker_count(train: Samples, augment: str) -> None:
    def images(**options: object) -> torch.Tensor:
        batches = list(loader(few(train, 20), augment=augment, seed=3, **options).epoch(2))
        index, content = torch.cat([b.index for b in batches]), torch.cat([b.images for b in batches])
        return content[index.argsort()]

    one = images(batch_size=20, workers=0)
    assert torch.equal(one, images(batch_size=7, workers=0))
    assert torch.equal(one, images(batch_size=6, workers=2))
    plain = next(iter(loader(few(train, 20), batch_size=20).ordered())).images
    assert not torch.equal(one, plain)


def test_flip_mirrors_about_half_of_the_images_and_nothing_else(train: Samples) -> None:
    plain = next(iter(loader(few(train, 200), batch_size=200).ordered())).images
    batch = next(iter(loader(few(train, 200), batch_size=200, augment="flip").epoch(0)))
    original = plain[batch.index]
    same = (batch.images == original).flatten(1).all(1)
    mirrored = (batch.images == original.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 60 < int(mirrored.sum()) < 140


def test_evaluation_is_never_augmented(train: Samples) -> None:
    plain = loader(few(train, 20)).ordered()
    augmented = loader(few(train, 20), augment="flip")
    list(augmented.epoch(0))
    for a, b in zip(plain, augmented.ordered(), strict=True):
        assert torch.equal(a.images, b.images)


def test_auto_augmentation_follows_the_images() -> None:
    def samples(size: int, natural: bool) -> Samples:
        image = Image.new("L", (size, size))
        return Samples("s", ["0"], np.array([0]), lambda i: image, natural=natural)

    assert loader(samples(8, True), augment="auto").augment == "flip"
    assert loader(samples(64, True), augment="auto").augment == "crop"
    assert loader(samples(8, False), augment="auto").augment == "none"


def test_preprocessing_is_timms_for_large_images() -> None:
    import timm.data

    vit = tiny_vit(in_chans=3, img_size=32, patch_size=8)
    vit.pretrained_cfg.update(crop_pct=0.875, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).resize((140, 100))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=0.875, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    samples = Samples("s", ["0"], np.array([0]), lambda i: Image.open(io.BytesIO(stream.getvalue())))
    ours = next(iter(Loader(samples, preprocessing_of(vit), batch_size=1).ordered())).images[0]
    expected = transform(image)
    assert ours.shape == expected.shape
    # timm resizes in PIL, this in torch: equal up to rounding of uint8
    assert float((ours - expected).abs().mean()) < 0.02


def test_concatenate_keeps_both(train: Samples) -> None:
    both = concatenate(few(train, 3), train.subset([7, 8]))
    assert both.labels.tolist() == [*train.labels[:3], *train.labels[[7, 8]]]
    assert np.array_equal(np.asarray(both.image(4)), np.asarray(train.image(8)))


def test_double_ids_and_negative_labels_are_refused(parquet_folder) -> None:
    with pytest.raises(UserError, match="negative label -1"):
        Samples("s", ["a", "b"], np.array([0, -1]), lambda i: None)
    with pytest.raises(UserError, match="2 ids for 1 labels"):
        Samples("s", ["a", "b"], np.array([0]), lambda i: None)
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = parquet_folder()
    file = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("id"), "id", pa.array(["same"] * len(table))), file)
    with pytest.raises(UserError, match="the id 'same' occurs twice"):
        open_source(f"parquet:{folder}")


# Ids


def test_ids_are_a_sequence_of_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_CHUNK", 2)
    words = ["b", "ä", "", "b/c", "d"]
    ids = Ids(words)
    assert (list(ids), len(ids), ids[-1], ids.index("b/c")) == (words, 5, "d", 3)
    assert ids == words
    assert ids != words[:4]
    assert ids != [*words[:4], "x"]
    assert ids[1:3] == ["ä", ""]
    assert ids[::-2] == ["d", "", "b"]
    assert ids + ["x"] == [*words, "x"]  # noqa: RUF005
    assert "ä" in ids
    assert "x" not in ids
    assert "".join(words).encode() == b"b\xc3\xa4b/cd"
    text = np.frombuffer("".join(words).encode(), dtype=np.uint8)
    assert Ids.from_bytes(text, np.cumsum([len(w.encode()) for w in words])) == ids
    assert ids.positions(["d", "nobody", "b"]).tolist() == [4, -1, 0]
    assert ids.positions([]).tolist() == []
    assert ids.first_double() is None
    assert Ids(["a", "b", "c", "b", "a"]).first_double() == "b"
    with pytest.raises(IndexError):
        ids[5]
    with pytest.raises(UserError, match="is not UTF-8"):
        Ids(["\udcff"])


def test_a_fingerprint_is_of_ids_and_labels_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_FINGERPRINT_CHUNK", 3)
    labels = np.arange(8) ** 2
    samples = Samples("s", [f"id{i}" for i in range(8)], labels, lambda i: None)
    lines = "".join(f"id{i}\0{i * i}\n" for i in range(8))
    assert samples.fingerprint() == hashlib.sha256(lines.encode()).hexdigest()
    order = [3, 0, 7]
    expected = hashlib.sha256("".join(f"id{i}\0{i * i}\n" for i in order).encode()).hexdigest()
    assert samples.subset(range(8)).subset(order).fingerprint() == expected


def test_a_million_ids_match_and_split_within_seconds(tmp_path: Path) -> None:
    count = 300_000  # a quarter of ImageNet; `python -m bench data` measures all of it
    text = np.frombuffer("".join(f"n{i:09d}" for i in range(count)).encode(), dtype=np.uint8)
    samples = Samples("s", Ids.from_bytes(text, np.arange(1, count + 1) * 10), np.zeros(count), lambda i: None)
    chosen = np.random.default_rng(0).permutation(count)[:30_000]
    (tmp_path / "ids.txt").write_text("\n".join(f"n{i:09d}" for i in chosen))
    began = time.perf_counter()
    request = read_forget_request(str(tmp_path / "ids.txt"), samples)
    forget, retain = request.split(samples)
    assert time.perf_counter() - began < 5
    assert request.indices.tolist() == sorted(chosen.tolist())
    assert (len(forget), len(retain)) == (30_000, 270_000)
    assert forget.ids[0] == f"n{min(chosen):09d}"


# Image folders


def test_imagefolder_lists_as_sorted_paths_do_and_follows_links(tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    names = ["a/x.png", "a-b/x.PNG", "a/sub/y.jpeg", "a/sub-1/y.png", "a/.png", "a/notes.txt", "B/z.tif", "a/10.png"]
    for name in names:
        (stored / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(stored / name, "PNG")
    folder = tmp_path / "set"
    (folder / "val").mkdir(parents=True)
    shutil.copytree(stored, folder / "train")
    (folder / "val" / "a").symlink_to(stored / "a")
    images = [p for p in (folder / "train").rglob("*") if p.suffix.lower() in (".png", ".jpeg", ".tif")]
    source = open_source(f"imagefolder:{folder}")
    assert source.train.ids == [p.relative_to(folder / "train").as_posix() for p in sorted(images)]
    assert source.train.class_names == ["a", "a-b", "B"]  # timm's order
    assert source.train.labels.tolist() == [2, 0, 0, 0, 0, 1]
    assert len(source.validation) + len(source.test) == 4
    (folder / "train" / "a" / "loop").symlink_to(folder / "train" / "a")
    with pytest.raises(UserError, match="links to a folder above it"):
        open_source(f"imagefolder:{folder}")


def test_imagefolder_with_val_and_test_uses_both(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 5)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / split / "cat" / f"{i}.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert (len(source.validation), len(source.test)) == (2, 5)
