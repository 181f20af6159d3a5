"""What long work tells of itself while it runs: which step it is at, and how much of that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


# Called with what is being done, how much of it is done, and how much there is: 0 where that is not known.
Progress = Callable[[str, int, int], None]
# Called while sampling with what is being done, the new tokens a second, and the seconds that are left.
TellSpeed = Callable[[str, float, float], None]


@contextmanager
def told(progress: Progress | None, what: str) -> Iterator[None]:
    """Tell when a step begins whose length is not known, and when it has ended."""
    if progress is not None:
        progress(what, 0, 0)
    yield
    if progress is not None:
        progress(what, 1, 1)


__all__ = ["Progress", "TellSpeed", "told"]
