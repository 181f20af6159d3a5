"""The process that checks samples: EvalPlus is imported once, and each sample is checked in its own fork.

    checking process    (this file's `serve`; adopts orphans, ends whatever a sample leaves behind)
      guard             (one a sample: own session, empty folder and environment; calls check_correctness)
        program         (EvalPlus's own child, once for base and once for plus tests; restricted when forked)

It is started in an environment and, with a sandbox, in a file system without this package: from here it
imports files of this folder only that need nothing but the standard library. Questions come pickled on stdin, from the process that
started it; answers go to stdout as a line of JSON each, since nothing that a program may have touched is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylora_moe.hub_export.restrictions import (
    adopt_orphans,
    become_user,
    confine,
    drop_privileges,
    end_with_parent,
    limit_resources,
    prefer_oom_kill,
)

from .folder_removal import empty_folder, remove_folder
from .process_state import own_state, restore_limits
from .syscall_filter import filter_calls


# EvalPlus 0.3.1 gives the base and the plus tests so long each, waits so much longer before it calls a
# program timed out and ends it, and is done with it after the third.
EVALPLUS_SECONDS = 60
WAITING_SECONDS = 2
ENDING_SECONDS = 3
# For the guard itself, on a busy machine.
GRACE_SECONDS = 10
# The only variable that EvalPlus reads in the process that it limits.
KEPT_VARIABLE = "EVALPLUS_MAX_MEMORY_BYTES"
# System V's shared memory, messages and semaphores, which no process's end frees.
LASTING = [Path("/proc/sysvipc", kind) for kind in ("shm", "msg", "sem")]


# The line with which the checking process ends what it says before the first answer.
READY = b'{"ready": true}\n'
# What a program's process notes of itself when all that remains is to run the program.
RUNS = {"runs": True}
# Whether this process is a program's. Not told by its parent, which may have ended.
_is_restricted = False


class Task(NamedTuple):
    """What samples of one task are checked against: EvalPlus's own problem and expected outputs."""

    dataset: str
    problem: Mapping[str, Any]
    expected_output: Mapping[str, Any]
    base_only: bool


class AskerGone(Exception):
    """The process that asks has ended."""


class _Folder:
    """Where programs write to, one after the other: made for the first, and emptied after each.

    A folder that Landlock let a program write to takes room for a while after it was removed: with one for
    each program there would have to be room for two. It is made again only where a program has changed the
    folder itself.
    """

    def __init__(self, parent: str, prefix: str):
        self.parent, self.prefix = parent, prefix
        self.path: str | None = None
        self.state: list[Any] = []

    def make(self) -> str:
        if self.path is None:
            self.path = tempfile.mkdtemp(prefix=self.prefix, dir=self.parent)
            self.state = self._state()
        return self.path

    def empty(self) -> None:
        empty_folder(self.path)
        try:
            is_new = self._state() == self.state
        except OSError:
            is_new = False
        if not is_new:
            self.close()

    def close(self) -> None:
        if self.path is not None:
            remove_folder(self.path)
            self.path = None

    def _state(self) -> list[Any]:
        """Collect what the next program could notice. On some file systems a folder's size never shrinks."""
        found = os.stat(self.path)
        # access control lists are there, too
        names = os.listxattr(self.path) if sys.platform == "linux" else []
        attributes = {name: os.getxattr(self.path, name) for name in names}
        return [os.listdir(self.path), found.st_mode, found.st_gid, found.st_size, attributes]


def serve(
    folder: str,
    prefix: str,
    private: Sequence[str],
    user: int | None,
    processes: int | None,
    state: Mapping[str, Any],
) -> None:
    """Answer questions from stdin until it ends, or until a program has changed the place of the next.

    What is said on stdout and stderr before the line `READY` is why it does not start, if it does not.

    A question is pickled: (the fields of a Task, or None for the one before; the program's text, or None to
    have the folder removed until the next question, which is not answered). An answer is what
    `check_correctness` says of it, `{"base": [status, details], "plus": [status, details]}`, with `"early":
    true` if a program that EvalPlus calls timed out ended before its time; or `{"lost": status, "reason":
    text}`; or `{"unset": reason, "errno": number or null, "has_run": …}` where the check could not be set up,
    with whether the program has run for the base tests at least. With `"last": true` this process ends with
    it, since it was changed.

    Args:
        folder: where this process makes the folder for its samples; `prefix`: how that one's name begins.
        private: folders that no other process writes to, in a sandbox; then shared memory is its own, too.
        user: to become, for a process that is root.
        processes: how many this user may have once a program runs, or None for no limit.
        state: has the limits that this process must have, whatever a program did to its parent's.
    """
    restore_limits(state)
    state = own_state()
    prefer_oom_kill()
    if user is not None:
        become_user(user)
    adopt_orphans()
    filter_calls()
    multiprocessing.set_start_method("fork")
    place = _Folder(folder, prefix)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, contextlib.closing(place):
        _redirect(1)  # nothing that EvalPlus prints is an answer
        import evalplus.evaluate  # noqa: F401

        task, lasting = None, _lasting(private, place)
        _redirect(2)
        answers.write(READY.decode())
        answers.flush()
        while True:
            try:
                given, program = pickle.load(sys.stdin.buffer)
                if program is None:
                    place.close()
                    continue
                task = Task(*given) if given else task
                answer = _check(task, program, place, processes)
            except (EOFError, AskerGone):
                return
            if own_state() != state or _lasting(private, place) != lasting:
                answer["last"] = True
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if "last" in answer:
                return


