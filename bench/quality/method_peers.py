"""Compare methods with other libraries' versions of them: same model, same request, same images, same evaluation.

"Ours" is this engine's version, the peer is that of the other library. For every seed, method and setting
(`bench.quality.peer_libraries`) both run one after the other, and the first alternates between seeds. Seconds are those
of the whole call with images decoded in it: of ours `engine.unlearn` without a run folder, of the peer a copy of the
model, its loaders and its function. They do not include evaluation. Times are compared in CPU seconds, which other
work on the machine changes less than wall-clock seconds.

A peer that is not installed is reported with the reason, and its method is left out.

The results file, as `python -m bench tables` reads it; numbers as in `bench.quality.retrain_cost`.

    peers: {LIBRARY: {version, reason: why it is missing, or null}}
    tasks: {NAME: {
        data, forget, samples, untouched, references, noise_floor, noise_floor_agreement: as there.
        rows: [{method, contender: "ours" | LIBRARY, settings: ["equal" | "defaults"], seed, seconds, cpu_seconds (of
            the process; null where they are not counted, as on a GPU), values: options that were set, collapsed (ours
            alone, else null), load_average, QUALITY}]
        comparisons: [{method, library, setting, seeds, differs, ours, theirs: {gap, forget, retain, test, efficacy,
            agreement, seconds (the CPU's; the wall clock's where those are null): each {mean, half_range} over seeds},
            times: {mean, half_range} of their seconds over ours, seed by seed, difference: of the mean gaps, ours -
            theirs, in points, noise, verdict}]
    }}

noise: the noise floor (0 with one reference) and the larger half range of the two over seeds. verdict: "better" and
"worse" if the gaps differ by more than that, else "within noise".
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from bench.harness.measure import mean_and_half_range
from bench.harness.report import Report, kept, load_average
from bench.quality.peer_libraries import PEERS, Peer, Values
from bench.quality.retrain_cost import (
    QUICK_STEPS,
    RETRAIN_SEED,
    Subject,
    compared,
    noise_floor,
    original_of,
    quality_of,
    setting_of,
)
from bench.quality.retrain_summary import PLACES, Row, over_seeds
from engine.cli.console import console, progress_bars
from engine.errors import UserError, nearest
from engine.jobs.task import Task
from engine.models.checkpoint import load_checkpoint
from engine.run.setup import RunOptions, set_up
from engine.run.unlearn import unlearn

OURS = "ours"
EQUAL, DEFAULTS = SETTINGS = ("equal", "defaults")

# Figures of both sides in a comparison.
_TOLD = ("gap", "forget", "retain", "test", "efficacy", "agreement")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One side of one or both settings. peer: None for this engine's method, with `values` as options."""

    method: str
    peer: Peer | None
    settings: tuple[str, ...]
    values: Values

    @property
    def name(self) -> str:
        return self.peer.library if self.peer else OURS


def run_method_peers(
    subjects: Sequence[Subject],
    seeds: int,
    settings: Sequence[str],
    methods: Sequence[str],
    json_file: Path | None,
    quick: bool = False,
    peers: Sequence[Peer] = PEERS,
    terms: Sequence[str] = (),
) -> dict[str, Any]:
    """Print and return the results described at the top of this file; continue the file of an interrupted run.

    methods: methods to run; none: all. terms: EQUAL, DEFAULTS or both; none: both.
    """
    setting = setting_of(subjects, seeds, settings, quick)
    options = setting["options"]
    known = [peer.method for peer in peers]
    for name in methods:
        if name not in known:
            raise UserError(f"--method {name!r}: no compared library has this method{nearest(name, known)}")
    for name in terms:
        if name not in SETTINGS:
            raise UserError(f"--setting {name!r}: expected {' or '.join(SETTINGS)}")
    chosen = [peer for peer in peers if peer.method in (methods or known)]
    report = Report()
    before = kept(json_file, setting, "peers")
    tasks: dict[str, Any] = dict(before.get("tasks", {}))
    found = {peer.library: _availability(peer) for peer in chosen}
    results = {**setting, "peers": {**before.get("peers", {}), **found}, "tasks": tasks}
    for library, each in found.items():
        if each["reason"]:
            console.print(f"{library} is left out: {each['reason']}", markup=False, soft_wrap=True)
    there = [peer for peer in chosen if not found[peer.library]["reason"]]
    if quick:
        options = {**options, "max_steps": QUICK_STEPS}
        there = [dataclasses.replace(peer, defaults=_shortened(peer.defaults)) for peer in there]
    for subject in subjects:
        for entry in _measured(subject, there, peers, seeds, terms, options, tasks.get(subject.name), quick):
            tasks[subject.name] = entry
            report.write(results, json_file)
        if subject.name in tasks:
            print_comparisons(subject.name, tasks[subject.name])
    return report.write(results, json_file)


