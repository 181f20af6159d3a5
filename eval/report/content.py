"""What a benchmark's folder holds, read for a report: runs and scores, expert and routing analysis, loss.

Its notes name results and analyses of samples that have changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError

from ..analysis.files import (
    EXPERTS_FILE,
    EXPERTS_VERSION,
    LOSS_FILE,
    LOSS_VERSION,
    ROUTING_FILE,
    ROUTING_TASKS_FILE,
    ROUTING_VERSION,
)
from ..sampling.run_record import Run, file_sha256, find_run, open_results, read_runs, read_versioned


@dataclass
class ReportContent:
    """Everything a report is made of.

    Attributes:
        runs: those that are scored, in the order in which they were begun.
        experts: the content of `expert_analysis.json`, or None.
        routing: the content of `routing_analysis.json`, with results that have come since joined in, or None.
        loss: the content of `loss.json`, or None.
        notes: what a reader must know of what is missing or no longer fits, a sentence each.
        has_routing_lines: whether `routing_tasks.jsonl` is there and of the same analysis as `routing`.
    """

    folder: Path
    runs: list[Run] = field(default_factory=list)
    experts: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    loss: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    has_routing_lines: bool = True

    def routing_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of `routing_tasks.jsonl`; none where it is missing or of another analysis."""
        path = self.folder / ROUTING_TASKS_FILE
        if self.routing is None or not self.has_routing_lines:
            return
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number}, is damaged; run routing-analysis again"
                    ) from error


def read_folder(folder: str | Path) -> ReportContent:
    """Read a benchmark's folder; raise InputError if it holds nothing to report, or a file is damaged."""
    content = ReportContent(Path(folder))
    for run in read_runs(content.folder):
        if run.has_results:
            content.runs.append(run)
        else:
            content.notes.append(f"{run.samples} is not part of this report: {_why(run)}.")
    content.experts = _read(content.folder / EXPERTS_FILE, EXPERTS_VERSION, "expert-analysis")
    content.routing = _read(content.folder / ROUTING_FILE, ROUTING_VERSION, "routing-analysis")
    if not content.runs and content.experts is None and content.routing is None:
        raise InputError(f"{folder} holds no scored run and no analysis, so there is nothing to report on")
    content.loss = _read(content.folder / LOSS_FILE, LOSS_VERSION, "loss")
    if content.experts is not None:
        used = content.experts["runs"].values()
        _note_changes(content, used, "The expert analysis", "expert-analysis")
    if content.routing is not None:
        _note_changes(content, [content.routing], "The routing analysis", "routing-analysis")
        found = file_sha256(content.folder / ROUTING_TASKS_FILE)
        if found is None or found != content.routing.get("tasks_sha256", found):
            content.notes.append(
                f"{ROUTING_TASKS_FILE} is not what this routing analysis wrote, so no tokens are shown; run "
                "routing-analysis again."
            )
            content.has_routing_lines = False
        _join_results(content)
    if content.experts is not None and content.routing is not None:
        compared = content.experts["runs"].get("router", {}).get("samples")
        if content.routing["samples"] != compared:
            content.notes.append(
                f"The routing analysis is of {content.routing['samples']}, which the expert analysis does not compare."
            )
    return content


def _why(run: Run) -> str:
    if run.samples_sha256 is None:
        return "its samples are not complete"
    if not run.has_samples:
        return "its samples changed after they were made"
    if run.results is None:
        return "it is not scored"
    return "its results changed after they were scored"


def _read(path: Path, version: int, command: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_versioned(path, version, f"run {command} again")


def _note_changes(content: ReportContent, used: Any, what: str, command: str) -> None:
    """Add a note if an analysis was made from samples that are no longer those in the folder.

    Raises:
        InputError: it names a file that does not lie in the folder.
    """
    folder = open_results(content.folder)
    if any(file_sha256(folder / run["samples"]) != run["samples_sha256"] for run in used):
        content.notes.append(f"{what} was made from samples that have changed since; run {command} again.")


def _join_results(content: ReportContent) -> None:
    """Put in what has been scored since the routing was traced: what the router and each expert solve."""
    from ..analysis.routing_inputs import Results
    from ..analysis.routing_summary import agreement

    routing = content.routing
    run = find_run(content.runs, samples=routing["samples"], samples_sha256=routing["samples_sha256"])
    if run is None:
        return
    results = Results(run, content.runs, routing["expert_names"])
    for task in routing["tasks"]:
        task["passed"] = results.passed(task["task_id"])
        task["experts_passed"] = results.experts_passed(task["task_id"])
    routing["tests"], routing["agreement"] = results.tests, agreement(routing["tasks"])


__all__ = ["ReportContent", "read_folder"]
