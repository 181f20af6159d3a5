"""Scores the demo's strategies with stock EvalPlus, two at a time, each in a process of its own.

Knows folders and result files. Knows nothing about how the models were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from dylora_moe.eval.evalplus_bridge.stock import prepare_ground_truth, run_stock_evalplus
from dylora_moe.hub_export.repo.results import TaskResult, read_results


PROCESSES = 2
TIMEOUT_SECONDS = 1800.0

# Called with a strategy and the number of problems that its model has answered.
Progress = Callable[[str, int], None]


def score_strategies(
    repos: Mapping[str, Path], *, dataset_path: Path, folder: Path, progress: Progress
) -> dict[str, dict[str, TaskResult]]:
    """Each strategy's results by task id, from the result files that EvalPlus writes under `folder`.

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
    """A strategy's name as a folder's name: `single:0` as `single-0`."""
    return strategy.replace(":", "-")
