"""What people look at: the page, tables and figures of a benchmark's folder.

Read `content` first: everything in the folder, read once. `page` makes `report.html`, `tables` and the files named
`*_table` or `*_tables` make tables, `figures` draws them, `run_labels` names runs so that no two look the same.
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
