"""Scores the demo's strategies with stock EvalPlus, and makes the table of pass@1 from its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.table import Table

from dylora_moe.eval.evalplus_bridge.stock import prepare_ground_truth, run_stock_evalplus
from dylora_moe.hub_export.repo.results import TaskResult, pass_at_1, read_results

from .problems import FAMILIES, family_of


PROCESSES = 2
TIMEOUT_SECONDS = 1800.0

# Called with a strategy and the number of problems that its model has answered.
Progress = Callable[[str, int], None]


def score_strategies(
    repos: Mapping[str, Path], *, dataset_path: Path, folder: Path, progress: Progress
) -> dict[str, dict[str, TaskResult]]:
    """Score each strategy with stock EvalPlus under `folder`; return its results by task id.

    `repos` maps a strategy to the folder of the model whose default it is. Each process computes with one
    thread: models this small gain nothing from a second. The first failure is raised, and nothing more is
        begun after it.
    """
    prepare_ground_truth(log_folder=folder / "ground_truth", dataset_path=dataset_path)
    with ThreadPoolExecutor(PROCESSES) as pool:
        futures = {
            strategy: pool.submit(
                run_stock_evalplus,
                repo,
                root=folder / folder_name(strategy),
                dataset_path=dataset_path,
                threads=1,
                timeout=TIMEOUT_SECONDS,
                progress=lambda answered, strategy=strategy: progress(strategy, answered),
            )
            for strategy, repo in repos.items()
        }
        try:
            for future in as_completed(futures.values()):
                future.result()
        finally:
            for future in futures.values():
                future.cancel()  # those that have not begun
    return {strategy: read_results(future.result()) for strategy, future in futures.items()}


def folder_name(strategy: str) -> str:
    """Make a folder's name of a strategy: `single-0` of `single:0`."""
    return strategy.replace(":", "-")


Row = dict[str, float]

ALL = "all"
ALL_PLUS = "all, plus inputs"


def summarise(results: Mapping[str, Mapping[str, TaskResult]]) -> dict[str, Row]:
    """Compute each strategy's pass@1 (0.0 to 1.0): each family, all, and all with the plus inputs."""
    return {strategy: _row(by_task) for strategy, by_task in results.items()}


def build_table(rows: Mapping[str, Row], problem_count: int) -> Table:
    """Make the table of percentages, with a caption that says what was measured."""
    table = Table(title="DyLoRA-MoE demo: pass@1 by routing strategy", caption=caption(problem_count))
    table.add_column("routing strategy", no_wrap=True)
    for column in (*FAMILIES, ALL, ALL_PLUS):
        table.add_column(column, justify="right")
    for strategy, row in rows.items():
        table.add_row(strategy, *(f"{row[column]:.1%}" for column in (*FAMILIES, ALL, ALL_PLUS)))
    return table


def caption(problem_count: int) -> str:
    """Say in words what the figures are and are not."""
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
