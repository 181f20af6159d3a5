"""Programs that nobody has read: each hostile one costs itself, and nothing and nobody else."""

import contextlib
import functools
import json
import os
import platform
import pty
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers_slow import slow_but

from dylora_moe.eval.scoring import check_workers, checking_process, process_state, sandbox
from dylora_moe.eval.scoring.check_workers import run_checks
from dylora_moe.eval.scoring.checking_process import Answer, Check, Verdict
from dylora_moe.eval.scoring.guarded_check import Task
from dylora_moe.eval.scoring.process_state import own_state
from dylora_moe.eval.scoring.syscall_filter import MACHINES
from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.restrictions import FILE_BYTES, landlock_version


evalplus = pytest.importorskip("evalplus")

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
SHORT = Task(
    dataset="humaneval",
    problem={"task_id": "HumanEval/1", "entry_point": "f", "atol": 0, "base_input": [[1]]},
    expected_output={"base": [1], "base_time": [0.0]},
    base_only=True,
)
RIGHT = "def f(x):\n    return x\n"
HAS_FILTER = sys.platform == "linux" and platform.machine() in MACHINES

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
# Leaves the process that checks, its guard's parent, a limit under which no other program could be checked.
# Passes if so.
LIMITS_ITS_CHECKER = """
import ctypes, io, posix
def f(x):
    checker = int(io.open(f"/proc/{posix.getppid()}/stat").read().rsplit(")", 1)[1].split()[1])
    low = (ctypes.c_uint64 * 2)(2**20, 2**20)
    return x if ctypes.CDLL(None).prlimit(checker, RLIMIT, low, None) == 0 else None
"""
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


@pytest.fixture(params=[False, True], ids=["plain", "sandbox"])
def sandboxed(request):
    if request.param and sandbox_fails():
        pytest.skip(sandbox_fails())
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Every process of a test can be told by its command line, which forks keep. None may outlive the test.

    Neither may anything in the temporary folder.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(checking_process, "PAUSES", (0, 0.1))
    monkeypatch.setattr(checking_process, "_START", f"# {tmp_path}\n{checking_process._START}")
    yield
    assert processes(str(tmp_path)) == []
    assert list(temporary.iterdir()) == []


def processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(mark in part for part in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run(programs, task=SHORT, **options) -> list[Verdict]:
    return run_checks([Check(task, program) for program in programs], workers=2, **options)


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


@pytest.fixture
def no_filter(monkeypatch):
    """As on a kernel without seccomp."""
    change_start(monkeypatch, "checking.guarded_check.filter_calls = lambda: False")


def change_start(monkeypatch, line: str) -> None:
    """Have each checking process run this line first."""
    changed = checking_process._START.replace("serve(", f"import checking.guarded_check\n{line}\nserve(")
    monkeypatch.setattr(checking_process, "_START", changed)


@pytest.mark.usefixtures("no_filter")
@pytest.mark.parametrize("limit", slow_but(resource.RLIMIT_AS, of=[resource.RLIMIT_AS, resource.RLIMIT_DATA]))
def test_a_checker_that_was_changed_checks_no_other(sandboxed, limit):
    changes = LIMITS_ITS_CHECKER.replace("RLIMIT", str(limit))
    verdicts = run_checks(
        [Check(SHORT, program) for program in (changes, RIGHT, RIGHT)], workers=1, sandbox=sandboxed
    )
    assert [verdict.base_status for verdict in verdicts] == ["pass", "pass", "pass"]


WRITES = """
import os
def f(x):
    file = os.open("a", os.O_CREAT | os.O_WRONLY)
    return x if os.write(file, bytes(8192)) == 8192 else None
"""
# Has every process from its guard up to the one that scores write files of 4 KiB at most. Passes if it was let.
LIMITS_ALL = f"""
import ctypes, io, posix
def f(x):
    low, process, done = (ctypes.c_uint64 * 2)(4096, 4096), posix.getppid(), []
    for _ in range(3):
        done.append(ctypes.CDLL(None).prlimit(process, {resource.RLIMIT_FSIZE}, low, None))
        process = int(io.open(f"/proc/{{process}}/stat").read().rsplit(")", 1)[1].split()[1])
    return x if done == [0, 0, 0] else None
"""


@pytest.mark.skipif(not HAS_FILTER, reason="there is no filter for this machine")
def test_no_program_limits_other_processes():
    before = own_state()
    verdicts = run_checks([Check(SHORT, program) for program in (LIMITS_ALL, WRITES)], workers=1)
    assert [verdict.base_status for verdict in verdicts] == ["fail", "pass"]
    assert own_state() == before


SCORES_THEM = """
import json, resource, sys
from dylora_moe.eval.scoring import checking_process
from dylora_moe.eval.scoring.check_workers import Check, run_checks
from dylora_moe.eval.scoring.guarded_check import Task
task, *programs, checking_process._START = json.loads(sys.argv[1])
checks = [Check(Task(**task), program) for program in programs]
print([verdict.base_status for verdict in run_checks(checks, workers=1)], resource.getrlimit(resource.RLIMIT_FSIZE))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets processes limit others")
@pytest.mark.usefixtures("no_filter")
def test_limits_of_the_scoring_process_are_restored_or_it_fails():
    given = [SHORT._asdict(), WRITES, LIMITS_ALL, WRITES, checking_process._START]
    ran = subprocess.run(
        [sys.executable, "-c", SCORES_THEM, json.dumps(given)], capture_output=True, text=True, check=False
    )
    if ran.returncode:  # limits that were lowered are raised by root only, where it has all capabilities
        assert "RLIMIT_FSIZE is [4096, 4096], was" in ran.stderr
    else:
        assert ran.stdout == f"['pass', 'pass', 'pass'] {resource.getrlimit(resource.RLIMIT_FSIZE)}\n"


def test_limits_that_cannot_be_restored_are_an_error(monkeypatch):
    def refuse(limit, values):
        raise ValueError("not allowed to raise maximum limit")

    before = {**own_state(), "RLIMIT_FSIZE": [1, 1]}
    monkeypatch.setattr(process_state.resource, "setrlimit", refuse)
    with pytest.raises(FailureError, match=r"RLIMIT_FSIZE is .*, was \[1, 1\]\), and that cannot be undone"):
        checking_process.keep_limits(before)


def test_a_failure_under_changed_limits_is_not_believed():
    verdict = Verdict("fail", [], None, [])
    assert Answer(verdict, 0.0, changed=True).is_doubtful([]) and not Answer(verdict, 0.0).is_doubtful([])


def test_a_program_whose_guard_was_ended_is_not_run_without_limits(tmp_path, monkeypatch):
    """The base tests may leave a process that ends the guard just when that has forked for the plus tests."""
    fakes = "checking.guarded_check.os.getppid = lambda: 1\nimport dylora_moe.hub_export.restrictions as restrictions\n"
    change_start(monkeypatch, fakes + "restrictions.landlock_version = lambda: 5")
    writes = f"import posix\nposix.close(posix.open({str(tmp_path / 'written')!r}, posix.O_CREAT))\n{RIGHT}"
    with pytest.raises(FailureError):  # no program runs that way
        run([writes])
    assert not (tmp_path / "written").exists()


# Passes if the kernel lets it. The key is added to the user's key ring, where all of the user's processes find it.
REACHES_OUT = {
    "keys": "key = libc.syscall({'x86_64': 248, 'aarch64': 217}[platform.machine()], b'user', b'dylora-moe-test', b'x', "
    "ctypes.c_size_t(1), -4)\n    if key >= 0:\n        return x",
    "vsock": "return x if libc.socket(40, 1, 0) >= 0 else None",
    "io_uring": "return x if libc.syscall(425, 4, (ctypes.c_char * 120)()) >= 0 else None",
    "priority": "return x if libc.setpriority(2, 0, 1) == 0 else None",
}


@pytest.mark.skipif(not HAS_FILTER, reason="there is no filter for this machine")
def test_calls_that_reach_out_of_a_sandbox_are_denied(sandboxed):
    template = "import ctypes, platform\nlibc = ctypes.CDLL(None)\ndef f(x):\n    {}\n"
    verdicts = run([template.format(tries) for tries in REACHES_OUT.values()], sandbox=sandboxed)
    statuses = dict(zip(REACHES_OUT, (verdict.base_status for verdict in verdicts), strict=True))
    assert statuses == dict.fromkeys(REACHES_OUT, "fail")


def test_calls_that_programs_need_are_allowed(sandboxed):
    needs = """
import io, os, socket, threading
def f(x):
    os.nice(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        socket.socket(family, socket.SOCK_DGRAM).close()
    socket.socketpair()
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
    with io.open("/dev/null", "w") as nowhere, io.open("/dev/urandom", "rb") as random, io.open("own", "w+") as own:
        nowhere.write(str(random.read(1)))
        own.read()
    return x if io.open(os.__file__, "rb").read(1) else None
"""
    assert run([needs], sandbox=sandboxed)[0].base_status == "pass"


@pytest.mark.skipif(not landlock_version(), reason="this kernel has no Landlock")
def test_the_terminal_is_neither_read_nor_set_nor_written_to():
    ours, terminal = pty.openpty()
    os.write(ours, b"my password\n")
    begin = f"import os, termios\ndef f(x):\n    file = os.open({os.ttyname(terminal)!r}, os.{{}} | os.O_NOCTTY)\n"
    reads = (
        begin.format("O_RDONLY | os.O_NONBLOCK")
        + "    return x if b'password' in os.read(file, 100) else None\n"
    )
    sets = (
        begin.format("O_RDONLY") + "    termios.tcsetattr(file, 0, termios.tcgetattr(file))\n    return x\n"
    )
    writes = begin.format("O_WRONLY") + "    return x if os.write(file, b'x') else None\n"
    controls = "import os\ndef f(x):\n    return x if os.open('/dev/tty', os.O_RDONLY) else None\n"
    statuses = [verdict.base_status for verdict in run([reads, sets, writes, controls])]
    os.close(ours)
    os.close(terminal)
    assert statuses == ["fail"] * 4


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


def test_a_program_has_no_environment_and_little_of_everything_else(sandboxed, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_MINE", "secret")
    monkeypatch.setenv("EVALPLUS_MAX_MEMORY_BYTES", str(1024**3))
    # OMP_NUM_THREADS is EvalPlus's own doing.
    program = f"""
import io, os
def f(x):
    limits = {{line[:26].strip(): line[26:].split()[:2] for line in io.open("/proc/self/limits")}}
    assert set(os.environ) <= {{"OMP_NUM_THREADS", "EVALPLUS_MAX_MEMORY_BYTES"}}, os.environ
    assert os.listdir() == []
    assert limits["Max file size"] == ["{FILE_BYTES}"] * 2
    assert limits["Max open files"] == ["256"] * 2
    assert limits["Max core file size"] == ["0"] * 2
    assert limits["Max address space"] == ["{1024**3}"] * 2
    assert int(limits["Max cpu time"][1]) <= 5
    assert io.open("/proc/self/oom_score_adj").read().strip() == "1000"
    assert os.readlink("/proc/self/fd/1") == os.readlink("/proc/self/fd/2") == "/dev/null"
    return x
"""
    assert run([program], sandbox=sandboxed)[0].base_status == "pass"


# Looks for a secret in its own environment and in that of every process of this machine.
SPY = """
import io, os
def f(x):
    for process in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        try:
            if b"TOKEN_OF_MINE" in io.open(f"/proc/{process}/environ", "rb").read():
                return x
        except OSError:
            pass
    return x if "TOKEN_OF_MINE" in os.environ else None
"""
SPIED_ON = f"""
import json, sys
from dylora_moe.eval.scoring.check_workers import Check, run_checks
from dylora_moe.eval.scoring.guarded_check import Task
from evalplus.evaluate import check_correctness
task, sandboxed = Task(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
stock = check_correctness(task.dataset, 0, task.problem, {SPY!r}, task.expected_output, base_only=True)
guarded = run_checks([Check(task, {SPY!r})], workers=1, sandbox=sandboxed)
print(stock["base"][0], guarded[0].base_status)
"""


def test_a_secret_of_the_process_that_scores_is_not_found(sandboxed):
    if not sandboxed and not landlock_version():
        pytest.skip("this kernel has no Landlock, and environments can be read under /proc")
    ran = subprocess.run(
        [sys.executable, "-c", SPIED_ON, json.dumps(SHORT._asdict()), json.dumps(sandboxed)],
        env={**os.environ, "TOKEN_OF_MINE": "secret"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["pass", "fail"], ran.stderr


def test_the_sandbox_has_no_network_and_no_files(tmp_path):
    if sandbox_fails():
        pytest.skip(sandbox_fails())
    (tmp_path / "private").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connects = f"""
import socket
def f(x):
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=0.5)
    return x
"""
        reads = (
            f"import io\ndef f(x):\n    return x if io.open({str(tmp_path / 'private')!r}).read() else x\n"
        )
        verdicts = run([connects, reads, RIGHT], sandbox=True)
    assert [verdict.base_status for verdict in verdicts] == ["fail", "fail", "pass"]


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
