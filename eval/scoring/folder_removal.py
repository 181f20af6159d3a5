"""Removes folders in which untrusted programs could do as they liked: any depth, any permissions, links.

What cannot be removed stays, without an error, and no link is followed. Nothing else may be at work in the
folder. Imports the standard library only, so that a bare interpreter in a sandbox can use it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path


def remove_folder(folder: str | Path) -> None:
    """Remove a folder with all that is in it."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    # What is left is nested deeper than Python's recursion goes, or locked; the system's commands are neither
    # bound by depth nor follow links below the folder that they are given.
    if _is_folder(folder):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            with contextlib.suppress(OSError):
                subprocess.run([*command, "--", os.fspath(folder)], check=False, stderr=subprocess.DEVNULL)


def empty_folder(folder: str | Path) -> None:
    """Remove all that is in a folder. The folder itself is this user's alone then."""
    if not _is_folder(folder):
        return
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if _is_folder(path):
                remove_folder(path)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def remove_folders(parent: str | Path, prefix: str, older_than: float | None = None) -> None:
    """Remove this user's folders in `parent` whose names begin with `prefix`, and no other user's.

    Args:
        older_than: seconds since they changed; any if left out.
    """
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(prefix)]:
            found = entry.stat(follow_symlinks=False)
            is_old = older_than is None or time.time() - found.st_mtime > older_than
            if found.st_uid == os.geteuid() and is_old:
                remove_folder(entry.path)


def _is_folder(path: str | Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)
