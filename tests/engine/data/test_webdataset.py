from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import Samples, open_source, read_forget_request
from engine.data.webdataset import index as tarindex
from engine.data.webdataset import samples as webdataset
from engine.data.webdataset.index import read_shard
from engine.errors import UserError

Members = list[tuple[str, bytes]]


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 0)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT, **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def numbered(start: int, count: int = 3) -> Members:
    """Samples whose red channel is their number, and the label its last digit."""
    members: Members = []
    for i in range(start, start + count):
        members += [(f"s{i:03d}.png", picture(i)), (f"s{i:03d}.cls", str(i % 10).encode())]
    return members


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(4):
        write(tmp_path / "data" / f"set-train-{shard:04d}.tar", numbered(3 * shard))
    for shard in range(2):
        write(tmp_path / "data" / f"set-val-{shard:02d}.tar", numbered(100 + 5 * shard, 5))
    return tmp_path / "data"


def red(samples: Samples, index: int) -> int:
    return int(np.asarray(samples.image(index))[0, 0, 0])


def fails(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# Which shards


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "/set-{split}-*.tar",
        "/set-train-{0000..0003}.tar",
        "/set-train-000{0,1,2,3}.tar",
        "/set-{split}-{0000..0003}.tar",
        "/*train*.tar",
    ],
)
def test_a_folder_and_patterns_name_all_splits(folder: Path, pattern: str) -> None:
    source = open_source(f"webdataset:{folder}{pattern}")
    assert source.train.ids == [f"s{i:03d}" for i in range(12)]
    assert source.train.labels.tolist() == [i % 10 for i in range(12)]
    assert (len(source.validation), len(source.test)) == (2, 8)
    assert sorted([*source.validation.ids, *source.test.ids]) == [f"s{i}" for i in range(100, 110)]
    assert [red(source.train, i) for i in (11, 0, 5)] == [11, 0, 5]


def test_splits_in_folders_of_their_own(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).mkdir()
        for number, shard in enumerate(sorted(folder.glob(f"set-{split}-*.tar"))):
            shard.rename(folder / split / f"{number}.tar")
    for spec in (f"webdataset:{folder}", f"webdataset:{folder}/train/*.tar", f"webdataset:{folder}/train/{{0..3}}.tar"):
        source = open_source(spec)
        assert (len(source.train), len(source.validation) + len(source.test)) == (12, 10), spec


def test_val_is_validation_beside_a_test_split(folder: Path) -> None:
    write(folder / "set-test-00.tar", numbered(200, 4))
    source = open_source(f"webdataset:{folder}")
    assert (source.validation.ids[0], source.test.ids[0]) == ("s100", "s200")
    assert (len(source.validation), len(source.test)) == (10, 4)
    write(folder / "set-validation-00.tar", numbered(300, 4))
    assert "has both val and validation next to test" in fails(lambda: open_source(f"webdataset:{folder}"))


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / "set-train-0001.tar").rename(folder / "elsewhere")
    for pattern in ("", "/set-train-{0000..0003}.tar", "/set-{split}-*.tar"):
        message = fails(lambda: open_source(f"webdataset:{folder}{pattern}"))  # noqa: B023
        assert "1 of 4 shards are missing, the first: " in message
        assert "set-train-0001.tar" in message
    # named so on purpose
    assert len(open_source(f"webdataset:{folder}/set-train-000{{0,2,3}}.tar").train) == 9
    assert len(open_source(f"webdataset:{folder}/set-train-000[023].tar").train) == 9


def test_a_gap_in_another_split_than_train_is_found(folder: Path) -> None:
    write(folder / "set-val-03.tar", numbered(120))
    message = fails(lambda: open_source(f"webdataset:{folder}/set-train-{{0000..0003}}.tar"))
    assert "1 of 4 shards are missing" in message
    assert "set-val-02.tar" in message


def test_a_total_in_the_names_shows_what_is_missing_at_the_end(folder: Path) -> None:
    for shard in range(4):
        (folder / f"set-train-{shard:04d}.tar").rename(folder / f"train-{shard:05d}-of-00006.tar")
    message = fails(lambda: open_source(f"webdataset:{folder}"))
    assert "2 of 6 shards are missing" in message
    assert "train-00004-of-00006.tar, " in message


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "write webdataset:FOLDER or webdataset:PATTERN"),
        ("{f}/nothing-train-*.tar", "no file matches"),
        ("{f}/set-val-*.tar", "a pattern has to separate the splits"),
        ("{f}/set-train-{{0003..0001}}.tar", "the range {0003..0001} names 0 shards"),
        ("{f}/set-train-{{0..99999999999}}.tar", "the range {0..99999999999} names 100000000000 shards"),
        ("{f}/other", "holds no train-*.tar and no train/*.tar"),
        ("{f}/unclear", "the name of shard-0.tar has no split"),
        ("{f}/only_test", "has no train shards"),
        ("{f}/only_train", "has neither test nor validation samples"),
    ],
)
def test_wrong_locations(folder: Path, location: str, message: str) -> None:
    (folder / "other").mkdir()
    write(folder / "unclear" / "shard-0.tar", numbered(0))
    write(folder / "only_test" / "test-0.tar", numbered(0))
    write(folder / "only_train" / "train-0.tar", numbered(0))
    assert message in fails(lambda: open_source("webdataset:" + location.format(f=folder)))


