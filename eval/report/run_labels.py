"""The labels of a folder's runs in tables, figures and pages; no two runs have the same.

What distinguishes a run is shown only where runs differ in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from ..sampling.run_record import Run


NAMES = {"humaneval": "HumanEval", "mbpp": "MBPP"}
SEVERAL_CATEGORIES = "A task may have several categories."
HASH_DIGITS = 8
# Of the table of scores, what says which run a row is of, in the order of a name in one line.
COLUMNS = ("routing strategy", "model", "benchmark", "tasks", "samples a task", "settings")

# Fields of a run and their words, by the part of the label that they belong to. Those of `MODEL` are shown
# where they distinguish models of one name, those of `DATA` benchmarks of one name, those of `SETTINGS` where
# any two runs differ.
MODEL: dict[str, Callable[[Any], str]] = {
    "backend": str,
    "model_revision": lambda commit: f"commit {commit[:HASH_DIGITS]}" if commit else "",
    "model_sha256": lambda digest: f"files {digest[:HASH_DIGITS]}" if digest else "",
}
DATA: dict[str, Callable[[Any], str]] = {
    "dataset_hash": lambda digest: f"data {digest[:HASH_DIGITS]}",
}
SETTINGS: dict[str, Callable[[Any], str]] = {
    "temperature": lambda temperature: f"temperature {temperature:g}" if temperature else "greedy",
    "top_p": lambda top_p: "" if top_p is None else f"top_p {top_p:g}",
    "seed": lambda seed: "" if seed is None else f"seed {seed}",
    "max_new_tokens": lambda count: f"{count} new tokens",
    "dtype": str,
    "attn_implementation": lambda name: f"{name or 'default'} attention",
    "force_base_prompt": lambda forced: "no chat template" if forced else "",
}
# None where nothing is drawn, which the temperature says already.
ONLY_IF_SAMPLED = ("top_p", "seed")


@dataclass
class RunLabel:
    """What a run is called, cell by cell. `settings` is empty where its runs differ in nothing else."""

    model: str
    strategy: str
    benchmark: str
    tasks: str
    samples: int
    settings: str

    def cells(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())


def run_labels(runs: Sequence[Run]) -> list[RunLabel]:
    """Call each of the runs of a folder by a name that no other of them has."""
    labels = [
        RunLabel(
            model=run.model_label,
            strategy=strategy_label(run.routing_strategy or "base", run.expert_names),
            benchmark=benchmark_label(run.benchmark, run.mini, run.dataset_file),
            tasks=str(len(run.task_ids)) if run.subset is None else run.subset,
            samples=run.n_samples,
            settings="",
        )
        for run in runs
    ]
    models = _distinguished(runs, [label.model for label in labels], MODEL)
    benchmarks = _distinguished(runs, [label.benchmark for label in labels], DATA)
    for label, model, benchmark in zip(labels, models, benchmarks, strict=True):
        label.model, label.benchmark = model, benchmark
    shown = [name for name in SETTINGS if _differs(runs, name)]
    for run, label in zip(runs, labels, strict=True):
        label.settings = ", ".join(filter(None, (SETTINGS[name](getattr(run, name)) for name in shown)))
    cells = [label.cells() for label in labels]
    for run, label in zip(runs, labels, strict=True):
        if cells.count(label.cells()) > 1:  # nothing above says how they differ; their files' names do
            mark = sha256(run.samples.encode()).hexdigest()[:HASH_DIGITS]
            label.settings = ", ".join(filter(None, (label.settings, f"run {mark}")))
    return labels


def _distinguished(
    runs: Sequence[Run], names: Sequence[str], words: dict[str, Callable[[Any], str]]
) -> list[str]:
    """Put behind names that several runs have, in brackets, what distinguishes the runs."""
    shown: dict[str, list[str]] = {}
    for name in set(names):
        namesakes = [run for run, own in zip(runs, names, strict=True) if own == name]
        shown[name] = []
        for field in words:  # only those that distinguish what the ones before do not
            if len(_values(namesakes, [*shown[name], field])) > len(_values(namesakes, shown[name])):
                shown[name].append(field)
    distinguished = []
    for run, name in zip(runs, names, strict=True):
        told = ", ".join(filter(None, (words[field](getattr(run, field)) for field in shown[name])))
        distinguished.append(f"{name} ({told})" if told else name)
    return distinguished


def _values(runs: Sequence[Run], fields: Sequence[str]) -> set[tuple[Any, ...]]:
    return {tuple(getattr(run, field) for field in fields) for run in runs}


def _differs(runs: Sequence[Run], field: str) -> bool:
    values = {getattr(run, field) for run in runs}
    if field in ONLY_IF_SAMPLED:
        values.discard(None)
    return len(values) > 1


def strategy_label(strategy: str, expert_names: Sequence[str]) -> str:
    """Name a strategy: `single:0` with the expert's name; others unchanged."""
    kind, _, index = strategy.partition(":")
    return f"{strategy} ({expert_names[int(index)]})" if kind == "single" else strategy


def expert_label(index: int, expert_names: Sequence[str]) -> str:
    """Call an expert by its number and its name."""
    return f"{index} {expert_names[index]}"


def benchmark_label(benchmark: str, mini: bool = False, dataset_file: str | None = None) -> str:
    """Name a data set; one that was read from a file of the user's own by that file's name, too."""
    whole = NAMES[benchmark] + (" mini" if mini else "")
    return whole if dataset_file is None else f"{whole} (file {dataset_file})"


def sampling_label(n_samples: int, temperature: float) -> str:
    return "greedy" if temperature == 0 else f"{n_samples} samples a task at temperature {temperature:g}"


def analysis_label(summary: dict[str, Any]) -> str:
    """Say in a line what an analysis is of: model, benchmark and tasks."""
    benchmark = benchmark_label(summary["benchmark"], summary["mini"], summary.get("dataset_file"))
    tasks = summary["subset"] or f"all {summary['num_tasks']} tasks"
    return f"{summary['model_label']} on {benchmark}, {tasks}"


def one_line_names(
    records: Sequence[dict[str, Any]], always: Sequence[str] = (), columns: Sequence[str] = COLUMNS
) -> list[str]:
    """Name each row of the table of scores by the columns `always` and those in which rows differ."""
    spelt = {
        "tasks": lambda tasks: f"{tasks} tasks" if tasks.isdecimal() else tasks,
        "samples a task": lambda count: f"{count} sample{'s' if count != 1 else ''} a task",
    }
    several = [name for name in columns if name in always or len({record[name] for record in records}) > 1]
    return [
        ", ".join(filter(None, (spelt.get(name, str)(record[name]) for name in several)))
        for record in records
    ]


__all__ = [
    "RunLabel",
    "analysis_label",
    "benchmark_label",
    "expert_label",
    "one_line_names",
    "run_labels",
    "sampling_label",
    "strategy_label",
]
