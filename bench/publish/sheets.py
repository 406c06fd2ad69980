"""Tables of the documents and of the page, each made from a file of bench/results/.

A new table is a function, an entry of TABLES, and a line `{{ table("NAME") }}` in a template of docs/templates/.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.harness.measure import middle, size
from bench.kernel_speed.kernel_peers import INFO_NCE_PYTORCH
from bench.kernel_speed.kernel_targets import CONTRAST, MASKING
from bench.kernel_speed.rollout_peers import FAST_VIT_ROLLOUT, HOOKED, PLAIN
from bench.publish.results import Report, fitted, kind_of
from bench.publish.sheet import Sheet, starting
from bench.publish.verdict_sheets import (
    agreement_table,
    calibration_table,
    certificates_table,
    queue_table,
    verdicts_table,
)
from bench.quality import ablation
from bench.quality.retrain_summary import OWN, PLACES, over_seeds, with_images
from bench.training_cost.train import BEST_BF16, BEST_FP32, OURS_COMPILED

MIB = 2**20
# Rows of the summary: a retrain, the two methods of this engine, the next best by gap, the simplest baseline.
SUMMARY = ("retrain", "lethe_plus", "random_labels", "finetune", "lethe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """How a table is made.

    Args:
        files: Names in bench/results/.
        make: Returns the table from the contents of `files`, in their order.
        command: Command that made the files, for files that do not name it.
        on_page: Whether `python -m bench page` shows it.
    """

    files: tuple[str, ...]
    make: Callable[..., Sheet]
    command: str = ""
    on_page: bool = True


# --- unlearning -------------------------------------------------------------------------------------------------------


# Names of variants in the table, if they differ from those of the results.
_VARIANTS = {"until forget samples look held out": "until forget samples match held-out samples"}


def ablation_table(report: Report) -> Sheet:
    found = ablation.table_rows(report)
    last = found[-1][1]  # stages before the last are of interest in the default's run alone
    rows = [
        [_VARIANTS.get(name, name), *cells]
        for name, stage, _, cells in found
        if stage == last or name == ablation.ALONE
    ]
    rows.sort(key=lambda row: row[0] not in ("retain stage alone", ablation.ALONE))
    return Sheet(columns=["variant", *ablation.columns(report)], rows=rows, marked=starting(rows, "default"))


# Heading: what an entry of a summary has it under, digits, factor, unit.
_COLUMNS = {
    "seconds": ("seconds", 1, 1, ""),
    "of retrain": ("share", 1, 100, "%"),
    "images": ("images_share", 1, 100, "%"),
    "average gap": ("gap", 2, 1, ""),
    "gap / noise floor": ("gap_to_floor", 1, 1, ""),
    "agreement": ("agreement", 1, 100, ""),
    "forget": ("forget", 1, 100, ""),
    "retain": ("retain", 1, 100, ""),
    "test": ("test", 1, 100, ""),
    "MIA efficacy": ("efficacy", 1, 100, ""),
    "score": ("score", 2, 1, ""),
}


def retrain_cost_table(report: Report) -> Sheet:
    return _comparison({task: _standing(entry) for task, entry in report["tasks"].items()})


def leaderboard_table(report: Report) -> Sheet:
    """Make the table of all methods, the smallest gap first in each task."""
    return _comparison({task: sorted(_standing(entry), key=_gap) for task, entry in report["tasks"].items()})


def _comparison(tasks: Mapping[str, Sequence[Report]]) -> Sheet:
    every = [(task, found) for task, entries in tasks.items() for found in entries]
    # Early files have no score.
    headings = [heading for heading, (key, *_) in _COLUMNS.items() if any(found.get(key) for _, found in every)]
    return Sheet(
        columns=["task, method", "seeds", *headings, "collapsed"],
        rows=[
            [f"{task}, {found['method']}", _count(found["seeds"]), *_cells(found, headings), _count(found["collapsed"])]
            for task, found in every
        ],
        marked=frozenset(number for number, (_, found) in enumerate(every) if found["method"] in OWN),
    )


def summary_table(report: Report) -> Sheet:
    """Make five rows and five columns of a leaderboard of one task, smallest gap first."""
    (entry,) = report["tasks"].values()
    entries = sorted((found for found in _summary(entry) if found["method"] in SUMMARY), key=_gap)
    headings = ("average gap", "forget", "test", "images")
    return Sheet(
        columns=["method", "average gap", "forget accuracy", "test accuracy", "training images, of a retrain"],
        rows=[[found["method"], *_cells(found, headings)] for found in entries],
        marked=frozenset(number for number, found in enumerate(entries) if found["method"] in OWN),
    )


def _standing(entry: Report) -> list[Report]:
    """Return a task's summary, with the untouched model as an entry of it."""
    numbers = {key: over_seeds([entry["untouched"]], path) for key, path in PLACES.items()}
    return [*_summary(entry), {"method": "untouched", "seeds": None, "collapsed": None, **numbers}]


