"""Checks many programs at once: keeps checking processes at work, and replaces those that end.

Knows how `guarded_check` is started, asked and ended, inside a sandbox or not. Knows nothing about samples files, and
does not import evalplus.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dylora_moe.hub_export.errors import FailureError

from .folder_removal import remove_folder
from .guarded_check import EVALPLUS_SECONDS, KEPT_VARIABLE, Task
from .sandbox import PROCESSES, WRITABLE, sandbox_user, sandboxed


# No check may take longer, whatever it does to the process that checks it, which has a shorter limit of its own.
CHECK_SECONDS = 2 * EVALPLUS_SECONDS + 60
ENDING_SECONDS = 5
POLL_SECONDS = 1
PACKAGE_FOLDERS = ("site-packages", "dist-packages")

# An empty package in place of this one, whose own `__init__` and requirements would cost time and memory.
_START = """
import json, sys, types
code, settings = sys.argv[1], json.loads(sys.argv[2])
sys.path += [path for path in settings.pop("packages") if path not in sys.path]
package = types.ModuleType("checking")
package.__path__ = [code]
sys.modules["checking"] = package
from checking.guarded_check import serve
serve(**settings)
"""

# Called with the number of checks done, and of all.
Progress = Callable[[int, int], None]


class Check(NamedTuple):
    """A program, and what it is checked against. Checks of one task should share it and follow each other."""

    task: Task
    program: str


class Verdict(NamedTuple):
    """What EvalPlus says of a program: "pass", "fail" or "timeout", and for each input that was run whether it passed.

    `plus_status` is None without the plus tests. `lost` says why EvalPlus could not say it, and then the program counts
    as failed.
    """

    base_status: str
    base_details: Sequence[int]
    plus_status: str | None
    plus_details: Sequence[int]
    lost: str | None = None


def run_checks(
    checks: Sequence[Check], *, workers: int, sandbox: bool = False, progress: Progress | None = None
) -> list[Verdict]:
    """The verdict of every check, in order. When this returns or raises, no process that it started is left.

    Args:
        workers: how many programs run at the same time.
        sandbox: run them inside bubblewrap.

    Raises:
        InputError: bubblewrap is not installed.
        FailureError: the process that checks cannot be started.
    """
    verdicts: dict[int, Verdict] = {}
    waiting = iter(range(len(checks)))
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dylora-moe-checks-"))
        stack.callback(remove_folder, folder)
        selector = stack.enter_context(selectors.DefaultSelector())
        idle = [_Worker(folder, number, sandbox, stack) for number in range(min(workers, len(checks)))]
        busy: dict[_Worker, int] = {}
        while len(verdicts) < len(checks):
            while idle and (number := next(waiting, None)) is not None:
                worker = idle.pop()
                worker.ask(checks[number])
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                busy[worker] = number
            ready = {key.data for key, _ in selector.select(POLL_SECONDS)}
            for worker in ready | {worker for worker in busy if worker.is_overdue}:
                selector.unregister(worker.process.stdout)
                number = busy.pop(worker)
                verdicts[number] = worker.answer()
                idle.append(worker)
                if progress is not None:
                    progress(len(verdicts), len(checks))
    return [verdicts[number] for number in range(len(checks))]


class _Worker:
    """A checking process, and the next one once that has ended."""

    def __init__(self, folder: Path, number: int, sandbox: bool, stack: contextlib.ExitStack):
        self.log = folder / f"checks-{number}.log"
        self.what = "the sandbox" if sandbox else "the process that checks programs"
        self.command = _command(folder, number, sandbox)
        self.folder = folder
        self._start()
        stack.callback(self.end)

    @property
    def is_overdue(self) -> bool:
        return self.asked is not None and time.monotonic() - self.asked > CHECK_SECONDS

    def ask(self, check: Check) -> None:
        if not self.is_ready:
            if not self.process.stdout.readline():
                raise FailureError(f"{self.what} does not start: {_last_line(self.log)}")
            self.is_ready = True
        given = None if check.task is self.task else tuple(check.task)
        self.task, self.asked = check.task, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has just ended, as `answer` will find
            pickle.dump((given, check.program), self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()

    def answer(self) -> Verdict:
        """What it says of what it was asked. If it has ended or is overdue, that is said; then the next one is started."""
        has_plus = not self.task.base_only
        try:
            said = json.loads(b"" if self.is_overdue else self.process.stdout.readline())
        except ValueError:
            said = {"lost": "fail", "reason": "the process that checks it ended or did not answer", "last": True}
        if "last" in said:
            self.end()
            self._start()
        self.asked = None
        if "lost" in said:
            return Verdict(said["lost"], [], said["lost"] if has_plus else None, [], said["reason"])
        return Verdict(*said["base"], *(said["plus"] if has_plus else (None, [])))

    def end(self) -> None:
        """End it and all that it started. It does that itself once nobody asks; what does not listen is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(0 if self.is_overdue else ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            _kill_tree(self.process.pid)
            self.process.wait()
        self.process.stdout.close()

    def _start(self) -> None:
        self.is_ready, self.task, self.asked = False, None, None
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # an interrupt from the terminal is for the process that asks
            )


def _command(folder: Path, number: int, sandbox: bool) -> list[str]:
    code = str(Path(__file__).resolve().parent)
    packages = [path for path in sys.path if Path(path).name in PACKAGE_FOLDERS and Path(path).is_dir()]
    settings = {
        "packages": packages,
        "folder": WRITABLE[0] if sandbox else str(folder),
        "private": WRITABLE if sandbox else [],
        "user": sandbox_user(number) if sandbox else None,
        "processes": PROCESSES if sandbox else None,
    }
    command = [sys.executable, "-I", "-c", _START, code, json.dumps(settings)]
    return sandboxed(command, [code, *packages]) if sandbox else command


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in (KEPT_VARIABLE, "LD_LIBRARY_PATH") if name in os.environ}
    return {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", **kept}


def _kill_tree(process_id: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(process_id)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
