"""A checking process, seen from the process that asks it: how it is started, asked, read and ended.

`guarded_check` is what runs in it, inside a sandbox or not. evalplus is not imported here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dylora_moe.hub_export import restrictions
from dylora_moe.hub_export.errors import FailureError, one_line

from .folder_removal import remove_folders
from .guarded_check import EVALPLUS_SECONDS, KEPT_VARIABLE, READY, Task
from .process_state import LIMITS, own_state, restore_limits
from .sandbox import PROCESSES, WRITABLE, sandbox_user, sandboxed
from .shortage import remedy


T = TypeVar("T")

# No check may take longer, whatever it does to the process that checks it, which has a shorter limit of its own.
CHECK_SECONDS = 2 * EVALPLUS_SECONDS + 60
ENDING_SECONDS = 5
# A check that cannot be set up makes other failures doubtful that are not further from it.
TROUBLE_SECONDS = 60
# Before each further attempt at what the machine has no room for just now.
PAUSES = (0, 1, 2, 4, 8)
PREFIX = "dylora-moe-checks-"
PACKAGE_FOLDERS = ("site-packages", "dist-packages")

# Empty packages in place of this one and of `hub_export`, whose own `__init__` and requirements would cost time and
# memory.
_START = """
import json, sys, types
folders, settings = map(json.loads, sys.argv[1:])
packages = settings.pop("packages")
first = next((place for place, path in enumerate(sys.path) if path in packages), len(sys.path))
sys.path[first:first] = packages
for name, folder in folders.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from checking.guarded_check import serve
serve(**settings)
"""


class Check(NamedTuple):
    """A program, and what it is checked against. Checks of one task should share it and follow each other."""

    task: Task
    program: str


class Verdict(NamedTuple):
    """EvalPlus's verdict on a program: "pass", "fail" or "timeout", and whether it passed each input.

    `plus_status` is None without the plus tests. `lost` says why EvalPlus could not say it, and then the
    program counts as failed.
    """

    base_status: str
    base_details: Sequence[int]
    plus_status: str | None
    plus_details: Sequence[int]
    lost: str | None = None

    @property
    def has_passed(self) -> bool:
        return self.base_status == "pass" and self.plus_status in ("pass", None)


class Answer(NamedTuple):
    """A verdict and how far it can be trusted.

    Attributes:
        when: it came, in seconds of the monotonic clock.
        unset: whether the check could not be set up, for the base or the plus tests; `errno` is the error's,
            if any.
        has_run: whether the program ran at all. Only then can what went wrong be its own doing.
        early: whether the program counts as timed out but ended before its time, as one that could not be set
            up does.
        changed: whether the checking process was changed meanwhile, by this program or by another.
    """

    verdict: Verdict
    when: float
    unset: bool = False
    has_run: bool = True
    errno: int | None = None
    early: bool = False
    changed: bool = False

    def is_doubtful(self, troubles: Iterable[float]) -> bool:
        """Return whether this may say more about the machine, with troubles then, than about the program."""
        if self.verdict.has_passed:
            return False
        near = any(abs(self.when - trouble) < TROUBLE_SECONDS for trouble in troubles)
        return near or not self.is_certain()

    def is_certain(self) -> bool:
        """Whether the program was run until it passed, failed or had its time."""
        return self.verdict.lost is None and not self.early and not self.changed


class CheckingProcess:
    """A checking process, and the next one once that has ended.

    It takes room for one folder in the temporary folder, and during a check EvalPlus for another in that.
    """

    def __init__(
        self, folder: Path, number: int, sandbox: bool, state: dict[str, Any], stack: contextlib.ExitStack
    ):
        self.what = "the sandbox" if sandbox else "the process that checks programs"
        self.folder, self.prefix = folder, f"{PREFIX}{secrets.token_hex(8)}-"
        self.state = state
        self.command = _command(folder, self.prefix, number, sandbox, state)
        self._start()
        stack.callback(self.end)

    @property
    def is_overdue(self) -> bool:
        return self.asked is not None and time.monotonic() - self.asked > CHECK_SECONDS

    def ask(self, check: Check) -> None:
        keep_limits(self.state)
        if not self.is_ready:
            self._wait_until_ready()
        given = None if check.task is self.task else tuple(check.task)
        self.task, self.asked = check.task, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has just ended, as `answer` will find
            pickle.dump((given, check.program), self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()

    def rest(self) -> None:
        """Have it take no room in the temporary folder until it is asked again."""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((None, None), self.process.stdin)
            self.process.stdin.flush()

    def answer(self, is_ready: bool) -> Answer:
        """Return what it says of what it was asked.

        If it has ended or is overdue, that is said; then the next one is started.

        Args:
            is_ready: whether there is something to read. An answer that came in time is read, however late.
        """
        has_plus = not self.task.base_only
        try:
            said = json.loads(self.process.stdout.readline() if is_ready else b"")
        except ValueError:
            said = {
                "lost": "fail",
                "reason": "the process that checks it ended or did not answer",
                "last": True,
            }
        if "last" in said:
            self.end()
            self._start()
        self.asked = None
        if "base" in said:
            verdict = Verdict(*said["base"], *(said["plus"] if has_plus else (None, [])))
            return Answer(verdict, time.monotonic(), early=said["early"], changed="last" in said)
        status = said.get("lost", "fail")
        reason = f"it could not be set up: {said['unset']}" if "unset" in said else said["reason"]
        verdict = Verdict(status, [], status if has_plus else None, [], reason)
        return Answer(
            verdict, time.monotonic(), "unset" in said, said.get("has_run", True), said.get("errno")
        )

    def end(self) -> None:
        """End it and all that it started.

        It does that itself once nothing asks it; what does not listen is killed.

        Its folder is removed here if it could not do that.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(0 if self.is_overdue else ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            _kill_tree(self.process.pid)
            self.process.wait()
        self.process.stdout.close()
        remove_folders(self.folder, self.prefix)

    def _wait_until_ready(self) -> None:
        said = []
        for line in self.process.stdout:
            if line.endswith(READY):
                self.is_ready = True
                return
            said.append(line)
        raise FailureError(f"{self.what} does not start: {_cause(b''.join(said).decode(errors='replace'))}")

    def _start(self) -> None:
        keep_limits(self.state)
        self.is_ready, self.task, self.asked = False, None, None
        self.process = insist(self._popen)

    def _popen(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # until it is ready
            start_new_session=True,  # an interrupt from the terminal is for the process that asks
        )


def insist(action: Callable[[], T]) -> T:
    """Do what needs memory, files or a process, with retries for a while if the operating system refuses.

    Raises:
        FailureError: it refuses still.
    """
    for seconds in PAUSES:
        time.sleep(seconds)
        try:
            return action()
        except OSError as error:
            refused = error
    advice = remedy(refused.errno, tempfile.tempdir or os.curdir)
    raise FailureError(f"programs cannot be checked: {one_line(refused)}; {advice}") from refused


def keep_limits(state: dict[str, Any]) -> None:
    """Undo what a program that was checked has done to the limits of this process.

    Raises:
        FailureError: it cannot be undone.
    """
    try:
        restore_limits(state)
    except (OSError, ValueError) as error:
        now = own_state()
        changed = ", ".join(
            f"{name} is {now[name]}, was {state[name]}" for name in LIMITS if now[name] != state[name]
        )
        raise FailureError(
            f"a program that was checked has changed what this command may use ({changed}), and that cannot be undone "
            f"({one_line(error)}); nothing was recorded: run the same command again, with --sandbox"
        ) from error


def _command(folder: Path, prefix: str, number: int, sandbox: bool, state: dict[str, Any]) -> list[str]:
    code, hub_export = Path(__file__).resolve().parent, Path(restrictions.__file__).resolve().parent
    # `dylora_moe` itself holds nothing that a check needs.
    folders = {"checking": str(code), "dylora_moe": str(code), "dylora_moe.hub_export": str(hub_export)}
    evalplus = _package_folder("evalplus")
    paths = [os.path.abspath(path) for path in sys.path]
    packages = [path for path in paths if _holds_packages(path) or path == str(evalplus.parent)]
    if str(evalplus.parent) not in packages:  # an editable installation's finder knows where it is
        packages.insert(0, str(evalplus.parent))
    settings = {
        "packages": packages,
        "folder": WRITABLE[0] if sandbox else str(folder),
        "prefix": prefix,
        "private": WRITABLE if sandbox else [],
        "user": sandbox_user(number) if sandbox else None,
        "processes": PROCESSES if sandbox else None,
        "state": state,
    }
    command = [sys.executable, "-I", "-c", _START, json.dumps(folders), json.dumps(settings)]
    if not sandbox:
        return command
    # Of a clone, evalplus alone.
    return sandboxed(command, [code, hub_export, evalplus, *filter(_holds_packages, packages)])


def _package_folder(name: str) -> Path:
    """Find the folder of the package that this process imports by a name."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0]).absolute()


def _holds_packages(path: str) -> bool:
    """Whether packages were installed there, by `pip install --target` as well."""
    folder = Path(path)
    return folder.is_dir() and (folder.name in PACKAGE_FOLDERS or any(folder.glob("*.dist-info")))


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


def _cause(text: str) -> str:
    """Take from a process's output what it ended with: a traceback's exception, else its last line."""
    *_, after = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if line.strip()]
    exceptions = [line for line in lines if not line[0].isspace()] if after != text else []
    return (exceptions or lines[-1:] or ["it ended without a word"])[0].strip()


__all__ = ["Answer", "Check", "CheckingProcess", "Verdict", "insist", "keep_limits"]