def _availability(peer: Peer) -> dict[str, str | None]:
    try:
        peer.load()
    except ImportError as error:
        return {"version": None, "reason": str(error)}
    return {"version": peer.version(), "reason": None}


def _shortened(values: Values) -> Values:
    """Replace several passes by one."""
    return {key: 1 if key in ("epochs", "sgda_epochs", "msteps") else value for key, value in values.items()}


def _measured(
    subject: Subject,
    chosen: Sequence[Peer],
    peers: Sequence[Peer],
    seeds: int,
    terms: Sequence[str],
    options: Values,
    before: Row | None,
    quick: bool,
) -> Iterator[Row]:
    """Yield the subject's entry after every run of the chosen peers that was not done yet; all peers are compared."""
    if not chosen:
        return
    task = Task.open(subject.data, subject.forget)
    original = original_of(subject, task, options)
    untouched = quality_of(subject, task, options, original)
    if before and before["untouched"]["weights_sha256"] != untouched["weights_sha256"]:
        raise UserError(f"--json: its rows of {subject.name} are of another original; name another file")
    references = before["references"] if before else list(_references(subject, task, original, seeds, options))
    rows: list[Row] = list(before["rows"]) if before else []
    done = {_key(row["method"], row["contender"], row["settings"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for peer in chosen:
            contenders = [each for each in contenders_of(peer) if not terms or {*each.settings} & {*terms}]
            first = seed % len(contenders)
            for each in (*contenders[first:], *contenders[:first]):
                if _key(each.method, each.name, each.settings, seed) in done:
                    continue
                console.print(f"{subject.name}, seed {seed}: {each.method}, {each.name}, {' and '.join(each.settings)}")
                rows.append(_run(subject, task, original, each, seed, options, quick))
                yield _entry(subject, task, untouched, references, rows, peers)
    yield _entry(subject, task, untouched, references, rows, peers)


def _key(method: str, contender: str, settings: Sequence[str], seed: int) -> tuple[str, str, tuple[str, ...], int]:
    return method, contender, tuple(settings), seed


def contenders_of(peer: Peer) -> list[Contender]:
    """Return both sides; ours is one contender if both settings are the same to it."""
    ours: list[tuple[tuple[str, ...], Values]] = [(SETTINGS, {})]
    if peer.ours:
        ours = [((EQUAL,), peer.ours), ((DEFAULTS,), {})]
    theirs = [Contender(peer.method, peer, (setting,), {}) for setting in SETTINGS]
    return [*(Contender(peer.method, None, *each) for each in ours), *theirs]


def _references(subject: Subject, task: Task, original: nn.Module, seeds: int, options: Values) -> Iterator[Row]:
    """Yield the given references; if there are none, retrain two at least."""
    for name in subject.references:
        yield {"name": Path(name).name, **quality_of(subject, task, options, load_checkpoint(name))}
    for seed in range(0 if subject.references else max(2, seeds)):
        console.print(f"{subject.name}: retraining, seed {seed}")
        config = {**subject.options, **subject.recipe, "seed": RETRAIN_SEED + seed, **options}
        with progress_bars() as progress:
            model = unlearn(
                original,
                task.forget,
                task.retain,
                method="retrain",
                config=config,
                validation=task.source.validation,
                progress=progress,
            ).model
        yield {"name": f"retrained, seed {seed}", **quality_of(subject, task, options, model)}


def _run(
    subject: Subject,
    task: Task,
    original: nn.Module,
    contender: Contender,
    seed: int,
    options: Mapping[str, Any],
    quick: bool,
) -> Row:
    """Do one run, timed, and evaluate its result."""
    peer, load = contender.peer, load_average()[0]
    config = {**subject.options, "seed": seed, **contender.values, **options}
    collapsed = None
    if peer is None:
        began = _clocks()
        with progress_bars() as progress:
            result = unlearn(
                original,
                task.forget,
                task.retain,
                method=contender.method,
                config=config,
                validation=task.source.validation,
                progress=progress,
            )
        ended = _clocks()
        model, values, collapsed = result.model, contender.values, result.collapsed
    else:
        # A run of this engine, set up and not started: it has the samples, rates and augmentation of the phases.
        run = set_up(
            original,
            task.forget,
            task.retain,
            RunOptions(method=contender.method, config={**config, **peer.ours}, validation=task.source.validation),
        )
        equal = contender.settings == (EQUAL,)
        values = peer.equal(run) if equal else peer.defaults
        values = _shortened(values) if quick else values
        precision = run.method.context.run.precision if equal else "fp32"
        began = _clocks()
        model = peer.unlearned(original, run, values, precision)
        ended = _clocks()
    return {
        "method": contender.method,
        "contender": contender.name,
        "settings": list(contender.settings),
        "seed": seed,
        "seconds": ended[0] - began[0],
        "cpu_seconds": ended[1] - began[1] if next(model.parameters()).device.type == "cpu" else None,
        "values": values,
        "collapsed": collapsed,
        "load_average": load,
        **quality_of(subject, task, options, model),
    }


def _clocks() -> tuple[float, float]:
    """Return the wall-clock seconds and the seconds of this process, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _entry(
    subject: Subject, task: Task, untouched: Row, references: Sequence[Row], rows: Sequence[Row], peers: Sequence[Peer]
) -> Row:
    floor, floor_agreement = noise_floor(references)
    finished = [{**row, **compared(row, references, floor)} for row in rows]
    return {
        "data": subject.data,
        "forget": subject.forget,
        "samples": {"forget": len(task.forget), "retain": len(task.retain), "test": len(task.source.test)},
        "untouched": {**untouched, **compared(untouched, references, floor)},
        "references": list(references),
        "noise_floor": floor,
        "noise_floor_agreement": floor_agreement,
        "rows": finished,
        "comparisons": comparisons(finished, floor, peers),
    }


def comparisons(rows: Sequence[Row], floor: float | None, peers: Sequence[Peer] = PEERS) -> list[Row]:
    """Compare both sides of each method and setting by their common seeds, if there are any."""
    found = []
    for peer in peers:
        for setting in SETTINGS:
            sides = [
                {
                    row["seed"]: row
                    for row in rows
                    if (row["method"], row["contender"]) == (peer.method, name) and setting in row["settings"]
                }
                for name in (OURS, peer.library)
            ]
            seeds = sorted(sides[0].keys() & sides[1].keys())
            if seeds:
                ours, theirs = ([side[seed] for seed in seeds] for side in sides)
                found.append(_comparison(peer, setting, ours, theirs, floor))
    return found


def _comparison(peer: Peer, setting: str, ours: list[Row], theirs: list[Row], floor: float | None) -> Row:
    clock = "seconds" if any(row["cpu_seconds"] is None for row in (*ours, *theirs)) else "cpu_seconds"
    paths = {**{key: PLACES[key] for key in _TOLD}, "seconds": (clock,)}
    sides = (("ours", ours), ("theirs", theirs))
    told: Row = {side: {key: over_seeds(rows, path) for key, path in paths.items()} for side, rows in sides}
    times = mean_and_half_range([their[clock] / our[clock] for our, their in zip(ours, theirs, strict=True)])
    mine, other = told["ours"]["gap"], told["theirs"]["gap"]
    noise = (floor or 0.0) + max(mine["half_range"], other["half_range"])
    return {
        "method": peer.method,
        "library": peer.library,
        "setting": setting,
        "seeds": len(ours),
        "differs": peer.differs if setting == EQUAL else None,
        **told,
        "times": dict(zip(("mean", "half_range"), times, strict=True)),
        "difference": mine["mean"] - other["mean"],
        "noise": noise,
        "verdict": verdict(mine["mean"] - other["mean"], noise),
    }


def verdict(difference: float, noise: float) -> str:
    """Return the verdict. difference: of the average gaps, ours - theirs."""
    if abs(difference) <= noise:
        return "within noise"
    return "better" if difference < 0 else "worse"


def print_comparisons(name: str, entry: Row) -> None:
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{name}: ours | theirs")
    table.add_column("method, setting", no_wrap=True)
    for heading in ("gap", "forget %", "test %", "MIA %", "agree %", "seconds", "x as fast", "gap is"):
        table.add_column(heading, justify="right")
    for found in entry["comparisons"]:
        pairs = [("gap", 2, 1), *((key, 1, 100) for key in ("forget", "test", "efficacy", "agreement")),
                 ("seconds", 1, 1)]  # fmt: skip
        cells = [
            " | ".join(f"{factor * found[side][key]['mean']:.{digits}f}" for side in ("ours", "theirs"))
            for key, digits, factor in pairs
        ]
        table.add_row(
            f"{found['method']}, {found['setting']}", *cells, f"{found['times']['mean']:.2f}", found["verdict"]
        )
    console.print(table)
    floor = entry["noise_floor"]
    gap = entry["untouched"]["gap"]["average"]
    console.print(
        f"[dim]untouched: gap {gap:.2f}; noise floor: "
        f"{'none with one reference' if floor is None else f'{floor:.2f} points'}[/dim]"
    )
