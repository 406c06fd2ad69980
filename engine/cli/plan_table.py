"""Tables of `lethe plan`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from engine.cli.console import console
from engine.plan.planning import GIB, Plan


def print_plan(plan: Plan) -> None:
    """Print a plan: memory by part, work and time compared with the retrain, and what is not counted."""
    setup, zero = plan.setup, plan.setup["zero"]
    rank = "GPU" if setup["device"] == "cuda" else "rank"
    moved = [name for name in ("offload_optimizer", "offload_param") if zero[name]]
    stage = " + ".join([f"ZeRO-{zero['stage']}", *moved])
    console.print(
        f"[bold]{setup['architecture']}[/bold], {plan.cost.parameters / 1e6:.1f} M parameters; forget "
        f"{setup['forget']:,} of {setup['images']:,} images by {setup['method']}; {rank}s: {setup['gpus']}, {stage}, "
        f"{setup['precision']}, batch {setup['batch_size']} x {setup['accumulation_steps']} a {rank}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(_memory(plan, rank))
    _print_verdict(plan, rank)
    _print_estimates(plan)
    console.print(_work(plan, rank))
    if plan.share:
        shares = ", ".join(f"{100 * value:.1f}% of its {name}" for name, value in plan.share.items())
        console.print(
            f"compared with the retrain ({_recipe(setup['retrain'])}): {shares}", soft_wrap=True, highlight=False
        )
    for name, found in plan.shares.items():
        if name != "unlearn":
            percent = 100 * found["flops"]
            shown = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}"
            console.print(f"{name}: {shown}% of a retrain", soft_wrap=True, highlight=False)
    sent = plan.communication
    console.print(
        f"each {rank} sends {_size(sent['bytes_per_step'])} a step; {sent['formula']}", soft_wrap=True, highlight=False
    )
    console.print(f"rate: {plan.rate['source']}", soft_wrap=True, highlight=False, markup=False)
    for note in plan.notes:
        console.print(f"[dim]not counted, {note}[/dim]", soft_wrap=True, highlight=False)


def _memory(plan: Plan, rank: str) -> Table:
    table = Table(title=f"memory of one {rank}, at its peak: {plan.memory.moment}", header_style="bold")
    table.add_column("part", no_wrap=True)
    host = plan.setup["device"] == "cuda"
    for column in (rank, "host") if host else (rank,):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why")
    for part in plan.memory.parts:
        size = _size(part.bytes)
        cells = ([size, ""] if part.place == "device" else ["", size]) if host else [size]
        table.add_row(part.name, *cells, part.why)
    table.add_section()
    totals = [_size(plan.memory.total("device")), *([_size(plan.memory.total("host"))] if host else [])]
    table.add_row("total", *totals, "content at that moment", style="bold")
    return table


def _print_verdict(plan: Plan, rank: str) -> None:
    if plan.capacity is None:
        console.print(f"--gpu-memory GIB checks whether that fits a {rank}")
        return
    words = "[bold green]FITS[/bold green]" if plan.fits else "[bold red]DOES NOT FIT[/bold red]"
    console.print(
        f"{words}: {_size(plan.memory.total('device'))} of {_size(plan.capacity)} a {rank}, before what is not counted"
    )
    for change in plan.advice:
        fits = "fits" if change["fits"] else "still does not fit"
        console.print(f"  {change['change']}: {_size(change['total'])}, {fits}", highlight=False)


def _print_estimates(plan: Plan) -> None:
    found = plan.estimates
    words = found.get("missing") or (
        f"{_size(found['gpu'])} a GPU, {_size(found['host'])} of host memory a node; assumes {found['assumes']}"
    )
    console.print(f"DeepSpeed's own estimator: {words}", soft_wrap=True, highlight=False, markup=False)


def _work(plan: Plan, rank: str) -> Table:
    table = Table(title="what is computed", header_style="bold")
    table.add_column("", no_wrap=True)
    timed = "seconds" in plan.work["unlearn"]["total"]
    priced = "money" in plan.work["unlearn"]["total"]
    columns = [
        "images",
        "steps",
        "flops",
        *(["time", f"{rank}-hours"] if timed else ["time"]),
        *(["price"] if priced else []),
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, work in plan.work.items():
        for item in work["items"]:
            table.add_row(f"{name}: {item['name']}", *_cells(item, plan, timed, priced))
        table.add_row(f"{name}, total", *_cells(work["total"], plan, timed, priced), style="bold")
        table.add_section()
    return table


def _cells(row: dict[str, Any], plan: Plan, timed: bool, priced: bool) -> list[str]:
    cells = [f"{row['images']:,.0f}", f"{row['steps']:,}" if row["steps"] else "-", f"{row['flops']:.2e}"]
    if not timed:
        return [*cells, ""]
    hours = row["seconds"] * plan.setup["gpus"] / 3600
    cells += [_time(row["seconds"]), f"{hours:,.2f}"]
    return [*cells, f"{hours * plan.setup['price']:,.2f}"] if priced else cells


def _recipe(recipe: dict[str, Any]) -> str:
    return f"{recipe['name']}: {recipe['epochs']:g} epochs, {recipe['source']}"


def _size(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"
