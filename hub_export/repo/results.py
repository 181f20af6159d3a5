"""Scores that EvalPlus wrote, to be stated in a model card.

    <samples>_eval_results.json    {"eval": {"HumanEval/0": [{"base_status": "pass", "plus_status": "fail", …}, …], …}}

It knows nothing about how the samples came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..sources.json_files import read_json


BENCHMARKS = {"HumanEval": "HumanEval", "Mbpp": "MBPP"}


@dataclass(frozen=True)
class BenchmarkResult:
    """pass@1 as a fraction: the mean over tasks of the share of samples that pass."""

    routing_strategy: str
    benchmark: str
    value: float
    num_tasks: int


def read_results(entries: list[str]) -> list[BenchmarkResult]:
    """`<strategy>=<file>` for each file of EvalPlus: one result for the base tests and one for the extended
    ones.

    Raises:
        InputError: not of that form, or not a file that EvalPlus wrote.
    """
    found = []
    for entry in entries:
        strategy, separator, name = str(entry).partition("=")
        if not separator or not strategy or not name:
            raise InputError(
                f"--results takes STRATEGY=FILE, for instance router=samples_eval_results.json; got {entry}"
            )
        tasks = read_json(Path(name)).get("eval")
        if not isinstance(tasks, dict) or not tasks:
            raise InputError(f"{name} is no result of EvalPlus: it has no entry 'eval' with tasks")
        benchmark = BENCHMARKS.get(next(iter(tasks)).partition("/")[0])
        if benchmark is None:
            raise InputError(f"{name} is about {next(iter(tasks))}, which is neither HumanEval nor MBPP")
        for tests, label in (("base", benchmark), ("plus", f"{benchmark}+")):
            value = _pass_at_1(tasks, tests, name)
            if value is not None:
                found.append(BenchmarkResult(strategy, label, value, len(tasks)))
    return found


def _pass_at_1(tasks: dict, tests: str, name: str) -> float | None:
    """A sample passes the extended tests if it passes both. None where they were not run."""
    shares = []
    for task, samples in tasks.items():
        if (
            not isinstance(samples, list)
            or not samples
            or not all(isinstance(sample, dict) for sample in samples)
        ):
            raise InputError(f"{name}: the results of {task} are no list of samples")
        needed = ["base_status"] if tests == "base" else ["base_status", "plus_status"]
        if any(sample.get(needed[-1]) is None for sample in samples):
            return None
        shares.append(sum(all(sample[key] == "pass" for key in needed) for sample in samples) / len(samples))
    return sum(shares) / len(shares)
