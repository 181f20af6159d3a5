"""EvalPlus's data sets as this package uses them: which tasks, of which version, under which name.

Everything is read by EvalPlus's own functions.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock

from dylora_moe.hub_export.errors import FailureError, InputError, one_line
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.staging import staged_file


# What users write, and what EvalPlus calls it. Its two sets are HumanEval+ and MBPP+, with the base tests
# among them.
BENCHMARKS = {"humaneval": "humaneval", "humanevalplus": "humaneval", "mbpp": "mbpp", "mbppplus": "mbpp"}


# Called with the number of tasks that are done, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Benchmark:
    """A data set of EvalPlus, or a part of it.

    Attributes:
        name: "humaneval" or "mbpp".
        mini: with few plus inputs.
        dataset_hash: of the file, by EvalPlus.
        tasks: those that are asked, by their ids, in EvalPlus's order; its own dicts.
        id_range: which these are, from the first number up to but not with the second; None for all, and for
            the first so many of a set whose ids are not all numbered.
        subset: which these are in words, for tables; None for all.
        file: the name of the user's own file that it was read from (HUMANEVAL_OVERRIDE_PATH,
            MBPP_OVERRIDE_PATH), or None.
    """

    name: str
    mini: bool
    dataset_hash: str
    tasks: dict[str, dict[str, Any]]
    id_range: tuple[int, int] | None = None
    subset: str | None = None
    file: str | None = None

    @property
    def task_ids(self) -> list[str]:
        return list(self.tasks)


def canonical_benchmark(name: str) -> str:
    """Return EvalPlus's name of a benchmark.

    Raises:
        InputError: it is not known; lists those that are.
    """
    try:
        return BENCHMARKS[name.lower().replace("+", "plus").replace("_", "").replace("-", "")]
    except KeyError:
        raise InputError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}") from None


def load_benchmark(
    name: str, *, mini: bool = False, id_range: Sequence[int] | None = None, limit: int | None = None
) -> Benchmark:
    """Read a data set.

    Args:
        id_range: two task numbers; from the first up to but not with the second, as in EvalPlus.
        limit: the first so many of these.

    Raises:
        InputError: the set is not known, a range is empty or of tasks without a number, or EvalPlus is not
            installed.
        FailureError: the data cannot be had.
    """
    name = canonical_benchmark(name)
    check_packages("evalplus")
    from evalplus import data

    get, get_hash = {
        "humaneval": (data.get_human_eval_plus, data.get_human_eval_plus_hash),
        "mbpp": (data.get_mbpp_plus, data.get_mbpp_plus_hash),
    }[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the first time EvalPlus downloads it, and says so
            every, dataset_hash = get(mini=mini), get_hash(mini=mini)
    except Exception as error:  # no network, a file that is not there, or not what it should be
        variable, why = f"{name.upper()}_OVERRIDE_PATH", f"{type(error).__name__}: {one_line(error)}"
        if _own_file(name):
            numbered = ", and numbers its tasks, Mbpp/1 and so on" if name == "mbpp" else ""
            raise FailureError(
                f"EvalPlus cannot read {_own_file(name)}, which {variable} names ({why}); give it one in the format of "
                f"its own {name}{numbered}"
            ) from error
        raise FailureError(
            f"EvalPlus's data set {name} cannot be had ({why}); put the file on this machine and name it in {variable}"
        ) from error
    if not every or not all(isinstance(task_id, str) for task_id in every):
        wrong = "holds no task" if not every else "has ids that are no text, which EvalPlus cannot score"
        raise InputError(f"{_own_file(name) or name} {wrong}")
    tasks, chosen = _part(every, id_range, limit)
    subset = None
    if len(tasks) < len(every):
        which = "the first" if chosen is None else f"tasks {chosen[0]} to {chosen[1] - 1},"
        subset = f"{which} {len(tasks)} of {len(every)}"
    return Benchmark(name, mini, dataset_hash, tasks, chosen if subset else None, subset, _own_file(name))


def _own_file(name: str) -> str | None:
    """Return the file that EvalPlus reads in place of its own, which may hold other tasks."""
    from evalplus.data import humaneval, mbpp

    path = {"humaneval": humaneval.HUMANEVAL_OVERRIDE_PATH, "mbpp": mbpp.MBPP_OVERRIDE_PATH}[name]
    return Path(path).name if path else None


def _part(
    every: dict[str, dict], id_range: Sequence[int] | None, limit: int | None
) -> tuple[dict[str, dict], tuple[int, int] | None]:
    """Choose the wanted tasks; return them, and their range of numbers where all have one."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; it must be at least 1")
    if id_range is not None and (len(id_range) != 2 or id_range[0] >= id_range[1]):
        raise InputError(f"--id_range is {list(id_range)}; it takes two numbers, the lower one first")
    numbers = {task_id: _number(task_id) for task_id in every}
    unnumbered = next((task_id for task_id, number in numbers.items() if number is None), None)
    if unnumbered is not None:
        if id_range is not None:
            raise InputError(
                f"--id_range takes tasks by their number, and {unnumbered} has none; use --limit, or leave it out"
            )
        return dict(list(every.items())[:limit]), None
    low, high = id_range or (min(numbers.values()), max(numbers.values()) + 1)
    kept = [task_id for task_id, number in numbers.items() if low <= number < high][:limit]
    if not kept:
        raise InputError(
            f"--id_range {low} {high} holds no task; the numbers run up to {max(numbers.values())}"
        )
    low, high = min(numbers[task_id] for task_id in kept), max(numbers[task_id] for task_id in kept) + 1
    # All with a number in this range, which is what the samples are called by.
    tasks = {task_id: task for task_id, task in every.items() if low <= numbers[task_id] < high}
    return tasks, (low, high)


