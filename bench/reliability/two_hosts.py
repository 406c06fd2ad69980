"""Run one job on two network namespaces, a rank in each, joined by one link: `python -m bench two-hosts`.

The result is compared with that of two ranks on one host. Then the link is cut in the middle of a run: both sides have
to end with an error, and to resume to the same result when the link is back. Both namespaces have the same file system,
as hosts of a run have to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.harness.launched import MODEL, OPTIONS, PATIENCE, SAMPLES_A_STEP, Job, Launched, unlearn_arguments
from bench.harness.report import Report
from bench.reliability.chaos import Stage, checkpoints, differences, unreadable
from engine.cli.console import console
from engine.errors import RunStopped, UserError
from engine.runtime.environment import extras

ZERO_STAGE = 2
# Timeout in seconds of a rank that does not answer, and of its launcher to end after that.
TIMEOUT, MARGIN = 20.0, 20.0
# Moments at which the link is cut: name, options, checkpoints begun by then, and seconds since the last.
CUTS: tuple[tuple[str, dict[str, int], int, float], ...] = (
    ("while a checkpoint is written", {"checkpoint_every": 2}, 4, 0.0),
    ("in a step", {"checkpoint_every": 1000}, 1, 0.3),  # the one at the end of the first phase
)
INTERFACE, ADDRESSES, PORT = "veth0", ("10.213.7.1", "10.213.7.2"), "29533"


class Hosts:
    """Two network namespaces and the link between them."""

    def __init__(self) -> None:
        self.names = tuple(f"lethe-{os.getpid()}-{letter}" for letter in "ab")

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            peer = ("peer", "name", INTERFACE, "netns", second)
            _ip("link", "add", INTERFACE, "netns", first, "type", "veth", *peer)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", "lo", "up")
            self.link("up")
        except RunStopped:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:  # the link goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def link(self, state: str) -> None:
        """Set the link up | down."""
        for name in self.names:
            _ip("-n", name, "link", "set", INTERFACE, state)

    def launch(self, arguments: list[str], logs: Path) -> list[Launched]:
        """Run `python -m` with these arguments as one rank in each namespace."""
        return [
            Launched(
                [
                    *("torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"),
                    *("--master-addr", ADDRESSES[0], "--master-port", PORT, "-m", *arguments),
                ],
                logs.with_suffix(f".{rank}.log"),
                prefix=("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={INTERFACE}"),
            )
            for rank, name in enumerate(self.names)
        ]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RunStopped(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def run_two_hosts(json_file: Path | None = None) -> dict[str, Any]:
    """Print and return the results; `passed`: whether all are as expected."""
    _check_here()
    report, began = Report(environment={"deepspeed": extras()["deepspeed"]}), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, Hosts() as hosts, contextlib.ExitStack() as alive:
        stage = Stage(Path(temporary)).train()
        expected = stage.expected(Job(ZERO_STAGE, "torchrun"))
        console.print("two hosts, undisturbed")
        whole = _whole(hosts, stage, expected, alive)
        cuts = [_cut(hosts, stage, expected, alive, *cut) for cut in CUTS]
    results = {
        "settings": {"stage": ZERO_STAGE, "timeout": TIMEOUT, "margin": MARGIN, "model": MODEL, **OPTIONS},
        "seconds": round(time.perf_counter() - began, 1),
        "two_hosts": whole,
        "cut_links": cuts,
        "passed": not any(case["problems"] for case in (whole, *cuts)),
    }
    _print(results)
    return report.write(results, json_file)


def _check_here() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UserError("bench two-hosts makes network namespaces, which needs root on Linux")
    if shutil.which("ip") is None:
        raise UserError(
            "bench two-hosts makes network namespaces by the command ip, which is missing; install iproute2"
        )


def _whole(hosts: Hosts, stage: Stage, expected: Path, alive: contextlib.ExitStack) -> dict[str, Any]:
    out = stage.folder / "two hosts"
    launched = _launch(hosts, stage, out, alive, {})
    codes = [one.wait() for one in launched]
    problems = differences(expected, out)
    if codes != [0, 0]:
        problems.insert(0, f"exit codes {codes}: {' | '.join(one.tail() for one in launched)}")
    return {"exit_codes": codes, "equal": not problems, "problems": problems}


def _cut(
    hosts: Hosts,
    stage: Stage,
    expected: Path,
    alive: contextlib.ExitStack,
    moment: str,
    options: dict[str, int],
    after: int,
    pause: float,
) -> dict[str, Any]:
    console.print(f"two hosts, the link is cut {moment} and comes back")
    out = stage.folder / f"cut {moment}"
    launched = _launch(hosts, stage, out, alive, options)
    problems, begun = [], set[str]()
    while len(begun) < after and all(one.running() for one in launched):
        begun |= checkpoints(out)
        time.sleep(0.002)
    time.sleep(pause)
    hosts.link("down")
    at = time.perf_counter()
    ended: dict[int, float] = {}
    while len(ended) < len(launched) and time.perf_counter() - at < PATIENCE:
        for rank, one in enumerate(launched):
            if rank not in ended and not one.running():
                ended[rank] = time.perf_counter() - at
        time.sleep(0.02)
    sides = []
    for rank, one in enumerate(launched):
        code, seconds = one.process.poll(), ended.get(rank, PATIENCE)
        output = one.output().replace(str(stage.folder), "FOLDER")
        sides.append({"rank": rank, "exit_code": code, "seconds_to_end": round(seconds, 1), "said": output})
        if code != 1 or f"rank {rank} lost contact" not in output:
            problems.append(f"rank {rank} ended with exit code {code}: {one.tail()}")
        if seconds > TIMEOUT + MARGIN:
            problems.append(f"rank {rank} took {seconds:.0f} s to end")
        one.kill()
    problems += unreadable(out)
    hosts.link("up")
    resumed = _launch(hosts, stage, out, alive, options, resume=True)
    codes = [one.wait() for one in resumed]
    if codes != [0, 0]:
        problems.append(f"exit codes {codes} when resumed: {' | '.join(one.tail() for one in resumed)}")
    differing = differences(expected, out)
    return {
        "cut": moment,
        "checkpoints_before_the_cut": len(begun),
        "sides": sides,
        "exit_codes_resumed": codes,
        "equal": not differing,
        "problems": [*problems, *differing],
    }


def _launch(
    hosts: Hosts,
    stage: Stage,
    out: Path,
    alive: contextlib.ExitStack,
    options: dict[str, int],
    resume: bool = False,
) -> list[Launched]:
    batch = SAMPLES_A_STEP // len(ADDRESSES)
    arguments = unlearn_arguments(stage.original, out, batch, ZERO_STAGE, resume=resume, timeout=TIMEOUT, **options)
    launched = hosts.launch(arguments, stage.folder / f"{out.name}{' resumed' if resume else ''}.log")
    for one in launched:
        alive.callback(one.kill)  # before the namespaces go
    return launched


def _print(report: dict[str, Any]) -> None:
    table = Table("", "result", header_style="bold")
    same = {True: "[green]same as on one host[/green]", False: "[red]ANOTHER RESULT[/red]"}
    table.add_row("a rank on each of two hosts", same[report["two_hosts"]["equal"]])
    for cut in report["cut_links"]:
        for side in cut["sides"]:
            ended = f"exit code {side['exit_code']} after {side['seconds_to_end']} s"
            table.add_row(f"link cut {cut['cut']}, rank {side['rank']}", ended)
        table.add_row("link back, --resume", same[cut["equal"]])
    console.print(table)
    for line in [side["said"] for cut in report["cut_links"] for side in cut["sides"]]:
        console.print(line, soft_wrap=True, markup=False)
    for problem in [p for case in (report["two_hosts"], *report["cut_links"]) for p in case["problems"]]:
        console.print(problem, soft_wrap=True, markup=False, style="red")
