"""The processes of a run, and what they tell each other. One process is a world of size one, and talks to nobody.

`deepspeed`, `torchrun` and their kin start a process a rank and say so in the environment (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT); `join()` turns that into a process group. Tensors on the CPU travel by gloo,
those on a GPU by NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RunStopped, UserError

# What torch.distributed raises where a peer is gone; gloo's are plain RuntimeErrors, told by their text.
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

    rank, size: as torch.distributed counts. local_rank: rank on this host, which picks the GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def current(cls) -> ProcessGroup:
        """The process group that is there, or a world of one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; the same on each of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main rank's value (any small picklable object) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values (small picklable objects) of all ranks, in their order, on each of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any]) -> None:
        """Runs something on the main rank while the others wait; if it raises UserError or RunStopped, so do they.

        Only the main rank's error is to be shown: those of the others are marked by `shared`.
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
            theirs = kind(text)
            theirs.shared = True
            raise theirs

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows [n_r, ...] of all ranks, on the CPU, in the order of ranks: [sum n_r, ...] on each of them."""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        # gloo gathers equal sizes alone: shorter ranks send rows that are cut off again.
        padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])


def launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str = "auto", timeout: float = 1800.0) -> ProcessGroup:
    """Joins the process group that the launcher describes, once; a world of one where there is no launcher.

    timeout: seconds after which a rank that does not answer is given up.
    Raises UserError for a launcher that says half of it.
    """
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup.current()
    if not launched():
        return ProcessGroup()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several ranks, but {', '.join(missing)} "
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
    # DeepSpeed makes groups of its own and names no timeout: they would wait for torch's, 30 minutes on gloo.
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
    return ProcessGroup.current()


def backends(device: str) -> str:
    """What carries tensors: gloo those on the CPU, NCCL those on a GPU."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def watching_ranks(resumable: bool) -> Iterator[None]:
    """Turns the failure of a collective (a rank or its host is gone) into RunStopped."""
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
    """What happened, without gloo's source line before it and its advice after it."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", first).split(". This is typically")[0][:200]
