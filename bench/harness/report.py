"""Heading of every result file: the command that made it, the commit, the machine and its load."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtime.environment import commit, environment
from engine.runtime.files import write_json


class Report:
    """A result file before it is written.

    Created before the first measurement, because it records the load at the start.
    """

    def __init__(self, command: str | None = None, environment: Mapping[str, Any] | None = None) -> None:
        """Store the heading.

        Args:
            command: The command as typed; None for this process's own `python -m bench ...`.
            environment: Further entries of the environment.
        """
        self.command = command_line() if command is None else command
        self.environment = dict(environment or {})
        self.load = load_average()

    def write(self, results: Mapping[str, Any], json_file: Path | None) -> dict[str, Any]:
        """Return the heading with `results` below it, and write it if a file is named."""
        report = {
            "command": self.command,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "environment": {**environment(), **self.environment, "clocks": clocks()},
            "load_average": {"before": self.load, "after": load_average()},
            **results,
        }
        if json_file:
            write_json(json_file, report)
        return report


def kept(json_file: Path | None, setting: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the results from which an interrupted run continues, `setting` among the keys; empty if none.

    Raises UserError if the file is of another setting. what: "an ablation".
    """
    if json_file is None or not json_file.is_file():
        return {}
    before = json.loads(json_file.read_text(encoding="utf-8"))
    differing = [key for key in setting if before.get(key) != setting[key]]
    if differing:
        raise UserError(f"--json {json_file} holds {what} of another {differing[0]}; name another file")
    return dict(before)


def command_line() -> str:
    """Return this process's command as a user of the repository types it.

    Folders above the working folder are removed.
    """
    here = f"{Path.cwd()}/"
    return shlex.join(["python", "-m", "bench", *(argument.replace(here, "") for argument in sys.argv[1:])])


def load_average() -> list[float]:
    """Return the load average of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def clocks() -> dict[str, Any]:
    """Return the clocks that can be read: the CPU's governor, each NVIDIA card's present and highest clock in MHz."""
    found: dict[str, Any] = {}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        found["cpu_governor"] = governor.read_text(encoding="ascii").strip()
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["cuda: sm, highest sm, memory, power limit"] = answer.stdout.strip().splitlines()
    return found
