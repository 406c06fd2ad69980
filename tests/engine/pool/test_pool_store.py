"""A pool in its folder: what it was trained on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from digit_pool import KEY, TRAINING, make_pool, train_member

from engine.data import Source
from engine.errors import UserError
from engine.pool.store import Pool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: Source) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", digits).folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pool"))


def _part(digits: Source, rows: np.ndarray) -> Source:
    return dataclasses.replace(digits, train=digits.train.subset(rows))


def test_a_complete_pool_covers_its_data(folder: Path, digits: Source) -> None:
    pool = Pool.open(folder)
    found = pool.check(digits)
    assert (found.samples, found.new, found.gone, found.short) == (len(digits.train), 0, 0, 0)
    assert not found.out_of_date
    assert (pool.unseen(digits.train.ids) == pool.lacking(digits.train.ids)).all()


def test_a_model_is_trained_on_all_but_its_share(folder: Path, digits: Source) -> None:
    pool = Pool.open(folder)
    task = pool.task(digits, 2)
    lacked = pool.lacking(digits.train.ids)[:, 1]
    assert list(task.forget.ids) == [digits.train.ids[int(i)] for i in np.flatnonzero(lacked)]
    assert task.retain.fingerprint() == pool.states[0].trained_on["2"]


def test_ids_are_not_in_its_files(tmp_path: Path, digits: Source) -> None:
    folder = make_pool(tmp_path / "pool", digits, train=False).folder
    assert {path.name for path in folder.iterdir()} == {"pool.json", "samples-1.npy"}
    table = np.load(folder / "samples-1.npy")
    assert table.dtype.names == ("digest", "label")
    assert (np.diff(table["digest"]) > 0).all()


def test_a_model_that_is_not_finished_is_named(folder: Path, digits: Source) -> None:
    shutil.rmtree(folder / "model_3")
    with pytest.raises(UserError, match="1 of 4 models are not finished"):
        Pool.open(folder).check(digits)
    assert Pool.open(folder).unfinished() == [3]


def test_a_model_of_another_share_is_refused(folder: Path, digits: Source) -> None:
    """Its record is valid, and names the samples of another model."""
    shutil.rmtree(folder / "model_1")
    shutil.copytree(folder / "model_2", folder / "model_1")
    with pytest.raises(UserError, match="model 1 was made by retrain from other samples"):
        Pool.open(folder).check(digits)


def test_a_model_that_was_trained_on_everything_is_refused(folder: Path, digits: Source) -> None:
    shutil.rmtree(folder / "model_4")
    pool = Pool.open(folder)
    train_member(pool, digits, 4, lacking=False)
    with pytest.raises(UserError, match="model 4 was made by retrain from other samples"):
        pool.check(digits)


def test_weights_that_were_exchanged_are_refused(folder: Path, digits: Source) -> None:
    shutil.copy(folder / "model_2" / "model.safetensors", folder / "model_1" / "model.safetensors")
    with pytest.raises(UserError, match=r"model_1: its record is not valid"):
        Pool.open(folder).check(digits)


def test_a_model_without_record_is_refused(folder: Path, digits: Source) -> None:
    for name in ("record.json", "record.salt"):
        (folder / "model_1" / name).unlink()
    with pytest.raises(UserError, match="model 1 has no record"):
        Pool.open(folder).check(digits)


def test_an_edited_pool_file_is_refused(folder: Path) -> None:
    path = folder / "pool.json"
    facts = json.loads(path.read_text())
    facts["share"] = 0.25
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="was changed"):
        Pool.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_file_that_is_no_pool_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(UserError, match=r"pool\.json"):
        Pool.open(tmp_path)


def test_other_labels_are_refused(folder: Path, digits: Source) -> None:
    labels = digits.train.labels.copy()
    labels[7] = (labels[7] + 1) % 10
    other = dataclasses.replace(digits, train=digits.train.with_labels(labels, digits.train.class_names))
    with pytest.raises(UserError, match="1 samples have another label"):
        Pool.open(folder).check(other)


def test_other_images_with_the_same_ids_are_refused(folder: Path, digits: Source) -> None:
    """Numbered images: ids and labels alone do not show that the data is another."""
    from engine.data import Samples

    train = digits.train
    moved = Samples(train.name, list(train.ids), train.labels, lambda i: train.image((i + 1) % 9), train.class_names)
    with pytest.raises(UserError, match="is another image"):
        Pool.open(folder).check(dataclasses.replace(digits, train=moved))


def test_new_samples_are_known_to_no_model_and_gone_ones_are_counted(tmp_path: Path, digits: Source) -> None:
    count = len(digits.train)
    before, now = _part(digits, np.arange(0, count - 10)), _part(digits, np.arange(5, count))
    pool = make_pool(tmp_path / "pool", before)
    found = pool.check(now)
    assert (found.new, found.gone, found.short) == (10, 5, 0)
    assert not found.out_of_date
    assert pool.unseen(now.train.ids)[-10:].all()
    far = pool.check(_part(digits, np.arange(30, count)))
    assert far.out_of_date


def test_models_that_join_are_trained_on_the_data_of_today(tmp_path: Path, digits: Source) -> None:
    count = len(digits.train)
    make_pool(tmp_path / "pool", _part(digits, np.arange(0, count - 10)))
    pool = make_pool(tmp_path / "pool", digits, models=5)
    assert [state.models for state in pool.states] == [[1, 2, 3, 4], [5]]
    unseen = pool.unseen(digits.train.ids)[-10:]
    assert unseen[:, :4].all()
    assert (unseen[:, 4] == pool.lacking(digits.train.ids)[-10:, 4]).all()
    assert pool.check(digits).new == 0


def test_a_changed_data_source_does_not_continue_a_pool(tmp_path: Path, digits: Source) -> None:
    make_pool(tmp_path / "pool", digits, train=False)
    with pytest.raises(UserError, match="its samples changed since the pool was begun, and model 1"):
        make_pool(tmp_path / "pool", _part(digits, np.arange(0, 100)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": 0.25, "models": 8}, "another share"),
        ({"models": 3}, "has 4 already"),
        ({"key": "other"}, "another key;"),
        ({"training": {**TRAINING, "recipe": {**TRAINING["recipe"], "lr": 1.0}}}, "another recipe .lr: "),
    ],
)
def test_another_pool_in_the_folder_is_refused(
    tmp_path: Path, digits: Source, changed: dict[str, object], message: str
) -> None:
    folder = make_pool(tmp_path / "pool", digits, train=False).folder
    given = {"models": 4, "share": 0.5, "training": TRAINING, "key": KEY, **changed}
    with pytest.raises(UserError, match=message):
        Pool.create(folder, digits, **given)  # type: ignore[arg-type]


def test_other_files_in_the_folder_are_refused(tmp_path: Path, digits: Source) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        make_pool(tmp_path, digits, train=False)


def test_the_recipe_of_the_original_is_compared(folder: Path, tmp_path: Path) -> None:
    pool, original = Pool.open(folder), tmp_path / "original"
    pool.check_recipe(str(original))  # made elsewhere
    original.mkdir()
    shutil.copy(folder / "model_2" / "config.yaml", original)  # another seed and other samples
    pool.check_recipe(str(original))
    (original / "config.yaml").write_text("method: retrain\nepochs: 90.0\n")
    with pytest.raises(UserError, match=r"with epochs=1.0, the original with 90.0"):
        pool.check_recipe(str(original))
    twin = shutil.copytree(folder, tmp_path / "twin")
    (twin / "model_2" / "config.yaml").unlink()
    (original / "config.yaml").write_text("method: retrain\nepochs: 1.0\n")
    with pytest.raises(UserError, match=r"model_2/config.yaml is missing; restore it"):
        Pool.open(twin).check_recipe(str(original))
