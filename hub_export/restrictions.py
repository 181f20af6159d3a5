"""What a process gives up on Linux before untrusted code or files: resources, privileges, writing, reading.

Each function restricts the calling process and what it starts, for good. In `eval/scoring/guarded_check`,
`_restrict` calls them for a sample's program, `_guard` and `serve` for the processes above it. Imports the
standard library only, so that a bare interpreter in a sandbox can use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


FILE_BYTES = 64 * 1024**2
OPEN_FILES = 256

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# linux/landlock.h; the numbers of these system calls are the same on every architecture.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_RULE_PATH_BENEATH = 1
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
# Removing and making folders, files, devices, sockets, pipes and links: bits 4 to 12.
CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))
# What later versions of Landlock know besides: moving between folders (2), truncating (3); TCP (4); settings of
# devices (5); abstract sockets of, and signals to, processes outside (6).
REFER, TRUNCATE, SET_DEVICES = 1 << 13, 1 << 14, 1 << 15
BIND_AND_CONNECT_TCP = 3
SOCKETS_AND_SIGNALS = 3
# Where terminals and other devices lie, and what is there for every program.
DEVICES = Path("/dev")
HARMLESS_DEVICES = ("null", "zero", "full", "random", "urandom", "shm")

CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class _PathBeneath(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))  # the kernel reads no further


def limit_resources(cpu_seconds: int, processes: int | None = None) -> None:
    """Limit CPU time, file size, open files, core dumps and, if given, the user's number of processes.

    Memory is not limited here: EvalPlus does that. A limit that is lower already stays.
    """
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (lower, lower))


def landlock_version() -> int:
    """Return the version of Landlock that this kernel has; 0 for none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def prctl(option: int, *arguments: Any) -> None:
    """Raises OSError: the kernel refuses, or does not know this."""
    _check(_libc.prctl(option, *arguments, *[0] * (4 - len(arguments))))


def give_up_new_privileges() -> None:
    """Have set-user-id programs take no effect; root's capabilities stay."""
    if sys.platform == "linux":
        prctl(PR_SET_NO_NEW_PRIVS, 1)


def drop_privileges() -> None:
    """Give up root's capabilities and the effect of set-user-id programs; the user id stays."""
    if sys.platform == "linux":
        give_up_new_privileges()
        none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits of each
        _check(_libc.capset(ctypes.byref(_CapabilityHeader(CAPABILITY_VERSION_3, 0)), none))


def confine(folder: str | Path) -> bool:
    """Let this process change files in `folder` only, and not read other processes' memory or environment.

    By Landlock, after `drop_privileges`. Where that is new enough it also refuses TCP (version 4, Linux 6.7)
    and signals to processes outside (version 6, Linux 6.12). All files may still be read, but no terminals and
    other devices.

    Returns:
        False where the kernel has no Landlock, and nothing was done.

    Raises:
        OSError: it has, and refused.
    """
    version = landlock_version()
    write = _writing(version)
    files = write | READ_FILE | CHANGE_FOLDER | (REFER if version >= 2 else 0)
    readable = [(path, READ_FILE) for path in _readable()]
    return _restrict(version, files, [(folder, files), (os.devnull, write | READ_FILE), *readable])


def confine_reading(paths: Iterable[str | Path]) -> bool:
    """Let this process read these files and folders alone, and change nothing; otherwise as `confine`."""
    version = landlock_version()
    read = READ_FILE | READ_FOLDER
    files = read | _writing(version) | CHANGE_FOLDER | (REFER if version >= 2 else 0)
    allowed = [(path, read if os.path.isdir(path) else READ_FILE) for path in paths]
    return _restrict(version, files, allowed)


def _writing(version: int) -> int:
    return WRITE_FILE | (TRUNCATE if version >= 3 else 0)


def _restrict(version: int, files: int, allowed: list[tuple[str | Path, int]]) -> bool:
    """Refuse these uses of files but for what is allowed, and what else this version of Landlock can refuse."""
    if version == 0:
        return False
    if version >= 5:
        files |= SET_DEVICES
    ruleset, fields = _Ruleset(files=files), 1  # the kernel takes as many fields as its version has
    if version >= 4:
        ruleset.network, fields = BIND_AND_CONNECT_TCP, 2
    if version >= 6:
        ruleset.scoped, fields = SOCKETS_AND_SIGNALS, 3
    size = ctypes.c_size_t(fields * ctypes.sizeof(ctypes.c_uint64))
    create = (LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, ctypes.c_uint32(0))
    rules = _check(_libc.syscall(*create))
    try:
        for path, uses in allowed:
            _allow(rules, path, uses)
        _check(_libc.syscall(LANDLOCK_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)))
    finally:
        os.close(rules)
    return True


def _readable() -> list[Path]:
    """All that lies in the root folder but devices, and of those the harmless ones."""
    top = [path for path in Path("/").iterdir() if path != DEVICES and not path.is_symlink()]
    return [path for path in [*top, *(DEVICES / name for name in HARMLESS_DEVICES)] if os.path.exists(path)]


def _allow(rules: int, path: str | Path, allowed: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathBeneath(allowed, descriptor)
        _check(
            _libc.syscall(
                LANDLOCK_ADD_RULE,
                ctypes.c_int(rules),
                ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH),
                ctypes.byref(rule),
                ctypes.c_uint32(0),
            )
        )
    finally:
        os.close(descriptor)


def prefer_oom_kill() -> None:
    """Have the kernel end this process, and what it starts, first when the machine's memory runs out.

    Does nothing where the kernel refuses.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none escapes."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def become_user(user: int) -> None:
    """Give up being root for a user id that need not exist."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
