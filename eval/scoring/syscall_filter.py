"""A seccomp filter of the system calls that reach out of a program's process where nothing else stops them.

    key rings           are the user's: what one program leaves there, another finds, in and out of a sandbox
    sockets             of other families than Unix, IP and netlink: vsock knows no network namespace
    limits, priority    and cores of the user's other processes
    io_uring            makes sockets and opens files that no filter sees

Imports the standard library only, so that a bare interpreter in a sandbox can use it.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from collections.abc import Sequence

from dylora_moe.hub_export.restrictions import give_up_new_privileges, prctl


# linux/seccomp.h, linux/bpf_common.h
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
ALLOW = 0x7FFF0000
DENY = 0x00050000 | errno.EPERM
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
# struct seccomp_data: the call's number, the architecture, an address, six arguments of 8 bytes.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
# Calls of x86-64's second interface, x32, have numbers from here on.
X32 = 0x40000000

# What arguments must be for a call to be allowed: (which argument, values).
NEVER = ((0, ()),)
# AF_UNSPEC, AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK, which names of hosts are looked up by.
COMMON_FAMILY = ((0, (0, 1, 2, 10, 16)),)
OF_ITSELF = ((0, (0,)),)
OF_ITSELF_ALONE = ((0, (0,)), (1, (0,)))  # no group of processes, no user

# The rule of a call, and its numbers: asm/unistd_64.h on x86-64, asm-generic/unistd.h on ARM.
CALLS = {
    "add_key": (NEVER, 248, 217),
    "request_key": (NEVER, 249, 218),
    "keyctl": (NEVER, 250, 219),
    "io_uring_setup": (NEVER, 425, 425),
    "io_uring_enter": (NEVER, 426, 426),
    "io_uring_register": (NEVER, 427, 427),
    "socket": (COMMON_FAMILY, 41, 198),
    "socketpair": (COMMON_FAMILY, 53, 199),
    "prlimit64": (OF_ITSELF, 302, 261),
    "sched_setparam": (OF_ITSELF, 142, 118),
    "sched_setscheduler": (OF_ITSELF, 144, 119),
    "sched_setaffinity": (OF_ITSELF, 203, 122),
    "sched_setattr": (OF_ITSELF, 314, 274),
    "setpriority": (OF_ITSELF_ALONE, 141, 140),
    "ioprio_set": (NEVER, 251, 30),
}
# AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of linux/audit.h, and which of the numbers are theirs.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def filter_calls() -> bool:
    """Have these calls fail with EPERM in this process and in what it starts, for good.

    Returns:
        False where the kernel has no filters or the architecture's numbers are not known, and nothing was done.

    Raises:
        OSError: the kernel has filters, and refused.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return False
    code = b"".join(_instructions(platform.machine()))
    held = ctypes.create_string_buffer(code, len(code))
    give_up_new_privileges()
    try:
        program = _Program(len(code) // 8, ctypes.addressof(held))
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _instructions(machine: str) -> list[bytes]:
    architecture, place = MACHINES[machine]
    program = [
        # The numbers of a 32-bit program mean other calls, so it may make none.
        *(_instruction(LOAD, ARCHITECTURE), _instruction(JUMP_IF_EQUAL, architecture, then=1)),
        _instruction(RETURN, DENY),
        *(_instruction(LOAD, NUMBER), _instruction(JUMP_IF_AT_LEAST, X32, otherwise=1)),
        _instruction(RETURN, DENY),
    ]
    for rule, *numbers in CALLS.values():
        checks = _checks(rule)
        program += [_instruction(JUMP_IF_EQUAL, numbers[place], otherwise=len(checks)), *checks]
    return [*program, _instruction(RETURN, ALLOW)]


def _checks(rule: Sequence[tuple[int, Sequence[int]]]) -> list[bytes]:
    """Allow the call if each argument has one of its values. They are C's int: the lower half of 8 bytes."""
    checks = []
    for argument, values in rule:
        checks.append(_instruction(LOAD, ARGUMENTS + 8 * argument))
        for before, value in enumerate(values):
            checks.append(_instruction(JUMP_IF_EQUAL, value, then=len(values) - before))
        checks.append(_instruction(RETURN, DENY))
    return [*checks, _instruction(RETURN, ALLOW)]


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One of BPF's; a jump says how many others are left out."""
    return struct.pack("=HBBI", code, then, otherwise, value)
