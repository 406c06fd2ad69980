"""The dictionary with which the templates of docs/templates/ are rendered: figures of sentences, and tables.

A new figure is a key in a function below and its place in a template, such as `{{ yardstick.floor }}`. A function
raises UserError if a sentence of a template would no longer be true.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.cases import VIT_B
from bench.harness.measure import middle, ratios
from bench.kernel_speed.kernel_peers import INFO_NCE_PYTORCH
from bench.kernel_speed.kernel_targets import CONTRAST, MASKING
from bench.kernel_speed.rollout_peers import FAST_VIT_ROLLOUT, PLAIN
from bench.publish.results import Report, fitted, measured
from bench.publish.sheets import MIB, TABLES, Table
from bench.quality import ablation
from bench.quality.certificates import IMPOSTORS
from bench.training_cost.recipes import RECIPES
from bench.training_cost.train import BEST_BF16
from engine.errors import UserError


def _yardstick(report: Report) -> dict[str, str]:
    (entry,), (subject,) = report["tasks"].values(), report["subjects"]
    samples, loads = entry["samples"], [row["load_average"] for row in entry["rows"]]
    gaps = {each["method"]: each["gap"]["mean"] for each in entry["summary"] if each["method"] != "retrain"}
    order = sorted(gaps, key=lambda method: gaps[method])
    no_better = gaps["finetune"] - gaps["lethe"] <= entry["noise_floor"]
    _still_true(no_better, "leaderboard-yardstick.json has lethe better than finetune")
    return {
        "samples": f"{samples['forget'] + samples['retain']:,}", "epochs": f"{subject['recipe']['epochs']:g}",
        "forget": f"{samples['forget']:,}", "references": str(len(entry["references"])),
        "untouched": f"{entry['untouched']['gap']['average']:.2f}", "floor": f"{entry['noise_floor']:.2f}",
        "lethe": f"{gaps['lethe']:.2f}", "finetune": f"{gaps['finetune']:.2f}", "plus": f"{gaps['lethe_plus']:.2f}",
        "place": str(1 + order.index("lethe_plus")), "lethe_place": str(1 + order.index("lethe")),
        "methods": str(len(order)), "tau": f"{entry['stability']['mean']:.2f}",
        "score_tau": f"{entry['foresight']:.2f}", "least_load": f"{min(loads):.1f}", "most_load": f"{max(loads):.1f}",
    }  # fmt: skip


def _yardstick_alone(report: Report) -> dict[str, str]:
    """Return the shares of LetheViT's seconds, seed by seed, as both ran in the same hour."""
    (entry,) = report["tasks"].values()
    means = {each["method"]: f"{each['unlearn_seconds']['mean']:.0f}" for each in entry["summary"]}
    seconds = {(row["method"], row["seed"]): row["seconds"] for row in entry["rows"]}
    seeds = [seed for method, seed in seconds if method == "lethe"]
    unlearning, whole = (
        [100 * seconds["lethe_plus", seed][part] / seconds["lethe", seed][part] for seed in seeds]
        for part in ("unlearn", "total")
    )
    return {
        "plus": means["lethe_plus"], "lethe": means["lethe"], "seeds": str(len(seeds)),
        "least": f"{min(unlearning):.0f}", "most": f"{max(unlearning):.0f}", "whole": f"{sum(whole) / len(seeds):.0f}",
    }  # fmt: skip


def _yardstick_class(report: Report) -> dict[str, str]:
    (entry,) = report["tasks"].values()
    gaps = {each["method"]: f"{each['gap']['mean']:.2f}" for each in entry["summary"]}
    return {
        "floor": f"{entry['noise_floor']:.2f}", "plus": gaps["lethe_plus"], "lethe": gaps["lethe"],
        "tau": f"{entry['stability']['mean']:.2f}", "score_tau": f"{entry['foresight']:.2f}",
    }  # fmt: skip


def _digits(report: Report) -> dict[str, str]:
    random, of_class = (entry["stability"]["mean"] for entry in report["tasks"].values())
    return {"tau": f"{random:.2f}", "class_tau": f"{of_class:.2f}"}


def _ablation(report: Report) -> dict[str, str]:
    rows = ablation.table_rows(report)
    gaps = {name: float(cells[-1].split()[0]) for name, stage, _, cells in rows if stage == "retain"}
    return {"gain": f"{gaps['retain stage alone'] - gaps['default: top patches, cosine, logits']:.2f}"}


