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


def restore_state(wanted: dict[str, Any]) -> None:
    """Give this process the limits, priority, scheduling and cores of an earlier `own_state`.

    Raises:
        OSError, ValueError: this user may not.
    """
    state = own_state()
    for name in [name for name, value in wanted.items() if state[name] != value]:
        if name in LIMITS:
            resource.setrlimit(LIMITS[name], tuple(wanted[name]))
        elif name == "priority":
            os.setpriority(os.PRIO_PROCESS, 0, wanted[name])
        elif name == "scheduling":
            os.sched_setscheduler(0, wanted[name], os.sched_param(0))
        else:  # those that the machine still lets it have
            os.sched_setaffinity(0, wanted[name])
