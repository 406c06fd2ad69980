"""Write every result file as a section of one HTML file that loads nothing: `python -m bench page`.

A section has the command, machine, date, commit and load of its file, its tables, and plots if there are any. Tables
are those of the documents if they have some of this file, else all plain values of the file.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench.harness import plots
from bench.publish.pictures import PICTURES
from bench.publish.results import RESULTS, Report, fitted, kind_of, load
from bench.publish.sheet import Sheet
from bench.publish.sheets import TABLES, sheets_of
from engine.cli.console import console
from engine.errors import UserError
from engine.runtime.files import replacing

TITLES = {
    "train": "Training steps",
    "retrain-cost": "Unlearning compared with retraining",
    "leaderboard-yardstick": "Every method on the yardstick",
    "leaderboard-yardstick-alone": "LetheViT and lethe_plus alone on the machine",
    "leaderboard-yardstick-class": "Every method on the yardstick, a class forgotten",
    "leaderboard-digits": "Every method on digits",
    "peers-digits": "Methods compared with other libraries on digits",
    "peers-yardstick": "Methods compared with other libraries on the yardstick",
    "yardstick-ablation": "The choices of LetheViT",
    "yardstick-ablation-plus": "The pieces of lethe_plus",
    "yardstick-accelerators": "Ways to train less",
    "scaling": "How cost grows",
    "kernels": "Kernels compared with other libraries",
    "kernels-compile": "Kernels compiled for GPUs",
    "data": "The data path",
    "equality": "Ranks against one process",
    "memory-fp32": "Memory of ViT-L, float32",
    "memory-bf16": "Memory of ViT-L, bf16",
    "chaos": "Runs that are killed and resumed",
    "two-hosts": "Two hosts and a link that is cut",
    "mutation": "Planted bugs that the tests notice",
    "verdicts": "Verdicts on models whose answer is known",
    "calibration": "How often retrained models and impostors pass",
    "calibration-yardstick": "Retrained models and impostors on the yardstick",
    "certificates": "Certificates of procedures",
    "pool-agreement": "Verdicts by a pool and by references",
    "ulira-digits": "U-LiRA on digits",
}
# Keys of the head of a section, and keys that only serve to continue a file.
_HEADING = {"command", "finished", "commit", "environment", "load_average", "setting"}
_MOST_ROWS = 60
_MISSING = "not recorded"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One plot as data URIs, for light pages and for dark ones. alt: a description."""

    light: str
    dark: str
    alt: str


def run_page(out: Path = Path("bench.html"), results: Path = RESULTS) -> Path:
    """Write the page of all result files in a folder. Raises UserError if there are none."""
    files = sorted(results.glob("*.json"), key=lambda file: _place(file.stem))
    if not files:
        raise UserError(f"--results {results}: holds no result file; `python -m bench all --out {results}` makes some")
    text = render({file.stem: load(file) for file in files})
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.print(f"{out}: {len(files)} results, {len(text) / 2**20:.1f} MiB", highlight=False)
    return out


def _place(name: str) -> tuple[int, str]:
    """Return the position in TITLES, others after them by name."""
    kind = kind_of(name)
    return (list(TITLES).index(kind) if kind in TITLES else len(TITLES)), name


def render(reports: Mapping[str, Report]) -> str:
    """Render the page of results by name (of their files, without .json)."""
    # Files may come from third parties: every name is escaped, nothing in the template is `safe`.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("bench.publish").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(sections=[_section(name, report) for name, report in reports.items()])


def _section(name: str, report: Report) -> dict[str, Any]:
    kind = kind_of(name)
    made = sheets_of(name, report)
    fallback = TABLES[next(iter(made))].command if made else ""
    sheets = [("", sheet) for sheet in made.values()] or list(plain_sheets(report))
    if made and report.get("targets"):
        sheets.append(("targets", _records(report["targets"])))
    return {
        "id": name,
        "title": TITLES.get(kind, name),
        "command": report.get("command") or fallback or _MISSING,
        "facts": list(facts(report).items()),
        "quick": bool(report.get("settings", {}).get("quick")),
        "sheets": sheets,
        "pictures": fitted([f"{name}.json"], lambda: list(_pictures(kind, report))),
    }


def facts(report: Report) -> dict[str, str]:
    """Return machine, date, commit and load in words; what the file does not have is `not recorded`."""
    machine, commit, load = (report.get(key) or {} for key in ("environment", "commit", "load_average"))
    parts = [*machine.get("cuda_devices", []), machine.get("cpu", ""), machine.get("platform", "")]
    if "threads" in machine:
        parts.append(f"{machine['threads']} threads")
    packages = machine.get("packages", {})
    parts += [f"{name} {packages[name]}" for name in ("torch", "triton", "timm") if name in packages]
    changed = ", with changes" if commit.get("modified") else ""
    return {
        "machine": ", ".join(part for part in parts if part) or _MISSING,
        "finished": (report.get("finished") or _MISSING).replace("T", " ").replace("Z", " UTC"),
        "commit": f"{commit['hash'][:12]}{changed}" if commit else _MISSING,
        "load average": f"{load['before'][0]:.2f} before, {load['after'][0]:.2f} after" if load else _MISSING,
    }


def plain_sheets(report: Report) -> Iterator[tuple[str, Sheet]]:
    """Yield (title, table) of the plain values of a file: its single values, and every list of records at its top."""
    single: dict[str, Any] = {}
    for key, value in report.items():
        if key not in _HEADING and key != "settings":
            single |= {key: value} if _is_plain(value) else {}
    single |= {key: value for key, value in report.get("settings", {}).items() if _is_plain(value)}
    if single:
        rows = [[key.replace("_", " "), _text(value)] for key, value in single.items()]
        yield "", Sheet(columns=["", "value"], rows=rows)
    for key, value in report.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield key.replace("_", " "), _records(value)


def _records(records: Sequence[Mapping[str, Any]]) -> Sheet:
    """Make a table of the plain values of the records, a row each."""
    columns = list(dict.fromkeys(key for row in records for key, value in row.items() if _is_plain(value)))
    rows = [[_text(row.get(key)) for key in columns] for row in records[:_MOST_ROWS]]
    if len(records) > _MOST_ROWS:
        rows.append([f"and {len(records) - _MOST_ROWS:,} more", *[""] * (len(columns) - 1)])
    return Sheet(columns=[column.replace("_", " ") for column in columns], rows=rows)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def _pictures(kind: str, report: Report) -> Iterator[Picture]:
    if kind in PICTURES:
        drawn = zip(*(PICTURES[kind](report, style) for style in (plots.LIGHT, plots.DARK)), strict=True)
        for (light, alt), (dark, _) in drawn:
            yield Picture(_uri(plots.png(light)), _uri(plots.png(dark)), alt)


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
