"""`lethe train --references N`: several references, each trained once, and their folder as `--reference`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import invoke as lethe

from engine.config import read_yaml
from engine.errors import UserError
from engine.jobs.references import ReferenceRun, each_reference, reference_runs, train_references
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.runtime import lock

FORGET = "random:0.1@0"
SHORT = ["--epochs", 1, "--set", "max_steps=2", "--set", "batch_size=32", "--set", "precision=fp32"]
ARCH = ["--arch", "vit_tiny_patch16_224"]
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1}
ARGS = [word for key, value in SMALL.items() for word in ("--model-arg", f"{key}={value}")]


def train(out: Path, count: int, *more: object) -> tuple[int, str]:
    command = ["train", *ARCH, *ARGS, "--data", "digits", "--forget", FORGET, *SHORT, "--out", out]
    return lethe(*command, "--references", count, *more)


def digests(out: Path) -> dict[str, str]:
    return {path.name: weights_sha256(load_checkpoint(path)) for path in sorted(out.glob("reference_*"))}


def test_each_reference_is_trained_once_with_a_seed_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "references"
    code, output = train(out, 2, "--seed", 4, "--json", tmp_path / "numbers.json")
    assert code == 0, output
    first = digests(out)
    assert len(set(first.values())) == 2
    assert [read_yaml(out / f"reference_{n}" / "config.yaml")["seed"] for n in (1, 2)] == [5, 6]
    rows = json.loads((tmp_path / "numbers.json").read_text())["references"]
    assert [(Path(row["folder"]).name, row["seed"], row["status"]) for row in rows] == [
        ("reference_1", 5, "trained"),
        ("reference_2", 6, "trained"),
    ]
    assert all(0 <= row["accuracy"]["test"] <= 1 for row in rows)

    code, output = train(out, 3, "--seed", 4)
    assert code == 0, output
    assert output.count("finished before") == 2
    assert "3 of 3 references are finished" in output
    assert {name: digest for name, digest in digests(out).items() if name in first} == first
    assert len(digests(out)) == 3

    code, output = train(out, 3, "--seed", 5)
    assert code == 2
    assert "another configuration" in output
    assert "seed" in output
    code, output = train(out, 3, "--seed", 4, "--model-arg", "depth=2")
    assert code == 2
    assert "another configuration (model_args.depth: 1 before, 2 now)" in output
    assert len(digests(out)) == 3


def test_a_model_that_another_process_trains_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "references"
    with lock.held(out / "reference_1"):
        code, output = train(out, 2)
    assert code == 0, output
    assert "1 of 2 references are finished; the others are in training in other processes" in output
    assert not (out / "reference_1" / "model.safetensors").exists()
    assert (out / "reference_2" / "model.safetensors").exists()
    with pytest.raises(UserError, match="reference_1 is not finished; repeat `lethe train --references`"):
        each_reference([str(out)])
    assert train(out, 2)[0] == 0
    assert each_reference([str(out), "other"]) == [str(out / "reference_1"), str(out / "reference_2"), "other"]


def test_a_model_that_was_begun_meanwhile_is_continued(tmp_path: Path) -> None:
    seen = []

    def begin_the_other(run: ReferenceRun) -> None:
        seen.append(run.resume)
        (tmp_path / "reference_2").mkdir(exist_ok=True)
        (tmp_path / "reference_2" / "config.yaml").touch()

    train_references(reference_runs(tmp_path, 0, 2), begin_the_other, print)
    assert seen == [False, True]


def test_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"reference_{number}").mkdir()
        (tmp_path / f"reference_{number}" / "model.safetensors").touch()
    (tmp_path / "reference_x").mkdir()
    assert [Path(each).name for each in each_reference([str(tmp_path)])] == [
        "reference_1",
        "reference_2",
        "reference_10",
    ]


def test_a_reference_is_given_once_and_is_a_model(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"reference_{number}").mkdir()
        (tmp_path / f"reference_{number}" / "model.safetensors").touch()
    for given in ([tmp_path, tmp_path / "reference_2"], [tmp_path, f"{tmp_path}/"], [tmp_path / "reference_1"] * 2):
        with pytest.raises(UserError, match="is given twice"):
            each_reference([str(each) for each in given])
    (tmp_path / "reference_3").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="reference_3 is not finished"):
        each_reference([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is an empty folder"):
        each_reference([str(tmp_path / "empty")])
    assert each_reference(["x.pth?arch=a", "timm:b", "x.pth?arch=c"]) == ["x.pth?arch=a", "timm:b", "x.pth?arch=c"]


@pytest.mark.parametrize("more", [["--overwrite"], ["--sliced"]])
def test_wrong_use(tmp_path: Path, more: list[str]) -> None:
    assert "--references goes neither with --sliced nor with --overwrite" in train(tmp_path / "r", 2, *more)[1]
    assert "give it by --seed 5" in train(tmp_path / "r", 2, "--set", "seed=5")[1]
    assert not (tmp_path / "r").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert "holds a model" in train(tmp_path / "model", 2)[1]
    command = ["train", *ARCH, *ARGS, "--data", "digits", *SHORT, "--out", tmp_path / "r", "--references", 2]
    code, output = lethe(*command)
    assert code == 2
    assert "--references needs --forget" in output


@pytest.mark.parametrize("count", [0, 33])
def test_counts_out_of_range(tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"--references {count}: expected 1 to 32"):
        reference_runs(tmp_path, 0, count)
