"""Removes a folder in which untrusted programs could do as they liked: any depth, any permissions, links.

Imports the standard library only, so that a bare interpreter in a sandbox can use it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path


def remove_folder(folder: str | Path) -> None:
    """Remove a folder with all that is in it. What cannot be removed stays, without an error.

    No link is followed. Nothing else may be at work in the folder.
    """
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    # What is left is nested deeper than Python's recursion goes, or locked; the system's commands are neither
    # bound by depth nor follow links below the folder that they are given.
    if os.path.isdir(folder) and not os.path.islink(folder):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            with contextlib.suppress(OSError):
                subprocess.run([*command, "--", os.fspath(folder)], check=False, stderr=subprocess.DEVNULL)
