"""A folder or a file appears whole or not at all, whatever happens on the way."""

import errno
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_checkpoints import snapshot

from dylora_moe.hub_export import FailureError, InputError, staging
from dylora_moe.hub_export.staging import exchange, staged_file, staged_folder, write_atomically


def replaceable(folder):
    return (folder / "config.json").is_file()


def write(final, text="new", overwrite=False):
    with staged_folder(final, overwrite, replaceable) as folder:
        (folder / "config.json").write_text(text)
        (folder / "weights").write_text(text)


@pytest.fixture
def old(tmp_path):
    """A folder that may be replaced, with a file that the new one does not have."""
    write(tmp_path / "repo", "old")
    (tmp_path / "repo" / "extra").write_text("old")
    return tmp_path / "repo"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    for text in ("old", "new"):
        write_atomically(path, text)
        assert snapshot(tmp_path) == {"file.json": text.encode()}
    with pytest.raises(ZeroDivisionError), staged_file(path) as work:
        work.write_text("half")
        assert path.read_text() == "new"
        _ = 1 / 0
    with staged_file(path, tmp_path / "mine", keep=False) as work:
        work.write_text("thrown away")
    assert snapshot(tmp_path) == {"file.json": b"new"}


def test_a_new_folder_and_the_folders_above_it(tmp_path):
    write(tmp_path / "a" / "b" / "repo")
    assert snapshot(tmp_path) == {"a/b/repo/config.json": b"new", "a/b/repo/weights": b"new"}


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo")
    assert (tmp_path / "repo" / "weights").read_text() == "new"


def test_a_folder_that_is_not_empty_is_refused_untouched(old):
    before = snapshot(old.parent)
    with pytest.raises(InputError, match="--overwrite"):
        write(old)
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_an_exported_repo_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not an exported repo"):
        write(tmp_path / "repo", overwrite=overwrite)
    assert snapshot(tmp_path) == {"repo/thesis.tex": b"years of work"}


def test_a_file_and_a_dead_link_are_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(InputError, match=name):
            write(tmp_path / name, overwrite=True)


def test_a_folder_under_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for final in (tmp_path / "file" / "repo", tmp_path / "file" / "deeper" / "repo"):
        with pytest.raises(InputError, match="is no folder that this user may write to"):
            staging.check_output(final, False, lambda path: True)


def test_overwriting_through_a_link_keeps_the_link(old):
    link = old.with_name("link")
    link.symlink_to(old)
    write(link, overwrite=True)
    assert link.is_symlink() and (old / "weights").read_text() == "new"


