"""`lethe pool` and `lethe certify`, and what refuses them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Lethe
from digit_pool import make_pool
from toys import tiny_vit

from engine.data import open_source
from engine.models.checkpoint import save_checkpoint

QUICK = [
    *("--data", "digits", "--models", 4, "--share", 0.5, "--epochs", 1, "--key", "k"),
    *("--set", "max_steps=2", "--set", "batch_size=32", "--set", "precision=fp32"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_vit(), tmp_path_factory.mktemp("original") / "original")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", open_source("digits")).folder


@pytest.mark.slow
def test_two_processes_train_every_model_once(original: Path, lethe: Lethe, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    words = [*map(str, QUICK), "--arch", str(original), "--out", str(folder)]
    command = [sys.executable, "-m", "engine", "pool", "train", *words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert [code for _, code in ends] == [0, 0], ends
    times = {path: path.stat().st_mtime for path in folder.glob("model_*/model.safetensors")}
    assert len(times) == 4
    code, out, _ = lethe("pool", "train", *QUICK, "--arch", original, "--out", folder, "--json", tmp_path / "t.json")
    assert code == 0
    assert out.count("finished before") == 4
    assert "pool in" in out
    assert {path: path.stat().st_mtime for path in times} == times
    found = json.loads((tmp_path / "t.json").read_text())
    assert [row["status"] for row in found["models"]] == ["finished before"] * 4
    assert found["unfinished"] == []


def test_a_verdict_by_a_pool_in_the_same_command(original: Path, pool: Path, lethe: Lethe, tmp_path: Path) -> None:
    words = ("--data", "digits", "--forget", "random:0.1@0", "--set", "max_steps=2", "--set", "precision=fp32")
    words = (*words, "--out", tmp_path / "run", "--accept-accuracy", "--verify", "--pool", pool)
    code, out, err = lethe("unlearn", "--checkpoint", original, *words)
    assert code in (1, 3), err
    assert "for each sample 2 models of the pool" in " ".join(out.split()), out
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["kind"] == "pool"


def test_status_shows_what_is_covered(pool: Path, lethe: Lethe, tmp_path: Path) -> None:
    code, out, _ = lethe(
        "pool", "status", "--data", "digits", "--pool", pool, "--ids", tmp_path / "x", "--json", tmp_path / "s"
    )
    assert code == 0
    assert "covered: 1438 of 1438 samples" in out
    assert (tmp_path / "x").read_text() == ""
    assert json.loads((tmp_path / "s").read_text())["out_of_date"] is False


def test_one_member_alone(original: Path, lethe: Lethe, tmp_path: Path) -> None:
    words = [*QUICK, "--arch", original, "--out", tmp_path / "p"]
    code, out, _ = lethe("pool", "train", *words, "--member", 3)
    assert code == 0
    assert "1 of 1 models are finished" in out
    assert "complete" not in out
    assert {path.name for path in (tmp_path / "p").glob("model_*")} == {"model_3"}
    code, _, err = lethe("pool", "status", "--data", "digits", "--pool", tmp_path / "p")
    assert code == 2
    assert "not complete" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--member", 9], "the pool has models 1 to 4"),
        (["--share", 0.3], "--share 0.3"),
        (["--models", 3], "expected 4 to 64"),
        (["--set", "seed=1"], "give it by --seed 1"),
        (["--set", "no_such=1"], "no_such"),
        (["--seed", -5], "0 or more"),
        (["--key", "k" * 70], "expected 1 to 64"),
    ],
)
def test_wrong_options_train_nothing(
    original: Path, lethe: Lethe, tmp_path: Path, words: list[object], message: str
) -> None:
    code, _, err = lethe("pool", "train", *QUICK, "--arch", original, "--out", tmp_path / "p", *words)
    assert code == 2
    assert message in " ".join(err.split())
    assert not list((tmp_path / "p").glob("model_*"))


def test_a_recipe_that_is_not_the_originals_trains_nothing(pool: Path, lethe: Lethe, tmp_path: Path) -> None:
    """Such a pool would be refused once it is trained."""
    words = ("--data", "digits", "--models", 4, "--share", 0.5, "--arch", pool / "model_1", "--out", tmp_path / "p")
    code, _, err = lethe("pool", "train", *words)
    assert code == 2
    assert "epochs is 30.0, but the original" in " ".join(err.split())
    assert "--epochs 1 --set batch_size=32 --set max_steps=2" in " ".join(err.split())
    assert not (tmp_path / "p").exists()
    same = ("--epochs", 1, "--set", "batch_size=32", "--set", "max_steps=2", "--set", "precision=fp32")
    code, _, err = lethe("pool", "train", *words, *same, "--member", 1)
    assert code == 0, err


def test_a_verdict_by_the_pool_has_its_page(pool: Path, original: Path, lethe: Lethe, tmp_path: Path) -> None:
    code, _, err = lethe(
        *("verify", "--checkpoint", original, "--original", original, "--data", "digits"),
        *("--forget", "random:0.1@0", "--pool", pool, "--accept-accuracy"),
        *("--html", tmp_path / "p.html", "--json", tmp_path / "p.json"),
    )
    assert code == 1, err  # untouched
    page = (tmp_path / "p.html").read_text()
    assert "Kind of proof: a pool of reference models" in page
    assert "compared for each sample with 2 models of the pool" in page
    assert "images through models" in page
    assert json.loads((tmp_path / "p.json").read_text())["kind"] == "pool"
    code, _, err = lethe(
        *("verify", "--checkpoint", original, "--original", original, "--data", "digits"),
        *("--forget", "random:0.1@0", "--pool", pool, "--reference", original, "--accept-accuracy"),
    )
    assert (code, "give --pool or --reference, not both" in err) == (2, True)


def test_a_procedure_that_shows_nothing_is_not_certified(
    pool: Path, original: Path, lethe: Lethe, tmp_path: Path
) -> None:
    """An untrained original memorised nothing."""
    words = [
        *("certify", "--checkpoint", original, "--data", "digits", "--pool", pool, "--method", "finetune"),
        *("--size", 20, "--requests", 8, "--set", "max_steps=2", "--set", "batch_size=32", "--set", "precision=fp32"),
        *("--out", tmp_path / "c", "--json", tmp_path / "c.json"),
    ]
    code, out, err = lethe(*words)
    assert code == 3, err
    assert "NOT CERTIFIED" in out
    content = json.loads((tmp_path / "c" / "certificate.json").read_text())["content"]
    assert content == json.loads((tmp_path / "c.json").read_text())
    assert content["granted"] is False
    assert "power" in content["reason"]
    (counted,) = (json.loads(each.read_text()) for each in (pool / "certificates").iterdir())
    assert counted["result"] == content["reason"]
    code, _, err = lethe(*words, "--set", "lr=1e-4")
    assert code == 2
    assert "holds simulated requests that differ in options" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "all"], "expected one of random, class, near-duplicates"),
        (["--set", "seed=1"], "give the first by --seed"),
        (["--size", 0], "1 or more"),
        (["--size", 500, "--requests", 8], "take at most half of them"),
        (["--requests", 2], "at least 8"),
        (["--days", "1e9"], "at most 3650"),
        (["--days", "nan"], "at most 3650"),
        (["--seed", -1], "0 or more"),
        (["--pool", "none"], "holds no pool"),
        (["--method", "none"], "none"),
    ],
)
def test_wrong_options_simulate_nothing(
    pool: Path, original: Path, lethe: Lethe, tmp_path: Path, words: list[object], message: str
) -> None:
    before = set(pool.glob("certificates/*"))
    code, _, err = lethe(
        *("certify", "--checkpoint", original, "--data", "digits", "--pool", pool, "--method", "finetune"),
        *("--size", 5, "--out", tmp_path / "c", *words),
    )
    assert code == 2
    assert message in " ".join(err.split())
    assert not list((tmp_path / "c").glob("requests/*"))
    assert set(pool.glob("certificates/*")) == before
