"""Labels of the data in the order of the checkpoint's classes, matched by name."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import Lethe
from fed_wrongly import NAMES, trained, with_exchanged_head, with_names, write_folder
from toys import tiny_vit

from engine.data import Samples, open_source
from engine.data.labels import match_names, relabelled
from engine.errors import UserError
from engine.jobs.opening import Opening
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.labels import imagenet_synsets, imagenet_words, label_names
from engine.models.spec import spec_of

QUICK = ["--set", "batch_size=20", "--set", "precision=fp32"]
ORDER = [3, 0, 1, 2, 4, 5, 6, 7, 9, 8]  # label of each of NAMES in the model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose classes are in another order than the folders, and which says so."""
    names = [NAMES[ORDER.index(label)] for label in range(10)]
    model = with_names(with_exchanged_head(copy.deepcopy(trained()), ORDER), names)
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoint"))


def evaluated(lethe: Lethe, checkpoint: Path, data: Path, *more: object) -> tuple[int, str, str]:
    task = ["--data", f"imagefolder:{data}", "--forget", "random:0.1@0", "--set", "precision=fp32"]
    return lethe("evaluate", "--checkpoint", checkpoint, *task, *more)


# --- the command ------------------------------------------------------------------------------------------------------


def test_labels_follow_the_names_of_the_checkpoint(lethe: Lethe, other: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = evaluated(lethe, other, data, "--json", tmp_path / "m.json")
    assert code == 0, err
    assert "classes: 10, matched by name: labels in the order of the checkpoint" in out
    assert "'class a' is label 3, 'class j' is label 8" in out
    assert yaml.safe_load((tmp_path / "m.json").read_text())["accuracy"]["retain"] == 1.0


def test_the_data_s_own_numbers_can_be_kept(lethe: Lethe, other: Path, data: Path) -> None:
    code, _, err = evaluated(lethe, other, data, "--label-order", "data")
    assert (code, "labels are probably permuted: 'class a' is predicted as 'class d'" in err) == (2, True)
    code, _, err = evaluated(lethe, other, data, "--label-order", "alphabet")
    assert (code, "--label-order alphabet: expected auto or data" in err) == (2, True)


def test_unlearning_keeps_names_and_order(lethe: Lethe, other: Path, data: Path, tmp_path: Path) -> None:
    given = ["--data", f"imagefolder:{data}", "--forget", "class:class a", "--method", "finetune", "--set", "lr=1e-6"]
    code, _, err = lethe(
        "unlearn", "--checkpoint", other, *given, "--out", tmp_path / "run", "--set", "max_steps=1", *QUICK
    )
    assert code == 0, err
    assert label_names(load_checkpoint(tmp_path / "run")) == label_names(load_checkpoint(other))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    first = int((open_source(f"imagefolder:{data}").train.labels == 0).sum())
    assert (config["label_order"], config["samples"]["forget"]) == ("auto", first)
    assert evaluated(lethe, tmp_path / "run", data)[0] == 0


def test_a_reference_is_trained_in_the_order_of_its_architecture(
    lethe: Lethe, other: Path, data: Path, tmp_path: Path
) -> None:
    train = ["train", "--arch", other, "--data", f"imagefolder:{data}", "--forget", "random:0.1@0", "--epochs", "0.1"]
    assert lethe(*train, "--out", tmp_path / "retrained", *QUICK)[0] == 0
    assert label_names(load_checkpoint(tmp_path / "retrained")) == label_names(load_checkpoint(other))
    code, out, err = evaluated(lethe, other, data, "--reference", tmp_path / "retrained")
    assert code == 0, err
    assert "in the order of the checkpoint" in out


def test_a_trained_model_names_its_classes(lethe: Lethe, data: Path, tmp_path: Path) -> None:
    arguments = ["img_size=8", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=1"]
    code, out, err = lethe(
        *("train", "--arch", "vit_tiny_patch16_224", "--data", f"imagefolder:{data}", "--epochs", "0.1", *QUICK),
        *(text for each in arguments for text in ("--model-arg", each)),
        *("--out", tmp_path / "model", "--mean", "unit", "--std", "unit"),
    )
    assert code == 0, err
    assert "preprocessing: 8 x 8 pixels, mean 0, std 1" in out
    assert "classes: 10, 'class a' ... 'class j'; in the data's order" in out
    model = load_checkpoint(tmp_path / "model")
    assert label_names(model) == NAMES
    assert spec_of(model).pretrained_cfg["std"] == [1.0, 1.0, 1.0]


def test_models_of_two_orders_are_not_compared(lethe: Lethe, other: Path, data: Path, tmp_path: Path) -> None:
    second = save_checkpoint(with_names(tiny_vit(in_chans=3), NAMES), tmp_path / "second")
    code, _, err = evaluated(lethe, other, data, "--reference", second)
    assert code == 2
    assert f"--reference {second}: its label 0 is 'class a', the original's 'class b'" in err


def test_a_class_that_the_model_does_not_have_is_named(lethe: Lethe, data: Path, tmp_path: Path) -> None:
    names = ["class A", *NAMES[1:-1], "class k"]
    model = save_checkpoint(with_names(tiny_vit(in_chans=3), names), tmp_path / "model")
    code, _, err = evaluated(lethe, model, data)
    assert code == 2
    assert "class 'class j' of the data is not among the 10 classes of the checkpoint ('class A' ... 'class k')" in err
    assert "--class-map FILE" in err


def test_more_classes_in_the_data_than_in_a_head_without_names(lethe: Lethe, data: Path, tmp_path: Path) -> None:
    small = save_checkpoint(tiny_vit(in_chans=3, num_classes=4), tmp_path / "small")
    code, _, err = evaluated(lethe, small, data)
    assert (code, f"its head has 4 classes, but imagefolder:{data} has label 9" in err) == (2, True)


@pytest.mark.slow
def test_a_store_of_requests_keeps_the_order(lethe: Lethe, other: Path, data: Path, tmp_path: Path) -> None:
    source = open_source(f"imagefolder:{data}")
    store = tmp_path / "store"
    settings = ["--method", "finetune", "--set", "max_steps=1", "--set", "lr=1e-6", *QUICK]
    code, out, err = lethe(
        "request", "init", "--store", store, "--checkpoint", other, "--data", f"imagefolder:{data}", *settings
    )
    assert code == 0, err
    assert "in the order of the checkpoint" in out
    assert lethe("request", "add", "--store", store, "--id", source.train.ids[0], "--id", source.train.ids[1])[0] == 0
    code, _, err = lethe("request", "run", "--store", store, "--json", tmp_path / "run.json")
    assert code in (1, 3), err  # two samples prove nothing
    metrics = yaml.safe_load((store / "versions" / "0001" / "metrics.json").read_text())
    assert metrics["original"]["accuracy"]["retain"] == 1.0


# --- matching ---------------------------------------------------------------------------------------------------------


def test_names_are_matched_exactly_first_and_then_without_case_spaces_and_dashes() -> None:
    assert match_names(["a", "b"], ["b", "x", "a"], "m").tolist() == [2, 0]
    assert match_names(["Maine_Coon", "great-dane"], ["Great Dane", "maine coon"], "m").tolist() == [1, 0]
    assert match_names(["A", "a"], ["a", "A"], "m").tolist() == [1, 0]
    assert match_names(["crane", "crane"], ["crane", "crane"], "m").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (["cat", "dgo"], ["cat", "dog"], "class 'dgo' of the data is not among .*; did you mean 'dog'"),
        (["crane"], ["crane", "x", "crane"], r"stands for several classes of m \(0, 2\)"),
        (["A b", "a_B"], ["a b", "c"], "classes 'A b' and 'a_B' of the data both stand for 'a b'"),
    ],
)
def test_names_that_do_not_match(found: list[str], wanted: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_names(found, wanted, "m")


def samples_of(names: list[str]) -> Samples:
    labels = np.arange(len(names))
    return Samples("folder", [str(i) for i in labels], labels, lambda index: None, names)


def test_relabelled_samples_keep_all_else() -> None:
    before = samples_of(["x", "y", "z"])
    after = relabelled(before, np.array([4, 0, 2]), ["y", "b", "z", "d", "x"])
    assert (after.labels.tolist(), after.class_names[4], list(after.ids)) == ([4, 0, 2], "x", ["0", "1", "2"])
    assert before.labels.tolist() == [0, 1, 2]
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("classes", [1000, 21843])
def test_wordnet_folders_are_imagenets_classes(classes: int) -> None:
    model = tiny_vit(num_classes=classes)
    synsets = imagenet_synsets(classes)
    some = [synsets[label] for label in (5, 17, 999)]
    mapping, _, line = Opening().match(samples_of(some), model)
    assert mapping is not None
    assert mapping.tolist() == [5, 17, 999]
    assert f"classes: 3 of the {classes} of the model, matched by name: labels in the order of ImageNet's" in line
    with pytest.raises(UserError, match="class 'n99999999' of the data is not among"):
        Opening().match(samples_of([*some, "n99999999"]), model)


def test_wordnet_folders_with_names_in_words_in_the_checkpoint() -> None:
    model = with_names(tiny_vit(num_classes=1000), list(imagenet_words(1000)))
    mapping, _, _ = Opening().match(samples_of([imagenet_synsets(1000)[label] for label in (1, 0)]), model)
    assert mapping is not None
    assert mapping.tolist() == [1, 0]


def test_fewer_classes_without_names_are_said_to_be_the_first() -> None:
    mapping, _, line = Opening().match(samples_of(["dog", "wolf"]), tiny_vit())
    assert mapping is None
    assert line == (
        "classes: 2 of the 10 of the model, 'dog' ... 'wolf'; in the data's order, the checkpoint gives no names: they "
        "stand for the first labels of the model"
    )


def test_placeholders_are_no_names_and_a_list_of_another_length_is_an_error() -> None:
    assert label_names(with_names(tiny_vit(), [f"LABEL_{i}" for i in range(10)])) == []
    with pytest.raises(UserError, match="gives 3 class names for a head of 10 classes"):
        label_names(with_names(tiny_vit(), ["a", "b", "c"]))


def test_class_names_of_a_base_do_not_outlive_its_head(tmp_path: Path) -> None:
    from engine.jobs.start import pretrained

    base = save_checkpoint(with_names(tiny_vit(num_classes=4), list("abcd")), tmp_path / "base")
    model = pretrained(str(base), {}, open_source("digits"))
    assert (spec_of(model).label_names, model.num_classes) == ([], 10)
    assert isinstance(model, torch.nn.Module)
