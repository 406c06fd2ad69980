from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness.launched import Launched, rank_of, unlearn_arguments
from bench.reliability.chaos import (
    Job,
    Kill,
    Stage,
    differences,
    disturbed_run,
    doing,
    draw_runs,
    folder_state,
    unreadable,
)
from bench.reliability.two_hosts import run_two_hosts
from engine.errors import UserError
from engine.run.folder import RunFolder

pytestmark = pytest.mark.slow  # runs of the engine, in processes of their own

# A run that does what the engine does to its folder, in less than a second and without torch.
FAKE = """
import json, pathlib, shutil, sys, time, zipfile
out, drift = pathlib.Path(sys.argv[1]), sys.argv[2]
resumed = (out / "config.yaml").exists()
assert resumed == (sys.argv[3] == "True")
(out / "resume").mkdir(parents=True, exist_ok=True)
(out / "config.yaml").touch()
current, history = out / "resume" / "current.json", out / "history.jsonl"
if (out / "model.safetensors").exists() and not current.exists():
    shutil.rmtree(out / "resume")
    sys.exit(2)
start = json.loads(current.read_text())["step"] + 1 if current.exists() else 0
for step in range(start, 12):
    time.sleep(0.02)
    place = out / "resume" / f"0-{step:08d}"
    place.mkdir(exist_ok=True)
    with zipfile.ZipFile(place / "state.pt", "w") as archive:
        archive.writestr("state", str(step))
    time.sleep(0.02)
    with open(history, "a") as handle:
        handle.write(f"{step}\\n")
    size = (place / "state.pt").stat().st_size
    (out / "new.json").write_text(json.dumps({"tag": place.name, "step": step, "files": {"state.pt": size}}))
    (out / "new.json").replace(current)
history.write_text("".join(f"{step}\\n" for step in range(12)))
(out / "model.safetensors").write_text("weights" + (" of another run" if resumed and drift == "weights" else ""))
(out / "metrics.json").write_text(json.dumps({"gap": 1.0, "seconds": {"unlearn": time.time()}}))
current.unlink()
time.sleep(0.3)
shutil.rmtree(out / "resume")
sys.exit(3 if resumed and drift == "exit" else 0)
"""

LAUNCHER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, "RANK": str(rank)})
         for rank in range(2)]
