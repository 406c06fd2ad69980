"""What every result file says of itself: the command that made it, the commit, the machine and how busy it was."""

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
    """A result file in the making: created before the first measurement, so that it knows the load it began under."""

    def __init__(self, command: str | None = None, environment: Mapping[str, Any] | None = None) -> None:
        """command: as typed; None takes this process's own `python -m bench ...`. environment: what else counts."""
        self.command = command_line() if command is None else command
        self.environment = dict(environment or {})
        self.load = load_average()

    def write(self, results: Mapping[str, Any], json_file: Path | None) -> dict[str, Any]:
        """The heading with `results` below it, written where a file is named."""
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
    """The results file that a broken-off run goes on with, `setting` among its keys; empty where there is none.

    Raises UserError where the file is of another setting. what: "an ablation".
    """
    if json_file is None or not json_file.is_file():
        return {}
    before = json.loads(json_file.read_text(encoding="utf-8"))
    differing = [key for key in setting if before.get(key) != setting[key]]
    if differing:
        raise UserError(f"--json {json_file} holds {what} of another {differing[0]}; name another file")
    return dict(before)


def command_line() -> str:
    """This process's command as a user of the repository types it; folders above the working folder are cut off."""
    here = f"{Path.cwd()}/"
    return shlex.join(["python", "-m", "bench", *(argument.replace(here, "") for argument in sys.argv[1:])])


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def clocks() -> dict[str, Any]:
    """What can be read of clocks: the CPU's governor, each NVIDIA card's present and highest clock in MHz."""
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
