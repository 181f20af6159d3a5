"""Folders as hostile programs leave them are removed, and nothing else is."""

import os

import pytest

from dylora_moe.eval.scoring.folder_removal import remove_folder, remove_folders


def test_any_depth_and_width_and_locked_folders(tmp_path, monkeypatch):
    top = tmp_path / "top"
    (top / "wide").mkdir(parents=True)
    for number in range(300):
        (top / "wide" / f"folder {number}").mkdir()
        (top / "wide" / f"file {number}").touch()
    monkeypatch.chdir(top)
    for _ in range(2000):  # more than may be nested in Python, and than a path may have letters
        os.mkdir("deep")
        os.chdir("deep")
    monkeypatch.chdir(tmp_path)
    for locked in (top / "wide" / "folder 7", top / "wide", top):
        locked.chmod(0)
    remove_folder(top)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["inside", "itself"])
def test_no_link_is_followed(tmp_path, where):
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o500)
    (tmp_path / "top").mkdir()
    link = tmp_path / "top" / "link" if where == "inside" else tmp_path / "link"
    link.symlink_to(precious)
    remove_folder(tmp_path / "top" if where == "inside" else link)
    assert precious.stat().st_mode & 0o777 == 0o500
    assert (tmp_path / "top").exists() == (where == "itself")


def test_what_is_not_there_is_no_error(tmp_path):
    remove_folder(tmp_path / "none")


def test_what_killed_runs_left_is_removed_when_it_is_old(tmp_path):
    for name in ("mark-old", "mark-new", "other"):
        (tmp_path / name).mkdir()
    for name in ("mark-old", "other"):
        os.utime(tmp_path / name, (0, 0))
    remove_folders(tmp_path, "mark-", older_than=3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark-new", "other"]
    os.utime(tmp_path / "mark-new", (2**33, 2**33))  # as a program may leave it
    remove_folders(tmp_path, "mark-")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
