"""Scores a samples file: EvalPlus's verdict on every sample, in EvalPlus's own result file.

Data, expected outputs, checks and estimates are EvalPlus's own functions. Unlike `evalplus.evaluate` it can
score a part of a data set, never takes old results for new ones, and runs the programs as `check_workers`
guards them.
"""

from __future__ import annotations

import json
import os
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from multiprocessing import cpu_count
from pathlib import Path
from typing import Any

import numpy as np

from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError, one_line
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.repo.results import PASS, read_results
from dylora_moe.hub_export.staging import staged_file

from ..evalplus_bridge.data import Benchmark, expected_outputs, load_benchmark
from .check_workers import run_checks
from .checking_process import Check, Verdict
from .guarded_check import Task
from .sandbox import find_bubblewrap


SUFFIX = ".jsonl"
TIME_VARIABLE = "EVALPLUS_TIMEOUT_PER_TASK"

# Called with the number of samples scored, or of tasks whose outputs are there, and of all.
Progress = Callable[[int, int], None]


def score_samples(
    samples: str | Path,
    dataset: str,
    *,
    task_ids: Sequence[str] | None = None,
    mini: bool = False,
    base_only: bool = False,
    parallel: int | None = None,
    sandbox: bool = False,
    progress: Progress | None = None,
    tell_expected: Progress | None = None,
) -> Path:
    """Score an EvalPlus samples file, and write `<samples>_eval_results.json` beside it atomically.

    The verdicts and the file are those of `evalplus.evaluate --samples`. The file of a part of a set has one
    key more, `"subset": {"tasks": 10, "of": 164}`. A sample whose checks end without a verdict, although
    others' do not, counts as failed, with a `DyloraMoeWarning`; then the file has the key `"lost"`, how many
    there are.

    Args:
        samples: one JSON object a line, `{"task_id": …, "solution": …}` or with `completion` in place of
            `solution`.
        dataset: "humaneval" or "mbpp".
        task_ids: the tasks to score, all unless given. Each must have the same number of samples, and no
            other any.
        mini: the set with few plus inputs; `base_only`: without plus inputs.
        parallel: how many programs run at the same time; half the cores unless given.
        sandbox: run them inside bubblewrap.
        progress: is told how many samples are scored.
        tell_expected: is told how many tasks' expected outputs are computed, where these are not kept from before.

    Returns:
        The result file.

    Raises:
        InputError: the file or the tasks in it are not as they should be, or something that is needed is
            missing.
        FailureError: the data cannot be had, programs cannot be run, or the result file cannot be written.
    """
    samples = Path(samples)
    results = _results_path(samples)
    check_settings(sandbox)
    whole = load_benchmark(dataset, mini=mini)
    benchmark = _part(whole, task_ids)
    programs = _read_samples(samples, benchmark)
    expected = expected_outputs(benchmark, tell_expected)
    # One object a task, which a checking process then gets only once.
    tasks = {
        task_id: Task(benchmark.name, problem, expected[task_id], base_only)
        for task_id, problem in benchmark.tasks.items()
    }
    checks = [Check(tasks[task_id], program) for task_id in tasks for program in programs[task_id]]
    workers = parallel or max(1, cpu_count() // 2)
    if progress is not None:
        progress(0, len(checks))
    found = run_checks(checks, workers=workers, sandbox=sandbox, progress=progress)
    verdicts = iter(found)
    content: dict[str, Any] = {
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "hash": benchmark.dataset_hash,
        "eval": {
            task_id: [_entry(task, program, next(verdicts)) for program in programs[task_id]]
            for task_id, task in tasks.items()
        },
    }
    if len(benchmark.tasks) < len(whole.tasks):
        content["subset"] = {"tasks": len(benchmark.tasks), "of": len(whole.tasks)}
    lost = sum(verdict.lost is not None for verdict in found)
    if lost:
        content["lost"] = lost
    _write(results, content)
    return results


def lost_checks(results: str | Path) -> int:
    """Count the samples in a result file of `score_samples` that failed as their checks had no verdict."""
    return json.loads(Path(results).read_text(encoding="utf-8")).get("lost", 0)


def pass_at_k(results: str | Path, ks: Sequence[int] = (1, 10, 100)) -> dict[str, float]:
    """Compute EvalPlus's estimates from a result file: `{"pass@1": …, "plus_pass@1": …}`, fractions.

    Only for those k that every task has samples for; the ones with plus tests only where those were run.

    Raises:
        InputError: the file is not an EvalPlus result file.
    """
    return {name: float(np.mean(estimates)) for name, estimates in pass_at_k_of_tasks(results, ks).items()}


def pass_at_k_of_tasks(results: str | Path, ks: Sequence[int] = (1, 10, 100)) -> dict[str, list[float]]:
    """Compute what `pass_at_k` is the mean of: each task's estimate, in the file's order.

    Raises:
        InputError: as `pass_at_k`.
    """
    shares = read_results(results)
    entries = json.loads(Path(results).read_text(encoding="utf-8"))["eval"]
    from evalplus.eval import estimate_pass_at_k

    samples = [len(entries[task_id]) for task_id in shares]
    scores = {}
    for name, kind in (("pass", "base"), ("plus_pass", "plus")):
        passed = [getattr(result, kind) for result in shares.values()]
        if None in passed:
            continue
        counts = [round(share * count) for share, count in zip(passed, samples, strict=True)]
        for k in ks:
            if k <= min(samples):
                scores[f"{name}@{k}"] = estimate_pass_at_k(samples, counts, k).tolist()
    return scores


def _results_path(samples: Path) -> Path:
    """Return where EvalPlus puts the results of a samples file."""
    if samples.suffix != SUFFIX:
        raise InputError(f"{samples} is not a samples file; its name must end in {SUFFIX}")
    if not samples.is_file():
        raise InputError(f"{samples} is not there")
    return samples.with_name(samples.name.removesuffix(SUFFIX) + "_eval_results.json")


def check_settings(sandbox: bool) -> None:
    """Refuse what would keep every sample from being scored, or have EvalPlus fail right programs too.

    Raises:
        InputError: EvalPlus or bubblewrap is not installed, or a variable or a limit is in the way.
    """
    if sandbox:
        find_bubblewrap()
    if TIME_VARIABLE in os.environ:
        raise InputError(
            f"{TIME_VARIABLE} is set, which EvalPlus 0.3.1 cannot compare with a number; unset it"
        )
    check_packages("evalplus")
    from evalplus.eval import query_maximum_memory_bytes

    wanted = query_maximum_memory_bytes()
    if wanted is None:
        return
    limits = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("AS", "DATA", "STACK")
    }
    short = {name: limit for name, limit in limits.items() if resource.RLIM_INFINITY != limit < wanted}
    if not short:
        return
    memory = min((limit for name, limit in short.items() if name != "STACK"), default=None)
    if memory is None or short.get("STACK", memory) < memory:
        # EvalPlus has one number for all three: the stack's would leave programs too little memory
        memory = -1
    said = ", ".join(f"{limit} of RLIMIT_{name}" for name, limit in short.items())
    raise InputError(
        f"EvalPlus gives each program {wanted} bytes of memory and of stack, and this process may have less ({said}); "
        f"set EVALPLUS_MAX_MEMORY_BYTES={memory}"
        + (", which keeps this process's own limits" if memory == -1 else "")
    )


