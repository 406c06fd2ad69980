"""Start runs of the engine as users do: through a launcher, in processes that can be killed.

The job is a tiny ViT that forgets a tenth of scikit-learn's digits, on the CPU in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import RunStopped

MODEL = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1}
SAMPLES_A_STEP = 50
OPTIONS = {"device": "cpu", "precision": "fp32", "checkpoint_every": 2, "max_steps": 30}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Time limits in seconds: of a run, and of its processes to end after they are killed.
PATIENCE, END_WITHIN = 300.0, 60.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One way to start the run. launcher: deepspeed | torchrun | none (one process). stage: ZeRO's, or None."""

    stage: int | None
    launcher: str

    @property
    def ranks(self) -> int:
        return 1 if self.launcher == "none" else 2

    @property
    def name(self) -> str:
        """Return what the result depends on; it does not depend on the launcher."""
        return "one process" if self.stage is None else f"2 ranks, ZeRO-{self.stage}"

    def arguments(self, original: Path, out: Path, resume: bool) -> list[str]:
        """Return the arguments of `python -m`."""
        run = unlearn_arguments(original, out, SAMPLES_A_STEP // self.ranks, self.stage, resume=resume)
        if self.launcher == "deepspeed":
            options = ["--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(deepspeed_port())]
            return ["deepspeed.launcher.runner", *options, "--module", *run]
        if self.launcher == "torchrun":
            return ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *run]
        return run


def unlearn_arguments(
    original: Path, out: Path, batch_size: int, stage: int | None, resume: bool = False, **options: object
) -> list[str]:
    """Return the arguments of `engine unlearn ...` of the job that all runs share; `options` are further settings."""
    settings = {**OPTIONS, "batch_size": batch_size, **options}
    return [
        *("engine", "unlearn", "--checkpoint", str(original), "--data", "digits", "--forget", "random:0.1@0"),
        *("--method", "lethe", "--out", str(out), "--accept-accuracy"),  # untrained models are timed too
        *_settings(settings),
        *(("--deepspeed", str(CONFIGS / f"zero{stage}.json")) if stage is not None else ()),
        *(("--resume",) if resume else ()),
    ]


class Launched:
    """A launcher and its ranks in a process session of their own; their output goes to a file."""

    def __init__(self, arguments: Sequence[str], log: Path, prefix: Sequence[str] = ()) -> None:
        self.log, self.began = log, time.perf_counter()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**_outside(), "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Wait and return the exit code, or None if the time limit passed and the run was killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self, rank: int | None = None) -> bool:
        """Send SIGKILL to one rank, or to the launcher and all its children; return False if it had ended already."""
        import psutil  # type: ignore[import-untyped]  # deepspeed depends on it

        if not self.running():
            return False
        launcher = psutil.Process(self.process.pid)
        below = launcher.children(recursive=True)
        victims = [launcher, *below] if rank is None else [process for process in below if rank_of(process) == rank]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if rank is None:
            self.process.wait()
            psutil.wait_procs(below, timeout=END_WITHIN)
        return bool(victims)

    def output(self) -> str:
        """Return the error lines of the engine from the output."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines()]
        return " | ".join(line for line in lines if line.startswith(("stopped:", "stopped (", "error:", "error (")))

    def tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return " / ".join(line.strip() for line in text.splitlines()[-12:] if line.strip())


def rank_of(process: Any) -> int | None:
    """Return the rank of a psutil.Process that a launcher started as one; None for the launcher and for others."""
    import psutil

    try:
        own, above = process.environ(), process.parent().environ()
    except (psutil.Error, AttributeError):
        return None
    return int(own["RANK"]) if "RANK" in own and "RANK" not in above else None


def _outside() -> dict[str, str]:
    """Return the environment without the variables that a launcher around this process may have set."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launcher}


@functools.cache
def deepspeed_port() -> int:
    """Return the port of all runs under DeepSpeed's launcher.

    For each port it leaves 66 MiB a rank in shared memory.
    """
    return free_port()


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def require_good(launched: Launched) -> None:
    """Wait for an undisturbed run, and raise an error if it fails."""
    code = launched.wait()
    if code != 0:
        raise RunStopped(f"the undisturbed run ended with exit code {code}: {launched.tail()}")


def train_arguments(out: Path) -> list[str]:
    """Return the arguments of `python -m` that train the original on two ranks.

    The first run compiles DeepSpeed's extensions.
    """
    settings = {**OPTIONS, "batch_size": SAMPLES_A_STEP // 2, "lr": 2e-3, "checkpoint_every": None, "max_steps": None}
    return [
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"),
        *("engine", "train", "--data", "digits", "--arch", "vit_tiny_patch16_224", "--epochs", "5", "--out", str(out)),
        *itertools.chain.from_iterable(("--model-arg", f"{key}={value}") for key, value in MODEL.items()),
        *_settings(settings),
        *("--deepspeed", str(CONFIGS / "zero1.json")),
    ]


def _settings(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={'null' if value is None else value}")]
