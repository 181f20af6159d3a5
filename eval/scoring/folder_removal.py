"""Removes a folder in which programs that nobody has read could do as they liked: any depth, any permissions,
links.

`shutil.rmtree` goes down by recursion, which a thousand nested folders end with an error. Imports the
standard library only, and knows nothing about what the folder was for.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def remove_folder(folder: str | Path) -> None:
    """Remove a folder with all that is in it. What cannot be removed stays, without an error; no link is
    followed.

    Nothing else may be at work in it.
    """
    empty_folder(folder)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def empty_folder(folder: str | Path) -> None:
    """Remove all that is in a folder, as `remove_folder` does. The folder itself is this user's alone
    then."""
    with contextlib.suppress(OSError):
        here = _open(os.fspath(folder), None)
        names: list[str] = []  # the way down from `folder`
        left = [_empty(here)]  # what is still to be removed in each folder on it
        while names or left[-1]:
            if left[-1]:
                name = left[-1].pop()
                with contextlib.suppress(OSError):
                    here = _move(here, name)
                    names.append(name)
                    left.append(_empty(here))
            else:
                here = _move(here, "..")
                left.pop()
                with contextlib.suppress(OSError):
                    os.rmdir(names.pop(), dir_fd=here)
        os.close(here)


def remove_folders(parent: str | Path, prefix: str) -> None:
    """Remove this user's folders in `parent` whose names begin so. What another user made there is left
    alone."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(prefix)]:
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                remove_folder(entry.path)


def _open(path: str, folder: int | None) -> int:
    with contextlib.suppress(PermissionError):
        return os.open(path, _FOLDER, dir_fd=folder)
    os.chmod(path, 0o700, dir_fd=folder)
    return os.open(path, _FOLDER, dir_fd=folder)


def _move(here: int, name: str) -> int:
    there = _open(name, here)
    os.close(here)
    return there


def _empty(folder: int) -> list[str]:
    """Remove what is no folder; the names of those that are."""
    folders = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        os.chmod(folder, 0o700)
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
                continue
            with contextlib.suppress(OSError):
                os.unlink(entry.name, dir_fd=folder)
    return folders
