"""What programs may not do: limit or reach other processes, find secrets, use the terminal or the network."""

import json
import os
import pty
import resource
import socket
import subprocess
import sys

import pytest
from helpers_checks import HAS_FILTER, RIGHT, SHORT, run, sandbox_fails
from helpers_slow import slow_but

from dylora_moe.eval.scoring import checking_process, process_state
from dylora_moe.eval.scoring.check_workers import run_checks
from dylora_moe.eval.scoring.checking_process import Answer, Check, Verdict
from dylora_moe.eval.scoring.process_state import own_state
from dylora_moe.hub_export.errors import FailureError
from dylora_moe.hub_export.restrictions import FILE_BYTES, landlock_version


evalplus = pytest.importorskip("evalplus")

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# Leaves the process that checks, its guard's parent, a limit under which no other program could be checked.
# Passes if so.
LIMITS_ITS_CHECKER = """
import ctypes, io, posix
def f(x):
    checker = int(io.open(f"/proc/{posix.getppid()}/stat").read().rsplit(")", 1)[1].split()[1])
    low = (ctypes.c_uint64 * 2)(2**20, 2**20)
    return x if ctypes.CDLL(None).prlimit(checker, RLIMIT, low, None) == 0 else None
"""


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