def limit_seconds(times: Sequence[float]) -> float:
    """Compute EvalPlus's time limit for a program from the reference solution's times."""
    from evalplus.config import DEFAULT_GT_TIME_LIMIT_FACTOR, DEFAULT_MIN_TIME_LIMIT

    limits = (max(DEFAULT_MIN_TIME_LIMIT, DEFAULT_GT_TIME_LIMIT_FACTOR * seconds) for seconds in times)
    return min(EVALPLUS_SECONDS, sum(limits))


def _check(task: Task, program: str, place: _Folder, processes: int | None) -> dict[str, Any]:
    """Check one sample. When it returns, nothing that the program started is left, and its folder is empty."""
    kinds = ("base",) if task.base_only else ("base", "plus")
    limits = [limit_seconds(task.expected_output[f"{kind}_time"]) for kind in kinds]
    seconds = [limit + ENDING_SECONDS for limit in limits]
    with contextlib.ExitStack() as stack:
        try:
            own = place.make()
            stack.callback(place.empty)
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            with contextlib.closing(os.fdopen(writing, "wb")):
                guard = os.fork()
                if guard == 0:
                    _guard(task, program, own, writing, math.ceil(max(seconds)), processes)
        except (OSError, MemoryError) as error:
            return {**_unset(error), "has_run": False}
        stack.callback(_end_all, guard)
        said = _read(reading, time.monotonic() + sum(seconds) + GRACE_SECONDS)
    if said is None:
        return {"lost": "timeout", "reason": "the check did not end at its time limit"}
    *notes, answer = _lines(said) or [{}]
    unset = next((note for note in [*notes, answer] if "unset" in note), None)
    if unset is not None:
        return {**unset, "has_run": notes[:1] == [RUNS]}
    if "base" not in answer:
        return {"lost": "fail", "reason": "the checking process was ended"}
    waited = sum(
        limit + WAITING_SECONDS
        for kind, limit in zip(kinds, limits, strict=True)
        if answer[kind][0] == "timeout"
    )
    return {**{kind: answer[kind] for kind in kinds}, "early": answer["seconds"] < waited}


def _lines(said: bytes) -> list[dict[str, Any]]:
    """Parse what a guard and its programs wrote, without a line that was cut off."""
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]


def _unset(error: BaseException) -> dict[str, Any]:
    """Make the answer where a check could not be set up."""
    reason = traceback.format_exception_only(type(error), error)[-1].strip()
    return {"unset": reason[:300], "errno": getattr(error, "errno", None)}


def _read(descriptor: int, deadline: float) -> bytes | None:
    """Read a pipe until its last writer ends; return None if that has not happened by the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(sys.stdin.fileno(), 0)  # the end of that comes unasked
    chunks = []
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if sys.stdin.fileno() in ready:
            raise AskerGone
        if descriptor in ready:
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
    return None


def _end_all(guard: int) -> None:
    """End the guard, its session, and what has left that: this process's children and theirs."""
    if os.getpid() == 1:  # in a sandbox: all but this one in one call, so that no fork gets away
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            _end_descendants()
            time.sleep(0.001)


def _end_descendants() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _guard(task: Task, program: str, own: str, writing: int, cpu_seconds: int, processes: int | None) -> None:
    """Check one program and write what EvalPlus says; in the forked process, which ends here."""
    try:
        os.setsid()
        end_with_parent()
        for descriptor in range(3):
            _redirect(descriptor)
        # Above all where the checking process answers: a line from a program would be taken for the next
        # one's verdict.
        os.closerange(3, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        memory = os.environ.get(KEPT_VARIABLE)
        os.environ.clear()
        if memory is not None:
            os.environ[KEPT_VARIABLE] = memory
        os.chdir(own)
        tempfile.tempdir = own
        os.register_at_fork(
            after_in_child=functools.partial(_restrict, os.getpid(), writing, own, cpu_seconds, processes)
        )
        started = time.monotonic()
        answer = _evalplus_check()(
            task.dataset,
            0,
            task.problem,
            program,
            task.expected_output,
            base_only=task.base_only,
            fast_check=True,  # as evalplus.evaluate does
        )
        kinds = {
            kind: (answer[kind][0], list(answer[kind][1])) for kind in ("base", "plus") if kind in answer
        }
        _write(writing, {**kinds, "seconds": time.monotonic() - started})
    except BaseException as error:
        _write(writing, _unset(error))
    finally:
        os._exit(0)


def _lasting(private: Sequence[str], place: _Folder) -> list[Any]:
    """Collect what a program can leave in the sandbox that outlives it and that the next one would find."""
    if not private:
        return []
    paths = {os.path.join(folder, name) for folder in private for name in os.listdir(folder)}
    return [*(path.read_text() for path in LASTING if path.exists()), paths - {place.path}]


def _evalplus_check() -> Callable[..., dict[str, Any]]:
    from evalplus.evaluate import check_correctness

    return check_correctness


def _restrict(guard: int, writing: int, own: str, cpu_seconds: int, processes: int | None) -> None:
    """Run in the process that EvalPlus forks for the program, before anything else."""
    global _is_restricted
    if _is_restricted:
        return  # a fork of the program's own: it has inherited everything
    _is_restricted = True
    try:
        end_with_parent()
        if os.getppid() != guard:
            os._exit(1)  # that ended before, by what the base tests left running
        limit_resources(cpu_seconds, processes)
        drop_privileges()
        confine(own)
        os.rmdir(tempfile.mkdtemp())  # EvalPlus makes one, and calls the program timed out if it cannot
        _write(writing, RUNS)
        os.close(writing)  # the answer is not the program's to give
    except BaseException as error:
        _write(writing, _unset(error))
        os._exit(1)


def _write(writing: int, answer: Mapping[str, Any]) -> None:
    os.write(writing, json.dumps(answer).encode() + b"\n")


def _redirect(descriptor: int) -> None:
    """Have a standard stream lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
