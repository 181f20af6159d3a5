"""Finished samples on their way to EvalPlus's files: one line each, on disk as soon as a sample is done.

    NAME.partial-0.jsonl    {"task_id": "HumanEval/0", "sample": 0, "tokens": [5, 17, …], "stop": "stop_string"}

One file a process, so that none waits for another. Whenever a process ends, at most the line that it was
writing is lost; when the machine does, what it has not written to the disk yet, a few seconds' samples.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dylora_moe.hub_export.errors import InputError


class Sample(NamedTuple):
    """New tokens, and why they end: see `decoding`; None in the journal of a version that did not say it."""

    tokens: list[int]
    stop: str | None


Samples = dict[tuple[str, int], Sample]


class SampleJournal:
    """The journals beside a samples file. Nothing is created before a sample is added.

    Args:
        samples_path: EvalPlus's samples file, `NAME.jsonl`.
        process: this process's number.

    Attributes:
        sanitized_path: where texts that took long to sanitize are kept until all are there: see `sanitizing`.
    """

    def __init__(self, samples_path: Path, process: int = 0):
        self.stem = samples_path.name.removesuffix(".jsonl")
        self.folder = samples_path.parent
        self.path = self.folder / f"{self.stem}.partial-{process}.jsonl"
        self.sanitized_path = self.folder / f"{self.stem}.sanitized-partial.jsonl"

    def paths(self) -> list[Path]:
        """List all processes' journals."""
        prefix = f"{self.stem}.partial-"
        return sorted(path for path in self.folder.glob("*.jsonl") if path.name.startswith(prefix))

    def read(self) -> Samples:
        """Read every process's samples: each by task id and number.

        Raises:
            InputError: a line other than the last is damaged.
        """
        samples: Samples = {}
        for path in self.paths():
            samples.update(_read(path)[0])
        return samples

    def begin(self) -> None:
        """Make this process's journal ready to be added to: a line that was cut off is taken away.

        Raises:
            InputError: as `read`.
        """
        if self.path.exists():
            _, whole = _read(self.path)
            with open(self.path, "r+b") as file:
                file.truncate(whole)

    def add(self, task_id: str, sample: int, tokens: list[int], stop: str) -> None:
        """Put one sample on disk.

        Raises:
            OSError: the disk is full.
        """
        entry = {"task_id": task_id, "sample": sample, "tokens": tokens, "stop": stop}
        line = json.dumps(entry, separators=(",", ":"))
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            content = line.encode() + b"\n"
            if file.write(content) < len(content):  # and what comes next would be added to half a line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def remove(self) -> None:
        """Remove every process's journal, and what was sanitized of it."""
        for path in self.paths():
            path.unlink()
        self.sanitized_path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Samples, int]:
    """Read the samples, and how many bytes of the file are whole lines."""
    samples: Samples = {}
    whole = 0
    content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # the process ended while it was writing this
        try:
            entry = json.loads(line)
            samples[entry["task_id"], int(entry["sample"])] = _sample(entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is damaged; remove the file to make its samples again"
            ) from error
        whole += len(line)
    return samples, whole


def _sample(entry: dict[str, Any]) -> Sample:
    """Raises KeyError, TypeError, ValueError or OverflowError: a field is missing or no such thing."""
    tokens = [int(token) for token in entry["tokens"]]
    stop = entry.get("stop")
    if stop is not None and not isinstance(stop, str):
        raise TypeError(f"stop is a {type(stop).__name__}")
    return Sample(tokens, stop)


__all__ = ["Sample", "SampleJournal", "Samples"]
