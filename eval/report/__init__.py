"""The report on a benchmark's folder: page, tables and figures.

Read `content` first: everything in the folder, read once. `report_table` is a table and how it is shown;
`tables`, `expert_tables` and `routing_tables` say which columns and rows there are. `page` makes `report.html`,
`figures` draws, and `run_labels` gives every run a name of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .page import write_report


def __getattr__(name: str) -> Any:
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .page import write_report

    return write_report


__all__ = ["write_report"]
