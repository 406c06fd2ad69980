"""A class name is the same in every Unicode form: in a checkpoint, a class map, a forget request and in files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import Samples, open_source, read_forget_request
from engine.data.classes import label_finder
from engine.data.columns import Labels, one_numbering
from engine.data.labels import match_names
from engine.errors import UserError

COMPOSED = [unicodedata.normalize("NFC", name) for name in ("café", "Café", "été")]
DECOMPOSED = [unicodedata.normalize("NFD", name) for name in COMPOSED]


@pytest.mark.parametrize(("found", "wanted"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_of_the_checkpoint(found: list[str], wanted: list[str]) -> None:
    """Two of them differ in case alone, so that a comparison without case would not do."""
    assert match_names(found, wanted[::-1], "the checkpoint").tolist() == [2, 1, 0]


def test_one_class_in_two_forms_is_still_an_error() -> None:
    with pytest.raises(UserError, match="both stand for"):
        match_names([COMPOSED[0], DECOMPOSED[0]], [COMPOSED[0], "b"], "the checkpoint")


def test_a_class_to_forget() -> None:
    train = Samples("train", list("abcd"), np.array([0, 1, 2, 1]), lambda i: Image.new("L", (8, 8)), DECOMPOSED)
    assert read_forget_request(f"class:{COMPOSED[1]}", train).indices.tolist() == [1, 3]
    with pytest.raises(UserError, match="no such class"):
        read_forget_request("class:cafe", train)


def test_a_class_map(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(DECOMPOSED):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 40 * label).save(tmp_path / "data" / split / name / "0.png")
    (tmp_path / "names.txt").write_text("\n".join(COMPOSED[::-1]), encoding="utf-8")
    train = open_source(f"imagefolder:{tmp_path / 'data'}?classes={tmp_path / 'names.txt'}").train
    shades = {int(label): int(train.tensor(i, 1).max()) for i, label in enumerate(train.labels)}
    assert shades == {2: 0, 1: 40, 0: 80}


def test_labels_of_parquet_files() -> None:
    texts = {"train": [Labels("a", list(COMPOSED), ())], "test": [Labels("b", list(DECOMPOSED), ())]}
    numbers = {
        "train": [Labels("a", np.arange(3), tuple(COMPOSED))],
        "test": [Labels("b", np.arange(3), tuple(DECOMPOSED[::-1]))],
    }
    found = one_numbering(texts)
    assert found["test"][0].tolist() == found["train"][0].tolist()
    assert one_numbering(numbers)["test"][0].tolist() == [2, 1, 0]


def test_an_equal_name_goes_before_the_same_text_in_another_form() -> None:
    find = label_finder([DECOMPOSED[0], COMPOSED[0]])
    assert (find(DECOMPOSED[0]), find(COMPOSED[0]), find("x")) == (0, 1, None)
