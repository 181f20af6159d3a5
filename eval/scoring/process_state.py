"""What processes of the same user may change of each other: resource limits, priority, scheduling, cores.

Limits are inherited, and one that was lowered can be raised again by root only. Imports the standard library only,
so that a bare interpreter in a sandbox can use it.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any


LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


def own_state() -> dict[str, Any]:
    """Say how this process is limited, in what JSON can hold."""
    state: dict[str, Any] = {name: list(resource.getrlimit(limit)) for name, limit in LIMITS.items()}
    state["priority"] = os.getpriority(os.PRIO_PROCESS, 0)
    if sys.platform == "linux":
        state |= {"cores": sorted(os.sched_getaffinity(0)), "scheduling": os.sched_getscheduler(0)}
    return state


def restore_limits(wanted: dict[str, Any]) -> None:
    """Give this process the resource limits of an earlier `own_state`.

    Its priority and cores stay, which a user may change meanwhile.

    Raises:
        OSError, ValueError: this user may not raise a limit that was lowered.
    """
    for name, limit in LIMITS.items():
        if list(resource.getrlimit(limit)) != wanted[name]:
            resource.setrlimit(limit, tuple(wanted[name]))
