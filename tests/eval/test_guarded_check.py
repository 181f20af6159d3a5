"""Programs that nobody has read: each hostile one costs itself, and nothing and nobody else."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers_checks import RIGHT, SHORT, change_start, processes, run, sandbox_fails

from dylora_moe.eval.scoring import check_workers, checking_process, sandbox
from dylora_moe.eval.scoring.check_workers import run_checks
from dylora_moe.eval.scoring.checking_process import Check
from dylora_moe.eval.scoring.guarded_check import Task
from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.restrictions import FILE_BYTES, landlock_version


evalplus = pytest.importorskip("evalplus")

pytestmark = pytest.mark.usefixtures("nothing_is_left")

TASK = Task(
    dataset="humaneval",
    problem={
        "task_id": "HumanEval/0",
        "entry_point": "f",
        "atol": 0,
        "base_input": [[1], [2]],
        "plus_input": [[3]],
    },
    expected_output={"base": [1, 2], "base_time": [0.0, 0.0], "plus": [3], "plus_time": [0.0]},
    base_only=False,
)

# Each would be right if it could do what it tries: PATH is a file outside of its folder.
HOSTILE = {
    "loops": "while True:\n    pass\n",
    "loops_within": "def f(x):\n    while True:\n        try:\n            x += 0\n        except BaseException:\n            pass\n",
    "allocates": "def f(x):\n    return x if len(bytearray(10 * 2**30)) else x\n",
    "deletes": "import os\ndef f(x):\n    os.remove(PATH)\n    return x\n",
    "writes": "import os\nwhile True:\n    os.write(1, b'x' * 4096)\n    os.write(2, b'x' * 4096)\n",
    "prints": "def f(x):\n    while True:\n        print('x')\n",
    "fills_a_file": f"import os\ndef f(x):\n    file = os.open('a', os.O_CREAT | os.O_WRONLY)\n"
    f"    for _ in range({FILE_BYTES // 2**20 + 1}):\n        assert os.write(file, bytes(2**20)) == 2**20\n    return x\n",
    "kills_its_checker": "import os, posix\ndef f(x):\n    posix.kill(os.getppid(), 9)\n",
    "leaves": "import os\nos._exit(0)\n",
    "nests_folders": "import os, posix\ndef f(x):\n    for _ in range(2000):\n        posix.mkdir('d')\n        posix.chdir('d')\n",
    "locks_its_folder": "import os, posix\ndef f(x):\n    os.makedirs('a/b')\n    os.symlink(PATH, 'a/link')\n"
    "    for name in ('a/b', 'a', '.'):\n        posix.chmod(name, 0)\n",
    "answers_for_others": "import os\ndef f(x):\n    for descriptor in range(3, 256):\n        try:\n"
    """            os.write(descriptor, b'{"base": ["fail", []]}\\n')\n        except OSError:\n            pass\n""",
}
# What EvalPlus's own guard does not keep from those who know it.
EVASIVE = {
    "unlinks": "import posix\ndef f(x):\n    posix.unlink(PATH)\n    return x\n",
    "truncates": "import posix\ndef f(x):\n    posix.truncate(PATH, 0)\n    return x\n",
    "moves": "import posix\ndef f(x):\n    posix.rename(PATH, PATH + '.moved')\n    return x\n",
}
# Right, and leaves a process behind that has left its session.
ORPHAN = """
import posix, time
def f(x):
    if posix.fork() == 0:
        posix.setsid()
        if posix.fork() == 0:
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    pass
        posix._exit(0)
    return x