# What a shard holds


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_says_what_tarfile_says(tmp_path: Path, tar_format: int, monkeypatch) -> None:
    deep = "/".join(["a" * 60, "b" * 60])  # longer than the name field of a header
    members: Members = [("readme", b"x" * 700), ("__meta.json", b"{}"), ("._a.jpg", b"resource fork")]
    for key, size in (("a/one", 1), ("two", 512), (f"{deep}/three", 513), ("./four", 90_000), ("fïve", 3_000_000)):
        members += [(f"{key}.JPEG", os.urandom(size)), (f"{key}.cls", b" 7\n"), (f"{key}.seg.png", b"another")]
    path = write(tmp_path / "s.tar", members, tar_format, mtime=1.5 if tar_format == tarfile.PAX_FORMAT else 1)
    ours = read_shard(path)
    assert [key.decode() for key in ours.keys] == ["a/one", "two", f"{deep}/three", "./four", "fïve"]
    assert ours.labels == [7] * 5
    with tarfile.open(path) as archive:
        expected = [(m.offset_data, m.size) for m in archive if m.name.endswith("JPEG")]
    assert list(zip(ours.offsets, ours.sizes, strict=True)) == expected

    def unusual(_: object) -> None:
        raise tarindex._Unusual

    monkeypatch.setattr(tarindex, "_members", unusual)
    assert read_shard(path) == ours


def test_shards_of_webdatasets_own_writer(tmp_path: Path) -> None:
    writer = pytest.importorskip("webdataset", reason="webdataset is not installed").TarWriter
    with writer(str(tmp_path / "s.tar")) as sink:
        for i in range(3):
            sink.write({"__key__": f"k{i}", "png": picture(i), "cls": i})
    shard = read_shard(tmp_path / "s.tar")
    assert (shard.keys, shard.labels) == ([b"k0", b"k1", b"k2"], [0, 1, 2])


def test_labels_from_json_and_members_in_any_order(tmp_path: Path) -> None:
    record = json.dumps({"label": 4, "name": "x"}).encode()
    members = [("b.cls", b"2"), ("a.json", record), ("b.jpg", b"B"), ("a.webp", b"A"), ("b.json", b"not read")]
    shard = read_shard(write(tmp_path / "s.tar", members))
    assert (shard.keys, shard.labels) == ([b"b", b"a"], [2, 4])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no images"),
        ([("a.txt", b"")], "holds no images"),
        ([("a.jpg", b"x")], "key 'a' has an image and no label"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "key 'a': its label 'cat' is not a whole number"),
        ([("a.jpg", b"x"), ("a.cls", b"1.5")], "key 'a': its label '1.5' is not a whole number"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": true}')], "key 'a': its label True is not a whole number"),
        ([("a.jpg", b"x"), ("a.json", b'{"name": 1}')], "key 'a': its JSON has no `label`"),
        ([("a.jpg", b"x"), ("a.json", b"[")], "key 'a': its JSON has no `label`"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1")], "key 'b' has a label and no image"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "key 'a' has two images"),
    ],
)
def test_samples_that_are_not_whole(tmp_path: Path, members: Members, message: str) -> None:
    path = write(tmp_path / "s.tar", members)
    assert f"shard {path}: {message}" in fails(lambda: read_shard(path))