def _summary(entry: Report) -> list[Report]:
    """Return a task's summary with the share of images, which early files do not have."""
    rows = with_images(entry["rows"])
    return [
        {
            **found,
            "images_share": over_seeds([row for row in rows if row["method"] == found["method"]], ("images_share",)),
        }
        for found in entry["summary"]
    ]


def _gap(found: Report) -> float:
    return found["gap"]["mean"] if found["gap"] else math.inf


def _cells(found: Report, headings: Iterable[str]) -> list[str]:
    chosen = [_COLUMNS[heading] for heading in headings]
    return [_either(found.get(key), digits, factor, unit, found["seeds"]) for key, digits, factor, unit in chosen]


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def peers_table(report: Report) -> Sheet:
    """Make a row a method and setting: this project's / the other library's."""
    rows = []
    for task, entry in report["tasks"].items():
        for found in entry["comparisons"]:
            sides = (found["ours"], found["theirs"])
            pairs = [("forget", 100), ("test", 100), ("efficacy", 100), ("agreement", 100), ("seconds", 1)]
            rows.append([
                f"{task}, {found['method']}, {found['setting']}", found["library"], str(found["seeds"]),
                *(_either(side["gap"], 2, seeds=found["seeds"]) for side in sides), found["verdict"],
                *(" / ".join(f"{factor * side[key]['mean']:.1f}" for side in sides) for key, factor in pairs),
                _either(found["times"], 2, seeds=found["seeds"]),
            ])  # fmt: skip
    columns = ["ours / theirs", "library", "seeds", "gap, ours", "gap, theirs", "ours is", "forget", "test"]
    return Sheet(columns=[*columns, "MIA efficacy", "agreement", "seconds", "their time over ours"], rows=rows)


def projection_table(report: Report) -> Sheet:
    rows = []
    for found in report["projection"]:
        for each in found["hours"]:
            shares = [f"{100 * share:.1f}% of {recipe}" for recipe, share in (each.get("share") or {}).items()]
            rows.append([
                f"{found['model']}, {each['work']}" + (f": {each['recipe']}" if each["recipe"] else ""),
                found["precision"], f"{each['device_hours']:,.1f}", ", ".join(shares) or "-",
                *("-" if each[key] is None else f"{each[key]:,.1f}" for key in ("kwh", "money")),
            ])  # fmt: skip
    columns = ["ImageNet-1k, projected from measured steps", "precision", "device-hours", "share", "kWh", "money"]
    return Sheet(columns=columns, rows=rows)


def scaling_table(report: Report) -> Sheet:
    rows = []
    for curve in report["curves"]:
        labels = curve["labels"]
        rows.append([
            f"{curve['name']}: {curve['quantity']} by {curve['variable']}", f"{labels[0]} to {labels[-1]}",
            f"{curve['exponent']:.2f} ± {curve['uncertainty']:.2f}", f"{curve['exponent_of_largest_two']:.2f}",
            f"{curve['expected']:.2f} ± {curve['tolerance']:g}", "PASS" if curve["within"] else "LOOK",
        ])  # fmt: skip
    columns = ["cost", "sizes", "exponent", "of the two largest", "expected", "verdict"]
    return Sheet(columns=columns, rows=rows)


# --- ranks ------------------------------------------------------------------------------------------------------------

_STAGES = {
    "zero0": "plain data parallel (stage 0)",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 + offload",
}


