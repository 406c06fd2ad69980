"""Summarise the parts of bench/gpu.sh on the terminal and in summary.json.

`python -m bench.kernel_speed.gpu_summary FOLDER`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.harness.report import Report
from engine.cli.console import console

_TIMED_OUT = (124, 137)  # exit codes of timeout(1): the time limit passed, or the part had to be killed


def summarise(folder: Path) -> dict[str, Any]:
    """Read `parts.tsv` (name, exit code, seconds, budget; then delete it) and each part's result.

    parts: one row a part. problems: the part that failed, and rows of this project that did. targets: reached, missed
    and not measured of each part.
    """
    parts = []
    listed = folder / "parts.tsv"
    for line in listed.read_text(encoding="utf-8").splitlines():
        name, code, seconds, budget = line.split("\t")
        parts.append(_part(folder / f"{name}.json", name, int(code), int(seconds), int(budget)))
    summary = Report(command="bench/gpu.sh").write(
        {"parts": parts, "problems": [problem for part in parts for problem in part["problems"]]},
        folder / "summary.json",
    )
    listed.unlink()
    return summary


def _part(file: Path, name: str, code: int, seconds: int, budget: int) -> dict[str, Any]:
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    problems = []
    if code in _TIMED_OUT:
        problems.append(f"{name}: not done within {budget} s" + ("; results up to then are stored" * bool(result)))
    elif code:
        problems.append(f"{name}: exit code {code}")
    elif result is None:
        problems.append(f"{name}: no result")
    problems += [f"{name}: {problem}" for problem in _wrong(result or {})]
    reached = [target["passed"] for target in (result or {}).get("targets", [])]
    return {
        "part": name,
        "exit_code": code,
        "seconds": seconds,
        "budget": budget,
        "targets": {"passed": reached.count(True), "missed": reached.count(False), "not measured": reached.count(None)},
        "not_begun": (result or {}).get("not_begun", []),
        "problems": problems,
    }


def _wrong(result: dict[str, Any]) -> Iterator[str]:
    """Yield rows of this project that raised or differ from float64.

    One that does not fit into memory does not count.
    """
    for case in result.get("cases", []):
        for row in case.get("rows", []):
            if row["contender"].startswith("ours") and row["status"] == "failed":
                yield f"{case['case']}: {row['contender']}: {row['reason']}"


def main() -> int:
    summary = summarise(Path(sys.argv[1]))
    table = Table(title="bench/gpu.sh", title_justify="left", header_style="bold")
    for column in ("part", "exit code", "seconds", "budget", "targets passed", "missed", "not measured", "not begun"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in summary["parts"]:
        numbers = (
            part["exit_code"],
            part["seconds"],
            part["budget"],
            *part["targets"].values(),
            len(part["not_begun"]),
        )
        table.add_row(part["part"], *map(str, numbers))
    console.print(table)
    for problem in summary["problems"]:
        console.print(escape(problem), style="red", soft_wrap=True, highlight=False)
    total = sum(part["seconds"] for part in summary["parts"])
    console.print(f"{total} s in all; {len(summary['problems'])} problems")
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
