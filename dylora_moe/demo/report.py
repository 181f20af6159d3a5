"""The demo's table: each strategy's pass@1 of each family, of all, and of all with the plus inputs.

Computes every figure from EvalPlus's results. Knows nothing about how those came about.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from dylora_moe.hub_export.repo.results import TaskResult, pass_at_1

from .problems import FAMILIES, family_of


Row = dict[str, float]

ALL = "all"
ALL_PLUS = "all, plus inputs"


def summarise(results: Mapping[str, Mapping[str, TaskResult]]) -> dict[str, Row]:
    """For each strategy: pass@1 (0.0 to 1.0) of each family and of all, and of all with the plus inputs."""
    return {strategy: _row(by_task) for strategy, by_task in results.items()}


def build_table(rows: Mapping[str, Row], problem_count: int) -> Table:
    """The rows as a table of percentages, with a caption that says what was measured."""
    table = Table(title="DyLoRA-MoE demo: pass@1 by routing strategy", caption=caption(problem_count))
    table.add_column("routing strategy", no_wrap=True)
    for column in (*FAMILIES, ALL, ALL_PLUS):
        table.add_column(column, justify="right")
    for strategy, row in rows.items():
        table.add_row(strategy, *(f"{row[column]:.1%}" for column in (*FAMILIES, ALL, ALL_PLUS)))
    return table


def caption(problem_count: int) -> str:
    """What the figures are and are not, in words."""
    return (
        f"{problem_count} problems: the same functions as in training, under unseen wordings of name and docstring "
        "(the import line at the top, which differs from family to family, is as in training). "
        "Greedy decoding, one sample per problem, scored by unmodified EvalPlus. Expert i was trained on family i, "
        f"in the order {', '.join(FAMILIES)}."
    )


def _row(by_task: Mapping[str, TaskResult]) -> Row:
    row = {
        family: pass_at_1(result for task_id, result in by_task.items() if family_of(task_id) == family)
        for family in FAMILIES
    }
    return {**row, ALL: pass_at_1(by_task.values()), ALL_PLUS: pass_at_1(by_task.values(), plus=True)}