def _training_step(report: Report) -> dict[str, str]:
    times = [case["rows"][0].get("times_with_prepare", {}).get(BEST_BF16) for case in report["cases"]]
    found = [middle(each) for each in times if each]
    return {"least": f"{min(found):.2f}", "most": f"{max(found):.2f}"}


def _projection(report: Report) -> dict[str, str]:
    (found,) = (each for each in report["projection"] if each["model"] == VIT_B.name)
    (hours,) = (each for each in found["hours"] if each["work"] == "lethe")
    return {"share": f"{100 * hours['share'][RECIPES[0].name]:.1f}"}


def _ulira(report: Report) -> dict[str, str]:
    (found,) = (each for each in report["rows"] if each["method"] == "lethe")
    return {key: f"{found[part]['auc']['value']:.2f}" for key, part in (("lethe", "ulira"), ("before", "untouched"))}


def _certificates(report: Report) -> dict[str, str]:
    found = report["procedures"]
    _still_true(
        all(not row["granted"] for name, row in found.items() if name in IMPOSTORS),
        "certificates.json: an impostor has a certificate",
    )
    return {"seeds": str(found["retrain"]["seeds"])}


def _agreement(report: Report) -> dict[str, str]:
    impostors = [row for name, row in report["models"].items() if "retrained" not in name]
    passed = {by: sum(row[by] == "PASS" for row in impostors) for by in ("pool", "references")}
    return {
        "models": str(len(report["models"])),
        "impostors": f"{passed['pool']} of {len(impostors)}",
        "by_references": str(passed["references"]),
    }


def _equality(report: Report) -> dict[str, str]:
    (steps,) = {row["steps"] for row in report["rows"]}
    bf16 = [row for row in report["rows"] if row["precision"] == "bf16" and row["case"] != "one process"]
    tensors, points = ([row[key] for row in bf16] for key in ("tensor", "points"))
    worst = max(row["tensor"] for row in report["rows"] if row["precision"] == "fp32")
    powers = {"worst": f"{worst:.1e}", "least": f"{min(tensors):.0e}", "most": f"{max(tensors):.0e}"}
    return {
        "steps": str(steps), **{key: value.replace("e-0", "e-") for key, value in powers.items()},
        "least_points": f"{min(points):.1f}", "most_points": f"{max(points):.1f}",
    }  # fmt: skip


def _chaos(report: Report) -> dict[str, str]:
    doing = [kill["doing"] for row in report["rows"] for kill in row["kills"]]
    _still_true(report["full_disk"].get("equal"), "chaos.json has no full disk after which the result was the same")
    return {
        "runs": str(len(report["rows"])),
        "same": str(sum(row["equal"] for row in report["rows"])),
        "before": str(sum(not row["kills"] for row in report["rows"])),
        "after": str(doing.count("after the end")),
    }


def _two_hosts(report: Report) -> dict[str, str]:
    _still_true(report["passed"], "two-hosts.json did not pass")
    return {"links": str(len(report["cut_links"]))}


def _data(report: Report) -> dict[str, str]:
    synthetic, steps = report["synthetic"], report["synthetic"]["open_and_match"]
    opened, matched, first = (steps[key] for key in ("open", "match_and_split", "first_batch"))
    peak = max(opened["peak_bytes"], matched["peak_bytes"])
    training, evaluation, *_ = (
        {row["contender"]: f"{row['images_per_second']:.0f}" for row in case["rows"]} for case in report["decoding"]
    )
    bicubic, bilinear = (f"torchvision ImageFolder, {kind}" for kind in ("bicubic", "bilinear"))
    return {
        "images": f"{synthetic['images']:,}", "shards": f"{synthetic['shards']:,}", "ids": f"{synthetic['forget']:,}",
        "index_seconds": f"{synthetic['index']['seconds']:.1f}", "open_seconds": f"{opened['seconds']:.1f}",
        "match_seconds": f"{matched['seconds']:.1f}", "batch": str(first["batch"][0]),
        "first_seconds": f"{opened['seconds'] + matched['seconds'] + first['seconds']:.1f}",
        "extra_mib": f"{(peak - opened['peak_bytes'] + opened['extra_bytes']) / MIB:.0f}",
        "peak_gib": f"{peak / 2**30:.2f}",
        "training": training["ours, draft"], "training_peer": training[bicubic], "training_default": training[bilinear],
        "evaluating": evaluation["ours, draft"], "evaluating_peer": evaluation[bicubic],
    }  # fmt: skip