print("stopped (rank 1): gone", flush=True)
time.sleep(60)
"""


class FakeJob(Job):
    drift = ""

    def arguments(self, original: Path, out: Path, resume: bool) -> list[str]:
        return ["fake_run", str(out), self.drift, str(resume)]


class DriftingJob(FakeJob):
    drift = "weights"


class FailingJob(FakeJob):
    drift = "exit"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_run.py").write_text(FAKE)
    (tmp_path / "modules" / "fake_launcher.py").write_text(LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("job", "problem"), [(FakeJob, ""), (DriftingJob, "model.safetensors differs"), (FailingJob, "exit code 3")]
)
def test_a_killed_run_is_resumed_and_one_that_ends_otherwise_is_noticed(
    tmp_path: Path, job: type[Job], problem: str
) -> None:
    row = disturbed_run(Stage(tmp_path), 1, job(None, "none"), [Kill("checkpoint", 0.5, 0.2, None)])
    assert (len(row["kills"]), row["resumes"]) == (1, 1)
    assert row["kills"][0]["exit_code"] == -9
    assert row["equal"] == (not problem)
    assert problem in "; ".join(row["problems"])


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("moment", ["start-up", "training", "report"])
def test_each_moment_comes_and_a_second_kill_hits_the_resumed_run(tmp_path: Path, moment: str) -> None:
    kills = [Kill(moment, 0.3, 0.0, None), Kill("checkpoint", 0.0, 0.0, None)]
    row = disturbed_run(Stage(tmp_path), 1, FakeJob(None, "none"), kills)
    assert row["equal"], row["problems"]
    # In the report it is killed while it removes resume/: nothing is left to be killed a second time.
    assert [kill["moment"] for kill in row["kills"]] == ([moment] if moment == "report" else [moment, "checkpoint"])


@pytest.mark.usefixtures("modules")
def test_a_run_that_is_over_before_its_kill_is_started_again(tmp_path: Path) -> None:
    row = disturbed_run(Stage(tmp_path), 1, FakeJob(None, "none"), [Kill("report", 1.5, 0.0, None)])
    assert (len(row["kills"]), row["equal"]) == (1, True)


@pytest.mark.usefixtures("modules")
def test_one_rank_is_killed_alone_and_everything_at_once(tmp_path: Path) -> None:
    launched = Launched(["fake_launcher"], tmp_path / "log")

    def ranks() -> list[int | None]:
        return sorted(rank_of(child) for child in psutil.Process(launched.process.pid).children() if child.is_running())

    try:
        while not launched.output() or len(ranks()) < 2:
            time.sleep(0.01)
        assert launched.output() == "stopped (rank 1): gone"
        assert ranks() == [0, 1]
        children = psutil.Process(launched.process.pid).children()
        assert launched.kill(rank=1)
        assert not launched.kill(rank=7)
        while sum(child.status() == psutil.STATUS_ZOMBIE for child in children) < 1:
            time.sleep(0.01)
        assert [child.environ()["RANK"] for child in children if child.status() != psutil.STATUS_ZOMBIE] == ["0"]
        assert launched.running()
    finally:
        assert launched.kill()
    assert launched.wait(5) == -9
    assert not any(child.is_running() for child in children)
    assert not launched.kill()


def result(folder: Path, **changed: object) -> Path:
    folder.mkdir()
    values = {"weights": "w", "history": "1\n2\n", "metrics": {"gap": 1, "seconds": {"unlearn": 1}}, **changed}
    (folder / "model.safetensors").write_text(str(values["weights"]))
    (folder / "history.jsonl").write_text(str(values["history"]))
    (folder / "metrics.json").write_text(json.dumps(values["metrics"]))
    return folder


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"metrics": {"gap": 1, "seconds": {"unlearn": 2, "more": 3}}}, []),
        ({"weights": "v"}, ["model.safetensors differs"]),
        ({"history": "1\n3\n"}, ["history.jsonl differs from line 2 on (2 lines, 2 expected)"]),
        ({"history": "1\n2\n2\n"}, ["history.jsonl differs from line 3 on (3 lines, 2 expected)"]),
        ({"history": "1\n"}, ["history.jsonl differs from line 2 on (1 lines, 2 expected)"]),
        ({"metrics": {"gap": 2, "mia": 1, "seconds": {}}}, ["metrics.json differs in gap, mia"]),
    ],
)
def test_differences_of_two_results(tmp_path: Path, changed: dict[str, object], found: list[str]) -> None:
    assert differences(result(tmp_path / "a"), result(tmp_path / "b", **changed)) == found


def test_files_too_many_and_too_few_are_differences(tmp_path: Path) -> None:
    first, second = result(tmp_path / "a"), result(tmp_path / "b")
    (second / "resume").mkdir()
    (second / ".metrics.json.1.tmp").touch()
    (second / "model.safetensors").unlink()
    assert differences(first, second) == ["left over: .metrics.json.1.tmp, resume", "missing: model.safetensors"]


def test_what_a_killed_run_was_doing_is_read_from_its_folder(tmp_path: Path) -> None:
    out, resume = tmp_path / "out", tmp_path / "out" / "resume"
    said = [doing(out)]
    resume.mkdir(parents=True)
    (out / "config.yaml").touch()
    said.append(doing(out))
    (resume / "0-00000002").mkdir()
    said.append(doing(out))
    (resume / "current.json").write_text(json.dumps({"tag": "0-00000002", "files": {}}))
    said.append(doing(out))
    (resume / "0-00000004").mkdir()
    said.append(doing(out))
    (resume / "current.json").write_text(json.dumps({"tag": "0-00000004", "files": {}}))
    said.append(doing(out))
    (out / ".model.safetensors.12.tmp").touch()
    said.append(doing(out))
    (out / ".model.safetensors.12.tmp").rename(out / "model.safetensors")
    said.append(doing(out))
    assert folder_state(out) == "unfinished"
    (resume / "current.json").unlink()  # half of resume/ is left, nothing to resume
    said.append(doing(out))
    assert said == [
        "before config.yaml",
        "before the first checkpoint",
        "writing the first checkpoint",
        "training",
        "writing a checkpoint",
        "removing the checkpoint before",
        "writing model.safetensors",
        "evaluation and report",
        "after the end",
    ]


def test_a_checkpoint_that_does_not_open_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    folder.save({"phase": 0, "step": 2}, lambda place: torch.save({"w": torch.zeros(99)}, place / "model.pt"))
    path = tmp_path / "run" / "resume" / "0-00000002" / "model.pt"
    whole = path.read_bytes()
    assert unreadable(tmp_path / "run") == []
    for content in (whole[:-1], whole + b"\0", b"\0" * len(whole), whole[:700] + b"\x7f" * 9 + whole[709:]):
        path.write_bytes(content)
        assert unreadable(tmp_path / "run") == ["model.pt of the checkpoint is missing or damaged"]
    path.unlink()
    assert unreadable(tmp_path / "run") == ["model.pt of the checkpoint is missing or damaged"]
    (tmp_path / "run" / "model.safetensors").touch()
    (tmp_path / "run" / "config.json").write_text("{")
    assert len(unreadable(tmp_path / "run")) == 2


def test_runs_are_drawn_by_the_seed_over_all_jobs_and_moments() -> None:
    jobs = [Job(2, "deepspeed"), Job(3, "torchrun"), Job(None, "none")]
    drawn = list(draw_runs(20, jobs, seed=0))
    assert drawn == list(draw_runs(20, jobs, seed=0)) != list(draw_runs(20, jobs, seed=1))
    assert Counter(kills[0].moment for _, kills in drawn) == {
        "checkpoint": 8,
        "training": 6,
        "report": 4,
        "start-up": 2,
    }
    assert sum(len(kills) == 2 for _, kills in drawn) == 5
    assert {kill.victim for job, kills in drawn if job.ranks == 2 for kill in kills} == {"all", "rank 0", "rank 1"}
    assert {kill.victim for job, kills in drawn if job.ranks == 1 for kill in kills} == {"all"}


def test_the_command_of_a_job(tmp_path: Path) -> None:
    original, out = tmp_path / "original", tmp_path / "out"
    one = Job(None, "none").arguments(original, out, resume=False)
    assert one == unlearn_arguments(original, out, 50, None)
    assert "--deepspeed" not in one
    assert "--resume" not in one
    for launcher in ("deepspeed", "torchrun"):
        two = Job(3, launcher).arguments(original, out, resume=True)
        assert two[-len(one) - 3 :] == unlearn_arguments(original, out, 25, 3, resume=True)
        assert two[-1] == "--resume"


def test_wrong_use_of_chaos_and_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    said = CliRunner().invoke(app, ["chaos", "--stages", "2,x"])
    assert isinstance(said.exception, UserError)
    assert "configs/zeroN.json" in str(said.exception)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="needs root"):
        run_two_hosts()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install iproute2"):
        run_two_hosts()
