"""Tables of `lethe request`."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.markup import escape
from rich.table import Table

from engine.cli.console import coloured

# Characters of a reason in the table; --json has all of it.
_MOST_REASON = 160


def requests_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of `lethe request list`; rows as of `engine.requests.status.describe_request`."""
    table = Table("request", "state", "samples", "received", "deadline", "days left", "tries", "source", "last reason")
    for row in rows:
        days = "-" if row["days_left"] is None else f"{row['days_left']:.1f}"
        if row["proven_at"]:
            days = f"done {row['proven_at']}{' [bold red]LATE[/]' if row['late'] else ''}"
        state = f"version {row['version']:04d}, {row['state']}" if row["version"] else row["state"]
        table.add_row(
            str(row["request"]),
            f"in run {row['running']:04d}" if row["running"] else state,
            str(row["samples"]),
            row["received"],
            row["deadline"],
            f"[bold red]{days} OVERDUE[/]" if row["overdue"] else days,
            str(row["attempts"]),
            escape(row["source"]),
            escape(textwrap.shorten(row["reason"], _MOST_REASON, placeholder=" ...")),
        )
    return table


def versions_table(rows: list[dict[str, Any]], current: int) -> Table:
    """Return the table of versions of `lethe request status`; rows as of `engine.requests.status.status`."""
    table = Table(
        "version", "from", "kind", "samples", "verdict", "proof", "state", "forgotten", "test", "change", "KL"
    )
    for row in rows:
        verdict, drift = row["verdict"], row["drift"]
        figures = ["-"] * 4
        if drift:
            figures = [
                f"{100 * drift['share']:.1f}%",
                f"{100 * drift['test_accuracy']:.1f}",
                f"{drift['test_accuracy_change']:+.1f}",
                f"{drift['test_kl']:.3f}",
            ]
        table.add_row(
            f"{row['version']:04d}",
            "-" if row["parent"] is None else f"{row['parent']:04d}",
            row["kind"],
            str(row["samples"]),
            coloured(verdict) if verdict else "-",
            row["proof"] or "-",
            "[bold]current[/]" if row["version"] == current else row["state"],
            *figures,
        )
    return table