def _mutation(report: Report) -> dict[str, str]:
    rows = report["rows"]
    return {"planted": str(len(rows)), "noticed": str(sum(row["killed_by"] is not None for row in rows))}


def _compiled(report: Report) -> dict[str, str]:
    kernels = report["kernels"]
    return {"kernels": str(len(kernels)), "spills": str(sum(one["spilled_bytes"] > 0 for one in kernels))}


def _timm_models(report: Report) -> dict[str, str]:
    ran = {key: sum(row.get(key) == "yes" for row in report["table"]) for key in ("lethe", "lethe_plus")}
    return {"tried": str(len(report["table"])), **{key: str(count) for key, count in ran.items()}}


def _kernels(report: Report) -> dict[str, str]:
    def rows(work: str, part: str) -> dict[str, Any]:
        case = next(case for case in report["cases"] if case["work"] == work and part in case["case"])
        return {row["contender"]: row for row in case["rows"]}

    small, base = (rows(MASKING, f"ViT-{letter}/16 224") for letter in "SB")
    pairs = rows(CONTRAST, "paired")
    return {
        "small": f"{middle(ratios(small[FAST_VIT_ROLLOUT], small['ours'])):.2f}",
        "base": f"{middle(ratios(base[FAST_VIT_ROLLOUT], base['ours'])):.2f}",
        "forward": f"{base[PLAIN]['median']:.2f}", "peer": f"{base[FAST_VIT_ROLLOUT]['median']:.2f}",
        "pairs": f"{1e3 * pairs['ours']['median']:.2f}", "pairs_peer": f"{1e3 * pairs[INFO_NCE_PYTORCH]['median']:.2f}",
    }  # fmt: skip


# Name in the templates: file of bench/results/, and what returns its figures.
FIGURES: dict[str, tuple[str, Callable[[Report], dict[str, str]]]] = {
    "yardstick": ("leaderboard-yardstick.json", _yardstick),
    "yardstick_alone": ("leaderboard-yardstick-alone.json", _yardstick_alone),
    "yardstick_class": ("leaderboard-yardstick-class.json", _yardstick_class),
    "digits": ("leaderboard-digits.json", _digits),
    "ablation": ("yardstick-ablation.json", _ablation),
    "training_step": ("train-cpu.json", _training_step),
    "projection": ("retrain-cost.json", _projection),
    "ulira": ("ulira-digits.json", _ulira),
    "certificates": ("certificates.json", _certificates),
    "agreement": ("pool-agreement.json", _agreement),
    "equality": ("equality.json", _equality),
    "chaos": ("chaos.json", _chaos),
    "two_hosts": ("two-hosts.json", _two_hosts),
    "data": ("data-cpu.json", _data),
    "mutation": ("mutation.json", _mutation),
    "compiled": ("kernels-compile.json", _compiled),
    "kernels": ("kernels-cpu.json", _kernels),
    "timm_models": ("models.json", _timm_models),
}


def values(results: Path, of_file: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the dictionary, and an error line for each part that is missing from it because it cannot be made.

    Args:
        results: Folder of the result files.
        of_file: Make only the parts that are read from this file.
    """
    found: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    errors: list[str] = []
    parts: list[tuple[dict[str, Any], str, tuple[str, ...], Callable[..., Any]]] = [
        *((found, name, (file,), make) for name, (file, make) in FIGURES.items()),
        *((tables, name, table.files, functools.partial(_table, table)) for name, table in TABLES.items()),
    ]
    for place, name, files, make in parts:
        if of_file in (None, *files):
            try:
                place[name] = fitted(files, make, *(measured(results / file) for file in files))
            except UserError as error:
                errors.append(f"{'table ' if place is tables else ''}{name}: {error}")
    return {**found, "tables": tables}, errors


def _table(table: Table, *reports: Report) -> dict[str, Any]:
    command = reports[0].get("command") or table.command
    return {"markdown": table.make(*reports).markdown(), "command": command, "files": table.files}


def _still_true(condition: Any, otherwise: str) -> None:
    if not condition:
        raise UserError(f"{otherwise}; change the sentence")
