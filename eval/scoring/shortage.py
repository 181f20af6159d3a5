"""What this machine is short of when a program cannot be run, and what a user can do about it.

Imports the standard library only.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


# System V's and POSIX's shared memory on Linux, where multiprocessing puts its values and locks.
SHARED_MEMORY = Path("/dev/shm")

_REMEDIES = {
    errno.ENOENT: "name a temporary folder in TMPDIR",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other programs: the machine's open files are used up",
    errno.EAGAIN: "end other programs, raise the limit on processes (ulimit -u), or pass a lower --parallel",
    errno.ENOMEM: "end other programs, or pass a lower --parallel: the machine's memory is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


def remedy(number: int | None, folder: str | Path) -> str:
    """Say what is short after an error of the operating system, and what to do about it.

    Args:
        number: the error's `errno`, None for another kind of error.
        folder: the temporary folder that was used.
    """
    if number in (errno.ENOSPC, errno.EDQUOT):
        left = ", ".join(_space_left(place) for place in (Path(folder), SHARED_MEMORY) if place.is_dir())
        return f"{left}; make room there; TMPDIR names another temporary folder"
    return _REMEDIES.get(number, "run the same command again once this is mended")


def _space_left(folder: Path) -> str:
    state = os.statvfs(folder)
    files = f" and {state.f_favail} files" if state.f_files else ""  # btrfs counts none
    return f"{folder} has room for {state.f_bavail * state.f_frsize / 1024:.0f} KB{files}"
