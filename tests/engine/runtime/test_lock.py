"""One process a folder: locks that are live, stale or another host's; and the commands that write into a run folder."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import few, tiny_vit

from engine.data import open_source
from engine.errors import UserError
from engine.run.folder import RunFolder
from engine.run.unlearn import unlearn
from engine.runtime import lock
from engine.runtime.lock import FILE, Owner, held, start_of, take

RUN = {"max_steps": 2, "batch_size": 16, "precision": "fp32"}


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def owned_by(folder: Path, **changed: object) -> bytes:
    """A lock file as another process would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this_process(), **changed))).encode() + b"\n"
    (folder / FILE).write_bytes(content)
    return content


def of(process: subprocess.Popen[bytes]) -> dict[str, object]:
    return {"pid": process.pid, "started": start_of(process.pid)}


def test_a_live_owner_is_named(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    content = owned_by(tmp_path, **of(other))
    with pytest.raises(UserError, match=rf"a run is active in it \(process {other.pid} on host "):
        take(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_lock_of_a_process_that_is_gone_is_stale(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    owned_by(tmp_path, **of(other))
    other.kill()  # not waited for: it is a zombie, which does no work
    for _ in range(100):
        if start_of(other.pid) is None:
            break
        time.sleep(0.05)
    take(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_is_used_again_is_told_by_its_start(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    owned_by(tmp_path, pid=other.pid, started="1")
    take(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_lock_from_before_the_machine_started_is_stale(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    if not Owner.this_process().machine:
        pytest.skip("this machine has no id")
    owned_by(tmp_path, **of(other), boot="another boot")
    take(tmp_path).release()


@pytest.mark.parametrize(
    "changed", [{"host": "elsewhere"}, {"machine": "a clone's"}, {"namespace": "pid:[1]"}, {"machine": "", "boot": "x"}]
)
def test_what_cannot_be_found_out_is_an_error_that_says_what_to_check(
    tmp_path: Path, changed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed.get("machine") == "":  # two containers of one name
        monkeypatch.setattr(lock, "_read", lambda path: "" if "machine" in path else "boot")
    content = owned_by(tmp_path, **{"pid": 999_999_999, **changed})
    host = changed.get("host", Owner.this_process().host)
    with pytest.raises(UserError, match=rf"locked by process 999999999 on host {host}, .* only if .* remove .*{FILE}"):
        take(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_damaged_lock_is_not_taken_for_a_stale_one(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=f"cannot be read.*remove .*{FILE}"):
        take(tmp_path)


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    first = take(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        take(tmp_path)
    first.release()
    assert not list(tmp_path.iterdir())


def test_release_leaves_the_lock_of_the_next_owner(tmp_path: Path) -> None:
    mine = take(tmp_path)
    content = owned_by(tmp_path)
    mine.release()
    assert (tmp_path / FILE).read_bytes() == content


def _contend(folder: Path, count: int, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    done = 0
    while done < count:
        try:
            with held(folder):
                number = int((folder / "number").read_text())
                (folder / "number").write_text(str(number + 1))
                if done == count - 1 and number % 2:
                    os._exit(0)  # leaves a stale lock behind, as a kill does
                done += 1
        except UserError:
            time.sleep(0.001)


def test_processes_that_contend_for_a_stale_lock_never_hold_it_together(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    owned_by(tmp_path, pid=999_999_999)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_contend, args=(tmp_path, 25, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert (tmp_path / "number").read_text() == "100"


# --- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_live_run_folder_is_refused_and_left_as_it_is(
    tmp_path: Path, other: subprocess.Popen[bytes], how: dict[str, bool]
) -> None:
    RunFolder(tmp_path / "run", {"method": "x"}).close()
    owned_by(tmp_path / "run", **of(other))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=rf"a run is active in it \(process {other.pid} on host"):
        RunFolder(tmp_path / "run", {"method": "x"}, **how)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_second_unlearning_in_the_same_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    train = open_source("digits").train
    forget, retain = few(train, 8), train.subset(range(8, 60))
    options = {"method": "finetune", "config": RUN, "output_dir": tmp_path / "run"}
    met: list[str] = []

    def meanwhile(phase: str, *_: object) -> None:
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="a run is active") as error:
                unlearn(tiny_vit(), forget, retain, **options, **how)
            met.append(str(error.value))

    unlearn(tiny_vit(), forget, retain, **options, progress=meanwhile)
    assert len(met) >= 3
    assert not (tmp_path / "run" / FILE).exists()

    def fail(*_: object) -> None:
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError) as stopped:
        unlearn(tiny_vit(), forget, retain, **options, overwrite=True, progress=fail)
    assert stopped.value.run_folder == tmp_path / "run"  # type: ignore[attr-defined]
    assert not (tmp_path / "run" / FILE).exists(), "given back by a run that failed"
    unlearn(tiny_vit(), forget, retain, **options, resume=True)


def test_nothing_is_left_where_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run to resume"):
        RunFolder(tmp_path / "run", {}, resume=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match="not a run's"):
        RunFolder(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


_JOB = """
import sys
from toys import few, tiny_vit
from engine.data import open_source
from engine.run.unlearn import unlearn
train = open_source("digits").train
unlearn(tiny_vit(), few(train, 8), train.subset(range(8, 60)), method="finetune", output_dir=sys.argv[1],
        config={"batch_size": 16, "precision": "fp32", "retain_epochs": 5000, "checkpoint_every": 2})
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_without_a_word(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", _JOB, str(run)], env=environment)
    for _ in range(600):
        if (run / "resume" / "current.json").exists():
            break
        time.sleep(0.1)
    refused = subprocess.run([sys.executable, "-c", _JOB, str(run)], env=environment, capture_output=True, text=True)
    assert f"a run is active in it (process {process.pid} on host" in refused.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / FILE).exists()
    with pytest.raises(UserError, match="another configuration"):  # it got past the lock
        RunFolder(run, {}, resume=True)


def test_a_search_a_verdict_and_a_demo_keep_off_a_live_folder(
    tmp_path: Path, other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.cli.demo import run_demo
    from engine.jobs.verify import check_recorded
    from engine.tuning import tune

    owned_by(tmp_path / "live", **of(other))
    train = open_source("digits").train
    words = rf"\(process {other.pid} on host"
    with pytest.raises(UserError, match=words):
        tune(tiny_vit(), few(train, 8), train, validation=train, output_dir=tmp_path / "live", resume=True)
    with pytest.raises(UserError, match=words):
        check_recorded(tmp_path / "live")
    (tmp_path / "live" / "original").mkdir()
    with pytest.raises(UserError, match=words):
        run_demo(tmp_path / "live")
    assert (tmp_path / "live" / "original").is_dir()
