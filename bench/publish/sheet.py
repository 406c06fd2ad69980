"""A table of text, and its markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from rich.table import Table

from engine.cli.console import console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of text. The first column names the rows; `marked` are the numbers of the highlighted rows."""

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


def starting(rows: Sequence[Sequence[str]], text: str) -> frozenset[int]:
    """Return the numbers of the rows whose name starts with a text."""
    return frozenset(number for number, row in enumerate(rows) if row[0].startswith(text))


def print_sheet(sheet: Sheet) -> None:
    """Print a table on the terminal."""
    table = Table(*sheet.columns, header_style="bold")
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table)
