"""How a process of several ranks ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

_COLLECTIVES = """
import sys, torch, torch.distributed as dist
from engine.runtime.process_group import end_rank, init_process_group
init_process_group("cpu")
kept = [dist.group.WORLD, dist.new_group()]
for number in range(200):
    dist.all_gather_object([None] * 2, number)
    dist.all_reduce(torch.ones(1000), group=kept[1])
"""


def two_ranks(arguments: Sequence[str], **environment: str) -> list[tuple[int, str]]:
    """Return (exit code, standard output and error) of the same Python command on two ranks."""
    from bench.harness.launched import free_port

    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.slow
def test_a_rank_ends_with_its_exit_code_although_something_refers_to_a_process_group() -> None:
    """Without `end_rank` about every third of these pairs is aborted by a thread of gloo (exit code -6)."""
    for code in (0, 4, 0, 4, 0, 4):
        ended = two_ranks(["-c", f"{_COLLECTIVES}end_rank({code})"])
        assert [each[0] for each in ended] == [code, code], ended


def test_a_command_of_several_ranks_ends_by_end_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from engine.cli import exits
    from engine.errors import UserError
    from engine.runtime import process_group

    class Ended(BaseException):
        pass

    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    def refused() -> None:
        raise UserError("no")

    monkeypatch.setattr(process_group, "end_rank", end)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (lambda: sys.exit(), lambda: sys.exit(3), lambda: sys.exit("text"), refused):
        with pytest.raises(Ended):
            exits.run(command, Console(stderr=True))
    assert codes == [0, 3, 1, 2]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        exits.run(sys.exit, Console(stderr=True))
    assert len(codes) == 4, "one process ends as any other"
