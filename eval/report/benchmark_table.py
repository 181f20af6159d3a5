"""What a benchmark found, as one table: a line a run, with 95 % intervals. Knows records and result files
alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ..analysis.statistics import interval
from ..sampling.run_record import Run
from ..scoring.scoring import pass_at_k_of_tasks
from .run_labels import run_labels


def benchmark_table(runs: Sequence[Run], others: Sequence[Run] = ()) -> Table:
    """A rich table of scored runs: pass@k of the base tests and, as `+`, of base and plus tests together.

    Args:
        others: what else the folder holds, from which the table's runs are told apart, too.
    """
    columns = list(dict.fromkeys(name for run in runs for name in sorted(run.scores, key=_order)))
    shown = {run.samples for run in runs}
    labels = run_labels([*runs, *(run for run in others if run.samples not in shown)])[: len(runs)]
    settings = ["settings"] if any(label.settings for label in labels) else []
    table = Table("model", "routing strategy", "benchmark", "tasks", "samples", *settings)
    for column in columns:
        table.add_column(column.replace("plus_pass", "+ pass"), justify="right")
    for run, label in zip(runs, labels, strict=True):
        named = [escape(str(cell)) for cell in label.cells()[: 5 + len(settings)]]
        table.add_row(*named, *(_cell(run, column) for column in columns))
    return table


def score_interval(run: Run, name: str) -> tuple[float, float]:
    """Compute the 95 % interval of one of a run's scores (`pass@1`, `plus_pass@10`), fractions."""
    return interval(pass_at_k_of_tasks(run.results_path)[name])


def _cell(run: Run, column: str) -> str:
    if column not in run.scores:
        return ""
    low, high = score_interval(run, column)
    return f"{100 * run.scores[column]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _order(name: str) -> tuple[int, bool]:
    return int(name.partition("@")[2]), name.startswith("plus")


__all__ = ["benchmark_table", "score_interval"]
