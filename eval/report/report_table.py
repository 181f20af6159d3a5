"""A table of a report: values in rows, and how they are shown on the terminal, on the page, in CSV and in JSON.

Shares are fractions. Columns whose names end with `low` and `high`, behind a figure's column, are the ends of its
interval, and are shown with it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..terminal_table import print_table


if TYPE_CHECKING:
    from rich.console import Console


SHARE = "share"
WHOLE_PERCENT = "whole percent"
POINTS = "points"
P_VALUE = "p"
DECIMALS = "decimals"
ONE_DECIMAL = "one decimal"
DIFFERENCE = "difference"
FORMATS: dict[str, Callable[[float], str]] = {
    SHARE: "{:.1%}".format,
    WHOLE_PERCENT: "{:.0%}".format,
    POINTS: lambda difference: f"{100 * difference:+.1f}",
    P_VALUE: lambda p: f"{p:.2g}" if p >= 0.0001 else "< 0.0001",
    DECIMALS: "{:.3f}".format,
    ONE_DECIMAL: "{:.1f}".format,
    DIFFERENCE: "{:+.3f}".format,
}
NO_VALUE = "-"


class Column(NamedTuple):
    """A column as it is shown: `place` is that of its value in a row, which an interval may follow."""

    heading: str
    place: int
    format: str
    has_interval: bool


class Cell(NamedTuple):
    """A value and its text, with those of its interval where it has one."""

    value: Any
    text: str
    low: float | None = None
    high: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class ReportTable:
    """`rows` hold a value for each of `columns`: text, numbers, or None.

    Attributes:
        note: what a reader must know.
        formats: of the columns whose numbers are no shares, one of `FORMATS`.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    formats: dict[str, str] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Return every row by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write the values as CSV."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            # With the writer's own row ends, those of RFC 4180, a lone carriage return in a cell is quoted, too.
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)

    def write_json(self, path: Path) -> None:
        """Write the values as JSON, with title and note."""
        content = {"title": self.title, "note": self.note, "rows": self.records()}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def shown_columns(self) -> list[Column]:
        """Return the columns as they are shown; those without a word in any row are left out."""
        shown = []
        for place, name in enumerate(self.columns):
            if name.endswith(("low", "high")) or (self.rows and all(row[place] == "" for row in self.rows)):
                continue
            has_interval = self.columns[place + 1 : place + 2] in (["low"], [f"{name} low"])
            heading = name.replace("plus_pass", "+ pass")
            shown.append(Column(heading, place, self.formats.get(name, SHARE), has_interval))
        return shown

    def cell(self, row: Sequence[Any], column: Column) -> Cell:
        """Return what a row has in a column, in words."""
        value = row[column.place]
        text = _text(value, column.format)
        low, high = row[column.place + 1 : column.place + 3] if column.has_interval else (None, None)
        if value is None or low is None:
            return Cell(value, text)
        return Cell(value, text, low, high, f"{_text(low, column.format)} to {_text(high, column.format)}")

    def print(self, console: Console) -> None:
        """Print the table on a terminal, with its note below."""
        columns = self.shown_columns()
        rows = []
        for row in self.rows:
            cells = [self.cell(row, column) for column in columns]
            rows.append([f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in cells])
        numbers = [
            place
            for place, column in enumerate(columns)
            if not all(isinstance(row[column.place], str) for row in self.rows)
        ]
        headings = [column.heading for column in columns]
        print_table(console, headings, rows, title=self.title, numbers=numbers)
        if self.note:
            console.print(self.note, markup=False)


def _text(value: Any, format: str) -> str:
    if value is None:
        return NO_VALUE
    if isinstance(value, float):
        return FORMATS[format](value)
    return f"{value:,}" if isinstance(value, int) else value


__all__ = [
    "DECIMALS",
    "DIFFERENCE",
    "ONE_DECIMAL",
    "POINTS",
    "P_VALUE",
    "WHOLE_PERCENT",
    "Cell",
    "Column",
    "ReportTable",
]
