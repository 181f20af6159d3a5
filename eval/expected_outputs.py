"""What EvalPlus's reference solutions answer to every test input: computed by EvalPlus once, and kept in its cache.

EvalPlus writes that cache in place, so that another process could read half of it. Here one process writes at a time,
under another name, and the whole file is then put in place. Knows nothing about samples.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock

from dylora_moe.hub_export.errors import FailureError, InputError, one_line

from .evalplus_data import Benchmark


def expected_outputs(benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """EvalPlus's expected outputs of (at least) a benchmark's tasks: task id to outputs and times, base and plus.

    Those of a whole set are kept for the next time, which HumanEval+ and MBPP+ take a minute each and hundreds of
    megabytes for. Those of a stretch are kept by nobody, unless the whole set's are there.

    Raises:
        InputError: the kept file is damaged.
        FailureError: the cache cannot be written.
    """
    from evalplus import evaluate

    tasks_not_none = evaluate.MBPP_OUTPUT_NOT_NONE_TASKS if benchmark.name == "mbpp" else []
    kept = Path(evaluate.CACHE_DIR, f"{benchmark.dataset_hash}.pkl")
    # EvalPlus names its file after the hash that it is told.
    partial = kept.with_name(f"{benchmark.dataset_hash}.partial.pkl")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # What EvalPlus prints, and what the reference solutions may, is none of this program's results.
        with FileLock(kept.with_suffix(".lock")), contextlib.redirect_stdout(sys.stderr), _steady_clock():
            if kept.exists():
                return evaluate.get_groundtruth(benchmark.tasks, benchmark.dataset_hash, tasks_not_none)
            partial.unlink(missing_ok=True)  # of a process that was killed
            try:
                outputs = evaluate.get_groundtruth(benchmark.tasks, partial.stem, tasks_not_none)
                if benchmark.subset is None:
                    os.replace(partial, kept)
            finally:
                partial.unlink(missing_ok=True)
            return outputs
    except (EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{kept}, EvalPlus's cache of expected outputs, is damaged; remove it") from error
    except OSError as error:
        raise FailureError(f"EvalPlus's cache {kept.parent} cannot be written: {one_line(error)}") from error


@contextlib.contextmanager
def _steady_clock() -> Iterator[None]:
    """Have EvalPlus time the reference solutions by a clock that is never set.

    Its own is the time of day. Set back meanwhile, it gives a slow reference solution a time limit that is too short for
    itself, and that is kept.
    """
    from evalplus.gen import util

    clock, util.time = util.time, SimpleNamespace(time=time.perf_counter)
    try:
        yield
    finally:
        util.time = clock
