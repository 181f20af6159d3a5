"""What people look at: the page, tables and figures of a benchmark's folder.

Read `content` first: everything in the folder, read once. `page` makes `report.html`, `tables` and the files
named `*_table` or `*_tables` make tables, `figures` draws them, `run_labels` names runs so that no two look
the same.
"""

from __future__ import annotations