def equality_table(report: Report) -> Sheet:
    """Make the table; rows that are equal in every figure are one row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for row in report["rows"]:
        if row["precision"] == "fp32" and row["case"] != "one process":
            cells = [_power(row[key]) for key in ("tensor", "weight", "loss")]
            cells.append("equal" if row["points"] == 0 else f"{row['points']:.2f} points")
            ranks, _, stage = row["case"].rpartition(", ")
            named = _STAGES.get(stage, row["case"])
            alike = names.setdefault(tuple(cells), [])
            alike.append(named if alike or named == row["case"] else f"{ranks}, {named}")
    rows = [[" and ".join(alike), *cells] for cells, alike in names.items()]
    columns = ["run", "worst tensor, by norm", "worst single weight", "largest difference of a loss", "accuracies"]
    return Sheet(columns=columns, rows=rows)


def memory_table(*reports: Report) -> Sheet:
    rows = [row for report in reports for row in report["rows"]]
    rows.sort(key=lambda row: (row["case"], row["precision"] != "fp32"))
    return Sheet(
        columns=["run", "precision", "peak", "planned"],
        rows=[
            [
                _STAGES[row["case"]],
                row["precision"],
                *(f"{n / MIB:,.0f} MiB" for n in (row["peaks"]["0"], row["planned"])),
            ]
            for row in rows
        ],
    )


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# --- training ---------------------------------------------------------------------------------------------------------

_GROUPS = (BEST_FP32, BEST_BF16)
_PEERS = ("SalUn's loop", "supreme's loop")


def train_table(report: Report) -> Sheet:
    """Make a row a case: images a second, and how many times as fast this engine is.

    The time of a forget step includes its share of `prepare`.
    """
    rows = []
    for case in report["cases"]:
        named = {row["contender"]: row for row in case["rows"]}
        ours = case["rows"][0]
        best = [case["best"].get(group, "") for group in _GROUPS]
        shown = [ours, *(named.get(name, {}) for name in (OURS_COMPILED, *best, *_PEERS))]
        times = ours.get("times_with_prepare", {})
        rows.append([
            case["case"], *(_speed(row) for row in shown),
            *(f"{middle(times[group]):.2f}" if group in times else "-" for group in _GROUPS),
            f"{100 * ours['mfu']:.0f}%" if "mfu" in ours else "-",
        ])  # fmt: skip
    columns = ["images a second", "ours", OURS_COMPILED, *_GROUPS, *_PEERS, *(f"x {group}" for group in _GROUPS), "MFU"]
    return Sheet(columns=columns, rows=rows)


def _speed(row: dict[str, Any]) -> str:
    if row.get("status") != "measured":
        return row.get("status", "-")
    return f"{row['batch'] / (row['median'] + row['prepare_a_step']):.1f}"


# --- proof ------------------------------------------------------------------------------------------------------------


def models_table(report: Report) -> Sheet:
    """Return the support table of timm: counts a module, by shapes, and what runs on one of its models, by steps.

    A cell of the steps is yes, - for a refusal with a message, or crash.
    """
    count, steps = report["count"], ("opens", "lethe", "lethe_plus", "verify", "plan")
    counts = {
        name: [f"{row['logits']} of {row['classifiers']}", f"{row['lethe']}"]
        for name, row in count["by_module"].items()
    }
    rows, shown = [], set()
    for row in report["table"]:
        module = row["module"]
        rows.append(
            [
                *(["", "", ""] if module in shown else [module, *counts.get(module, ["", ""])]),
                " ".join(filter(None, (row["name"], row["kind"] and f"({row['kind']})"))),
                *(_support(row.get(key, "")) for key in steps),
            ]
        )
        shown.add(module)
    crashes = sum(row.get(key, "").startswith("crash") for row in report["table"] for key in steps)
    totals = [f"{count['logits']} of {count['classifiers']}", f"{count['lethe']} of {count['columnar']} columnar"]
    passed = [f"{sum(row.get(key) == 'yes' for row in report['table'])} of {len(report['table'])}" for key in steps]
    rows.append(["all", *totals, f"{count['crashes'] + crashes} crashes", *passed])
    columns = ["module of timm", "accepted by logits methods", "by lethe", "model tried", *steps]
    return Sheet(columns=columns, rows=rows, marked=frozenset({len(rows) - 1}))


def _support(outcome: str) -> str:
    kind = outcome.partition(":")[0]
    return {"refused": "-"}.get(kind, kind)


def ulira_table(report: Report) -> Sheet:
    """Make a row a procedure, and one for the attack if nothing was unlearned."""
    rows: list[list[str]] = []
    for found in report["rows"]:
        pairs = found["models"]["with_each_target"]
        for name, attack in ((f"unlearned by {found['method']}", found["ulira"]), ("untouched", found["untouched"])):
            auc, rate = attack["auc"], attack["tpr_at_fpr"]["0.01"]
            row = [
                f"{name}, {pairs} + {pairs} models",
                f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})",
                f"{100 * rate['value']:.1f}% ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})",
            ]
            rows += [row] if row not in rows else []  # the untouched models are the same for every procedure
    return Sheet(columns=["U-LiRA on digits", "AUC", "TPR at 1% FPR"], rows=rows)


# --- kernels ----------------------------------------------------------------------------------------------------------

# Launch, case of bench.kernel_speed.compile, its forward and backward kernels (None: the only one), targets.
_LAUNCHES: tuple[tuple[str, str, tuple[str | None, ...], tuple[str, ...]], ...] = (
    (
        "rollout and mask, ViT-B/16 224, B = 256", "rollout B=256 N=197 H=12 d=64 mean rollout", (None,),
        ("sm_80", "sm_90", "sm_100", "gfx942"),
    ),
    ("rollout and mask, ViT-B/16 384, B = 256", "rollout B=256 N=577 H=12 d=64 mean rollout", (None,), ("sm_90",)),
    (
        "InfoNCE, B = 65,536, D = 128: forward / backward", "info_nce in-batch B=65536 D=128",
        ("_shared_forward_kernel", "_push_kernel"), ("sm_90",),
    ),
)  # fmt: skip


def compile_table(report: Report) -> Sheet:
    """Make the table; of several launches of a kernel it has the one with the most registers."""
    rows = []
    for launch, case, kernels, targets in _LAUNCHES:
        for target in targets:
            found = [
                one for one in report["kernels"] if (one["case"], one["dtype"], one["target"]) == (case, "bf16", target)
            ]
            chosen = [
                max((one for one in found if kernel in (None, one["kernel"])), key=lambda one: one["registers"])
                for kernel in kernels
            ]
            columns = [
                " / ".join(f"{one[key]:,}" for one in chosen)
                for key in ("registers", "shared_bytes", "matrix_instructions")
            ]
            times: dict[str, list[str]] = {}
            for card, seconds in chosen[0]["predicted"].items():
                times.setdefault(f"{1e6 * seconds:,.0f} us", []).append(card.split()[1][:4])
            best = ", ".join(f"{', '.join(cards)} {time}" for time, cards in times.items())
            rows.append([launch if target == targets[0] else "", target, *columns, best])
    columns = ["launch, bf16", "target", "registers", "shared memory", "matrix instructions", "time at best"]
    return Sheet(columns=columns, rows=rows)


def masks_table(report: Report) -> Sheet:
    labels = {
        PLAIN: "forward pass alone, fused attention",
        HOOKED: f"{HOOKED} (vit-explain's algorithm, batched)",
        FAST_VIT_ROLLOUT: f"{_versioned(report, FAST_VIT_ROLLOUT)} at its defaults",
    }
    return _contenders(report, MASKING, "images to masked images", labels, "extra_bytes")


def info_nce_table(report: Report) -> Sheet:
    labels = {
        INFO_NCE_PYTORCH: _versioned(report, INFO_NCE_PYTORCH),
        "open_clip ClipLoss": "open_clip's ClipLoss (both directions)",
    }
    return _contenders(report, CONTRAST, "InfoNCE, forward and backward", labels, "peak_bytes")


def _contenders(report: Report, work: str, head: str, labels: dict[str, str], memory: str) -> Sheet:
    """Make two columns a case: median and memory of this project's row and of the contenders with a label."""
    cases = [case for case in report["cases"] if case["work"] == work and "negatives" not in case["shape"]]
    names = dict.fromkeys(row["contender"] for case in cases for row in case["rows"])
    rows = []
    for name in names:
        if name not in labels and not name.startswith("ours"):
            continue
        cells = [labels.get(name, name)]
        for case in cases:
            missing: dict[str, Any] = {"status": "not measured"}
            row = next((row for row in case["rows"] if row["contender"] == name), missing)
            if row["status"] == "measured":
                # The memory of the others is that above the plain forward pass.
                cells += [_seconds(row["median"]), "" if name == PLAIN else size(row[memory])]
            else:
                cells += [row.get("reason", row["status"]).split(" (")[0], ""]
        rows.append(cells)
    columns = [head, *(text for case in cases for text in (case["case"], "memory"))]
    return Sheet(columns=columns, rows=rows, marked=starting(rows, "ours"))


