"""EvalPlus's result files: the share of every task's samples that pass, pass@1, and the scores for a model card.

<samples>_eval_results.json    {"eval": {"HumanEval/0": [{"base_status": "pass", "plus_status": "fail", …}, …], …}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..sources.json_files import read_json


PASS = "pass"
# Bytes. It holds every program: 200 samples of each task of MBPP are 100 MB.
MOST_RESULTS = 256 * 1024**2
DAY = re.compile(r"\d{4}-\d{2}-\d{2}(?!\d)", re.ASCII)
BENCHMARKS = {"HumanEval": "HumanEval", "Mbpp": "MBPP"}


class TaskResult(NamedTuple):
    """The share of a task's samples (0.0 to 1.0) that pass the base tests, and base and plus tests together.

    `plus` is None when only the base tests were run.
    """

    base: float
    plus: float | None


@dataclass(frozen=True)
class Score:
    """A strategy's pass@1 on a benchmark, a fraction; `date` is the day on which it was scored, if that is known."""

    routing_strategy: str
    benchmark: str
    value: float
    num_tasks: int
    date: str | None = None


def read_results(path: str | Path) -> dict[str, TaskResult]:
    """Read each task's result from a result file (`…_eval_results.json`).

    Raises:
        InputError: it is not one, or holds no task.
    """
    return _tasks(read_json(Path(path), most_bytes=MOST_RESULTS), path)


def _tasks(content: Mapping[str, Any], path: str | Path) -> dict[str, TaskResult]:
    tasks = content.get("eval")
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"{path} is not a result file of EvalPlus: it has no entry 'eval' with tasks")
    return {task_id: _task_result(samples, task_id, path) for task_id, samples in tasks.items()}


def _day(content: Mapping[str, Any]) -> str | None:
    """Give the day on which EvalPlus scored, as YYYY-MM-DD; its hour is of an unknown time zone."""
    match = DAY.match(str(content.get("date")))
    return None if match is None else match[0]


def pass_at_1(results: Iterable[TaskResult], *, plus: bool = False) -> float:
    """Compute the mean share of passing samples, with the plus tests too if `plus`.

    Raises:
        ValueError: there are no results, or none of the plus tests.
    """
    shares = [result.plus if plus else result.base for result in results]
    if not shares or any(share is None for share in shares):
        raise ValueError("no results, or results without the plus tests")
    return sum(shares) / len(shares)


def read_scores(entries: Sequence[str]) -> list[Score]:
    """Read `<strategy>=<file>` for each result file: a score of the base tests and, if run, one of the plus tests.

    Raises:
        InputError: not of that form, or not a file that EvalPlus wrote.
    """
    scores = []
    for entry in entries:
        strategy, separator, name = str(entry).partition("=")
        if not separator or not strategy or not name:
            raise InputError(
                f"--results takes STRATEGY=FILE, for instance router=samples_eval_results.json; got {entry}"
            )
        content = read_json(Path(name), most_bytes=MOST_RESULTS)
        results, day = _tasks(content, name), _day(content)
        first_task = next(iter(results))
        benchmark = BENCHMARKS.get(first_task.partition("/")[0])
        if benchmark is None:
            raise InputError(f"{name} is about {first_task}, which is neither HumanEval nor MBPP")
        tasks = list(results.values())
        scores.append(Score(strategy, benchmark, pass_at_1(tasks), len(tasks), day))
        if all(result.plus is not None for result in tasks):
            plus = pass_at_1(tasks, plus=True)
            scores.append(Score(strategy, f"{benchmark}+", plus, len(tasks), day))
    return scores


def _task_result(samples: Any, task_id: str, path: str | Path) -> TaskResult:
    if not isinstance(samples, list) or not samples or not all(map(_is_sample, samples)):
        raise InputError(f"{path} is not a result file of EvalPlus: {task_id} has no list of samples")
    base = [sample["base_status"] == PASS for sample in samples]
    plus = [sample.get("plus_status") for sample in samples]
    if None in plus:
        return TaskResult(sum(base) / len(base), None)
    # EvalPlus's own rule: a sample passes "plus" if it passes both.
    both = [passed and status == PASS for passed, status in zip(base, plus, strict=True)]
    return TaskResult(sum(base) / len(base), sum(both) / len(both))


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, Mapping) and "base_status" in sample
