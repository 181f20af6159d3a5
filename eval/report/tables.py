"""All tables of a benchmark's folder by name, and the first of them: the scores of its runs.

To add a column, give it a name in a table's `columns` and a value in each of its rows: here for the scores, in
`expert_tables`, `routing_tables` and `loss_tables` for the rest. Terminal, page, CSV, JSON and W&B show it without more.
`figures` takes some columns by their position, so a new one goes behind those that it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..analysis.statistics import interval
from ..sampling.run_record import Run
from ..scoring.scoring import pass_at_k_of_tasks
from .content import ReportContent
from .expert_tables import expert_tables
from .loss_tables import loss_tables
from .report_table import ReportTable
from .routing_tables import routing_tables
from .run_labels import LABEL_COLUMNS, data_label, run_labels


# What the runs of one group of the page's scores have in common.
GROUP = ("model", "benchmark", "tasks", "samples a task", "settings")


def report_tables(content: ReportContent) -> dict[str, ReportTable]:
    """Make every table that the folder has the data for, by name."""
    tables = [scores(content.runs)] if content.runs else []
    if content.experts is not None:
        tables += expert_tables(content.experts)
    if content.routing is not None:
        tables += routing_tables(content.routing)
    if content.loss is not None:
        tables += loss_tables(content.loss)
    return {table.name: table for table in tables}


def scores(runs: Sequence[Run], others: Sequence[Run] = ()) -> ReportTable:
    """Make the table of scored runs: pass@k of the base tests, and of base and plus tests as `plus_pass@k`.

    Args:
        others: what else the folder holds; the table's runs are told from these, too.
    """
    measured = sorted({name for run in runs for name in run.scores}, key=_order)
    columns = list(LABEL_COLUMNS)
    for name in measured:
        columns += [name, f"{name} low", f"{name} high"]
    shown = {run.samples for run in runs}
    labels = run_labels([*runs, *(run for run in others if run.samples not in shown)])
    rows = []
    for run, label in zip(runs, labels, strict=False):
        row = list(label.cells())
        intervals = _intervals(run)
        for name in measured:
            row += [run.scores[name], *intervals[name]] if name in run.scores else [None, None, None]
        rows.append(row)
    note = (
        "Shares of tasks, with 95 % intervals over tasks. pass counts the samples that pass the base tests, plus_pass (+) "
        "those that pass the base and the plus tests. The best comes first, by the strictest tests that were run. Settings "
        "are those in which these runs differ."
    )
    return by_score(ReportTable("scores", "pass@k by routing strategy", columns, rows, note))


def by_score(table: ReportTable) -> ReportTable:
    """Sort the scores: groups as they come, and in each the best run first, by the strictest pass@1."""
    groups: dict[tuple, list] = {}
    for row, record in zip(table.rows, table.records(), strict=True):
        found = (record.get(name) for name in ("plus_pass@1", "pass@1"))
        score = tuple(-1.0 if value is None else value for value in found)
        groups.setdefault(_group(record), []).append((score, row))
    rows = [
        row for rows in groups.values() for _, row in sorted(rows, key=lambda found: found[0], reverse=True)
    ]
    return replace(table, rows=rows)


def _group(record: dict) -> tuple:
    return tuple(record[name] for name in GROUP)


def score_groups(table: ReportTable) -> list[ReportTable]:
    """Split the scores by model, benchmark and settings, each group with the measures that it has."""
    measures = [name for name in table.columns if "pass@" in name and not name.endswith((" low", " high"))]
    members: dict[tuple, list[dict]] = {}
    for record in table.records():
        members.setdefault(_group(record), []).append(record)
    groups = []
    for shared, records in members.items():
        columns = ["routing strategy"]
        for name in measures:
            if any(record[name] is not None for record in records):
                columns += [name, f"{name} low", f"{name} high"]
        rows = [[record[name] for name in columns] for record in records]
        groups.append(replace(table, title=_caption(*shared), columns=columns, rows=rows))
    return groups


def _caption(model: str, benchmark: str, tasks: str, samples: int, settings: str) -> str:
    caption = f"{model} on {data_label(benchmark, tasks)}"
    caption += ", one sample a task" if samples == 1 else f", {samples} samples a task"
    return f"{caption}, {settings}" if settings else caption


def _order(name: str) -> tuple[int, bool]:
    return int(name.partition("@")[2]), name.startswith("plus")


def _intervals(run: Run) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each of a run's scores."""
    return {name: interval(tasks) for name, tasks in pass_at_k_of_tasks(run.results_path).items()}


__all__ = ["report_tables", "score_groups", "scores"]
