"""Starts a command of `dylora-moe` for `python -m dylora_moe.eval.<command>`.

The command line stands above this package, so it is run as a program and never imported.
"""

from __future__ import annotations

import runpy
import sys


def run_command(name: str) -> None:
    """Run `dylora-moe <name>` with this process's arguments."""
    sys.argv.insert(1, name)
    runpy.run_module("dylora_moe", run_name="__main__")


__all__ = ["run_command"]