BODIES = {
    "a file that is not there": (
        lambda: Path("/nowhere/weights.pt").read_bytes(),
        InputError,
        "/nowhere/weights.pt cannot be read: No such file or directory",
    ),
    "a library's own error": (
        lambda: fail(OSError("the model has no config")),
        FailureError,
        "the model has no config",
    ),
    "a lost connection": (
        lambda: fail(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        FailureError,
        "Connection reset by peer",
    ),
}
WRITES = {
    "the disk is full": (lambda folder: fail(OSError(errno.ENOSPC, "full")), "no space left on the disk"),
    "a copy to a full disk": (
        lambda folder: fail(OSError(errno.ENOSPC, "full", "/elsewhere", None, str(folder / "x"))),
        "no space left on the disk",
    ),
    "the file system refuses": (
        lambda folder: fail(OSError(errno.EIO, "Input/output error")),
        "Input/output error",
    ),
    "a folder that is not there": (
        lambda folder: (folder / "a" / "b").write_text(""),
        "No such file or directory",
    ),
}


def fail(error):
    raise error


@pytest.mark.parametrize("case", BODIES)
def test_what_fails_on_the_way_and_is_not_writing(tmp_path, case):
    body, kind, message = BODIES[case]
    with (
        pytest.raises(kind, match=re.escape(message)) as caught,
        staged_folder(tmp_path / "repo", False, replaceable),
    ):
        body()
    assert "cannot write" not in str(caught.value) and "repo was not written" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", WRITES)
def test_what_fails_in_writing(tmp_path, case):
    body, message = WRITES[case]
    message = f"cannot write .*/repo: {message}; nothing was left there"
    with (
        pytest.raises(FailureError, match=message),
        staged_folder(tmp_path / "repo", False, replaceable) as folder,
    ):
        body(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_exchange", [True, False])
def test_overwriting_leaves_exactly_the_new_folder(old, monkeypatch, has_exchange):
    if not has_exchange:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    write(old, overwrite=True)
    assert snapshot(old.parent) == {"repo/config.json": b"new", "repo/weights": b"new"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the call is Linux's")
def test_overwriting_is_one_stroke(old):
    """Another process that looks all the time never sees the folder missing or mixed."""
    look = (
        "import pathlib, sys\n"
        "repo = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while not (repo.parent / 'stop').exists():\n"
        "    try:\n"
        "        handle = __import__('os').open(repo, 0)\n"
        "    except FileNotFoundError:\n"
        "        sys.exit('missing')\n"
        "    __import__('os').close(handle)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", look, str(old)], stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        for turn in range(30):
            write(old, str(turn), overwrite=True)
        (old.parent / "stop").touch()
    assert process.returncode == 0
    assert (old / "weights").read_text() == "29"


def test_an_exception_leaves_the_old_folder_and_nothing_else(old):
    before = snapshot(old.parent)
    with pytest.raises(ZeroDivisionError), staged_folder(old, True, replaceable) as folder:
        (folder / "config.json").write_text("half")
        1 / 0  # noqa: B018
    assert snapshot(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["repo"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_one_line_and_leaves_no_trace(tmp_path, old, exists):
    final = old if exists else tmp_path / "made" / "for" / "it"
    before = snapshot(tmp_path)
    with (
        pytest.raises(FailureError, match="no space left on the disk"),
        staged_folder(final, True, replaceable),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_a_failing_exchange_restores_the_old_folder(old, monkeypatch):
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    rename = os.rename

    def fail_once(source, target):
        if str(source).endswith("content"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    before = snapshot(old.parent)
    with pytest.raises(FailureError, match="Input/output error"):
        write(old, overwrite=True)
    assert snapshot(old.parent) == before


def test_leftovers_of_the_same_output_are_removed_and_others_kept(old):
    left = old.parent / ".repo.partial-0123abcd"
    kept = [
        old.parent / name
        for name in (".repo.partial-mine", ".other.partial-0123abcd", "repo.partial-0123abcd")
    ]
    for path in (left, *kept):
        (path / "content").mkdir(parents=True)
        (path / "content" / "half").write_text("half")
    write(old, overwrite=True)
    assert not left.exists()
    assert all(path.exists() for path in kept)


def test_a_folder_in_use_is_not_a_leftover(tmp_path):
    with staged_folder(tmp_path / "repo", False, replaceable) as first:
        (first / "config.json").write_text("first")
        write(tmp_path / "other")
        staging.remove_leftovers(tmp_path / "repo")
        assert (first / "config.json").exists()
    assert (tmp_path / "repo" / "config.json").read_text() == "first"


def test_of_two_runs_at_once_the_second_is_refused(tmp_path):
    with pytest.raises(InputError, match="not empty"), staged_folder(tmp_path / "repo", False, replaceable):
        write(tmp_path / "repo", "quicker")
    assert snapshot(tmp_path) == {"repo/config.json": b"quicker", "repo/weights": b"quicker"}


def test_a_run_killed_between_two_renames_is_repaired(old):
    """The slow way of replacing has moved the old folder aside and did not come back."""
    work = old.parent / ".repo.partial-0123abcd"
    work.mkdir()
    os.rename(old, work / "replaced")
    (work / "content").mkdir()
    staging.remove_leftovers(old)
    assert (old / "extra").read_text() == "old"
    assert not work.exists()


WRITER = """
import sys
from pathlib import Path
from dylora_moe.hub_export import staging
if sys.argv[2] == "slow way":
    staging.exchange = lambda first, second: False
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    with staging.staged_folder(Path(sys.argv[1]), True, lambda folder: True) as folder:
        for name in "abcd":
            (folder / name).write_text(str(turn))
"""


@pytest.mark.parametrize("way", ["exchange", "slow way"])
def test_killed_at_any_moment_the_folder_is_whole(tmp_path, way):
    chance = random.Random(0)
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "repo"), way], stdout=subprocess.PIPE
        ) as run:
            run.stdout.readline()
            time.sleep(chance.uniform(0, 0.15))
            run.kill()
        if way == "slow way":
            staging.remove_leftovers(tmp_path / "repo")
        if (tmp_path / "repo").exists():
            contents = [(tmp_path / "repo" / name).read_text() for name in "abcd"]
            assert len(set(contents)) == 1
    assert (tmp_path / "repo").exists()
    with staged_folder(tmp_path / "repo", True, lambda folder: True) as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the call is Linux's")
def test_exchange_swaps(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert snapshot(tmp_path) == {"a/which": b"b", "b/which": b"a"}


def test_the_file_of_a_killed_run_is_removed_a_day_later(tmp_path):
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("run.json.17", "run.json.18", "run.json.mine"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "run.json", "{}")
    assert not old.exists() and new.exists() and other.exists()
