"""Runs unmodified EvalPlus on a model in a process of its own.

Neither evalplus nor torch is imported here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.repo.choices import long_dtype


LOG_FILE = "evalplus.log"
OVERRIDE_VARIABLES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
POLL_SECONDS = 0.5
TAIL_LINES = 15

# Called with the number of problems answered so far.
Progress = Callable[[int], None]

# EvalPlus's own functions, run once before several evaluations share their cache: it writes that cache in
# place, so that a second process could read half of it.
_GROUND_TRUTH = """
import sys
from evalplus import evaluate
if sys.argv[1] == "humaneval":
    evaluate.get_groundtruth(evaluate.get_human_eval_plus(), evaluate.get_human_eval_plus_hash(), [])
else:
    evaluate.get_groundtruth(
        evaluate.get_mbpp_plus(), evaluate.get_mbpp_plus_hash(), evaluate.MBPP_OUTPUT_NOT_NONE_TASKS
    )
"""


class StockEvalPlusError(FailureError):
    """EvalPlus failed or left no result. `log` is its log file, `tail` the last lines of that.

    The message is one line, which names the file and quotes its last line.
    """

    def __init__(self, what: str, log: Path):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        self.log = log
        self.tail = [line for line in lines if line.strip()][-TAIL_LINES:]
        quoted = f"; it ends with: {self.tail[-1].strip()}" if self.tail else ", which is empty"
        super().__init__(f"{what}. See its log {log}{quoted}")


def run_stock_evalplus(
    model: str | Path,
    *,
    root: str | Path,
    dataset: str = "humaneval",
    dataset_path: str | Path | None = None,
    dtype: str = "bfloat16",
    threads: int | None = None,
    timeout: float | None = None,
    extra_arguments: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Generate greedily with `model` (a folder or a Hub id), score, and return the result file's path.

    `root` must be empty or absent: EvalPlus would go on from samples it finds there and read old results as
    new. `dataset_path` replaces the named data set's own file. `threads` limits each process's CPU threads;
    `timeout` is in seconds. Raises `StockEvalPlusError` when EvalPlus fails, `InputError` when `root` holds
    something.
    """
    root = _fresh_folder(root)
    environment = _environment(dataset, dataset_path, threads)
    if Path(model).is_dir():
        model = Path(model).resolve()
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "evalplus.evaluate", "--model", str(model), "--dataset", dataset]
    command += [
        "--backend",
        "hf",
        "--greedy",
        "--trust_remote_code",
        "--dtype",
        long_dtype(dtype),
        "--root",
        str(root),
    ]
    report = progress or (lambda answered: None)
    _run(
        [*command, *extra_arguments],
        environment=environment,
        log=root / LOG_FILE,
        timeout=timeout,
        poll=lambda: report(_count_lines((root / dataset).glob("*.raw.jsonl"))),
    )
    results = list((root / dataset).glob("*_eval_results.json"))
    if len(results) != 1:
        raise StockEvalPlusError(f"EvalPlus ended but left {len(results)} result files", root / LOG_FILE)
    return results[0]


def prepare_ground_truth(
    *, log_folder: str | Path, dataset: str = "humaneval", dataset_path: str | Path | None = None
) -> None:
    """Have EvalPlus compute and cache the expected outputs, so that several runs may then go in parallel.

    `log_folder` must be empty or absent.
    """
    log_folder = _fresh_folder(log_folder)
    _run(
        [sys.executable, "-c", _GROUND_TRUTH, dataset],
        environment=_environment(dataset, dataset_path, threads=1),
        log=log_folder / LOG_FILE,
        timeout=None,
        poll=lambda: None,
    )


def _fresh_folder(folder: str | Path) -> Path:
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose a new one, so that no old result is read")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _environment(dataset: str, dataset_path: str | Path | None, threads: int | None) -> dict[str, str]:
    if dataset not in OVERRIDE_VARIABLES:
        raise InputError(f"unknown data set {dataset!r}: choose one of {', '.join(OVERRIDE_VARIABLES)}")
    # Nothing in the caller's folder or path may stand in for a module that EvalPlus imports.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if dataset_path is not None:
        environment[OVERRIDE_VARIABLES[dataset]] = str(Path(dataset_path).resolve(strict=True))
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment


def _run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    timeout: float | None,
    poll: Callable[[], None],
) -> None:
    """Run `command` in the log's folder, calling `poll` twice a second and once more at the end."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment,
            stdin=subprocess.DEVNULL,  # with a terminal, transformers asks whether to trust the code, and waits
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the workers that EvalPlus starts end with it
        )
        try:
            while process.poll() is None:
                if timeout is not None and time.monotonic() - started > timeout:
                    raise StockEvalPlusError(f"EvalPlus did not end within {timeout:g} seconds", log)
                poll()
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
    poll()
    if process.returncode != 0:
        raise StockEvalPlusError(f"EvalPlus ended with exit code {process.returncode}", log)


def _end(process: subprocess.Popen) -> None:
    """End a process that still runs, and all that it started; do nothing to one that has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _count_lines(paths: Iterable[Path]) -> int:
    return sum(path.read_bytes().count(b"\n") for path in paths)
