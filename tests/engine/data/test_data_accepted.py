"""Data that used to be refused or to crash: parquet as people have it, lists of ids, options of a source."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from refusals import refused
from typer.testing import CliRunner

from engine.data import Samples, open_source, read_forget_request, rowgroups
from engine.data.samples import IdKind
from engine.data.spec import parse_spec, with_options
from engine.errors import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def images(rows: range) -> pa.Array:
    return pa.array([{"bytes": png(i), "path": None} for i in rows], STRUCT)


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def greys(samples: Samples) -> list[int]:
    return [int(np.asarray(samples.image(i))[0, 0]) for i in range(len(samples))]


# Parquet


@pytest.mark.parametrize(
    "layout",
    [
        "{split}.parquet",
        "data/{split}-00000-of-00001.parquet",
        "data/{split}-00000-of-00001-0123456789abcdef.parquet",
        "{split}/0000.parquet",
        "default/{split}/0000.parquet",
        "plain_text/{split}-00000-of-00001.parquet",
    ],
)
def test_layouts_of_the_hub(tmp_path: Path, layout: str) -> None:
    write(tmp_path / layout.format(split="train"), image=images(range(4)), label=[0, 1, 2, 1])
    write(tmp_path / layout.format(split="test"), image=images(range(5)), label=[0] * 5)
    (tmp_path / ".cache").mkdir()
    source = open_source(f"parquet:{tmp_path}")
    assert greys(source.train) == [0, 1, 2, 3]
    assert source.train.labels.tolist() == [0, 1, 2, 1]
    assert len(source.validation) + len(source.test) == 5


def test_one_of_several_configurations_has_to_be_named(tmp_path: Path) -> None:
    for config in ("big", "small"):
        for split in ("train", "test"):
            write(tmp_path / config / split / "0000.parquet", image=images(range(2)), label=[0, 1])
    refused(f"parquet:{tmp_path}", "several folders", "big, small", f"parquet:{tmp_path}/big")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", image=pa.array([png(i) for i in range(3)], kind), label=[0, 1, 0])
    assert greys(open_source(f"parquet:{tmp_path}").train) == [0, 1, 2]


@pytest.mark.parametrize("form", ["text", "struct", "path only", "dictionary"])
def test_images_may_be_files_below_the_folder(tmp_path: Path, form: str) -> None:
    (tmp_path / "files").mkdir()
    names = [f"files/{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(png(i))
    column = {
        "text": pa.array(names),
        "dictionary": pa.array(names).dictionary_encode(),
        "struct": pa.array([{"bytes": None, "path": name} for name in names], STRUCT),
        "path only": pa.array([{"path": name} for name in names]),
    }[form]
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.parquet", image=column, label=[0, 1, 0])
    assert greys(open_source(f"parquet:{tmp_path}").train) == [0, 1, 2]
    (tmp_path / names[0]).unlink()
    if form != "struct":
        refused(f"parquet:{tmp_path}", "names the file 'files/0.png'")


@pytest.mark.parametrize("encoded", [False, True])
def test_text_labels_are_classes_in_timms_order(tmp_path: Path, encoded: bool) -> None:
    texts = pa.array(["10", "b", "9", "A"])
    write(tmp_path / "train.parquet", image=images(range(4)), label=texts.dictionary_encode() if encoded else texts)
    write(tmp_path / "test.parquet", image=images(range(5)), label=["b"] * 5)
    source = open_source(f"parquet:{tmp_path}")
    assert source.train.class_names == ["9", "10", "A", "b"]
    assert source.train.labels.tolist() == [1, 3, 0, 2]
    assert set(source.test.labels) == {3}
    write(tmp_path / "test.parquet", image=images(range(5)), label=["c"] * 5)
    refused(f"parquet:{tmp_path}", "the label 'c', which no training sample has")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.5, 1, 0, 1]), "holds 0.5; expected whole numbers or text"),
        (pa.array([[1, 0], [0, 1], [1, 0], [0, 1]]), "expected a whole number or text"),
        (pa.array([0, None, 1, 1]), "1 samples"),
        (pa.array([-1, 0, 1, 1]), "negative label -1"),
    ],
)
def test_soft_and_missing_labels_are_refused(tmp_path: Path, labels: pa.Array, message: str) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", image=images(range(4)), label=labels)
    refused(f"parquet:{tmp_path}", message)


def test_shards_of_other_column_orders_and_widths_go_together(tmp_path: Path) -> None:
    names = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    write(tmp_path / names[0], image=images(range(2)), label=pa.array([0, 5], pa.int64()))
    write(tmp_path / names[1], label=pa.array([3, 1], pa.int8()), image=images(range(2, 4)))
    write(tmp_path / names[2], x=["", ""], label=pa.array([2, 2], pa.uint16()), image=[png(4), png(5)])
    write(tmp_path / "test.parquet", image=images(range(5)), label=[0] * 5)
    train = open_source(f"parquet:{tmp_path}").train
    assert train.labels.tolist() == [0, 5, 3, 1, 2, 2]
    assert greys(train) == [0, 1, 2, 3, 4, 5]


def described(names: list[str], label: str = "label", image: str = "image") -> dict[str, str]:
    features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_class_labels_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    for split, names in (("train", ["z", "a"]), ("test", ["a", "z"])):
        table = pa.table({"photo_1": images(range(5)), "kind": [0] * 5})
        pq.write_table(
            table.replace_schema_metadata(described(names, "kind", "photo_1")), tmp_path / f"{split}.parquet"
        )
    source = open_source(f"parquet:{tmp_path}")
    assert source.train.class_names == ["z", "a"]
    assert (set(source.train.labels), set(source.test.labels)) == ({0}, {1})


def test_columns_are_found_by_name_or_named(tmp_path: Path) -> None:
    columns = {"img": images(range(4)), "fine_label": [0, 1, 2, 3]}
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", **columns)
    assert open_source(f"parquet:{tmp_path}").train.labels.tolist() == [0, 1, 2, 3]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", **columns, coarse_label=[1, 1, 0, 0])
    refused(f"parquet:{tmp_path}", "fine_label or coarse_label", "--label-column")
    assert open_source(f"parquet:{tmp_path}?label=coarse_label").train.labels.tolist() == [1, 1, 0, 0]
    refused(f"parquet:{tmp_path}?label=lable", "has no column 'lable'", "found img, fine_label, coarse_label")


def test_images_are_read_by_row_group_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        table = pa.table({"image": images(range(30)), "label": [0] * 30})
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=7)
    monkeypatch.setattr(rowgroups, "_CACHE_BYTES", 1500)
    monkeypatch.setattr(rowgroups, "_PIECE_BYTES", 300)
    train = open_source(f"parquet:{tmp_path}").train
    reader = train._decode.__self__  # type: ignore[attr-defined]
    order = np.random.default_rng(0).permutation(30)
    assert [int(np.asarray(train.image(int(i)))[0, 0]) for i in order] == order.tolist()
    assert 1 <= len(reader._kept) < 5
    assert sum(group.nbytes for group in reader._kept.values()) <= 1500 or len(reader._kept) == 1


# Options of a source


def test_options_travel_in_the_spec(tmp_path: Path) -> None:
    spec = with_options("parquet:/a b", image="img", label=None, classes="/c&d?.txt")
    kind, location, options = parse_spec(spec)
    assert (kind, location, options.image, options.label, options.classes) == (
        "parquet", "/a b", "img", None, "/c&d?.txt"
    )  # fmt: skip
    assert parse_spec(with_options(spec, label="y"))[2].label == "y"
    assert parse_spec("webdataset:/x/train-0?.tar")[1] == "/x/train-0?.tar"
    odd = tmp_path / "a?image=b"
    for split in ("train", "val"):
        (odd / split / "c").mkdir(parents=True)
        (odd / split / "c" / "0.png").write_bytes(png(0))
    assert open_source(f"imagefolder:{odd}").train.ids == ["c/0.png"]
    refused("parquet:/x?imgae=img", "unknown option 'imgae'; did you mean 'image'?")
    refused("digits?image=img", "digits data has no columns")
    with pytest.raises(UserError, match="--data has image=img already"):
        with_options(spec, image="other")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c.txt", "dog\ncat\nfox\n"),
        ("c.json", '["dog", "cat", "fox"]'),
        ("c.json", '{"0": "dog", "1": "cat", "2": "fox"}'),
        ("c.json", '{"cat": 1, "dog": 0, "fox": 2}'),
        ("c.yaml", "0: dog\n1: cat\n2: fox\n"),
    ],
)
def test_a_class_map_orders_the_classes(tmp_path: Path, file: str, content: str) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(0))
    (tmp_path / file).write_text(content)
    train = open_source(f"imagefolder:{tmp_path}?classes={tmp_path / file}").train
    assert train.class_names == ["dog", "cat", "fox"]
    assert dict(zip(train.ids, train.labels.tolist(), strict=True)) == {"cat/0.png": 1, "dog/0.png": 0}
    (tmp_path / "less.txt").write_text("dog\nfox\n")
    refused(f"imagefolder:{tmp_path}?classes={tmp_path / 'less.txt'}", "1 of 2 classes", "the first: 'cat'")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("c.json", '{"a": 0, "b": 2}', "its labels are not 0 to 1"),
        ("c.txt", "a\na\n", "the class 'a' occurs twice"),
        ("c.txt", "\n", "it holds no names"),
        ("c.json", "{", "it is not valid JSON"),
        ("c.yaml", "1: 0\n0: 1\n", "names and labels are both numbers"),
    ],
)
def test_class_maps_that_cannot_be_right(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    refused(f"digits?classes={tmp_path / file}", message)


@pytest.mark.parametrize("command", ["train", "unlearn", "evaluate", "attack", "forget-set", "tune", "verify"])
def test_every_command_with_data_takes_its_options(command: str) -> None:
    from engine.cli.app import app

    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert all(option in shown for option in ("--image-column", "--label-column", "--class-map"))


def test_the_options_reach_the_spec(tmp_path: Path) -> None:
    from engine.cli.app import app

    (tmp_path / "names.txt").write_text("\n".join("9876543210"))
    arguments = ["forget-set", "--strategy", "class", "--set", "name=9", "--count", "2", "--data", "digits"]
    arguments += ["--out", str(tmp_path / "o.csv"), "--class-map", str(tmp_path / "names.txt")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "o.json")], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "o.json").read_text())["description"]["chosen"]["classes"] == {"9": 2}


# Lists of ids


def named(*ids: str, rows: int | None = None) -> Samples:
    kind = IdKind.of_rows(rows) if rows else None
    return Samples("s", ids, np.zeros(len(ids), dtype=np.int64), lambda i: None, id_kind=kind)


def test_ids_are_matched_in_any_unicode_form(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "ü/é.png") for form in ("NFC", "NFD"))
    train = named("a", nfd, "b")
    (tmp_path / "ids.csv").write_text(f"id,why\n{nfc},x\n{nfd},x\n", encoding="utf-8")
    request = read_forget_request(str(tmp_path / "ids.csv"), train)
    assert (request.indices.tolist(), request.duplicates) == ([1], 1)
    assert request.provenance == {nfd: {"why": "x"}}
    mixed = unicodedata.normalize("NFC", "ü") + unicodedata.normalize("NFD", "/é.png")
    (tmp_path / "ids.txt").write_text(mixed, encoding="utf-8")
    with pytest.raises(UserError, match="in two Unicode forms"):
        read_forget_request(str(tmp_path / "ids.txt"), named(nfc, nfd, "b"))
    (tmp_path / "ids.txt").write_text(nfc, encoding="utf-8")
    assert read_forget_request(str(tmp_path / "ids.txt"), named(nfd, nfc, "b")).indices.tolist() == [1]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("cp1252", "CP1252")],
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / "ids.txt").write_bytes("Küche/1.png\nKüche/2.png\n".encode(encoding))
    with pytest.raises(UserError) as error:
        read_forget_request(str(tmp_path / "ids.txt"), named("a", "b"))
    assert f"iconv -f {name} -t UTF-8 {tmp_path}" in str(error.value)


def test_positions_are_said_to_be_positions_and_hold_for_one_number_of_rows(tmp_path: Path) -> None:
    train = open_source("digits").train
    (tmp_path / "ids.txt").write_text("1797\n")
    with pytest.raises(UserError, match="positions of scikit-learn's images, 0 to 1796, of these 1797 alone"):
        read_forget_request(str(tmp_path / "ids.txt"), train)
    (tmp_path / "ids.csv").write_text("id,rows\n1,40\n")
    assert read_forget_request(str(tmp_path / "ids.csv"), named("0", "1", rows=40)).indices.tolist() == [1]
    with pytest.raises(UserError, match=r"positions among 40 rows .* has 50 now"):
        read_forget_request(str(tmp_path / "ids.csv"), named("0", "1", rows=50))


def test_a_chosen_list_of_positions_says_of_how_many(tmp_path: Path) -> None:
    from engine.forget_sets import choose_forget_set

    choose_forget_set(open_source("digits").train, "random", count=2).write(tmp_path / "o.csv")
    assert [line.split(",")[-1] for line in (tmp_path / "o.csv").read_text().splitlines()] == ["rows", "1797", "1797"]
    read_forget_request(str(tmp_path / "o.csv"), open_source("digits").train)


def test_a_task_notes_the_rows_that_its_positions_are_of(tmp_path: Path) -> None:
    from engine.jobs.task import Task

    assert Task.open("digits", "random:0.1@0").notes()["forget"]["rows"] == 1797


@pytest.mark.slow
@pytest.mark.minutes
def test_more_than_2_gib_of_images_in_one_row_group(tmp_path: Path) -> None:
    rows = pa.array([{"bytes": png(77) + bytes(8 << 20), "path": None}] * 100, STRUCT)
    table = pa.table({"image": pa.chunked_array([rows] * 3), "label": [0] * 300})
    for split, part in (("train", table), ("test", table.slice(0, 5))):
        pq.write_table(part, tmp_path / f"{split}.parquet")
    assert table.nbytes > 1 << 31
    assert pq.read_metadata(tmp_path / "train.parquet").num_row_groups == 1
    train = open_source(f"parquet:{tmp_path}").train
    assert [int(np.asarray(train.image(i))[0, 0]) for i in (0, 150, 299)] == [77, 77, 77]
