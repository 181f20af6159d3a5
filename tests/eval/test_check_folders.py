"""A check takes room for two folders, one of which serves all programs of a process, and none finds what
another left."""

import tempfile

import pytest

from dylora_moe.eval.scoring import checking_process
from dylora_moe.eval.scoring.check_workers import run_checks
from dylora_moe.eval.scoring.checking_process import Check
from dylora_moe.eval.scoring.guarded_check import Task


pytest.importorskip("evalplus")

TASK = Task(
    dataset="humaneval",
    problem={
        "task_id": "HumanEval/0",
        "entry_point": "f",
        "atol": 0,
        "base_input": [[1]],
        "plus_input": [[2]],
    },
    expected_output={"base": [1], "base_time": [0.0], "plus": [2], "plus_time": [0.0]},
    base_only=False,
)
RIGHT = "def f(x):\n    return x\n"
PASSED = ("pass", [1], "pass", [1], None)

# The checking process and its forks have room for this many folders in all. It makes at most as many itself.
ROOM = """
import errno, os, tempfile
import checking.guarded_check
make, own = tempfile.mkdtemp, []
def mkdtemp(suffix=None, prefix=None, dir=None):
    if sum(len(folders) for _, folders, _ in os.walk({parent!r})) >= {room}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), dir)
    if dir is not None:
        own.append(dir)
        if len(own) > {most}:
            os._exit(1)
    return make(suffix, prefix, dir)
tempfile.mkdtemp = mkdtemp
serve("""


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(checking_process, "PAUSES", (0, 0.1))
    start = checking_process._START

    def limit(folders, most=100):
        given = ROOM.format(parent=str(tmp_path), room=folders, most=most)
        monkeypatch.setattr(checking_process, "_START", start.replace("serve(", given))

    yield limit
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_room_for_two_folders_is_enough(room, workers):
    """As for EvalPlus with two processes. Those that do not check meanwhile take none."""
    room(2)
    assert run_checks([Check(TASK, RIGHT)] * 6, workers=workers) == [PASSED] * 6


def test_one_folder_serves_one_program_after_the_other(room):
    """The kernel gives the room of a removed one back later than the next program needs it."""
    room(3, most=1)
    wrong = "def f(x):\n    return None\n"
    programs = [RIGHT, wrong, RIGHT, "import os\nos.mkdir('../left')\n" + RIGHT, RIGHT]
    verdicts = run_checks([Check(TASK, program) for program in programs], workers=1)
    assert [verdict.base_status for verdict in verdicts] == ["pass", "fail", "pass", "pass", "pass"]
    assert [verdict.lost for verdict in verdicts] == [None] * 5


# Each changes the folder around the one that EvalPlus makes for it, while it is loaded.
CHANGES = {
    "file": "io.open('../left', 'w').write('x')",
    "folders": "for _ in range(1100):\n    posix.mkdir('d')\n    posix.chdir('d')",
    "rights": "posix.chmod('..', 0)",
    "size": "for number in range(500):\n    posix.mkdir(f'../{number}')",
    "attribute": "os.setxattr('..', 'user.left', b'x')",
}
FINDS_NOTHING = """
import os, posix
def f(x):
    here = posix.getcwd()
    above = os.path.dirname(here)
    assert os.listdir(here) == [] and os.listdir(above) == [os.path.basename(here)]
    assert os.stat(above).st_mode & 0o7777 == 0o700
    assert not any(name.startswith("user.") for name in os.listxattr(above))
    return x
"""


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_finds_nothing_of_the_one_before(room, change):
    room(10000)
    indented = CHANGES[change].replace("\n", "\n    ")
    leaves = f"import io, os, posix\ntry:\n    {indented}\nexcept OSError:\n    pass\n{RIGHT}"
    base_only = TASK._replace(base_only=True)  # some leave no room for the plus tests of theirs
    assert run_checks([Check(base_only, leaves), Check(TASK, FINDS_NOTHING)], workers=1)[1] == PASSED