def _number(task_id: str) -> int | None:
    """Return the number that a task's id ends in, `HumanEval/53`; None for another end, `HumanEval/53_v2`."""
    end = task_id.rpartition("/")[2]
    return int(end) if end.isascii() and end.isdigit() else None


class _ToldTasks(dict):
    """Tasks that tell how many of them EvalPlus has gone through: it goes through `items` once."""

    def __init__(self, tasks: dict[str, dict[str, Any]], progress: Progress | None):
        super().__init__(tasks)
        self._progress = progress or (lambda done, total: None)

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, item in enumerate(super().items()):
            self._progress(number, len(self))
            yield item
        self._progress(len(self), len(self))


def expected_outputs(benchmark: Benchmark, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Return EvalPlus's expected outputs and times, base and plus, of (at least) a benchmark's tasks, by id.

    Those of a whole set are kept for the next time, which HumanEval+ and MBPP+ take a minute each and
    hundreds of megabytes for. Those of a part are not kept, unless the whole set's are there.

    Args:
        progress: is told how many are computed; not called where they were kept.

    Raises:
        InputError: the kept file is damaged.
        FailureError: the cache cannot be written.
    """
    from evalplus import evaluate

    tasks_not_none = evaluate.MBPP_OUTPUT_NOT_NONE_TASKS if benchmark.name == "mbpp" else []
    kept = Path(evaluate.CACHE_DIR, f"{benchmark.dataset_hash}.pkl")
    # EvalPlus names its file after the hash that it is told. The name is fixed, so that what a killed process
    # left is found.
    partial = kept.with_name(f"{benchmark.dataset_hash}.partial.pkl")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # What EvalPlus prints, and what the reference solutions may, is none of this program's results.
        with FileLock(kept.with_suffix(".lock")), contextlib.redirect_stdout(sys.stderr), _steady_clock():
            if kept.exists():
                return evaluate.get_groundtruth(benchmark.tasks, benchmark.dataset_hash, tasks_not_none)
            partial.unlink(missing_ok=True)
            with staged_file(kept, partial, keep=benchmark.subset is None):
                tasks = _ToldTasks(benchmark.tasks, progress)
                return evaluate.get_groundtruth(tasks, partial.stem, tasks_not_none)
    except (EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{kept}, EvalPlus's cache of expected outputs, is damaged; remove it") from error
    except OSError as error:
        raise FailureError(f"EvalPlus's cache {kept.parent} cannot be written: {one_line(error)}") from error


@contextlib.contextmanager
def _steady_clock() -> Iterator[None]:
    """Have EvalPlus time the reference solutions by a clock that is never set.

    Its own is the time of day. Set back meanwhile, it gives a slow reference solution a time limit that is
    too short for itself, and that is kept.
    """
    from evalplus.gen import util

    clock, util.time = util.time, SimpleNamespace(time=time.perf_counter)
    try:
        yield
    finally:
        util.time = clock
