"""Run the benchmarks one after the other, a result file each, then the page: `python -m bench all`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.publish.page import run_page
from engine.cli.console import console
from engine.errors import UserError
from engine.runtime.device import resolve_device

# Command and the kind of its result; some results have the name of the device they were measured on.
PARTS = (
    ("kernels", "kernels"),
    ("train", "train"),
    ("unlearn", "scaling"),
    ("retrain-cost", "retrain-cost"),
    ("data", "data"),
)
_OF_A_DEVICE = ("kernels", "train", "scaling", "data")


def run_all(out: Path, quick: bool, real: Path | None = None, parts: Sequence[tuple[str, str]] = PARTS) -> list[str]:
    """Run each part in a process of its own, so that no part affects another, and return those that failed.

    real: images that the part `data` decodes.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = resolve_device("auto").type
    failed = []
    for command, kind in parts:
        file = out / (f"{kind}-{device}.json" if kind in _OF_A_DEVICE else f"{kind}.json")
        file.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
        arguments = [command, "--json", str(file), *(["--quick"] if quick else [])]
        if command == "data" and real:
            arguments += ["--real", str(real)]
        console.rule(f"python -m bench {' '.join(arguments)}", align="left")
        code = subprocess.run([sys.executable, "-m", "bench", *arguments], check=False).returncode
        if code or not file.is_file():
            failed.append(f"{command} (exit code {code}{'' if file.is_file() else ', no result'})")
    try:
        run_page(out / "bench.html", out)
    except UserError as error:
        failed.append(f"page ({error})")
    if failed:
        console.print(f"FAILED: {', '.join(failed)}", soft_wrap=True, markup=False, style="red")
    return failed
