"""How fast samples are made, how long it still takes, and how much memory it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch


PROCESS = Path("/proc/self")  # of Linux
RESET_PEAK = "5"  # proc_pid_clear_refs(5)
TELL_SECONDS = 0.5


class SpeedMeter:
    """Measures from when it is made to when the last sample is.

    Args:
        num_samples: that are to be made.
        max_new_tokens: of one of them.
        tell: is told tokens a second and the seconds that are left, every now and then.
    """

    def __init__(
        self, num_samples: int, max_new_tokens: int, tell: Callable[[float, float], None] | None = None
    ):
        self.tokens = 0
        self.finished = 0
        self._num_samples = num_samples
        self._max_new_tokens = max_new_tokens
        self._tell = tell
        self._started = self._told = time.monotonic()
        reset_peak_memory()

    def add(self, num_tokens: int) -> None:
        """Count the tokens of one step, of all samples that are being made."""
        self.tokens += num_tokens
        now = time.monotonic()
        if self._tell is not None and now - self._told >= TELL_SECONDS:
            self._told = now
            self._tell(self.tokens / (now - self._started), self.seconds_left())

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def seconds_left(self) -> float:
        """Estimate how long the samples that are not finished take.

        Their mean length is taken as all tokens over the finished samples: the maximum likelihood of exponential
        lengths of which the unfinished ones are censored. It is `max_new_tokens` at most.
        """
        mean = self._max_new_tokens
        if self.finished:
            mean = min(mean, self.tokens / self.finished)
        return (self._num_samples - self.finished) * mean * self.seconds() / self.tokens


def reset_peak_memory() -> None:
    """Have `peak_memory` begin at what is taken now, where the system allows that."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text(RESET_PEAK)


def peak_memory() -> int | None:
    """Return the most bytes that this process had at once: allocated on its GPUs, or if there is nothing resident.

    None where the system does not say it.
    """
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        allocated = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        if allocated:
            return allocated
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


__all__ = ["SpeedMeter", "peak_memory", "reset_peak_memory"]
