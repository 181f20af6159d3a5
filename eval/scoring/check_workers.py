"""Checks many programs at once: keeps checking processes at work, and replaces those that end.

`checking_process` is one of them. Which verdicts can be trusted is decided here.
"""

from __future__ import annotations

import contextlib
import selectors
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dylora_moe.hub_export.errors import FailureError

from . import checking_process
from .checking_process import Answer, Check, CheckingProcess, Verdict, insist, keep_limits
from .folder_removal import remove_folders
from .guarded_check import Task
from .process_state import own_state
from .shortage import remedy


POLL_SECONDS = 1
# So much longer than that it waits only if this machine, or this process, stood still: then time limits ran out, too.
STANDSTILL_SECONDS = 5
# A folder of checks that were killed together with their checking process; others change with every check.
STALE_SECONDS = 24 * 3600
# How often a doubtful check is made again, with nothing beside it.
TRIES = 2

# Called with the number of checks done, and of all.
Progress = Callable[[int, int], None]


def check_start(sandbox: bool = False) -> None:
    """Run a program that is known to be right, to see that programs can be run at all.

    Raises:
        InputError: bubblewrap is not installed.
        FailureError: it cannot be run, or does not pass.
    """
    problem = {"task_id": "trial", "entry_point": "same", "atol": 0, "base_input": [[1]]}
    task = Task("humaneval", problem, {"base": [1], "base_time": [1.0]}, base_only=True)
    (verdict,) = run_checks([Check(task, "def same(x):\n    return x\n")], workers=1, sandbox=sandbox)
    if not verdict.has_passed:
        why = verdict.lost or f"EvalPlus's verdict on it is {verdict.base_status!r}"
        raise FailureError(f"a program that is right does not pass on this machine: {why}")


def run_checks(
    checks: Sequence[Check], *, workers: int, sandbox: bool = False, progress: Progress | None = None
) -> list[Verdict]:
    """Run every check; verdicts in order. When this returns or raises, no process or folder of it is left.

    A program may fail because the machine is short of something: room in the temporary folder, files,
    processes, memory. So a verdict that is not to be trusted (`Answer.is_doubtful`) is made again, with
    nothing beside it. It stands if it comes again although a program known to fail by itself is run as it
    should be.

    Args:
        workers: how many programs run at the same time: half as many from when a check cannot be set up.
        sandbox: run them inside bubblewrap.

    Raises:
        InputError: bubblewrap is not installed.
        FailureError: the process that checks cannot be started, checks cannot be set up, or a program has lowered
            this process's own limits for good.
    """
    state = own_state()
    with contextlib.ExitStack() as stack:
        stack.callback(keep_limits, state)  # when all have ended
        folder = Path(insist(tempfile.gettempdir))
        remove_folders(folder, checking_process.PREFIX, older_than=STALE_SECONDS)
        pool = _Pool(
            [
                CheckingProcess(folder, number, sandbox, state, stack)
                for number in range(min(workers, len(checks)))
            ]
        )
        answers: dict[int, Answer] = {}
        while len(answers) < len(checks):
            waiting = (number for number in range(len(checks)) if number not in answers)
            unset = pool.answer(checks, waiting, answers, progress)
            if unset is not None:
                pool.prove(checks[unset].task)
                del pool.workers[: -max(1, len(pool.workers) // 2)]  # they rest by now
        for number in [number for number, answer in answers.items() if answer.is_doubtful(pool.troubles)]:
            answers[number] = pool.answer_alone(checks[number])
    return [answers[number].verdict for number in range(len(checks))]


class _Pool:
    """Checking processes, and the times at which the machine was in trouble."""

    def __init__(self, workers: list[CheckingProcess]):
        self.workers = workers
        self.troubles: list[float] = []

    def answer(
        self,
        checks: Sequence[Check],
        waiting: Iterator[int],
        answers: dict[int, Answer],
        progress: Progress | None,
    ) -> int | None:
        """Have the waiting checks answered, until one cannot be set up: the number of that, or None."""
        unset = None
        idle, busy = list(self.workers), {}
        with selectors.DefaultSelector() as selector:
            while True:
                while idle and unset is None and (number := next(waiting, None)) is not None:
                    worker = idle.pop()
                    worker.ask(checks[number])
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                    busy[worker] = number
                if not busy:
                    return unset
                ready = self._wait(selector)
                for worker in ready | {worker for worker in busy if worker.is_overdue}:
                    selector.unregister(worker.process.stdout)
                    number = busy.pop(worker)
                    answers[number] = worker.answer(worker in ready)
                    if answers[number].unset:
                        unset = number
                        self.troubles.append(answers[number].when)
                    idle.append(worker)
                    if progress is not None:
                        progress(len(answers), len(checks))

    def answer_alone(self, check: Check) -> Answer:
        """Check a program while no other is checked, and again if only the answer is doubtful.

        Raises:
            FailureError: it cannot be set up, and that is not the program's doing.
        """
        for _ in range(TRIES):
            before = len(self.troubles)
            answer = self._repeat(check, lambda answer: not answer.unset)
            if not answer.has_run:
                raise self._failure(answer)
            if not answer.is_doubtful(self.troubles[before:]):
                break
            self.prove(check.task)
        return answer

    def prove(self, task: Task) -> None:
        """Wait until a program that fails by itself is run, and fails.

        Raises:
            FailureError: it is not run, however often it is tried.
        """
        answer = self._repeat(Check(task, ""), Answer.is_certain)
        if not answer.is_certain():
            raise self._failure(answer)

    def _repeat(self, check: Check, is_enough: Callable[[Answer], bool]) -> Answer:
        """Make a check alone, again and again for a while, until the answer is good enough."""
        for worker in self.workers[:-1]:  # `answer` asks the last
            worker.rest()
        for seconds in checking_process.PAUSES:
            time.sleep(seconds)
            answers: dict[int, Answer] = {}
            self.answer([check], iter([0]), answers, None)
            if is_enough(answers[0]):
                break
        return answers[0]

    def _failure(self, answer: Answer) -> FailureError:
        why = answer.verdict.lost or "a program that fails at once was not run to its end"
        return FailureError(
            f"programs cannot be checked: {why}; {remedy(answer.errno, self.workers[0].folder)}"
        )

    def _wait(self, selector: selectors.BaseSelector) -> set[CheckingProcess]:
        """Return the workers that answer or end, after a second at most.

        Much longer means that all stood still meanwhile.
        """
        asked = time.monotonic()
        ready = {key.data for key, _ in selector.select(POLL_SECONDS)}
        if time.monotonic() - asked > POLL_SECONDS + STANDSTILL_SECONDS:
            self.troubles.append(time.monotonic())
        return ready


__all__ = ["Check", "Verdict", "check_start", "run_checks"]