"""


def test_verdicts_are_in_order_and_say_where_a_program_failed(sandboxed):
    wrong_second, unfinished = "def f(x):\n    return 1\n", "def f(x"
    seen = []
    verdicts = run(
        [RIGHT, wrong_second, unfinished, RIGHT],
        task=TASK,
        sandbox=sandboxed,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [verdict.base_status for verdict in verdicts] == ["pass", "fail", "fail", "pass"]
    assert [verdict.plus_status for verdict in verdicts] == ["pass", "fail", "fail", "pass"]
    assert [list(verdict.base_details) for verdict in verdicts] == [[1, 1], [1, 0], [], [1, 1]]
    assert seen == [(number, 4) for number in range(1, 5)]


def test_each_hostile_program_costs_itself_only(sandboxed, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    hostile = dict(HOSTILE)
    if sandboxed or landlock_version() >= 3:
        hostile |= EVASIVE
    programs = [RIGHT]
    for program in hostile.values():
        programs += [f"PATH = {str(precious)!r}\n{program}", RIGHT]
    statuses = [verdict.base_status for verdict in run(programs, sandbox=sandboxed)]
    assert statuses[::2] == ["pass"] * (len(hostile) + 1)
    assert "pass" not in dict(zip(hostile, statuses[1::2], strict=True)).values()
    assert precious.read_text() == "kept"


def test_what_a_program_leaves_running_is_ended(sandboxed):
    # That nothing is left is checked after every test; EvalPlus itself says that it is right.
    assert [verdict.base_status for verdict in run([ORPHAN, RIGHT], sandbox=sandboxed)] == ["pass", "pass"]


def test_a_program_whose_guard_was_ended_is_not_run_without_limits(tmp_path, monkeypatch):
    """The base tests may leave a process that ends the guard just when that has forked for the plus tests."""
    fakes = "checking.guarded_check.os.getppid = lambda: 1\nimport dylora_moe.hub_export.restrictions as restrictions\n"
    change_start(monkeypatch, fakes + "restrictions.landlock_version = lambda: 5")
    writes = f"import posix\nposix.close(posix.open({str(tmp_path / 'written')!r}, posix.O_CREAT))\n{RIGHT}"
    with pytest.raises(FailureError):  # no program runs that way
        run([writes])
    assert not (tmp_path / "written").exists()


def test_what_outlives_a_program_in_the_sandbox_is_not_there_for_the_next(monkeypatch):
    if sandbox_fails():
        pytest.skip(sandbox_fails())
    # As on a kernel without Landlock, where all of /tmp can be written to.
    change_start(monkeypatch, "checking.guarded_check.confine = lambda folder: False")
    lasting = "import ctypes\ndef f(x):\n    return x if ctypes.CDLL(None).{} >= 0 else None\n"
    leaves_memory, leaves_messages = map(lasting.format, ("shmget(0, 4096, 0o1600)", "msgget(0, 0o1600)"))
    leaves_file = (
        "import os\ndef f(x):\n    os.mkdir('/tmp/left')\n    os.mkdir('/dev/shm/left')\n    return x\n"
    )
    finds_nothing = """
import io, os
def f(x):
    assert "left" not in os.listdir("/tmp") and os.listdir("/dev/shm") == []
    assert [len(io.open(f"/proc/sysvipc/{kind}").readlines()) for kind in ("shm", "msg")] == [1, 1]
    return x
"""
    programs = [leaves_memory, finds_nothing, leaves_messages, finds_nothing, leaves_file, finds_nothing]
    verdicts = run_checks([Check(SHORT, program) for program in programs], workers=1, sandbox=True)
    assert [verdict.base_status for verdict in verdicts] == ["pass"] * 6


def test_a_fork_bomb_in_the_sandbox():
    if sandbox_fails():
        pytest.skip(sandbox_fails())
    # Bounded by itself, to begin with: right if it is kept from a hundred processes.
    forks = """
import posix, time
def f(x):
    for _ in range(100):
        try:
            if posix.fork() == 0:
                time.sleep(5)
                posix._exit(0)
        except OSError:
            return x
"""
    assert run([forks], sandbox=True)[0].base_status == "pass"
    bomb = """
import posix
while True:
    try:
        posix.fork()
    except BaseException:
        pass
"""
    statuses = [verdict.base_status for verdict in run([RIGHT, bomb, RIGHT, RIGHT], sandbox=True)]
    assert statuses == ["pass", "timeout", "pass", "pass"]


def test_a_program_whose_checking_process_was_killed_is_checked_again(sandboxed):
    waits = "import time\ndef f(x):\n    time.sleep(0.9)\n    return x\n"

    def kill_one():
        # The checking process itself, and not bubblewrap around it, once it has forked for the program.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "bwrap" not in process.name() and len(process.children(recursive=True)) == 2:
                        return process.kill()
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    verdicts = run_checks([Check(SHORT, program) for program in (waits, RIGHT)], workers=1, sandbox=sandboxed)
    killer.join()
    assert verdicts == [("pass", [1], None, [], None)] * 2


@pytest.mark.usefixtures("no_filter")
def test_a_program_that_takes_its_check_from_it_counts_as_failed_and_is_said(sandboxed):
    """Here: all files from the process that would have to set up the plus tests."""
    takes = f"""
