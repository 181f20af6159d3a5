"""How much CPU time do `--help` and refusals take?

    python tests/performance/front_door.py --json front_door.json

CPU seconds (user and system) of whole processes, the median of 5: the help of every command, and mistakes that are
refused before torch is imported. The bars are 0.5 s for help and 1 s for refusals.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from dylora_moe.cli import app


HELP, REFUSAL = 0.5, 1.0  # seconds of CPU
REFUSALS = (
    "benchmark",
    "benchmark --model no/such/folder",
    "benchmark --model m --routing_strategy routr",
    "expert-analysis --model no/such/folder",
    "loss m",
    "inspect no/such/folder",
    "export m -o out --routing_strategy routr",
    "verify no/such/folder",
    "merge no/such/folder --expert 0 -o out",
)


def cpu_seconds(arguments: list[str], folder: str, **environment: str) -> float:
    """Return the CPU time of one process of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "dylora_moe", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def helps() -> list[str]:
    """List the command lines that show a help."""
    top = typer.main.get_command(app)
    commands = [f"{name} --help" for name in top.commands]
    return ["--help", "-V", *commands, *(f"mirror {name} --help" for name in top.commands["mirror"].commands)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    typed = [(line, HELP) for line in helps()] + [(line, REFUSAL) for line in REFUSALS]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds(["--help"], folder)  # so that all is compiled and in the file system's cache
        for line, bar in typed:
            seconds = [cpu_seconds(shlex.split(line), folder) for _ in range(options.repeats)]
            rows.append(
                {"typed": line, "cpu_s": statistics.median(seconds), "most_s": max(seconds), "bar_s": bar}
            )
            over = "" if rows[-1]["cpu_s"] <= bar else "  OVER"
            print(f"{line:<48} {rows[-1]['cpu_s']:.2f} s  most {rows[-1]['most_s']:.2f}  bar {bar}{over}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
