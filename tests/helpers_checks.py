"""Small programs that are checked, and what is left of checking them."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys

import psutil

from dylora_moe.eval.scoring import checking_process, sandbox
from dylora_moe.eval.scoring.check_workers import run_checks
from dylora_moe.eval.scoring.checking_process import Check, Verdict
from dylora_moe.eval.scoring.guarded_check import Task
from dylora_moe.eval.scoring.syscall_filter import MACHINES
from dylora_moe.hub_export.errors import InputError


SHORT = Task(
    dataset="humaneval",
    problem={"task_id": "HumanEval/1", "entry_point": "f", "atol": 0, "base_input": [[1]]},
    expected_output={"base": [1], "base_time": [0.0]},
    base_only=True,
)
RIGHT = "def f(x):\n    return x\n"
HAS_FILTER = sys.platform == "linux" and platform.machine() in MACHINES


@functools.cache
def sandbox_fails() -> str | None:
    try:
        ran = subprocess.run(
            sandbox.sandboxed([sys.executable, "-I", "-c", ""], []),
            capture_output=True,
            text=True,
            check=False,
        )
    except InputError as error:
        return str(error)
    return None if ran.returncode == 0 else f"bubblewrap does not work here: {ran.stderr.strip()}"


def processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(mark in part for part in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run(programs, task=SHORT, **options) -> list[Verdict]:
    return run_checks([Check(task, program) for program in programs], workers=2, **options)


def change_start(monkeypatch, line: str) -> None:
    """Have each checking process run this line first."""
    changed = checking_process._START.replace("serve(", f"import checking.guarded_check\n{line}\nserve(")
    monkeypatch.setattr(checking_process, "_START", changed)
