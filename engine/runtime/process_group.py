"""The process group of a run and its collectives. One process is a group of size one without communication.

`deepspeed`, `torchrun` and similar launchers start one process for each rank and set the environment (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), from which `init_process_group()` makes a process group. Tensors on the CPU are
sent by gloo, those on a GPU by NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RunStopped, UserError

# Errors of torch.distributed for a lost rank; gloo's are plain RuntimeErrors, recognised by their text.
_CONNECTION_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out",
    "timed out",
    "Broken pipe",
    "NCCL",
)


class ProcessGroup:
    """This process's place among the ranks of a run.

    Attributes:
        rank, size: Rank and number of ranks, as in torch.distributed.
        local_rank: Rank on this host, which selects the GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def current(cls) -> ProcessGroup:
        """Return the existing process group, or a group of size one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on each of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value (any small picklable object) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values (small picklable objects) of all ranks, in the order of ranks, on each of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any]) -> None:
        """Run an action on the main rank while the others wait.

        If it raises UserError or RunStopped, every rank raises the same. Only the main rank's error is to be shown:
        those of the others are marked by `shared`.
        """
        if self.size == 1:
            action()
            return
        error: UserError | RunStopped | None = None
        if self.is_main:
            try:
                action()
            except (UserError, RunStopped) as raised:
                error = raised
        payload = self.broadcast(error and (type(error), str(error)))
        if error:
            raise error
        if payload:
            kind, text = payload
            copy = kind(text)
            copy.shared = True
            raise copy

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows [n_r, ...] of all ranks, [sum n_r, ...] in the order of ranks, on the CPU of each of them."""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        # gloo gathers equal sizes alone: ranks with fewer rows send padding, which is removed again.
        padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])


def launched() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str = "auto", timeout: float = 1800.0) -> ProcessGroup:
    """Join the process group of the launcher, once; without a launcher, return a group of size one.

    Args:
        device: Device of the run.
        timeout: Seconds that a collective waits for another rank before it fails.

    Raises:
        UserError: The launcher's environment is incomplete, or this host has fewer GPUs than ranks.
        RunStopped: The other ranks cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup.current()
    if not launched():
        return ProcessGroup()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} means that this is one of several ranks, but {', '.join(missing)} "
            "is not set; start with deepspeed or torchrun, or unset WORLD_SIZE"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available() and not device.startswith("cpu")
    if gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {os.environ['RANK']} is number {local_rank} on this host, which has {torch.cuda.device_count()} "
                "GPUs; start no more ranks than GPUs, or use --set device=cpu"
            )
        torch.cuda.set_device(local_rank)
    limit = datetime.timedelta(seconds=timeout)
    # DeepSpeed makes groups of its own without a timeout: they would use torch's default, 30 minutes on gloo.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if getattr(dist.distributed_c10d, name, None) is not None:
            setattr(dist.distributed_c10d, name, limit)
    try:
        dist.init_process_group(backends("cuda" if gpu else "cpu"), timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RunStopped(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} found no other ranks at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({_first_line(error)})"
        ) from error
    atexit.register(leave)
    return ProcessGroup.current()


def backends(device: str) -> str:
    """Return the backends of collectives: gloo for tensors on the CPU, NCCL for those on a GPU."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def leave() -> None:
    """Leave the process group, if there is one, and drop what DeepSpeed still refers to of it.

    A group that exists when the interpreter ends can abort the process (`end_rank`).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        for module in (sys.modules.get(name) for name in ("deepspeed.utils.groups", "deepspeed.comm.comm")):
            for name, value in list(vars(module).items()) if module else ():
                if isinstance(value, dist.ProcessGroup):
                    setattr(module, name, None)
        gc.collect()


def end_rank(code: int) -> NoReturn:
    """End this process, which is one of several ranks, with an exit code and without the interpreter's finalization.

    A thread of gloo that releases a tensor during finalization aborts the process ("terminate called without an active
    exception", exit code -6, https://github.com/pytorch/pytorch/issues/190489), so a run that succeeded would count as
    failed. Any object that still refers to a process group, a DeepSpeed engine for example, keeps such threads.
    Functions of `atexit` are called.
    """
    if code:  # another rank may be gone, and NCCL would wait for it
        atexit.unregister(leave)
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def watching_ranks(resumable: bool) -> Iterator[None]:
    """Turn the failure of a collective (a rank or its host has stopped) into RunStopped.

    Args:
        resumable: The run can be resumed, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if (
            ProcessGroup.current().size == 1
            or isinstance(error, RunStopped)
            or not any(t in str(error) for t in _CONNECTION_ERRORS)
        ):
            raise
        then = "start the same command with --resume" if resumable else "start again"
        raise RunStopped(
            f"rank {ProcessGroup.current().rank} lost contact with another rank ({_first_line(error)}); when all hosts "
            f"are back, {then}"
        ) from error


def _first_line(error: BaseException) -> str:
    """Return the error's message, without gloo's source line before it and the advice after it."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", first).split(". This is typically")[0][:200]
