"""The command as a user types it: exit codes, one-line errors, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Lethe, one_line
from toys import tiny_vit

from engine.audit.record import recorded
from engine.audit.record_check import verify_record
from engine.cli import app as cli
from engine.config import read_yaml
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256

FORGET = "random:0.02@0"
QUICK = ["--set", "max_steps=2", "--set", "batch_size=32", "--set", "precision=fp32"]
ACCEPT = "--accept-accuracy"  # most models here were never trained


def unlearn_args(original: Path, out: Path, /, **changed: str) -> list[str]:
    options = {
        "checkpoint": str(original),
        "data": "digits",
        "forget": FORGET,
        "out": str(out),
        "method": "lethe",
        **changed,
    }
    return ["unlearn", *(text for key, value in options.items() for text in (f"--{key}", value)), *QUICK, ACCEPT]


def test_unlearn_fills_the_run_folder(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    before = weights_sha256(load_checkpoint(checkpoint))
    reference = save_checkpoint(tiny_vit(seed=1), tmp_path / "reference")
    code, out, err = lethe(
        *unlearn_args(checkpoint, tmp_path / "run"), "--reference", reference, "--json", tmp_path / "deep" / "m.json"
    )
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        [
            "config.yaml",
            "history.jsonl",
            "config.json",
            "model.safetensors",
            "metrics.json",
            "record.json",
            "record.salt",
            "report.html",
        ]
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == json.loads((tmp_path / "deep" / "m.json").read_text())
    assert {"accuracy", "mia", "reference", "gap", "seconds", "samples_seen", "original"} <= set(metrics)
    assert {"unlearn", "forget_phase", "retain_phase", "evaluate"} <= set(metrics["seconds"])
    assert "gap: mean absolute difference" in out
    assert "higher = better forgotten" in out
    assert weights_sha256(load_checkpoint(checkpoint)) == before
    after = weights_sha256(load_checkpoint(tmp_path / "run"))
    references = [weights_sha256(load_checkpoint(reference))]
    weights = {"before": before, "after": after, "references": references}
    assert verify_record(tmp_path / "run") == []
    assert recorded(tmp_path / "run", "weights") == weights


def test_the_default_method_is_that_which_passes_the_verdict(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    args = ["unlearn", "--checkpoint", checkpoint, "--data", "digits", "--forget", FORGET, "--out", tmp_path / "run"]
    code, _, err = lethe(*args, *QUICK, ACCEPT)
    assert code == 0, err
    assert read_yaml(tmp_path / "run" / "config.yaml")["method"] == "lethe_plus"


def test_a_verdict_in_the_same_command(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    """It is that of lethe verify, and so is the exit code."""
    args = unlearn_args(checkpoint, tmp_path / "run")
    code, out, err = lethe(*args, "--verify")
    assert code == 3, err
    assert "INSUFFICIENT EVIDENCE" in out
    assert "have nothing to be compared with" not in out  # the verdict says it
    kept = json.loads((tmp_path / "run" / "verdict.json").read_text())
    given = ("--data", "digits", "--forget", FORGET, "--original", checkpoint, ACCEPT, "--set", "precision=fp32")
    lethe("verify", "--checkpoint", tmp_path / "run", *given, "--json", tmp_path / "v.json")
    again = json.loads((tmp_path / "v.json").read_text())
    assert [(gate["name"], gate["status"]) for gate in kept["gates"]] == [
        (gate["name"], gate["status"]) for gate in again["gates"]
    ]
    assert verify_record(tmp_path / "run") == []


def test_what_a_verdict_needs_is_checked_before_the_run(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    args = unlearn_args(checkpoint, tmp_path / "run")
    for extra, words in (
        (("--pool", tmp_path), "give --verify too"),
        (("--verify", "--pool", tmp_path, "--reference", checkpoint), "give --pool or --reference, not both"),
        (("--verify", "--pool", tmp_path / "none"), "none"),
    ):
        code, _, err = lethe(*args, *extra)
        assert (code, words in err) == (2, True), err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluate_agrees_with_unlearn(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    assert lethe(*unlearn_args(checkpoint, tmp_path / "run"))[0] == 0
    task, config = Task.open("digits", FORGET), {"max_steps": 2, "precision": "fp32"}
    first, second = tmp_path / "r1", tmp_path / "r2"
    for seed, reference in enumerate((first, second)):
        train_job(task.source, tiny_vit(), reference, task=task, config={**config, "epochs": 1, "seed": seed})
    code, out, err = lethe(
        "evaluate",
        "--checkpoint",
        tmp_path / "run",
        "--data",
        "digits",
        "--forget",
        FORGET,
        "--original",
        checkpoint,
        "--reference",
        first,
        "--reference",
        second,
        "--json",
        tmp_path / "e.json",
        "--set",
        "precision=fp32",
        ACCEPT,
    )
    assert code == 0, err
    evaluated, unlearned = (
        json.loads((tmp_path / "e.json").read_text()),
        json.loads((tmp_path / "run" / "metrics.json").read_text()),
    )
    assert evaluated["accuracy"] == unlearned["accuracy"]
    assert evaluated["mia"] == unlearned["mia"]
    assert evaluated["noise_floor"]["average"] > 0
    assert "noise floor" in out


def test_train_with_forget_leaves_the_samples_out(lethe: Lethe, tmp_path: Path, checkpoint: Path) -> None:
    code, out, err = lethe(
        "train",
        "--data",
        "digits",
        "--arch",
        checkpoint,
        "--out",
        tmp_path / "t",
        "--forget",
        FORGET,
        "--epochs",
        "1",
        "--seed",
        "3",
        *QUICK,
        "--json",
        tmp_path / "t.json",
    )
    assert code == 0, err
    assert "accuracy: train" in out
    config = (tmp_path / "t" / "config.yaml").read_text()
    assert "method: retrain" in config
    assert "retain: 1409" in config  # 1438 less 29
    assert load_checkpoint(tmp_path / "t").embed_dim == 32
    assert set(json.loads((tmp_path / "t.json").read_text())["accuracy"]) == {"train", "test"}


def test_train_builds_a_timm_architecture(lethe: Lethe, tmp_path: Path) -> None:
    arguments = ["img_size=8", "patch_size=4", "in_chans=1", "embed_dim=16", "depth=1", "num_heads=1"]
    code, _, err = lethe(
        "train",
        "--data",
        "digits",
        "--arch",
        "vit_tiny_patch16_224",
        "--out",
        tmp_path / "t",
        "--epochs",
        "0.1",
        *QUICK,
        *(t for a in arguments for t in ("--model-arg", a)),
    )
    assert code == 0, err
    assert load_checkpoint(tmp_path / "t").num_classes == 10


def test_methods_lists_all_and_one(lethe: Lethe, tmp_path: Path) -> None:
    code, out, _ = lethe("methods", "--json", tmp_path / "m.json")
    assert code == 0
    assert "(one process)" in out
    found = json.loads((tmp_path / "m.json").read_text())
    assert {"lethe", "retrain", "finetune", "gradient_ascent", "random_labels"} <= set(found)
    assert (found["lethe"]["one_process"], found["s3t"]["needs_checkpoint"]) == ("", "`lethe train --sliced`")
    code, out, _ = lethe("methods", "s3t")
    assert "Runs on one process: each stage freezes other weights" in out
    assert "Needs a checkpoint of `lethe train --sliced`." in out
    code, out, _ = lethe("methods", "lethe")
    assert "temperature" in out
    assert "collapse_drop" in out


def test_env_prints_versions_and_that_kernels_is_ours(lethe: Lethe, tmp_path: Path) -> None:
    code, _, _ = lethe("env", "--json", tmp_path / "env.json")
    assert code == 0
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["kernels"] == "ours"
    assert facts["backends"]["cpu"].startswith("eager; the tensors are on the CPU")
    assert "all layers in one launch from a batch of" in facts["rollout"]
    assert (
        facts["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ in facts["packages"]["torch"]
    )


@pytest.mark.slow
def test_env_notices_a_foreign_package_called_lethe_kernels(tmp_path: Path) -> None:
    (tmp_path / "lethe_kernels").mkdir()
    (tmp_path / "lethe_kernels" / "__init__.py").write_text("")
    root = Path(cli.__file__).parents[2]
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; sys.argv = ['lethe', 'env']"
    script += "; from engine.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not lethe's" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_module_entry_point_and_help_teach() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine", "unlearn", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--checkpoint", "parquet:FOLDER", "random:FRACTION@SEED", "--reference", "--resume"):
        assert word in done.stdout


def test_the_command_line_is_read_without_loading_torch() -> None:
    """Red before: one option's default loaded it, and `lethe --help` took seconds."""
    script = "import sys; import engine.cli.app; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changed", "extra", "message"),
    [
        ({"forget": "missing.txt"}, [], "no such file"),
        ({"forget": "class:eleven"}, [], "no such class"),
        ({"forget": "random:0@1"}, [], "names no samples"),
        ({"forget": "random:1@1"}, [], "leaves nothing to retain"),
        ({"method": "letha"}, [], "unknown method 'letha'; did you mean 'lethe'"),
        ({"data": "digitz"}, [], "unknown data source 'digitz'; did you mean 'digits'"),
        ({}, ["--set", "temprature=1"], "unknown option 'temprature'; did you mean 'temperature'"),
        ({}, ["--set", "precision=int8"], "option precision='int8'"),
        ({}, ["--set", "kernels.backend=triton"], "triton"),
        ({}, ["--config", "missing.yaml"], "does not exist"),
        ({}, ["--reference", "missing"], "checkpoint missing is not a folder"),
        ({"checkpoint": "missing"}, [], "checkpoint missing is not a folder"),
        ({}, ["--resume"], "holds no run to resume"),
    ],
)
def test_wrong_use_is_one_line_with_exit_code_2_and_writes_nothing(
    lethe: Lethe, checkpoint: Path, tmp_path: Path, changed: dict[str, str], extra: list[str], message: str
) -> None:
    code, _, err = lethe(*unlearn_args(checkpoint, tmp_path / "run", **changed), *extra)
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_non_vit_and_labels_outside_the_head(lethe: Lethe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are errors before the accuracy is measured, which took minutes on a CPU."""
    from engine.models.spec import ModelSpec

    def too_late(*arguments: object) -> None:
        raise AssertionError("the accuracy was measured first")

    monkeypatch.setattr("engine.jobs.opening.measure_accuracy", too_late)
    resnet = ModelSpec(architecture="resnet10t", num_classes=10, model_args={}, pretrained_cfg={}).build(seed=0)
    code, _, err = lethe(*unlearn_args(save_checkpoint(resnet, tmp_path / "resnet"), tmp_path / "run"))
    assert (code, "not a Vision Transformer" in one_line(err)) == (2, True)
    small = save_checkpoint(tiny_vit(num_classes=4), tmp_path / "small")
    code, _, err = lethe(*unlearn_args(small, tmp_path / "run"))
    assert (code, "head has 4 classes" in one_line(err)) == (2, True)


def test_an_image_that_does_not_decode_is_named(lethe: Lethe, tmp_path: Path, checkpoint: Path, parquet_folder) -> None:
    folder = parquet_folder(spoil={7: b"broken"})
    code, _, err = lethe(*unlearn_args(checkpoint, tmp_path / "run", data=f"parquet:{folder}", forget="random:0.9@0"))
    assert (code, "image 'train/0007.png' does not decode" in one_line(err)) == (2, True)


def test_a_second_run_needs_a_word(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    arguments = unlearn_args(checkpoint, tmp_path / "run")
    assert lethe(*arguments)[0] == 0
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, err = lethe(*arguments)
    assert (code, "--overwrite" in one_line(err)) == (2, True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    assert lethe(*arguments, "--overwrite")[0] == 0


def test_a_run_that_stops_exits_with_4(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = lethe(*unlearn_args(checkpoint, tmp_path / "run"), "--set", "forget_lr=1e30", "--set", "grad_clip=0")
    assert code == 4  # 1 is a bad result; of this run there is none
    assert "is not finite" in one_line(err)


@pytest.mark.slow
def test_a_collapsed_run_keeps_its_evidence_and_exits_with_1(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    learn = ["--epochs", "6", "--set", "lr=0.005", "--set", "batch_size=50", "--set", "precision=fp32"]
    assert lethe("train", "--data", "digits", "--arch", checkpoint, "--out", tmp_path / "good", *learn)[0] == 0
    settings = ["max_steps=20", "forget_lr=0.05", "forget_epochs=20", "retain_epochs=0", "collapse_drop=100"]
    code, _, err = lethe(
        *unlearn_args(tmp_path / "good", tmp_path / "run"), *(t for s in settings for t in ("--set", s))
    )
    assert code == 1
    assert "COLLAPSED" in err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["collapsed"] is True
    assert "collapsed" in (tmp_path / "run" / "report.html").read_text()


def test_a_yaml_file_of_options_and_set_over_it(lethe: Lethe, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("temperature: 0.5\nseed: 4\n")
    code, _, err = lethe(
        *unlearn_args(checkpoint, tmp_path / "run"), "--config", tmp_path / "options.yaml", "--set", "seed=9"
    )
    assert code == 0, err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "temperature: 0.5" in config
    assert "seed: 9" in config


@pytest.mark.slow
@pytest.mark.minutes
def test_the_demo_from_start_to_report(lethe: Lethe, tmp_path: Path) -> None:
    code, out, err = lethe("demo", "--out", tmp_path / "demo", "--json", tmp_path / "demo.json")
    assert code == 0, err
    metrics = json.loads((tmp_path / "demo.json").read_text())
    assert metrics["accuracy"]["test"] > 0.9
    assert not metrics["collapsed"]
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert "noise floor" in out
