"""A machine that is short of something costs no verdict: reference solutions pass, or there is an error that
says what."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers_slow import slow_but

from dylora_moe.demo.problems import load_problems
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.scoring import check_workers, checking_process
from dylora_moe.eval.scoring.check_workers import check_start, run_checks
from dylora_moe.eval.scoring.checking_process import Check
from dylora_moe.eval.scoring.guarded_check import Task
from dylora_moe.eval.scoring.scoring import score_samples
from dylora_moe.eval.scoring.shortage import remedy
from dylora_moe.hub_export.errors import FailureError


evaluate = pytest.importorskip("evalplus.evaluate")

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
RIGHT = "def f(x):\n    return x\n"
WRONG = "def f(x):\n    return None\n"

# What the checking process and what it forks do where `tempfile` makes a folder.
FAULT = """
import errno, os, tempfile
import checking.guarded_check
make, calls, checks, checker = tempfile.mkdtemp, [], [], os.getpid()
os.register_at_fork(before=lambda: os.getpid() == checker and checks.append(len(checks)))
def mkdtemp(suffix=None, prefix=None, dir=None):
    calls.append(dir)
    {}
    return make(suffix, prefix, dir)
tempfile.mkdtemp = mkdtemp
serve("""


@pytest.fixture
def fault(monkeypatch):
    """Have folders made with a statement before, and no long wait between two attempts."""

    def inject(statement):
        start = checking_process._START.replace("serve(", FAULT.format(statement))
        monkeypatch.setattr(checking_process, "_START", start)

    monkeypatch.setattr(checking_process, "PAUSES", (0, 0.1, 0.1))
    return inject


def refuse(condition, name="ENOSPC"):
    return f"if {condition}: raise OSError(errno.{name}, os.strerror(errno.{name}), dir)"


def statuses(programs, workers=1, **options):
    verdicts = run_checks([Check(TASK, program) for program in programs], workers=workers, **options)
    assert [verdict.lost for verdict in verdicts] == [None] * len(programs)
    return [(verdict.base_status, verdict.plus_status) for verdict in verdicts]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ENOSPC", r"No space left on device.* has room for \d+ KB.*; make room there; TMPDIR"),
        pytest.param("EMFILE", r"Too many open files.*ulimit -n", marks=pytest.mark.slow),
        pytest.param(
            "EAGAIN", r"Resource temporarily unavailable.*ulimit -u.*--parallel", marks=pytest.mark.slow
        ),
        pytest.param("ENOMEM", r"Cannot allocate memory.*lower --parallel", marks=pytest.mark.slow),
    ],
)
def test_what_is_short_is_said_and_what_to_do(fault, name, said):
    fault(refuse("True", name))
    with pytest.raises(FailureError, match=said):
        statuses([RIGHT, RIGHT], workers=2)


@pytest.mark.parametrize("condition", slow_but("dir is None", of=["dir is not None", "dir is None"]))
def test_a_program_that_finds_no_room_for_its_folder_has_no_verdict(fault, condition):
    """Neither where the checking process makes the folder nor where EvalPlus does, which calls the program
    timed out."""
    fault(refuse(condition))
    with pytest.raises(FailureError, match="No space left on device"):
        statuses([RIGHT])


def test_a_shortage_that_passes_costs_nothing(fault):
    fault(refuse("dir is None and len(checks) in (2, 3, 5)"))
    assert statuses([RIGHT] * 4 + [WRONG]) == [("pass", "pass")] * 4 + [("fail", "fail")]


def test_a_folder_that_evalplus_alone_could_not_make_is_no_time_out(tmp_path, fault):
    """Between the look for room and EvalPlus's own folder another process may take the last."""
    short = tmp_path / "short"
    short.touch()
    # The first is the checking process's, the second the look for room, the third EvalPlus's.
    fault(refuse(f"len(calls) == 3 and os.path.exists({str(short)!r})"))
    seen = []
    assert statuses([RIGHT], progress=lambda done, total: (seen.append(done), short.unlink())) == [
        ("pass", "pass")
    ]
    assert seen == [1]


def test_failures_in_the_minute_of_a_failed_set_up_are_checked_again(tmp_path, fault):
    short = tmp_path / "short"
    short.touch()
    # The first program fails for what the second cannot be set up for, until that is over.
    hit = f"import os\ndef f(x):\n    return None if os.path.exists({str(short)!r}) else x\n"
    fault(refuse("dir is None and len(checks) == 2"))
    until = {2: short.unlink}
    progress = lambda done, total: until.pop(done, bool)()  # noqa: E731
    assert statuses([hit, RIGHT, WRONG], progress=progress) == [
        ("pass", "pass"),
        ("pass", "pass"),
        ("fail", "fail"),
    ]


def test_a_program_that_makes_its_own_shortage_counts_as_failed(fault, tmp_path):
    """It ran for the base tests, and left no room for the plus tests. A program beside it is set up as
    ever."""
    fault("if dir is None and os.path.exists('left'): raise OSError(errno.ENOSPC, '')")
    fills = "import os\ndef f(x):\n    os.mkdir('../left')\n    return x\n"
    verdicts = run_checks([Check(TASK, program) for program in (fills, RIGHT)], workers=1)
    assert verdicts[0].plus_status == "fail"
    assert "could not be set up" in verdicts[0].lost
    assert verdicts[1] == ("pass", [1, 1], "pass", [1], None)


STOPPED = """
import json, sys
from dylora_moe.eval.scoring import check_workers, checking_process
from dylora_moe.eval.scoring.guarded_check import Task
check_workers.STANDSTILL_SECONDS = 1
waits = "import time\\ndef f(x):\\n    time.sleep(0.7)\\n    return x\\n"
(verdict,) = check_workers.run_checks([check_workers.Check(Task(**json.loads(sys.argv[1])), waits)], workers=1)
print(*verdict[:4])
"""


@pytest.mark.slow
def test_a_machine_that_stands_still_costs_no_verdict():
    """As a suspended container: its clock goes on, and a program's time limit runs out."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, json.dumps(TASK._asdict())], stdout=subprocess.PIPE, text=True
    )
    tree = []
    deadline = time.monotonic() + 60
    while len(tree) < 4:  # itself, the checking process, a guard and a program
        assert time.monotonic() < deadline
        time.sleep(0.02)
        tree = [process, *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        each.send_signal(signal.SIGSTOP)
    time.sleep(3)
    for each in reversed(tree):
        each.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert said.split() == ["pass", "[1,", "1]", "pass", "[1]"]


SCORES = """
import json, os, sys
from dylora_moe.eval.scoring import check_workers, checking_process
from dylora_moe.eval.scoring.scoring import pass_at_k, score_samples
checking_process.PAUSES = (0, 0.2, 0.5)
samples, *task_ids = sys.argv[1:]
print(json.dumps(pass_at_k(score_samples(samples, "humaneval", parallel=2, task_ids=task_ids))))
"""
# In a user namespace of its own, a temporary folder that holds so many files and folders.
SMALL_FOLDER = 'mount -t tmpfs -o size=1m,nr_inodes="$1" none "$2" && shift 2 && exec "$@"'


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("files", [3, 6, 20])
def test_reference_solutions_pass_or_nothing_is_scored_in_a_small_temporary_folder(files, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    unshare = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        SMALL_FOLDER,
        "sh",
        str(files),
        str(folder),
    ]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    task_ids = list(load_problems())[:4]
    samples = tmp_path / "samples.jsonl"
    solutions = {
        task_id: problem["prompt"] + problem["canonical_solution"]
        for task_id, problem in load_problems().items()
    }
    samples.write_text(
        "".join(
            json.dumps({"task_id": task_id, "solution": solutions[task_id]}) + "\n" for task_id in task_ids
        )
    )
    ran = subprocess.run(
        [*unshare, sys.executable, "-c", SCORES, str(samples), *task_ids],
        env={**os.environ, "TMPDIR": str(folder), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    results = tmp_path / "samples_eval_results.json"
    if ran.returncode == 0:
        assert json.loads(ran.stdout) == {"pass@1": 1.0, "plus_pass@1": 1.0}
        assert "lost" not in json.loads(results.read_text())
    else:
        assert files < 20, ran.stderr
        assert "No space left on device" in ran.stderr and "TMPDIR" in ran.stderr
        assert not results.exists()


@pytest.mark.usefixtures("problems")
def test_without_room_nothing_is_final_and_with_room_it_is_scored(tmp_path, fault, monkeypatch):
    monkeypatch.setattr(evaluate, "CACHE_DIR", str(tmp_path / "cache"))
    (task_id, problem), *_ = load_problems().items()
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        json.dumps({"task_id": task_id, "solution": problem["prompt"] + problem["canonical_solution"]})
    )
    short = tmp_path / "short"
    short.touch()
    fault(refuse(f"os.path.exists({str(short)!r})"))
    with pytest.raises(FailureError, match="TMPDIR"):
        score_samples(samples, "humaneval", task_ids=[task_id])
    assert not list(tmp_path.glob("*eval_results*"))
    short.unlink()
    content = json.loads(score_samples(samples, "humaneval", task_ids=[task_id]).read_text())
    assert content["eval"][task_id][0]["plus_status"] == "pass"


def test_programs_that_cannot_be_run_are_noticed_before_anything_is_made(tmp_path, fault):
    fault(refuse("True"))
    (tmp_path / "no model").mkdir()
    with pytest.raises(FailureError, match=r"programs cannot be checked: .*No space left"):
        benchmark(tmp_path / "no model", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_right_program_that_does_not_pass_is_noticed(monkeypatch):
    check_start()
    monkeypatch.setattr(
        check_workers, "run_checks", lambda checks, **options: [check_workers.Verdict("fail", [], None, [])]
    )
    with pytest.raises(
        FailureError, match="right does not pass on this machine: EvalPlus's verdict on it is 'fail'"
    ):
        check_start()


def test_a_temporary_folder_that_cannot_be_used_is_said(monkeypatch):
    def refused():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "folder")

    monkeypatch.setattr(checking_process, "PAUSES", (0, 0))
    monkeypatch.setattr(check_workers.tempfile, "gettempdir", refused)
    with pytest.raises(FailureError, match=r"No space left on device.*TMPDIR"):
        statuses([RIGHT])


def test_the_remedy_names_the_folder_and_what_is_left(tmp_path):
    assert f"{tmp_path} has room for " in remedy(errno.ENOSPC, tmp_path)
    assert remedy(None, tmp_path) == remedy(errno.EPERM, Path("/nowhere"))
