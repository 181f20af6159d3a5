"""How long work is shown on stderr while it runs: bars on a terminal, else a line for each step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dylora_moe.cli_common import err
from dylora_moe.hub_export.shown_text import one_printable_line


class Steps:
    """Shows one step after the other. It is called with what is being done, how much of it, and of how much.

    A step ends when all of it is done, or when the next one begins; 0 of 0 is one whose length is not known.
    """

    def __init__(self, bars: Progress):
        self._bars = bars
        self._what: str | None = None  # the step that goes on
        self._task = TaskID(0)
        self._speed: float | None = None
        self._speaks = not err.is_terminal and is_main_process()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.end()
            self._begin(what)
        counted = f"{done}/{total}" if total > 1 else ""
        self._bars.update(self._task, completed=done, total=total or None, counted=counted)
        if total and done >= total:
            self.end()

    def tell_speed(self, what: str, tokens_per_second: float, seconds_left: float) -> None:
        """Show how fast the step that goes on samples, and how long it still takes."""
        if what == self._what:
            self._speed = tokens_per_second
            left = f"{timedelta(seconds=round(seconds_left))} left"
            self._bars.update(self._task, speed=f"{tokens_per_second:,.0f} tokens/s", left=left)

    def _begin(self, what: str) -> None:
        self._what, self._speed = what, None
        name = one_printable_line(what)
        self._task = self._bars.add_task(name, total=None, counted="", speed="", left="")
        if self._speaks:
            err.print(what)

    def end(self) -> None:
        """End the step that goes on: its time stands still."""
        if self._what is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        if task.total is None:
            self._bars.update(self._task, completed=1, total=1)
        self._bars.update(self._task, left="")
        self._bars.stop_task(self._task)
        if self._speaks and self._speed is not None:
            err.print(f"{self._what}: {self._speed:,.0f} tokens/s")
        self._what = None


@contextmanager
def steps() -> Iterator[Steps]:
    """Show progress on stderr: a bar for each step on a terminal, else a line."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counted]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
    )
    shown = err.is_terminal and is_main_process()
    with Progress(*columns, console=err, disable=not shown) as bars:
        yield Steps(bars)


def is_main_process() -> bool:
    """Say whether this is the main process of `accelerate launch`, or the only one."""
    return os.environ.get("RANK", "0") == "0"


__all__ = ["Steps", "is_main_process", "steps"]
