from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import RunStopped, UserError
from engine.run.folder import RunFolder
from engine.runtime.process_group import _first_line


def test_a_run_that_is_killed_while_it_clears_up_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run", {})
    folder.save({"phase": 0, "step": 2}, lambda place: torch.save({}, place / "model.pt"))
    (tmp_path / "run" / "model.safetensors").touch()
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: (path / "0-00000002" / "model.pt").unlink())  # no further
    folder.finished()
    monkeypatch.undo()
    with pytest.raises(UserError, match="finished run"):
        RunFolder(tmp_path / "run", {}, resume=True)
    assert not (tmp_path / "run" / "resume").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a tmpfs")
@pytest.mark.parametrize("size", [1, 1_000, 30_000, 100_000])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        folder = RunFolder(disk / "run", {})
        folder.save({"phase": 0, "step": 1}, lambda place: torch.save({"w": torch.zeros(9)}, place / "model.pt"))
        before = folder.checkpoint()
        with open(disk / "filler", "wb", buffering=0) as filler:
            filler.write(bytes(200_000))
        with pytest.raises(RunStopped, match="no space left"):
            folder.save({"phase": 0, "step": 2}, lambda place: torch.save({"w": torch.zeros(size)}, place / "model.pt"))
        assert folder.checkpoint() == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_line_of_a_lost_rank_is_gloos_without_its_frame() -> None:
    said = (
        "[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:7. This is typically caused by x"
    )
    assert _first_line(RuntimeError(said)) == "Connection closed by peer [127.0.0.1]:7"
    assert _first_line(RuntimeError("")) == "RuntimeError"


@pytest.mark.slow
def test_groups_that_deepspeed_makes_keep_the_timeout_of_the_run() -> None:
    code = (
        "import torch.distributed as dist; from engine.runtime.process_group import init_process_group;"
        "init_process_group('cpu', 7.0);"
        "print(dist.new_group([0, 1])._get_backend(__import__('torch').device('cpu')).options._timeout)"
    )
    from bench.harness.launched import free_port

    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert "0:00:07" in ranks[0].communicate(timeout=60)[0]
    assert ranks[1].wait(60) == 0
