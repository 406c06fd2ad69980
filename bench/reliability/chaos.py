"""Kill runs with SIGKILL, resume them, and compare them with an undisturbed run: `python -m bench chaos`.

A tiny ViT forgets a tenth of scikit-learn's digits on the CPU in float32: on two ranks through DeepSpeed's and torch's
launchers, and on one process. A run counts as the same if weights are equal in bytes, the history line by line, the
metrics except for their seconds, and the names of the remaining files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.harness.launched import (
    CONFIGS,
    END_WITHIN,
    MODEL,
    OPTIONS,
    PATIENCE,
    Job,
    Launched,
    deepspeed_port,
    require_good,
    train_arguments,
)
from bench.harness.report import Report
from engine.cli.console import console
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint
from engine.runtime.environment import extras
from engine.runtime.files import sha256

# Moments of the kills of ten runs. Start-up lasts until the first checkpoint.
MOMENTS = ("checkpoint",) * 4 + ("training",) * 3 + ("report",) * 2 + ("start-up",)


@dataclasses.dataclass(frozen=True)
class Kill:
    """A SIGKILL.

    at: position within its moment, in [0, 1). within: position in the writing of a checkpoint. rank: None for all.
    """

    moment: str
    at: float
    within: float
    rank: int | None

    @property
    def victim(self) -> str:
        return "all" if self.rank is None else f"rank {self.rank}"


# --- state of a run folder --------------------------------------------------------------------------------------------


def folder_state(out: Path) -> str:
    """Return new (nothing to resume), unfinished or finished, by the rules of `--resume`."""
    if not (out / "config.yaml").is_file():
        return "new"
    finished = (out / "model.safetensors").is_file() and not (out / "resume" / "current.json").exists()
    return "finished" if finished else "unfinished"


def doing(out: Path) -> str:
    """Return the activity of a run when it was killed, derived from its files."""
    state = folder_state(out)
    if state != "unfinished":
        return "before config.yaml" if state == "new" else "after the end"
    partial = sorted(path.name for path in out.glob(".*.tmp"))
    if partial:
        return f"writing {partial[0].split('.')[1]}.{partial[0].split('.')[2]}"
    if (out / "model.safetensors").is_file():
        return "evaluation and report"
    current, tags = _current(out), checkpoints(out)
    if current is None:
        return "writing the first checkpoint" if tags else "before the first checkpoint"
    if max(tags, default="") > current["tag"]:
        return "writing a checkpoint"
    return "removing the checkpoint before" if len(tags) > 1 else "training"


def checkpoints(out: Path) -> set[str]:
    """Return the folders under resume/, complete or not."""
    with contextlib.suppress(FileNotFoundError):
        return {entry.name for entry in os.scandir(out / "resume") if entry.is_dir()}
    return set()


def _current(out: Path) -> dict[str, Any] | None:
    """Return the current checkpoint: its tag, and its files with their sizes."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((out / "resume" / "current.json").read_text(encoding="utf-8"))
    return None


def differences(expected: Path, got: Path) -> list[str]:
    """Return the differences between a run folder and the expected one; empty if they have the same result."""
    found = []
    names, wanted = ({path.name for path in folder.iterdir()} for folder in (got, expected))
    for what, some in (("left over", names - wanted), ("missing", wanted - names)):
        if some:
            found.append(f"{what}: {', '.join(sorted(some))}")
    if "model.safetensors" in names and sha256(got / "model.safetensors") != sha256(expected / "model.safetensors"):
        found.append("model.safetensors differs")
    if "history.jsonl" in names:
        ours, theirs = ((folder / "history.jsonl").read_text().splitlines() for folder in (got, expected))
        for number, (one, other) in enumerate(itertools.zip_longest(ours, theirs), 1):
            if one != other:
                found.append(f"history.jsonl differs from line {number} on ({len(ours)} lines, {len(theirs)} expected)")
                break
    if "metrics.json" in names:
        numbers, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (got, expected))
        keys = sorted({*numbers, *theirs} - {"seconds"})
        differing = [key for key in keys if numbers.get(key) != theirs.get(key)]
        if differing:
            found.append(f"metrics.json differs in {', '.join(differing)}")
    return found


