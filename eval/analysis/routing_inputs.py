"""What a routing analysis reads in a benchmark's folder: the router's completions, and experts' results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.results import read_results

from ..evalplus_bridge.data import Benchmark
from ..sampling.loading import FoundModel
from ..sampling.run_record import DECISIVE, Run, file_sha256, read_runs
from .routing_trace import Text


STRATEGY = "router"
# Two runs with the same of these put the same questions to the same model in the same way.
SAME_QUESTIONS = tuple(name for name in DECISIVE if name not in ("routing_strategy", "task_ids"))


def runs_of(found: FoundModel, tasks: Benchmark, folder: Path) -> list[Run]:
    """List the folder's runs of just this model on this data."""
    runs = [
        run
        for run in read_runs(folder)
        if (run.benchmark, run.mini, run.dataset_hash) == (tasks.name, tasks.mini, tasks.dataset_hash)
    ]
    return [run for run in runs if run.model_sha256 == found.sha256] if runs else []


def run_of_router(runs: list[Run], tasks: Benchmark) -> Run | None:
    """Choose the run to analyse: of all tasks asked for, or as many as there are; greedy, if any is."""
    candidates = [
        run
        for run in runs
        if run.routing_strategy == STRATEGY
        and (tasks.subset is None or set(tasks.task_ids) <= set(run.task_ids))
        and run.has_samples
    ]
    return max(candidates, key=lambda run: (len(run.task_ids), -run.temperature), default=None)


def read_texts(run: Run, tasks: Benchmark, task_ids: list[str], tokenizer: Any) -> Iterator[Text]:
    """Read each task's prompt, as the model was given it, and first completion, in the samples' order.

    Raises:
        InputError: the raw samples are missing, damaged, not those that were recorded, or do not begin with
            the prompt.
    """
    from ..evalplus_bridge.decoder import prompt_text

    if run.raw_samples_sha256 not in (None, file_sha256(run.raw_samples_path)):
        raise InputError(
            f"{run.raw_samples_path} changed since it was written; delete {run.samples_path}, and both are made again"
        )
    direct = run.force_base_prompt or tokenizer.chat_template is None
    waiting = set(task_ids)
    for task_id, solution in _raw_samples(run.raw_samples_path):
        if task_id not in waiting:
            continue
        waiting.remove(task_id)
        prompt = prompt_text(tasks, task_id, tokenizer, run.force_base_prompt)
        if direct and not solution.startswith(prompt):
            raise InputError(
                f"{run.raw_samples_path}: the sample of {task_id} does not begin with the task's prompt"
            )
        # EvalPlus notes what follows a prompt with it, and what follows a chat prompt without.
        yield Text(task_id, prompt, solution.removeprefix(prompt) if direct else solution)
    if waiting:
        raise InputError(f"{run.raw_samples_path} holds no sample of {min(waiting)}; benchmark it again")


def _raw_samples(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                yield sample["task_id"], sample["solution"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no samples ({type(error).__name__}: {error}); benchmark it again"
        ) from error


class Results:
    """Which tasks the router's samples pass, and those of each expert alone, where they were scored.

    Attributes:
        tests: "plus" or "base", the tests that count: plus where every run that is read has them; None
            without results.
    """

    def __init__(self, router: Run, runs: list[Run], expert_names: list[str]):
        comparable = [
            run for run in runs if all(getattr(run, name) == getattr(router, name) for name in SAME_QUESTIONS)
        ]
        scored = {run.routing_strategy: run for run in reversed(comparable) if run.has_results}
        singles = [scored.get(f"single:{index}") for index in range(len(expert_names))]
        read = [
            read_results(run.results_path) if run and run.has_results else None for run in (router, *singles)
        ]
        plus = all(result.plus is not None for tasks in read if tasks for result in tasks.values())
        shares = [
            tasks and {task_id: result.plus if plus else result.base for task_id, result in tasks.items()}
            for tasks in read
        ]
        self.tests = None
        if any(shares):
            self.tests = "plus" if plus else "base"
        self._router, self._experts = shares[0], shares[1:]

    def passed(self, task_id: str) -> float | None:
        return self._router.get(task_id) if self._router else None

    def experts_passed(self, task_id: str) -> list[float] | None:
        """Return each expert's share on a task; None unless every expert alone was asked it."""
        if not all(self._experts):
            return None
        shares = [tasks.get(task_id) for tasks in self._experts]
        return None if None in shares else shares


__all__ = ["Results", "read_texts", "run_of_router", "runs_of"]
