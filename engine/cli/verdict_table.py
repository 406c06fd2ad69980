"""The table of a verdict, on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from engine.cli.console import coloured, console
from engine.evaluate.gates import DOES_NOT_PROVE, Verdict


def print_verdict(verdict: Verdict) -> None:
    """Print the gates of a verdict, its status, and what it does not prove."""
    table = Table("gate", "", "limit", "found", header_style="bold")
    for gate in verdict.gates:
        table.add_row(gate.name, coloured(gate.status), escape(gate.limit), escape(gate.reason))
    console.print(table)
    console.print(
        f"{coloured(verdict.status)} on {verdict.samples['forget']} forget and {verdict.samples['test']} test "
        f"samples, {_compared_with(verdict)}"
        + (f"; decided by {', '.join(verdict.decided_by)}" if verdict.decided_by else ""),
        soft_wrap=True,
    )
    if not verdict.references:
        console.print("Without retrained references it is based on held-out data alone.", soft_wrap=True)
    console.print("[dim]It does not prove:[/dim]")
    for line in DOES_NOT_PROVE:
        console.print(f"[dim]  {line}[/dim]", soft_wrap=True)


def _compared_with(verdict: Verdict) -> str:
    if verdict.kind == "pool":
        return f"for each sample {verdict.references} models of the pool"
    return f"{verdict.references} references"