def _part(benchmark: Benchmark, task_ids: Sequence[str] | None) -> Benchmark:
    if task_ids is None:
        return benchmark
    unknown = sorted(set(task_ids) - set(benchmark.tasks))
    if unknown:
        raise InputError(f"{_some(unknown)} are not tasks of {benchmark.name}")
    if not task_ids:
        raise InputError("there are no tasks to score")
    tasks = {task_id: task for task_id, task in benchmark.tasks.items() if task_id in set(task_ids)}
    subset = None if len(tasks) == len(benchmark.tasks) else f"{len(tasks)} of {len(benchmark.tasks)}"
    return replace(benchmark, tasks=tasks, subset=subset)


def _read_samples(path: Path, benchmark: Benchmark) -> dict[str, list[str]]:
    """Read each task's programs, in the order of the file, and check that all are there and no others."""
    from evalplus.data import load_solutions

    programs: dict[str, list[str]] = {}
    try:
        for sample in load_solutions(str(path)):
            task_id = sample["task_id"]
            if task_id not in benchmark.tasks:
                raise InputError(f"{sample['_identifier']} is not a task of {benchmark.name} that is scored")
            prompt = benchmark.tasks[task_id]["prompt"]
            program = sample["solution"] if "solution" in sample else prompt + sample["completion"]
            programs.setdefault(task_id, []).append(program)
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not a samples file: {type(error).__name__}: {one_line(error)}"
        ) from error
    missing = [task_id for task_id in benchmark.tasks if task_id not in programs]
    if missing:
        raise InputError(f"{path} has no sample of {_some(missing)}")
    usual = max(map(len, programs.values()))
    fewer = [task_id for task_id, found in programs.items() if len(found) < usual]
    if fewer:
        raise InputError(f"{path} has {usual} samples of some tasks, and fewer of {_some(fewer)}")
    return programs


def _entry(task: Task, program: str, verdict: Verdict) -> dict[str, Any]:
    """Make a sample's entry of EvalPlus's result file."""
    task_id = task.problem["task_id"]
    if verdict.lost is not None:
        message = f"a sample of {task_id} counts as failed, since its check had no result: {verdict.lost}"
        warnings.warn(DyloraMoeWarning(message), stacklevel=3)
    base_failed = _failed_test(verdict.base_status, verdict.base_details, task.problem["base_input"])
    plus_failed = _failed_test(verdict.plus_status, verdict.plus_details, task.problem["plus_input"])
    if task.dataset == "mbpp":
        from evalplus.data.mbpp import mbpp_serialize_inputs

        base_failed, plus_failed = (
            mbpp_serialize_inputs(task_id, failed) for failed in (base_failed, plus_failed)
        )
    return {
        "task_id": task_id,
        "solution": program,
        "base_status": verdict.base_status,
        "plus_status": verdict.plus_status,
        "base_fail_tests": base_failed,
        "plus_fail_tests": plus_failed,
    }


def _failed_test(status: str | None, details: Sequence[int], inputs: Sequence[Any]) -> list[Any]:
    """Find the input that EvalPlus stopped at: the first that fails."""
    return [] if status == PASS or not details else [inputs[len(details) - 1]]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with staged_file(path) as staged, open(staged, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError as error:
        raise FailureError(
            f"{path} cannot be written: {one_line(error)}; the samples are kept: make room, and run the same command again"
        ) from error


def _some(task_ids: Sequence[str]) -> str:
    more = f" and {len(task_ids) - 3} more" if len(task_ids) > 3 else ""
    return ", ".join(task_ids[:3]) + more
