"""EvalPlus's `sanitize` for many programs: in processes where it takes long, and kept on disk.

EvalPlus parses every run of a program's lines, so a sample of a thousand lines takes seconds, and one of a
few thousand minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, NamedTuple

from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, one_line


# Runs of lines that this process parses in less time than it takes to start others: one second of opening brackets,
# which take longest, and a fifth of that of Python.
FEW_RUNS = 20_000
# So much time of a processor may a program take. EvalPlus needs it for some 2,000 lines of prose.
SECONDS = 600
# Blank lines at a program's end that are left. After two, further ones change nothing
# (`tests/eval/test_sanitizing.py`).
BLANK_LINES = 3

# Nothing but the paths on which this process found EvalPlus is handed on.
_SERVE = (
    "import sys; sys.path[:] = sys.argv[1:]; from dylora_moe.eval.scoring.sanitizing import serve; serve()"
)

# Called with the number of programs that are done, and of all.
Progress = Callable[[int, int], None]


class Program(NamedTuple):
    code: str
    entry_point: str


class Sanitized(NamedTuple):
    """A program's text, and what EvalPlus failed with, in which case the text is the program's own."""

    text: str
    problem: str | None = None


def sanitize_programs(
    programs: Sequence[tuple[str, str]],
    *,
    kept: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[str]:
    """Return the text that `evalplus.sanitize.sanitize` makes of each program, in order.

    A program that EvalPlus fails at (thousands of operators in a row; NUL under Python 3.10), where it would
    end, stays as it is, with a `DyloraMoeWarning`; so does one that takes it longer than `SECONDS`.

    Args:
        programs: the text of each and the name of the function that its task asks for.
        kept: a file for texts that took long; those that are there are not made again. The caller removes it.
        workers: how many processes work at the same time where it takes long.

    Raises:
        FailureError: such a process does not start, or ends. What was done is kept.
        OSError: the disk is full.
    """
    programs = [Program(*program) for program in programs]
    wanted = {_key(program): program for program in programs}
    done = {} if kept is None else {key: text for key, text in _read(kept).items() if key in wanted}
    missing = {key: program for key, program in wanted.items() if key not in done}
    if sum(map(_runs_of_lines, missing.values())) <= FEW_RUNS:
        done.update((key, sanitize_program(program)) for key, program in missing.items())
    else:
        _sanitize_in_processes(missing, done, kept, workers, progress or (lambda done, total: None))
    for key, program in wanted.items():
        if done[key].problem is not None:
            message = f"EvalPlus cannot sanitize a sample of {program.entry_point} ({done[key].problem}); it stays as it is"
            warnings.warn(message, DyloraMoeWarning, stacklevel=2)
    return [done[_key(program)].text for program in programs]


def sanitize_program(program: Program) -> Sanitized:
    """Run EvalPlus's `sanitize` on one program, in this process."""
    from evalplus.sanitize import sanitize

    try:
        return Sanitized(sanitize(_without_blank_end(program.code), entrypoint=program.entry_point))
    except (RecursionError, ValueError) as error:
        return Sanitized(program.code, one_line(error))


def serve() -> None:
    """Sanitize what comes on standard input, a line each, until it ends; what a process of its own runs.

    A line is a program and how many seconds of a processor it may take before this process ends.
    """
    import evalplus.sanitize  # noqa: F401  (takes no program's time)

    from dylora_moe.hub_export.restrictions import end_with_parent

    end_with_parent()
    for line in sys.stdin:
        *program, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        print(json.dumps(sanitize_program(Program(*program))), flush=True)


def _without_blank_end(code: str) -> str:
    """Cut the blank lines at a program's end to `BLANK_LINES`; a model that repeats itself writes hundreds.

    EvalPlus looks for the run of lines that parses with the most lines that are not blank, and of several for
    the first and shortest: none of these ends in a blank line too many.
    """
    lines = code.split("\n")
    count = len(lines)
    while count and not lines[count - 1].strip(" \t"):
        count -= 1
    return "\n".join(lines[: count + BLANK_LINES])


def _runs_of_lines(program: Program) -> int:
    return _without_blank_end(program.code).count("\n") ** 2 // 2


def _sanitize_in_processes(
    programs: dict[str, Program],
    done: dict[str, Sanitized],
    kept: Path | None,
    workers: int,
    progress: Progress,
) -> None:
    """Sanitize programs, the longest first, and add each to `done` and to the file as soon as it is there."""
    before, total = len(done), len(done) + len(programs)
    progress(before, total)
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def sanitize(program: Program) -> Sanitized:
        worker = idle.get()
        try:
            return worker.sanitize(program)
        finally:
            idle.put(worker)

    with (
        tempfile.TemporaryFile() as log,
        ThreadPoolExecutor(workers) as pool,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(min(workers, len(programs))):
            worker = _Worker(log)
            stack.callback(worker.end)
            idle.put(worker)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # before their processes end
        keys = sorted(programs, key=lambda key: _runs_of_lines(programs[key]), reverse=True)
        waiting = {pool.submit(sanitize, programs[key]): key for key in keys}
        for number, future in enumerate(as_completed(waiting), before + 1):
            key = waiting[future]
            done[key] = future.result()
            if kept is not None:
                _keep(kept, key, done[key])
            progress(number, total)


class _Worker:
    """A process that sanitizes one program after the other; it ends with the thread that started it."""

    def __init__(self, log: IO[bytes]):
        self.log = log
        self._start()

    def _start(self) -> None:
        try:
            self.process = subprocess.Popen(
                # Python warns of what it finds odd in a program.
                [sys.executable, "-W", "ignore", "-c", _SERVE, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                start_new_session=True,  # an interrupt from the terminal is for the process that asks
            )
        except OSError as error:
            raise FailureError(
                f"the process that sanitizes samples does not start: {one_line(error)}"
            ) from error

    def sanitize(self, program: Program) -> Sanitized:
        try:
            self.process.stdin.write(json.dumps([*program, SECONDS]) + "\n")
            self.process.stdin.flush()
            return Sanitized(*json.loads(self.process.stdout.readline()))
        except (OSError, ValueError) as error:
            if self.process.wait() == -signal.SIGPROF:
                self.end()
                self._start()
                return Sanitized(program.code, f"it takes longer than {SECONDS} seconds")
            raise FailureError(
                f"the process that sanitizes samples ended at one of {program.entry_point}: {_last_line(self.log)}; run "
                "the same command again, what was sanitized is kept"
            ) from error

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:  # which closes its pipes
            pass


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")


def _key(program: Program) -> str:
    return hashlib.sha256(json.dumps(program).encode()).hexdigest()


def _read(kept: Path) -> dict[str, Sanitized]:
    """Read a file of kept texts; a line that was cut off is left out, and its text made again."""
    done: dict[str, Sanitized] = {}
    if kept.exists():
        for line in kept.read_bytes().splitlines():
            try:
                key, text, problem = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(text, str):
                done[key] = Sanitized(text, problem)
    return done


def _keep(kept: Path, key: str, sanitized: Sanitized) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "ab") as file:
        # A line of its own, whatever was cut off before it.
        file.write(b"\n" + json.dumps([key, *sanitized]).encode() + b"\n")


__all__ = ["Program", "Sanitized", "sanitize_program", "sanitize_programs", "serve"]
