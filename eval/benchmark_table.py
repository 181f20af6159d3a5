"""What a benchmark found, as one table: a line a run, with 95 % intervals. Knows records and result files alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .run_record import Run
from .scoring import pass_at_k_of_tasks
from .statistics import interval
from .stock_evalplus import read_results


NAMES = {"humaneval": "HumanEval", "mbpp": "MBPP"}


def benchmark_table(runs: Sequence[Run]) -> Table:
    """A rich table of scored runs: pass@k of the base tests and, as `+`, of base and plus tests together."""
    columns = list(dict.fromkeys(name for run in runs for name in sorted(run.scores, key=_order)))
    table = Table("model", "routing strategy", "benchmark", "tasks", "samples")
    for column in columns:
        table.add_column(column.replace("plus_pass", "+ pass"), justify="right")
    for run in runs:
        name = NAMES[run.benchmark] + (" mini" if run.mini else "")
        tasks = f"{len(run.task_ids)}" if run.subset is None else run.subset
        cells = [_cell(run, column) for column in columns]
        table.add_row(run.model_label, run.routing_strategy, name, tasks, str(run.n_samples), *cells)
    return table


def pass_at_1_interval(run: Run, plus: bool = False) -> tuple[float, float]:
    """95 % interval of a scored run's pass@1, fractions; see `interval`."""
    results = read_results(run.results_path)
    return interval([result.plus if plus else result.base for result in results.values()])


def _cell(run: Run, column: str) -> str:
    if column not in run.scores:
        return ""
    low, high = interval(pass_at_k_of_tasks(run.results_path)[column])
    return f"{100 * run.scores[column]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _order(name: str) -> tuple[int, bool]:
    return int(name.partition("@")[2]), name.startswith("plus")


__all__ = ["benchmark_table", "pass_at_1_interval"]
