"""README.md's tables, each made from a file of bench/results/; `bench.readme_figures` has the figures in sentences.

`python -m bench tables` puts them in their places. A new table is a function, an entry of TABLES and its two marker
lines in README.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import ablation, quality
from bench.kernel_peers import INFO_NCE_PYTORCH
from bench.kernel_targets import CONTRAST, MASKING
from bench.measure import middle, size
from bench.rollout_peers import FAST_VIT_ROLLOUT, HOOKED, PLAIN
from bench.train import BEST_BF16, BEST_FP32, OURS_COMPILED

Report = dict[str, Any]
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of text. The first column names the rows; `marked` are the numbers of the rows that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns)]
        for number, (name, *cells) in enumerate(self.rows):
            lines.append([f"**{name}**" if number in self.marked else name, *cells])
        return "\n".join(_line(cells) for cells in lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """A table of README.md. make: from the contents of `files`, in their order.

    command: where a file does not say what made it. expected: without it, neither the files nor the markers need be
    there yet.
    """

    name: str
    files: tuple[str, ...]
    make: Callable[..., Sheet]
    command: str = ""
    expected: bool = True


# --- unlearning -------------------------------------------------------------------------------------------------------

_QUALITY = ("forget", "retain", "test", "MIA efficacy", "loss AUC", "average gap")


def quality_table(report: Report) -> Sheet:
    rows = []
    for name, cells in quality.table_rows(report["rows"], report["retrain_seconds"]):
        config = report["rows"].get(name, {}).get("config", {})
        if name == "finetune":
            name = f"fine-tuning, {config['retain_epochs']:g} epochs"
        elif name == "lethe":
            name = f"lethe ({config['forget_epochs']:g} + {config['retain_epochs']:g} epochs)"
        rows.append([name, *cells])
    columns = ["model", *_QUALITY, "gap / noise floor", "agreement", "seconds", "of retrain"]
    return Sheet(columns=columns, rows=rows, marked=_starting(rows, "lethe ("))


def ablation_table(report: Report) -> Sheet:
    found = ablation.table_rows(report)
    last = found[-1][1]  # stages before the last are of interest in the default's run alone
    rows = [[name, *cells] for name, stage, _, cells in found if stage == last or name == ablation.ALONE]
    rows.sort(key=lambda row: row[0] not in ("retain stage alone", ablation.ALONE))
    return Sheet(columns=["variant", *ablation.columns(report)], rows=rows, marked=_starting(rows, "default"))


def retrain_cost_table(report: Report) -> Sheet:
    columns = ["task, method", "seeds", "seconds", "of retrain", "average gap", "gap / noise floor", "forget", "test"]
    # Early files have none.
    scored = any(found.get("score") for entry in report["tasks"].values() for found in entry["summary"])
    rows = []
    for task, entry in report["tasks"].items():
        untouched, floor = entry["untouched"], entry["noise_floor"]
        for found in entry["summary"]:
            percent = [_either(found[key], 1, 100) for key in ("forget", "test", "efficacy", "agreement")]
            rows.append([
                f"{task}, {found['method']}", str(found["seeds"]), _either(found["seconds"], 1),
                _either(found["share"], 1, 100, "%"), _either(found["gap"], 2), _either(found["gap_to_floor"], 1),
                *percent, *([_either(found.get("score"), 2)] if scored else []), str(found["collapsed"]),
            ])  # fmt: skip
        percent = [f"{100 * untouched['accuracy'][key]:.1f}" for key in ("forget", "test")]
        agreement = untouched.get("agreement")
        gap = (untouched.get("gap") or {}).get("average")
        rows.append([
            f"{task}, untouched", "-", "-", "-", "-" if gap is None else f"{gap:.2f}",
            f"{gap / floor:.1f}" if gap is not None and floor else "-", *percent,
            f"{100 * untouched['mia']['efficacy']:.1f}", "-" if agreement is None else f"{100 * agreement:.1f}",
            *([f"{untouched['score']:.2f}"] if scored else []), "-",
        ])  # fmt: skip
    return Sheet(
        columns=[*columns, "MIA efficacy", "agreement", *(["score"] if scored else []), "collapsed"],
        rows=rows,
        marked=frozenset(i for i, row in enumerate(rows) if row[0].endswith(", lethe")),
    )


def leaderboard_table(report: Report) -> Sheet:
    """The same, the smallest gap first in each task."""

    def gap(found: Report) -> float:
        return found["gap"]["mean"] if found["gap"] else math.inf

    tasks = {name: {**entry, "summary": sorted(entry["summary"], key=gap)} for name, entry in report["tasks"].items()}
    return retrain_cost_table({"tasks": tasks})


def peers_table(report: Report) -> Sheet:
    """A row a method and setting: ours / theirs."""
    rows = []
    for task, entry in report["tasks"].items():
        for found in entry["comparisons"]:
            sides = (found["ours"], found["theirs"])
            pairs = [("forget", 100), ("test", 100), ("efficacy", 100), ("agreement", 100), ("seconds", 1)]
            rows.append([
                f"{task}, {found['method']}, {found['setting']}", found["library"],
                *(_either(side["gap"], 2) for side in sides), found["verdict"],
                *(" / ".join(f"{factor * side[key]['mean']:.1f}" for side in sides) for key, factor in pairs),
                _either(found["times"], 2),
            ])  # fmt: skip
    columns = ["ours / theirs", "library", "gap, ours", "gap, theirs", "ours is", "forget", "test", "MIA efficacy"]
    return Sheet(columns=[*columns, "agreement", "seconds", "their time over ours"], rows=rows)


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
    """Rows that are alike in every figure are one row."""
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
    """A row a case: images a second, and how many times as fast ours is; a forget step with its share of `prepare`."""
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


def verdicts_table(report: Report) -> Sheet:
    """A row a model, with the verdict on each subject and the gates that decided it."""
    subjects = report["subjects"]
    models = dict.fromkeys(model for found in subjects.values() for model in found["models"])
    rows = []
    for model in models:
        cells = []
        for found in subjects.values():
            row = found["models"].get(model)
            if row is None:
                cells += ["-", "-", ""]
                continue
            verdict = row["verdict"]
            cells += [f"{100 * row['accuracy']['forget']:.1f}", verdict["status"], ", ".join(verdict["decided_by"])]
        expected = next(found["models"][model]["expected"] for found in subjects.values() if model in found["models"])
        rows.append([model, expected or "", *cells])
    columns = [
        "model",
        "must be",
        *(text for name in subjects for text in (f"{name}: forget %", "verdict", "decided by")),
    ]
    return Sheet(columns=columns, rows=rows, marked=_starting(rows, "retrained"))


def ulira_table(report: Report) -> Sheet:
    """A row a procedure, and what the attack finds where nothing was unlearned."""
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

# Launch, case of bench.compile, its forward and backward kernels (None: the only one), targets.
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
    """Of several launches of a kernel the one with the most registers."""
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
        FAST_VIT_ROLLOUT: f"{_versioned(report, FAST_VIT_ROLLOUT)} as it ships",
    }
    return _contenders(report, MASKING, "images to masked images", labels, "extra_bytes")


def info_nce_table(report: Report) -> Sheet:
    labels = {
        INFO_NCE_PYTORCH: _versioned(report, INFO_NCE_PYTORCH),
        "open_clip ClipLoss": "open_clip's ClipLoss (both directions)",
    }
    return _contenders(report, CONTRAST, "InfoNCE, forward and backward", labels, "peak_bytes")


def _contenders(report: Report, work: str, head: str, labels: dict[str, str], memory: str) -> Sheet:
    """Two columns a case: median and memory of ours and of the contenders with a label."""
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
                # The plain forward pass is what the others' memory is above.
                cells += [_seconds(row["median"]), "" if name == PLAIN else size(row[memory])]
            else:
                cells += [row.get("reason", row["status"]).split(" (")[0], ""]
        rows.append(cells)
    columns = [head, *(text for case in cases for text in (case["case"], "memory"))]
    return Sheet(columns=columns, rows=rows, marked=_starting(rows, "ours"))


def _versioned(report: Report, distribution: str) -> str:
    """With its version, where the result has it."""
    return f"{distribution} {report['environment'].get('peers', {}).get(distribution, '')}".strip()


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def _starting(rows: Sequence[Sequence[str]], text: str) -> frozenset[int]:
    return frozenset(number for number, row in enumerate(rows) if row[0].startswith(text))


def _either(found: dict[str, float] | None, digits: int, factor: float = 1.0, unit: str = "") -> str:
    """Mean ± half of the range, or a dash where there is none."""
    if found is None:
        return "-"
    return f"{factor * found['mean']:.{digits}f} ± {factor * found['half_range']:.{digits}f}{unit}"


TABLES = (
    Generator(name="yardstick-quality", files=("yardstick-quality.json",), make=quality_table),
    Generator(name="yardstick-ablation", files=("yardstick-ablation.json",), make=ablation_table),
    Generator(name="retrain-cost", files=("retrain-cost.json",), make=retrain_cost_table),
    Generator(name="leaderboard-digits", files=("leaderboard-digits.json",), make=leaderboard_table),
    Generator(name="leaderboard-yardstick", files=("leaderboard-yardstick.json",), make=leaderboard_table),
    Generator(name="peers-digits", files=("peers-digits.json",), make=peers_table, expected=False),
    Generator(name="peers-yardstick", files=("peers-yardstick.json",), make=peers_table, expected=False),
    Generator(name="retrain-projection", files=("retrain-cost.json",), make=projection_table),
    Generator(
        name="equality", files=("equality.json",), make=equality_table,
        command="python -m bench equality --checkpoint ORIGINAL --data parquet:DATA --forget IDS",
    ),
    Generator(
        name="memory", files=("memory-fp32.json", "memory-bf16.json"), make=memory_table,
        command="python -m bench memory --images FOLDER --case ...",
    ),
    Generator(name="train", files=("train-cpu.json",), make=train_table),
    Generator(name="scaling", files=("scaling-cpu.json",), make=scaling_table),
    Generator(name="verdicts", files=("verdicts.json",), make=verdicts_table),
    Generator(name="ulira", files=("ulira-digits.json",), make=ulira_table),
    Generator(
        name="kernels-compile", files=("kernels-compile.json",), make=compile_table, command="python -m bench compile"
    ),
    Generator(name="kernels-masks", files=("kernels-cpu.json",), make=masks_table),
    Generator(name="kernels-info-nce", files=("kernels-cpu.json",), make=info_nce_table),
)  # fmt: skip
