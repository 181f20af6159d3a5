"""The demo: small experts trained on this machine, exported, and scored by stock EvalPlus.

Read `runner` first: `run_demo` does all of it. `problems`, `texts` and what these import are learned and scored,
`training` and what it imports learn, `checkpoint` saves, `scoring` scores. Importing this package imports neither
torch nor peft nor evalplus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .runner import run_demo

__all__ = ["run_demo"]


def __getattr__(name: str):
    # The heavy imports wait until the demo runs, so that the command line answers at once.
    if name == "run_demo":
        from .runner import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