import ctypes, posix
def f(x):
    none = (ctypes.c_uint64 * 2)(0, 0)
    return x if ctypes.CDLL(None).prlimit(posix.getppid(), {resource.RLIMIT_NOFILE}, none, None) == 0 else None
"""
    verdicts = run([takes, RIGHT], task=TASK, sandbox=sandboxed)
    assert verdicts[0][:4] == ("fail", [], "fail", [])
    assert "Too many open files" in verdicts[0].lost
    assert verdicts[1] == ("pass", [1, 1], "pass", [1], None)


@pytest.mark.slow
def test_a_check_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(checking_process, "CHECK_SECONDS", 3)  # EvalPlus would take 7
    monkeypatch.setattr(check_workers, "TRIES", 1)
    verdicts = run([HOSTILE["loops"], RIGHT], task=TASK)
    assert [verdict.base_status for verdict in verdicts] == ["fail", "pass"]
    assert "did not answer" in verdicts[0].lost


@pytest.mark.slow
def test_an_answer_that_came_in_time_is_read_however_late(monkeypatch):
    """As after a stop from the terminal, which the checking processes do not get."""
    monkeypatch.setattr(checking_process, "CHECK_SECONDS", 3)
    asked = []
    monkeypatch.setattr(check_workers._Pool, "answer_alone", lambda pool, check: asked.append(check))
    verdicts = run([RIGHT, RIGHT], progress=lambda done, total: time.sleep(3.5))
    assert [verdict.base_status for verdict in verdicts] == ["pass", "pass"]
    assert asked == []


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_when_scoring_is_ended_so_is_all_that_it_started(sandboxed, ending, tmp_path):
    code = f"""
import json, signal, sys
from dylora_moe.eval.scoring import check_workers, checking_process
from dylora_moe.eval.scoring.guarded_check import Task
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
checking_process._START = "# {tmp_path}\\n" + checking_process._START
check = check_workers.Check(Task(**json.loads(sys.argv[1])), "while True: pass")
check_workers.run_checks([check] * 8, workers=2, sandbox=json.loads(sys.argv[2]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(SHORT._asdict()), json.dumps(sandboxed)],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # This process; twice bubblewrap, a worker, a guard and a program.
    wait_until(lambda: len(processes(f"# {tmp_path}")) == (9 if sandboxed else 7))
    process.send_signal(ending)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -ending if ending == signal.SIGKILL else "KeyboardInterrupt" in errors
    wait_until(lambda: not processes(f"# {tmp_path}"))  # and nothing in the temporary folder


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_missing_bubblewrap_is_named(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="install it"):
        run([RIGHT], sandbox=True)


def test_a_checking_process_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(checking_process, "_START", "raise RuntimeError('broken\\nas ever')")
    with pytest.raises(FailureError, match=r"does not start: RuntimeError: broken$"):
        run([RIGHT])


# In a clone whose verdict on every program tells that it was asked.
MARK = """

def check_correctness(*args, **kwargs):
    return {"base": ("pass", [True]), "plus": ("pass", [True])}
"""
ASKS = """
import json, sys
from dylora_moe.eval.scoring.check_workers import Check, run_checks
from dylora_moe.eval.scoring.guarded_check import Task
task, sandboxed = Task(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
(verdict,) = run_checks([Check(task, "def f(x):\\n    return None\\n")], workers=1, sandbox=sandboxed)
print(verdict.base_status)
"""
# As setuptools installs a folder for development: the path does not name it.
FINDS = """
import importlib.machinery, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "evalplus":
            return importlib.machinery.PathFinder.find_spec(name, [CLONE])
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("way", ["PYTHONPATH", "editable"])
def test_evalplus_from_a_clone(tmp_path, way, sandboxed):
    installed = Path(evalplus.__file__).parent
    clone = tmp_path / "clone" / "evalplus"
    clone.mkdir(parents=True)
    for entry in installed.iterdir():
        if entry.name not in ("evaluate.py", "__pycache__"):
            (clone / entry.name).symlink_to(entry)
    (clone / "evaluate.py").write_text((installed / "evaluate.py").read_text() + MARK)
    environment = dict(os.environ)
    if way == "PYTHONPATH":
        environment["PYTHONPATH"] = str(clone.parent)
    code = ASKS if way == "PYTHONPATH" else FINDS.replace("CLONE", repr(str(clone.parent))) + ASKS
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(SHORT._asdict()), json.dumps(sandboxed)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["pass"], ran.stderr