def unreadable(out: Path) -> list[str]:
    """Return what cannot be opened in the folder of an interrupted run: its checkpoint, its timm folder."""
    found = []
    current = _current(out) or {"tag": "", "files": {}}
    for name, size in current["files"].items():
        path = out / "resume" / current["tag"] / name
        if not path.is_file() or path.stat().st_size != size or _damaged(path):
            found.append(f"{name} of the checkpoint is missing or damaged")
    if (out / "config.json").is_file():
        try:
            load_checkpoint(out)
        except (UserError, OSError) as error:
            found.append(str(error).replace(str(out), "OUT"))
    return found


def _damaged(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return True


# --- killing, resuming, comparing -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Profile:
    """Seconds from the start at which an undisturbed run reached each moment. checkpoint_bytes: of the largest one."""

    first: float = 0.0
    model: float = 0.0
    end: float = 0.0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    checkpoint_bytes: int = 0


class Stage:
    """A folder with the original and, for each job, an undisturbed run to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.original = folder, folder / "original"
        self.profiles: dict[str, Profile] = {}

    def train(self) -> Stage:
        """Train the original."""
        require_good(Launched(train_arguments(self.original), self.folder / "train.log"))
        return self

    def expected(self, job: Job) -> Path:
        """Return the undisturbed run of a job, made at the first call."""
        out = self.folder / f"expected {job.name}"
        if job.name not in self.profiles:
            launched = Launched(job.arguments(self.original, out, resume=False), self.folder / f"{out.name}.log")
            self.profiles[job.name] = watch(launched, out)
            require_good(launched)
        return out


def watch(launched: Launched, out: Path) -> Profile:
    """Monitor a run until it ends."""
    profile, seen, since = Profile(), set[str](), 0.0
    while launched.running():
        new = checkpoints(out) - seen
        if new:
            seen |= new
            since = launched.elapsed()
            profile.first = profile.first or since
        current = _current(out)
        if since and current and current["tag"] == max(seen):
            profile.checkpoint_seconds = max(profile.checkpoint_seconds, launched.elapsed() - since)
            profile.checkpoint_bytes = max(profile.checkpoint_bytes, sum(current["files"].values()))
            since = 0.0
        if not profile.model and (out / "model.safetensors").is_file():
            profile.model = launched.elapsed()
        if folder_state(out) != "finished":
            profile.end = launched.elapsed()
        time.sleep(0.002)
    profile.checkpoints = len(seen)
    return profile


def await_moment(launched: Launched, out: Path, kill: Kill, profile: Profile) -> bool:
    """Wait for the moment of a kill; return False if the run ended before."""
    before = checkpoints(out)

    def reached(condition: Callable[[], bool]) -> bool:
        while not condition():
            if not launched.running() or launched.elapsed() > PATIENCE:
                return False
            time.sleep(0.002)
        return True

    def after(seconds: float) -> bool:
        until = launched.elapsed() + seconds
        return reached(lambda: launched.elapsed() >= until)

    if kill.moment == "start-up":
        return after(kill.at * profile.first)
    if kill.moment == "report":
        written = reached(lambda: (out / "model.safetensors").is_file())
        return written and after(kill.at * (profile.end - profile.model))
    if kill.moment == "training":
        begun = reached(lambda: bool(checkpoints(out) - before))
        return begun and after(kill.at * (profile.model - profile.first))
    # A resumed run has fewer checkpoints left to write: one of the next.
    ordinal = 1 + int(kill.at * (3 if before else profile.checkpoints))
    seen: set[str] = set()

    def one_more() -> bool:
        seen.update(checkpoints(out) - before)
        return len(seen) >= ordinal

    return reached(one_more) and after(kill.within * profile.checkpoint_seconds)


def disturbed_run(stage: Stage, number: int, job: Job, kills: Sequence[Kill]) -> dict[str, Any]:
    """Start a job, kill it once for each of `kills`, resume it to its end, and compare."""
    expected, profile = stage.expected(job), stage.profiles[job.name]
    out, log = stage.folder / f"run {number}", stage.folder / f"run {number}.log"
    done: list[dict[str, Any]] = []
    problems: list[str] = []
    resumes = 0
    for kill in (*kills, None):
        state = folder_state(out)
        if state == "finished" and not (out / "resume").exists():
            break
        resumes += state == "unfinished"
        launched = Launched(job.arguments(stage.original, out, resume=state != "new"), log)
        if kill and await_moment(launched, out, kill, profile) and launched.kill(kill.rank):
            killed, at = launched.elapsed(), doing(out)
            code = launched.wait(END_WITHIN)
            done.append(
                {"moment": kill.moment, "killed": kill.victim, "seconds": round(killed, 2), "doing": at}
                | {"seconds_to_end": round(launched.elapsed() - killed, 2), "exit_code": code}
                | {"said": launched.output().replace(str(stage.folder), "FOLDER")}
            )
            if code is None:
                problems.append(f"the launcher had not ended {END_WITHIN:.0f} s after {kill.victim} was killed")
            problems += unreadable(out)
            continue
        code = launched.wait()
        if code != (2 if state == "finished" else 0):  # --resume of a finished run removes leftovers and exits with 2
            problems.append(f"exit code {code} of a run that was not killed: {launched.tail()}")
            break
    problems += differences(expected, out)
    if kills and not done and not problems:  # the run ended before the kill: again, earlier
        shutil.rmtree(out)
        return disturbed_run(stage, number, job, [dataclasses.replace(kill, at=kill.at / 2) for kill in kills])
    row = {"run": number, "configuration": job.name, "launcher": job.launcher, "kills": done, "resumes": resumes}
    return row | {"equal": not problems, "problems": problems}


def draw_runs(runs: int, jobs: Sequence[Job], seed: int) -> Iterator[tuple[Job, list[Kill]]]:
    """Yield (job, kills) of each run: jobs in turn.

    Moments in the shares of MOMENTS, every fourth run is killed twice.
    """
    generator = random.Random(seed)
    moments = list(itertools.islice(itertools.cycle(MOMENTS), runs))
    generator.shuffle(moments)
    for number, moment in enumerate(moments):
        job = jobs[number % len(jobs)]
        kinds = [moment, generator.choice(("checkpoint", "report"))] if number % 4 == 3 else [moment]
        victims = [None, *range(job.ranks)] if job.ranks > 1 else [None]
        yield job, [Kill(kind, generator.random(), generator.random(), generator.choice(victims)) for kind in kinds]


def full_disk(stage: Stage, job: Job) -> dict[str, Any]:
    """Run the job on a tmpfs with space for one checkpoint but not for two; then on a larger one."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return {"left_out": "needs root on Linux, to mount a tmpfs"}
    expected, disk = stage.expected(job), stage.folder / "disk"
    size = stage.profiles[job.name].checkpoint_bytes * 3 // 2 + 2**18
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return {"left_out": "mounting a tmpfs is not allowed here"}
    out, log = disk / "run", stage.folder / "disk.log"
    try:
        launched = Launched(job.arguments(stage.original, out, resume=False), log)
        code, output = launched.wait(), launched.output().replace(str(stage.folder), "FOLDER")
        current = _current(out)
        row = {
            "configuration": job.name,
            "launcher": job.launcher,
            "disk_bytes": size,
            "exit_code": code,
            "said": output,
        }
        problems = unreadable(out)
        if code in (0, None) or "no space left" not in output:
            problems.append(f"exit code {code} on a full disk: {launched.tail()}")
        if current is None:
            problems.append("no checkpoint was left")
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        launched = Launched(job.arguments(stage.original, out, resume=True), log)
        if (code := launched.wait()) != 0:
            problems.append(f"exit code {code} when resumed: {launched.tail()}")
        problems += differences(expected, out)
        return row | {"checkpoint": current and current["tag"], "equal": not problems, "problems": problems}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- the command ------------------------------------------------------------------------------------------------------


def run_chaos(runs: int, stages: Sequence[int], seed: int = 0, json_file: Path | None = None) -> dict[str, Any]:
    """Print and return a row for each run and the full disk; `passed`: whether all ended the same."""
    unknown = [stage for stage in stages if not (CONFIGS / f"zero{stage}.json").is_file()]
    if unknown or not stages:
        raise UserError(f"--stages {','.join(map(str, stages))}: expected stages of configs/zeroN.json, such as 2,3")
    report, began = Report(environment={"deepspeed": extras()["deepspeed"]}), time.perf_counter()
    launchers = ("deepspeed", "torchrun")
    two_ranks = [Job(stage, launchers[(i + turn) % 2]) for turn in (0, 1) for i, stage in enumerate(stages)]
    rows = []
    with tempfile.TemporaryDirectory() as temporary, _shared_memory_freed():
        stage = Stage(Path(temporary)).train()
        for number, (job, kills) in enumerate(draw_runs(runs, [*two_ranks, Job(None, "none")], seed), 1):
            rows.append(disturbed_run(stage, number, job, kills))
            _print_row(rows[-1])
            shutil.rmtree(stage.folder / f"run {number}", ignore_errors=True)
        disk = full_disk(stage, two_ranks[0])
        profiles = {name: dataclasses.asdict(profile) for name, profile in stage.profiles.items()}
    same = sum(row["equal"] for row in rows)
    results = {
        "settings": {"runs": runs, "stages": list(stages), "seed": seed, "model": MODEL, **OPTIONS},
        "seconds": round(time.perf_counter() - began, 1),
        "undisturbed": profiles,
        "rows": rows,
        "full_disk": disk,
        "identical": same,
        "passed": same == runs and disk.get("equal", True),
    }
    _print(results)
    return report.write(results, json_file)


@contextlib.contextmanager
def _shared_memory_freed() -> Iterator[None]:
    """Remove the shared memory that DeepSpeed leaves for each rank under its own launcher."""
    yield
    for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{deepspeed_port()}_*"):
        leftover.unlink()


def _print_row(row: dict[str, Any]) -> None:
    kills = "; ".join(f"{kill['killed']} {kill['doing']}" for kill in row["kills"]) or "not killed"
    verdict = "[green]same[/green]" if row["equal"] else f"[red]{escape('; '.join(row['problems']))}[/red]"
    console.print(f"run {row['run']}, {row['configuration']}, {row['launcher']}: {kills}: {verdict}", soft_wrap=True)


def _print(report: dict[str, Any]) -> None:
    table = Table("run", "configuration", "launcher", "killed, while", header_style="bold")
    for column in ("at", "launcher ended", "resumed", "same"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        kills = row["kills"]
        table.add_row(
            str(row["run"]),
            row["configuration"],
            row["launcher"],
            "\n".join(f"{kill['killed']}, {kill['doing']}" for kill in kills),
            "\n".join(f"{kill['seconds']:.1f} s" for kill in kills),
            "\n".join("-" if kill["killed"] == "all" else f"after {kill['seconds_to_end']:.1f} s" for kill in kills),
            str(row["resumes"]),
            "[green]yes[/green]" if row["equal"] else "[red]NO[/red]",
        )
    console.print(table)
    disk = report["full_disk"]
    if "left_out" in disk:
        console.print(f"full disk: left out, {disk['left_out']}")
    else:
        verdict = "same after --resume" if disk["equal"] else "; ".join(disk["problems"])
        console.print(
            f"full disk, {disk['configuration']}: exit code {disk['exit_code']}, {disk['said']}: {verdict}",
            soft_wrap=True,
            markup=False,
        )
    console.print(f"{report['identical']} of {len(report['rows'])} end identical to the undisturbed run")
