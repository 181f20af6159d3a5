"""Prints a table on a terminal of any width without cutting a word in two.

What does not fit side by side is said in other ways: columns that are the same in every row above the table, and
a table that is too wide even so a row a paragraph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from dylora_moe.hub_export.shown_text import NO_BREAK, one_printable_line, wrapped


if TYPE_CHECKING:
    from rich.console import Console

BORDER = 3  # a column's: the line on its left and a space on either side


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    numbers: Collection[int] = (),
) -> None:
    """Print a table.

    Args:
        rows: a text for each of `headings`.
        numbers: the columns that are aligned on the right.
    """
    headings = [one_printable_line(heading) for heading in headings]
    rows = [[one_printable_line(text) for text in row] for row in rows]
    columns, constants = _columns(headings, rows, console.width, numbers)
    if constants:
        title = f"{title} ({constants})" if title else constants
    widths = _widths(headings, rows, columns, console.width)
    if widths is None:
        _print_paragraphs(console, headings, rows, columns, title)
    else:
        _print_grid(console, headings, rows, columns, widths, title, numbers)


def _columns(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, numbers: Collection[int]
) -> tuple[list[int], str]:
    """Return the columns to show, and in words those that are the same in every row and are left out for it.

    First those that say what the rows are about, which stand before the figures; if that is not enough, all.
    """
    columns = list(range(len(headings)))
    same = [column for column in columns if len({row[column] for row in rows}) == 1]
    if len(rows) < 2 or not 0 < len(same) < len(columns) or _needed(headings, rows, columns) <= width:
        return columns, ""
    differing = [column for column in columns if column in numbers and column not in same]
    first_figure = min(differing or numbers, default=len(columns))
    before = [column for column in same if column < first_figure]
    left_out = before if _widths(headings, rows, [c for c in columns if c not in before], width) else same
    constants = "; ".join(_said(headings[column], rows[0][column]) for column in left_out)
    return [column for column in columns if column not in left_out], constants


def _said(heading: str, text: str) -> str:
    """Say a value with its heading, once: `tasks 24`, and `tasks 0 to 3` as it is."""
    return text if text.startswith(heading) else f"{heading} {text}"


def _print_grid(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    widths: Sequence[int],
    title: str,
    numbers: Collection[int],
) -> None:
    from rich.table import Table
    from rich.text import Text

    if title:
        _print_wrapped(console, title, style="table.title")
    table = Table()
    for column, width in zip(columns, widths, strict=True):
        justify = "right" if column in numbers else "left"
        table.add_column(Text(headings[column]), justify=justify, width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    console.print(table)


def _print_paragraphs(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    title: str,
) -> None:
    if title:
        _print_wrapped(console, title, style="table.title")
    first, *others = columns
    for row in rows:
        values = [f"{headings[column]} {row[column]}" for column in others if row[column]]
        # A value stays beside its heading, in whichever line there is room for both.
        kept = [
            value.replace(" ", NO_BREAK) if _length(value) < console.width // 2 else value for value in values
        ]
        _print_wrapped(console, f"{headings[first]} {row[first]}: {', '.join(kept)}".strip())


def _print_wrapped(console: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    for line in wrapped(text, console.width, others="  "):
        console.print(Text(line, style=style), soft_wrap=True)


def _widths(
    headings: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], width: int
) -> list[int] | None:
    """Share a width out among the columns: at least its longest word for each, or None if that is too much.

    What is left goes, cell by cell, to the column that takes the most lines.
    """
    texts = [[headings[column], *(row[column] for row in rows)] for column in columns]
    widths = [max(_length(word) for text in column for word in [*text.split(), ""]) for column in texts]
    wanted = [max(map(_length, column)) for column in texts]
    left = width - 1 - sum(widths) - BORDER * len(columns)
    if left < 0:
        return None
    while left > 0 and widths != wanted:
        lacking = [place for place in range(len(columns)) if widths[place] < wanted[place]]
        widest = max(lacking, key=lambda place: _num_lines(texts[place], widths[place]))
        widths[widest] += 1
        left -= 1
    return widths


def _num_lines(texts: Sequence[str], width: int) -> int:
    return sum(len(wrapped(text, width)) for text in texts)


def _needed(headings: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> int:
    """Return the width in which no text of a table is wrapped."""
    texts = [[headings[column], *(row[column] for row in rows)] for column in columns]
    return 1 + sum(BORDER + max(map(_length, column)) for column in texts)


def _length(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


__all__ = ["print_table"]
