"""The command line that runs a command inside bubblewrap: no network, no files but Python's, no processes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dylora_moe.hub_export.errors import InputError


# Written files lie in memory, inside the sandbox only.
WRITABLE = ("/tmp", "/dev/shm")
WRITABLE_BYTES = 64 * 1024**2
# How many processes and threads a sandbox's user may have: EvalPlus's two, and some for the program.
PROCESSES = 32
# Root is exempt from that limit, so that root's sandboxes run as users of their own, from a range that Debian
# reserves.
FIRST_USER, USERS = 65000, 500
SYSTEM_LIBRARIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")


def sandboxed(command: Sequence[str], readable: Iterable[str | Path]) -> list[str]:
    """Wrap `command` in a sandbox in which this Python, the system's libraries and `readable` can be read.

    Its first process has number 1, and all end with it. /tmp is its own, empty, and in memory.

    Raises:
        InputError: bubblewrap is not installed.
    """
    bubblewrap = find_bubblewrap()
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # to become a user of its own
    else:
        options += ["--unshare-user"]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for folder in WRITABLE:
        options += ["--perms", "1777", "--size", str(WRITABLE_BYTES), "--tmpfs", folder]
    for path in SYSTEM_LIBRARIES:
        options += ["--ro-bind-try", path, path]
    paths = _python_paths() | {str(path) for path in readable}
    # What bubblewrap makes itself on the way to a path is for root only.
    for folder in sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/", *WRITABLE}):
        options += ["--perms", "0755", "--dir", folder]
    for path in sorted(paths):
        options += ["--ro-bind", path, path]
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    return [bubblewrap, *options, "--", *command]


def find_bubblewrap() -> str:
    """Find the program `bwrap`; raise InputError if it is not installed."""
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise InputError(
            "the sandbox needs bubblewrap, and there is no bwrap here; install it (Debian, Ubuntu, Fedora: the package "
            "bubblewrap), or leave out --sandbox"
        )
    return bubblewrap


def sandbox_user(number: int) -> int | None:
    """Return the user that the process in a sandbox must become; None if bubblewrap has given it rights.

    Args:
        number: of the sandbox; those that run at the same time should differ.
    """
    return FIRST_USER + (os.getpid() + number) % USERS if os.geteuid() == 0 else None


def _python_paths() -> set[str]:
    """List where this interpreter and its standard library lie, by every name that its links may use."""
    folders = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
    return {name for folder in folders for name in (folder, os.path.realpath(folder))}
