"""Odd data of the kinds that people have: read right, or refused in one line that names the thing."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from refusals import refused

from engine.data import open_source
from engine.data.forget import ForgetRequest, read_forget_request
from engine.data.samples import BadImageError, Samples
from engine.errors import UserError

LABELS = [i % 3 for i in range(9)]


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [png(20 * i) for i in range(9)]


def table(names: list[str] | None = None, column: str = "label", **columns: Any) -> pa.Table:
    """names: of ClassLabel, of the column."""
    found = pa.table({"image": IMAGES, "label": LABELS} | columns)
    info = {"info": {"features": {column: {"_type": "ClassLabel", "names": names}}}}
    return found.replace_schema_metadata({"huggingface": json.dumps(info)}) if names else found


def parquet(folder: Path, train: pa.Table, test: pa.Table | None = None) -> str:
    pq.write_table(train, folder / "train.parquet")
    pq.write_table(train if test is None else test, folder / "test.parquet")
    return f"parquet:{folder}"


# Parquet


def test_an_unpublished_label_is_not_the_last_class(tmp_path: Path) -> None:
    spec = parquet(tmp_path, table(["a", "b", "c"]), table(["c", "b", "a"], label=[-1] * 9))
    refused(spec, "-1", "test.parquet", "'label'")


def test_a_class_label_beside_a_column_named_category_is_not_chosen(tmp_path: Path) -> None:
    both = table(["m", "f"], "gender", gender=[i % 2 for i in range(9)], category=LABELS).drop_columns(["label"])
    refused(parquet(tmp_path, both), "gender or category", "--label-column")
    assert open_source(f"parquet:{tmp_path}?label=category").train.labels.tolist() == LABELS


def test_files_below_a_folder_of_files_are_not_passed_over(tmp_path: Path) -> None:
    parquet(tmp_path, table())
    (tmp_path / "train/more").mkdir(parents=True)
    (tmp_path / "train.parquet").rename(tmp_path / "train/0000.parquet")
    pq.write_table(table(), tmp_path / "train/more/0001.parquet")
    refused(f"parquet:{tmp_path}", "more/0001.parquet", "one folder")


def test_the_suffix_of_a_shard_may_be_upper_case(tmp_path: Path) -> None:
    parquet(tmp_path, table())
    (tmp_path / "train.parquet").rename(tmp_path / "train-0.parquet")
    pq.write_table(table(), tmp_path / "train-1.PARQUET")
    assert len(open_source(f"parquet:{tmp_path}").train) == 18


def test_attribute_files_of_macos_are_no_shards(tmp_path: Path) -> None:
    spec = parquet(tmp_path, table())
    (tmp_path / "._train.parquet").write_bytes(b"Mac OS X")
    assert open_source(spec).train.labels.tolist() == LABELS


def test_images_in_base64_are_refused_in_a_short_line(tmp_path: Path) -> None:
    texts = [base64.b64encode(image * 30).decode() for image in IMAGES]
    refused(parquet(tmp_path, table(image=texts)), "'image'", "names the file")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.table([pa.array(IMAGES), pa.array(LABELS), pa.array(LABELS)], names=["image", "label", "label"])
    refused(parquet(tmp_path, twice), "2 columns 'label'")


def test_an_option_given_twice_is_refused(tmp_path: Path) -> None:
    refused(f"{parquet(tmp_path, table(other=LABELS))}?label=label&label=other", "label=", "twice")


def test_ids_of_bytes_are_their_text(tmp_path: Path) -> None:
    spec = parquet(tmp_path, table(id=[b"x%d" % i for i in range(9)]))
    assert list(open_source(spec).train.ids)[:2] == ["x0", "x1"]


def test_an_empty_text_is_no_class(tmp_path: Path) -> None:
    refused(parquet(tmp_path, table(label=["", *"abababab"])), "empty text", "row 0")


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_without_rows_are_refused(tmp_path: Path, split: str) -> None:
    spec = parquet(tmp_path, table())
    pq.write_table(table()[:0], tmp_path / f"{split}.parquet")
    refused(spec, "training" if split == "train" else "test", "without rows")


def test_a_class_name_that_two_labels_have_is_not_the_first_alone(tmp_path: Path) -> None:
    train = open_source(parquet(tmp_path, table(["crane", "dog", "crane"]))).train
    with pytest.raises(UserError, match="labels 0, 2"):
        read_forget_request("class:crane", train)


# Folders and shards


def folders(root: Path) -> str:
    for split in ("train", "val"):
        for name in ("a", "\u00e9"):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                (root / split / name / f"{i}.png").write_bytes(IMAGES[i])
    return f"imagefolder:{root}"


def test_a_class_in_another_unicode_form_is_the_same_class(tmp_path: Path) -> None:
    spec = folders(tmp_path)
    (tmp_path / "val/\u00e9").rename(tmp_path / "val" / unicodedata.normalize("NFD", "\u00e9"))
    source = open_source(spec)
    assert sorted([*source.test.labels, *source.validation.labels]) == [0] * 5 + [1] * 5


def test_a_class_that_links_to_nothing_is_refused(tmp_path: Path) -> None:
    spec = folders(tmp_path)
    (tmp_path / "train/b").symlink_to(tmp_path / "unmounted")
    refused(spec, "train/b", "unmounted")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, scandir = folders(tmp_path), os.scandir

    def forbidden(path: Any) -> Any:
        if str(path).rstrip("/").endswith("train/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    refused(spec, "train/a", "Permission denied")


def shards(root: Path, *members: tuple[str, bytes]) -> str:
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            for name, content in members:
                facts = tarfile.TarInfo(name)
                facts.size = len(content)
                archive.addfile(facts, io.BytesIO(content))
    return f"webdataset:{root}"


def test_a_label_with_an_underscore_is_no_number(tmp_path: Path) -> None:
    refused(shards(tmp_path, ("a.png", IMAGES[0]), ("a.cls", b"1_0")), "'1_0'", "'a'")


def test_a_compressed_shard_beside_others_is_not_passed_over(tmp_path: Path) -> None:
    spec = shards(tmp_path, ("a.png", IMAGES[0]), ("a.cls", b"1"))
    (tmp_path / "train-1.tar.gz").write_bytes(b"\x1f\x8b")
    refused(spec, "train-1.tar.gz", "gunzip")


# Images


def decoded(path: Path) -> np.ndarray:
    return Samples("s", ["0"], np.array([0]), lambda index: Image.open(path)).tensor(0, 1).numpy()[0]


def test_grey_levels_from_0_to_1_are_not_black(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match="mode F"):
        decoded(tmp_path / "a.tif")


def test_a_pgm_of_16_bits_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([0, 65535], dtype=">u2").tobytes())
    assert decoded(tmp_path / "a.pgm").tolist() == [[0, 255]]


# Lists of ids


def asked(path: Path, content: str | bytes) -> ForgetRequest:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_forget_request(str(path), open_source("digits").train)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "id\n1,2,4\n", "more fields"),
        ("a.csv", "id,id\n1,2\n", "several columns"),
        ("a.csv", "id;who\n1;x\n", "separated by semicolons"),
        ("a.csv", "id\twho\n1\tx\n", "separated by tabs"),
        ("a.json", '["1", "2"]', ".jsonl"),
        ("a.jsonl", '{"id": null}\n', "line 1 has the id null"),
        ("a.jsonl", '{"id": 1.0}\n', "line 1 has the id 1.0"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00abc", "gunzip"),
    ],
)
def test_lists_that_would_lose_ids_are_refused(tmp_path: Path, name: str, content: str | bytes, part: str) -> None:
    with pytest.raises(UserError) as error:
        asked(tmp_path / name, content)
    assert part in str(error.value)
    assert "Traceback" not in str(error.value)


def test_commas_in_quotes_are_values(tmp_path: Path) -> None:
    request = asked(tmp_path / "a.csv", 'id,who\r\n"1","x, y"\r\n2,z\r\n')
    assert request.indices.tolist() == [1, 2]
    assert request.provenance["1"] == {"who": "x, y"}


def test_a_list_without_doubt_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert asked(tmp_path / "a.jsonl", '{"id": 1}\n{"id": "2"}\n').indices.tolist() == [1, 2]
    assert not caplog.records


@pytest.mark.parametrize("given", ["train/cat/1.png", "/data/photos/train/cat/1.png", "train\\cat\\1.png", "1.png"])
def test_an_id_with_another_path_is_shown_as_it_has_to_be(given: str) -> None:
    samples = Samples("photos train", ["cat/1.png", "cat/11.png", "dog/2.png"], np.zeros(3, int), lambda index: None)
    with pytest.raises(UserError, match=r"'cat/1\.png' is one of them: write each id like that"):
        samples.positions(["dog/2.png", given], "forget request ids.txt")


@pytest.mark.parametrize("given", ["bird/1.gif", "3.png", ""])
def test_an_id_like_none_or_like_several_gets_no_advice(given: str) -> None:
    samples = Samples("photos train", ["cat/1.png", "dog/1.png", "dog/2.png"], np.zeros(3, int), lambda index: None)
    with pytest.raises(UserError, match=r"ids look like 'cat/1\.png'$"):
        samples.positions([given], "forget request ids.txt")


@pytest.mark.parametrize(
    ("header", "advice"),
    [("ID,why", "'ID' holds the ids, rename"), ("path", "'path' holds"), ("id_,name,file", "file$")],
)
def test_the_column_that_may_hold_the_ids_is_named(header: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(UserError, match=f"no column `id`; found .*{advice}"):
        read_forget_request(str(tmp_path / "ids.csv"), open_source("digits").train)
