"""Tables of verdicts: on models whose verdict is known, and how often retrained models and impostors pass."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from bench.publish.results import Report
from bench.publish.sheet import Sheet, starting

STATUSES = ("PASS", "INSUFFICIENT EVIDENCE", "FAIL")


def verdicts_table(report: Report) -> Sheet:
    """Make a row a model, with the verdict on each subject and the gates that decided it."""
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
    return Sheet(columns=columns, rows=rows, marked=starting(rows, "retrained"))


def calibration_table(report: Report) -> Sheet:
    """Make a row a model, with the numbers of PASS, INSUFFICIENT EVIDENCE and FAIL by task and number of references.

    Lists of one task ("digits, list 0") are added up.
    """
    tasks: dict[str, dict[str, dict[str, collections.Counter[str]]]] = {}
    for name, found in report["subjects"].items():
        task = tasks.setdefault(name.split(",")[0], {})
        for model, found_by_count in {"retrained": found["retrains"], **found["impostors"]}.items():
            for references, statuses in found_by_count.items():
                task.setdefault(model, {}).setdefault(str(references), collections.Counter()).update(statuses)
    columns = [(task, count) for task, models in tasks.items() for count in models["retrained"]]
    models = dict.fromkeys(model for each in tasks.values() for model in each)
    rows = [[model, *(counts(tasks[task].get(model, {}).get(count)) for task, count in columns)] for model in models]
    heads = [f"{task}, {count} reference{'s' if count != '1' else ''}" for task, count in columns]
    return Sheet(columns=["model", *heads], rows=rows, marked=starting(rows, "retrained"))


def counts(statuses: Mapping[str, int] | None) -> str:
    """Return the numbers of STATUSES as text, or a dash."""
    return "-" if statuses is None else " / ".join(str(statuses.get(status, 0)) for status in STATUSES)


def certificates_table(report: Report) -> Sheet:
    """Make a row a procedure: certificates granted, their rate, and what decided against one."""
    rows = []
    for name, found in report["procedures"].items():
        rate, deciding = found["rate"], sorted(found["deciding"].items(), key=lambda each: -each[1])
        rows.append(
            [
                name,
                f"{found['granted']} of {found['seeds']}",
                f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f}",
                f"{sum(found['auc']) / len(found['auc']):.3f}",
                ", ".join(f"{gate} {count}" for gate, count in deciding[:4]),
            ]
        )
    columns = ["procedure", "certificates", "rate %, 95% interval", "membership AUC, mean", "deciding gates"]
    return Sheet(columns=columns, rows=rows, marked=starting(rows, "retrain"))


def agreement_table(report: Report) -> Sheet:
    """Make a row a verdict by references, with the verdicts of the same models by the pool."""
    counts_of = report["counts"]
    rows = [[status, *(str(counts_of.get(status, {}).get(other, 0)) for other in STATUSES)] for status in STATUSES]
    return Sheet(columns=["by references", *(f"by the pool: {other}" for other in STATUSES)], rows=rows)


def _points(value: float) -> str:
    """Format a difference in points; one that rounds to 0 has no sign."""
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def queue_table(report: Report) -> Sheet:
    """Make a row a run: its request, its state, what it kept of the accuracy, and the cost of its proof."""
    rows = []
    accuracies = ("test accuracy", "retain accuracy")
    for run in report["runs"]:
        share = "-" if run["share"] is None else f"{100 * run['share']:.2f}"
        seconds = "-" if run["proof_seconds"] is None else f"{run['proof_seconds']:.1f}"
        kept = [_points(run["kept"][name][0]) if name in run["kept"] else "-" for name in accuracies]
        cells = [run["planted"], run["status"], run["state"], run["kind"], *kept, share, seconds]
        rows.append([str(run["request"]), str(run["samples"]), *cells])
    cost = ["proof, % of a retrain's images", "proof, s"]
    return Sheet(columns=["request", "samples", "planted", "verdict", "state", "proof", *accuracies, *cost], rows=rows)
