"""How commands end: exit codes, crashes, references of `evaluate`, the version, completion, a Hub out of reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Lethe, one_line
from test_cli import unlearn_args
from toys import tiny_vit

import engine
from engine.cli import exits
from engine.errors import EXIT_CODES, BadResult, ExitCode, RunStopped, UserError
from engine.jobs.evaluate import evaluate_models
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.jobs.unlearn import run_job
from engine.models.checkpoint import load_checkpoint, save_checkpoint


def crashing(*_: object, **__: object) -> None:
    raise ZeroDivisionError("made for this\ntest")


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.run.trainer.Trainer.begin", crashing)


def test_a_crash_is_no_verdict_and_its_traceback_lies_in_the_run_folder(
    lethe: Lethe,
    checkpoint: Path,
    tmp_path: Path,
    crash: None,
) -> None:
    code, _, err = lethe(*unlearn_args(checkpoint, tmp_path / "run"))
    assert code == 70
    assert "crash: ZeroDivisionError: made for this;" in one_line(err)
    found = list((tmp_path / "run").glob("crash-*.txt"))
    assert [str(found[0])] == [word for word in one_line(err).replace(";", " ").split() if word == str(found[0])]
    assert "in crashing" in found[0].read_text()
    assert not (tmp_path / "run" / "lock.json").exists()


@pytest.mark.slow
def test_the_next_run_clears_the_crash_away(
    lethe: Lethe,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("engine.run.trainer.Trainer.begin", crashing)
        lethe(*unlearn_args(checkpoint, tmp_path / "run"))
    assert lethe(*unlearn_args(checkpoint, tmp_path / "run"), "--resume")[0] == 0
    assert not list((tmp_path / "run").glob("crash*"))


def test_debug_prints_the_traceback(
    lethe: Lethe,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash: None,
) -> None:
    monkeypatch.setenv(exits.DEBUG, "1")
    code, _, err = lethe(*unlearn_args(checkpoint, tmp_path / "run"))
    assert code == 70
    assert "in crashing" in err
    monkeypatch.setenv(exits.DEBUG, "0")
    code, _, err = lethe("--debug", *unlearn_args(checkpoint, tmp_path / "run"), "--overwrite")
    assert (code, "in crashing" in err) == (70, True)


def test_a_crash_outside_a_run_is_kept_too(
    lethe: Lethe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.runtime.environment.environment", crashing)
    monkeypatch.setattr(exits.tempfile, "gettempdir", lambda: str(tmp_path))
    code, _, err = lethe("env")
    assert (code, "Traceback" in err) == (70, False)
    assert "in crashing" in next(tmp_path.glob("lethe-crash-*.txt")).read_text()
    monkeypatch.setattr(exits.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    assert "in crashing" in lethe("env")[2], "nowhere to keep it: printed"


def test_every_code_is_documented_and_told_apart(lethe: Lethe) -> None:
    assert set(EXIT_CODES) == set(ExitCode)
    assert (UserError.exit_code, RunStopped.exit_code, BadResult.exit_code) == (2, 4, 1)
    code, out, _ = lethe("--help")
    assert code == 0
    words = " ".join(out.split())
    for each, meaning in EXIT_CODES.items():
        assert f"{int(each)}: {meaning.split()[0]}" in words


_WAITING = """
import sys, time, typer
from pathlib import Path
from engine.cli.app import run_app
from engine.runtime.lock import held
app = typer.Typer()
@app.command()
def wait(folder: Path):
    with held(folder):
        time.sleep(600)
run_app(app)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_command_in_order(tmp_path: Path, number: int, code: int) -> None:
    lock = tmp_path / "held" / "lock.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING, lock.parent],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for _ in range(600):
        if lock.exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert not lock.exists()


def test_the_version_and_completion(lethe: Lethe) -> None:
    assert lethe("--version")[:2] == (0, f"lethe {engine.__version__}\n")
    assert "--install-completion" in lethe("--help")[1]
    environment = {**os.environ, "_LETHE_COMPLETE": "complete_bash", "COMP_WORDS": "lethe unl", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['lethe']; from engine.cli.app import app; app(prog_name='lethe')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "unlearn" in done.stdout


# --- references of evaluate -------------------------------------------------------------------------------------------


@pytest.fixture
def task() -> Task:
    return Task.open("digits", "random:0.1@0")


def test_the_original_is_no_reference(task: Task, tmp_path: Path) -> None:
    original = str(save_checkpoint(tiny_vit(), tmp_path / "original"))
    copy = str(save_checkpoint(tiny_vit(), tmp_path / "copy"))
    other = str(save_checkpoint(tiny_vit(5), tmp_path / "model"))
    for reference in (original, copy):
        with pytest.raises(UserError, match=rf"--reference {reference}: its weights are those of the original"):
            evaluate_models(task, other, original, [reference], {})
    with pytest.raises(UserError, match="its weights are those of the original"):
        run_job(task, original, tmp_path / "run", references=[copy])
    assert not (tmp_path / "run").exists()


def test_a_reference_counts_once(task: Task, tmp_path: Path) -> None:
    model = str(save_checkpoint(tiny_vit(5), tmp_path / "model"))
    first, again = (str(save_checkpoint(tiny_vit(1), tmp_path / name)) for name in ("first", "again"))
    with pytest.raises(UserError, match=rf"--reference {again}: its weights are those of --reference {first}"):
        evaluate_models(task, model, None, [first, again], {})
    with pytest.raises(UserError, match="its weights are those of the model that is evaluated"):
        evaluate_models(task, model, None, [first, model], {})
    metrics = evaluate_models(task, model, None, [first], {"precision": "fp32"})
    assert metrics["reference"]["count"] == 1


def test_a_reference_by_its_record_and_by_what_it_predicts(task: Task, tmp_path: Path) -> None:
    config = {"max_steps": 2, "epochs": 1.0, "precision": "fp32"}
    train_job(task.source, tiny_vit(), tmp_path / "all", config=config)
    model = str(save_checkpoint(tiny_vit(5), tmp_path / "model"))
    with pytest.raises(UserError, match=r"by its record.json it was trained on all samples"):
        evaluate_models(task, model, None, [str(tmp_path / "all")], {})
    stranger = str(save_checkpoint(tiny_vit(7), tmp_path / "stranger"))
    original = str(save_checkpoint(tiny_vit(8), tmp_path / "original"))
    with pytest.raises(UserError, match=r"it fits the forget samples as well as the original does"):
        evaluate_models(task, model, original, [stranger], {"precision": "fp32"})


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "hf-hub:nobody/nothing"])
def test_a_hub_out_of_reach_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=rf"{name}: its weights are not on this machine.*HF_HUB_OFFLINE.*local folder"):
        load_checkpoint(name)


def test_names_that_timm_does_not_have() -> None:
    with pytest.raises(UserError, match=r"no such architecture; did you mean 'vit_tiny_patch16_224'"):
        load_checkpoint("timm:vit_tinny_patch16_224")
    with pytest.raises(UserError, match=r"Invalid pretrained tag.*timm.list_pretrained"):
        load_checkpoint("timm:vit_tiny_patch16_224.nope")


def test_an_output_folder_below_a_file_is_one_line(lethe: Lethe, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("1")
    for out in (file, file / "run"):
        words = ("unlearn", "--checkpoint", checkpoint, "--data", "digits", "--forget", "random:0.1@0", "--out", out)
        code, _, err = lethe(*words)
        assert (code, one_line(err)) == (2, f"error: {out}: {file} is a file; give a folder")