def spoiled(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    end = len(content) - len(content) % 512
    last = content.rstrip(b"\0")
    used = -(-len(last) // 512) * 512
    if how == "inside":
        content = content[: used - 512]
    elif how == "no mark":
        content = content[:used]
    elif how == "half a mark":
        content = content[: used + 512]
    elif how == "odd":
        content = content[: end - 100]
    elif how == "flipped":
        content[3] ^= 1
    elif how == "second":
        content[1024 + 2] ^= 1
    elif how == "joined":
        content = content * 2
    elif how == "empty":
        content = bytearray()
    elif how == "text":
        content = bytearray(b"hello" * 300)
    elif how == "compressed":
        content[:2] = b"\x1f\x8b"
    path.write_bytes(content)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("inside", "is cut short: the member at byte"),
        ("no mark", "is cut short: it ends after"),
        ("half a mark", "is cut short: half of its end-of-archive mark"),
        ("odd", "is cut short: its"),
        ("flipped", "is not a tar archive"),
        ("second", "has a damaged header at byte 1024"),
        ("joined", "continues after its end-of-archive mark"),
        ("empty", "is empty"),
        ("text", "is not a tar archive"),
        ("compressed", "is compressed"),
    ],
)
def test_damaged_shards_are_named(
    folder: Path, how: str, message: str, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "set-train-0002.tar"
    spoiled(write(path, [("a.png", picture(1)), ("a.cls", b"1")], tarfile.USTAR_FORMAT), how)
    if fallback:

        def unusual(_: object) -> None:
            raise tarindex._Unusual

        monkeypatch.setattr(tarindex, "_members", unusual)
        message = ""  # tarfile says it in its own words; what matters is that it is found
    text = fails(lambda: open_source(f"webdataset:{folder}"))
    assert f"shard {path}: {message}" in text


def test_a_link_to_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(info)
    assert "member 'a.jpg' is a link" in fails(lambda: read_shard(path))


def test_keys_are_unique_in_a_split_and_utf8(folder: Path) -> None:
    write(folder / "set-train-0004.tar", numbered(4, 1))
    message = fails(lambda: open_source(f"webdataset:{folder}"))
    assert "the id 's004' occurs twice" in message
    assert "set-train-0001.tar" in message
    assert "set-train-0004.tar" in message
    write(folder / "set-train-0004.tar", [("\udcff.png", b"x"), ("\udcff.cls", b"1")], tarfile.USTAR_FORMAT)
    assert "is not UTF-8" in fails(lambda: open_source(f"webdataset:{folder}"))


# The index


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def counted(path: Path) -> object:
        names.append(path.name)
        return read_shard(path)

    monkeypatch.setattr(webdataset, "read_shard", counted)
    return names


def test_the_index_is_kept_and_used_until_a_shard_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = reads(monkeypatch)
    first = open_source(f"webdataset:{folder}")
    assert len(names) == 6
    second = open_source(f"webdataset:{folder}")
    assert len(names) == 6
    assert first.train.fingerprint() == second.train.fingerprint()
    assert red(second.train, 7) == 7
    assert not list(folder.glob("*.tmp"))
    path = folder / "set-train-0001.tar"
    size = path.stat().st_size
    write(path, [("t" + name[1:], content) for name, content in numbered(3)])
    assert path.stat().st_size == size
    os.utime(path, ns=(1, 1))
    assert open_source(f"webdataset:{folder}").train.ids[3] == "t003"
    assert len(names) == 10
    assert len(list(folder.glob(".lethe-index-*"))) == 2  # replaced, not piled up


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"])
def test_an_index_that_cannot_be_read_is_built_anew(folder: Path, content: bytes) -> None:
    open_source(f"webdataset:{folder}")
    for file in folder.glob(".lethe-index-*"):
        file.write_bytes(content)
    assert len(open_source(f"webdataset:{folder}").train) == 12
    assert all(len(file.read_bytes()) > 500 for file in folder.glob(".lethe-index-*"))


def test_the_index_goes_to_the_users_cache_where_shards_cannot_be_written_beside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by permissions: the tests may run as root.
    save = webdataset._save
    monkeypatch.setattr(webdataset, "_save", lambda place, *rest: place.parent != folder and save(place, *rest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_source(f"webdataset:{folder}")
    assert len(list((tmp_path / "cache" / "lethe").glob(".lethe-index-*"))) == 2
    names = reads(monkeypatch)
    open_source(f"webdataset:{folder}")
    assert not names
    assert not list(folder.glob(".lethe-index-*"))


def test_an_index_that_cannot_be_kept_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(webdataset, "write_npz", full)
    assert len(open_source(f"webdataset:{folder}").train) == 12


# Reading


def test_forgetting_leaves_the_shards_alone(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    train = open_source(f"webdataset:{folder}").train
    (tmp_path / "ids.txt").write_text("s011\ns004\n")
    forget, retain = read_forget_request(str(tmp_path / "ids.txt"), train).split(train)
    assert forget.ids == ["s004", "s011"]
    assert [red(forget, i) for i in range(2)] == [4, 11]
    assert [red(retain, i) for i in range(10)] == [i for i in range(12) if i not in (4, 11)]
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before


def test_an_image_that_does_not_decode_names_key_and_shard(folder: Path) -> None:
    write(folder / "set-train-0004.tar", [("bad.jpg", picture(1, "JPEG")[:300]), ("bad.cls", b"1")])
    train = open_source(f"webdataset:{folder}").train
    message = fails(lambda: train.subset([3, 12]).image(1))
    assert f"image 'bad' in shard {folder}/set-train-0004.tar does not decode" in message


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    train = open_source(f"webdataset:{folder}").train
    path = folder / "set-train-0003.tar"
    path.write_bytes(path.read_bytes()[:1500])
    assert "has changed since it was opened" in fails(lambda: train.image(10))


def test_few_shards_are_open_at_once_and_all_in_the_end_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    if opened is None:
        pytest.skip("counts descriptors in /proc, which this system does not have")
    monkeypatch.setattr(webdataset, "_opened", webdataset.functools.lru_cache(maxsize=2)(webdataset._Opened))
    train = open_source(f"webdataset:{folder}").train
    for i in range(12):
        assert red(train, i) == i
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
    webdataset._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == opened


def test_samples_can_be_sent_to_a_process_that_does_not_share_memory(folder: Path) -> None:
    train = open_source(f"webdataset:{folder}").train
    copy = pickle.loads(pickle.dumps(train.subset([2, 9])))
    assert copy.ids == ["s002", "s009"]
    assert red(copy, 1) == 9
    assert copy.fingerprint() == train.subset([2, 9]).fingerprint()