def _versioned(report: Report, distribution: str) -> str:
    """Return the name with its version, if the result has it."""
    return f"{distribution} {report['environment'].get('peers', {}).get(distribution, '')}".strip()


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def _either(
    found: dict[str, float] | None, digits: int, factor: float = 1.0, unit: str = "", seeds: int | None = None
) -> str:
    """Format mean ± half of the range, the mean alone of one seed, or a dash if there is none."""
    if found is None:
        return "-"
    half = f" ± {factor * found['half_range']:.{digits}f}" if seeds and seeds > 1 else ""
    return f"{factor * found['mean']:.{digits}f}{half}{unit}"


TABLES = {
    "summary": Table(files=("leaderboard-yardstick.json",), make=summary_table, on_page=False),
    "verdicts": Table(files=("verdicts.json",), make=verdicts_table),
    "calibration": Table(files=("calibration.json",), make=calibration_table),
    "calibration-yardstick": Table(files=("calibration-yardstick.json",), make=calibration_table),
    "certificates": Table(files=("certificates.json",), make=certificates_table),
    "pool-queue-digits": Table(files=("pool-queue-digits.json",), make=queue_table),
    "pool-queue-yardstick": Table(files=("pool-queue-yardstick.json",), make=queue_table),
    "pool-agreement": Table(files=("pool-agreement.json",), make=agreement_table),
    "leaderboard-yardstick": Table(files=("leaderboard-yardstick.json",), make=leaderboard_table),
    "leaderboard-yardstick-alone": Table(files=("leaderboard-yardstick-alone.json",), make=leaderboard_table),
    "leaderboard-yardstick-class": Table(files=("leaderboard-yardstick-class.json",), make=leaderboard_table),
    "leaderboard-digits": Table(files=("leaderboard-digits.json",), make=leaderboard_table),
    "yardstick-ablation": Table(files=("yardstick-ablation.json",), make=ablation_table),
    "yardstick-ablation-plus": Table(files=("yardstick-ablation-plus.json",), make=ablation_table),
    "yardstick-accelerators": Table(files=("yardstick-accelerators.json",), make=ablation_table),
    "peers-digits": Table(files=("peers-digits.json",), make=peers_table),
    "peers-yardstick": Table(files=("peers-yardstick.json",), make=peers_table),
    "retrain-projection": Table(files=("retrain-cost.json",), make=projection_table),
    "train": Table(files=("train-cpu.json",), make=train_table),
    "scaling": Table(files=("scaling-cpu.json",), make=scaling_table),
    "models": Table(files=("models.json",), make=models_table),
    "ulira": Table(files=("ulira-digits.json",), make=ulira_table),
    "equality": Table(
        files=("equality.json",), make=equality_table,
        command="python -m bench equality --checkpoint ORIGINAL --data parquet:DATA --forget IDS",
    ),
    "memory": Table(
        files=("memory-fp32.json", "memory-bf16.json"), make=memory_table,
        command="python -m bench memory --images FOLDER --case ...",
    ),
    "kernels-compile": Table(files=("kernels-compile.json",), make=compile_table, command="python -m bench compile"),
    "kernels-masks": Table(files=("kernels-cpu.json",), make=masks_table),
    "kernels-info-nce": Table(files=("kernels-cpu.json",), make=info_nce_table),
    # For the page alone: in the documents the leaderboards have the same of more methods.
    "retrain-cost": Table(files=("retrain-cost.json",), make=retrain_cost_table),
}  # fmt: skip


def sheets_of(name: str, report: Report) -> dict[str, Sheet]:
    """Make the page's tables of one result file, by its name without .json; of a GPU's and of a CPU's alike."""
    kind = kind_of(name)
    return {
        key: fitted([f"{name}.json"], table.make, report)
        for key, table in TABLES.items()
        if table.on_page and any(kind_of(file) == kind for file in table.files)
    }
