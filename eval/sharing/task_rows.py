"""Every sample of a scored run: what was asked, what the model wrote, and EvalPlus's verdicts on it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import DyloraMoeWarning
from dylora_moe.hub_export.repo.results import PASS

from ..evalplus_bridge.data import load_benchmark
from ..sampling.run_record import Run, file_sha256, read_runs


@dataclass(frozen=True)
class SampleRow:
    """One sample.

    Attributes:
        sample: its number among its task's, from 0.
        prompt, reference: the task's, as EvalPlus's data set has them.
        raw: what the model wrote, in EvalPlus's form, where that was kept; else the same as `solution`.
        solution: the program that was scored.
        base_status, plus_status: EvalPlus's, "pass", "fail" or "timeout"; None for tests that were not run.
    """

    task_id: str
    sample: int
    prompt: str
    reference: str
    raw: str
    solution: str
    base_status: str
    plus_status: str | None

    @property
    def base(self) -> bool:
        """Whether it passes the base tests."""
        return self.base_status == PASS

    @property
    def plus(self) -> bool | None:
        """Whether it passes base and plus tests, as EvalPlus counts; None where the plus tests were not run."""
        return None if self.plus_status is None else self.base and self.plus_status == PASS


@dataclass(frozen=True)
class ScoredRun:
    """A run with results, and the problems that it was asked, by their ids."""

    run: Run
    tasks: Mapping[str, Mapping[str, Any]]

    def rows(self) -> Iterator[SampleRow]:
        """Yield the run's samples, task by task."""
        run = self.run
        verdicts = json.loads(run.results_path.read_text(encoding="utf-8"))["eval"]
        solutions = _programs(run.samples_path)
        is_raw_kept = (
            run.raw_samples_sha256 is not None and file_sha256(run.raw_samples_path) == run.raw_samples_sha256
        )
        raw = _programs(run.raw_samples_path) if is_raw_kept else solutions
        for task_id in run.task_ids:
            found = zip(verdicts[task_id], solutions[task_id], raw[task_id], strict=True)
            for sample, (verdict, solution, written) in enumerate(found):
                yield SampleRow(
                    task_id=task_id,
                    sample=sample,
                    prompt=self.tasks[task_id]["prompt"],
                    reference=self.tasks[task_id]["canonical_solution"],
                    raw=written,
                    solution=solution,
                    base_status=verdict["base_status"],
                    plus_status=verdict.get("plus_status"),
                )


def scored_runs(folder: str | Path) -> list[ScoredRun]:
    """Read a folder's runs that have results, with their problems.

    Runs of problems other than those that EvalPlus has now are left out, with a `DyloraMoeWarning`.

    Raises:
        InputError, FailureError: as `read_runs` and `load_benchmark`.
    """
    load = cache(lambda name, mini: load_benchmark(name, mini=mini))
    found = []
    for run in read_runs(folder):
        if not run.has_results:
            continue
        benchmark = load(run.benchmark, run.mini)
        if benchmark.dataset_hash == run.dataset_hash and benchmark.tasks.keys() >= set(run.task_ids):
            found.append(ScoredRun(run, benchmark.tasks))
            continue
        message = (
            f"{run.samples} is left out: its problems are not those that EvalPlus has as {run.benchmark} now; name its "
            f"file in {run.benchmark.upper()}_OVERRIDE_PATH"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)
    return found


def _programs(path: Path) -> dict[str, list[str]]:
    """Read the programs of a samples file of this package, by task, in their order."""
    programs: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            sample = json.loads(line)
            programs.setdefault(sample["task_id"], []).append(sample["solution"])
    return programs
