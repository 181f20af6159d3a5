"""The labels of a folder's runs in tables, figures and pages, no two of them the same; and how each was run, in words.

What distinguishes a run is in its label only where runs differ in it.
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
# Of the table of scores, the columns that say which run a row is of, in the order of `RunLabel` ...
LABEL_COLUMNS = ("model", "routing strategy", "benchmark", "tasks", "samples a task", "settings")
# ... and of a name in one line.
COLUMNS = ("routing strategy", "model", "benchmark", "tasks", "samples a task", "settings")
MOST_MODELS = 3  # that a title names
MARKED = ("router", "best")  # the strategies by which the gate chooses, which readers look for

# Fields of a run and their words, by the part of the label that they belong to. Those of `MODEL` are shown
# where they distinguish models of one name, those of `DATA` benchmarks of one name, those of `SETTINGS` where
# any two runs differ.
MODEL: dict[str, Callable[[Any], str]] = {
    "backend": str,
    "model_revision": lambda commit: f"commit {commit[:HASH_DIGITS]}" if commit else "",
    "model_sha256": lambda digest: f"files {digest[:HASH_DIGITS]}" if digest else "",
}
DATA: dict[str, Callable[[Any], str]] = {
    "dataset_file": lambda file: f"file {file}" if file else "",
    "benchmark": lambda benchmark: f"in the format of {NAMES[benchmark]}",
    "mini": lambda mini: "mini" if mini else "",
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
            benchmark=benchmark_label(run.benchmark, run.mini, run.dataset_file, len(run.task_ids)),
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
    seen = [_as_seen(label) for label in labels]
    for run, label, text in zip(runs, labels, seen, strict=True):
        if seen.count(text) > 1:  # nothing above says how they differ; their files' names do
            mark = sha256(run.samples.encode()).hexdigest()[:HASH_DIGITS]
            label.settings = ", ".join(filter(None, (label.settings, f"run {mark}")))
    return labels


def _as_seen(label: RunLabel) -> str:
    """Return the label's text as pages show it: one space for any white space."""
    return " ".join("\n".join(map(str, label.cells())).split())


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


def benchmark_label(benchmark: str, mini: bool, dataset_file: str | None, num_tasks: int) -> str:
    """Name a data set. Problems from the user's own file are no benchmark, and do not have its name."""
    if dataset_file is not None:
        return f"own problems ({num_tasks})"
    return NAMES[benchmark] + (" mini" if mini else "")


def data_label(benchmark: str, tasks: str) -> str:
    """Join the label of a data set and of its tasks, a number of which is not said twice."""
    if f"({tasks})" in benchmark:
        return benchmark
    return f"{benchmark}, {tasks} tasks" if tasks.isdecimal() else f"{benchmark}, {tasks}"


def sampling_label(n_samples: int, temperature: float) -> str:
    return "greedy" if temperature == 0 else f"{n_samples} samples a task at temperature {temperature:g}"


def analysis_label(summary: dict[str, Any]) -> str:
    """Say in a line what an analysis is of: model, benchmark and tasks."""
    count = summary["num_tasks"]
    benchmark = benchmark_label(summary["benchmark"], summary["mini"], summary.get("dataset_file"), count)
    if summary["subset"] is not None or summary.get("dataset_file") is None:
        benchmark += f", {summary['subset'] or f'all {count} tasks'}"
    return f"{summary['model_label']} on {benchmark}"


def describe_runs(runs: Sequence[Run]) -> str:
    """Say in a line which models' runs these are, and on what."""
    return f"{first_of([run.model_label for run in runs])} on {data_of_runs(runs)}"


def data_of_runs(runs: Sequence[Run]) -> str:
    """Say what runs are on: data, tasks, sampling and dtype, each combination once."""
    parts = []
    for run in runs:
        benchmark = benchmark_label(run.benchmark, run.mini, run.dataset_file, len(run.task_ids))
        sampling = sampling_label(run.n_samples, run.temperature)
        parts.append(
            f"{data_label(benchmark, run.subset or str(len(run.task_ids)))}, {sampling}, {run.dtype}"
        )
    return "; ".join(dict.fromkeys(parts))


def first_of(labels: Sequence[str], most: int = MOST_MODELS) -> str:
    """Name the first of some models, and say how many more there are."""
    labels = list(dict.fromkeys(labels))
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def run_facts(run: Run) -> dict[str, str]:
    """Say in words how a run was made; what is not known of it is left out."""
    own_file = run.dataset_file and f"own file {run.dataset_file}, in the format of {NAMES[run.benchmark]}"
    attention = run.attn_implementation and f"{run.attn_implementation} attention"
    facts = {
        "model": run.model,
        "format": run.model_format,
        "commit": run.model_revision,
        "its files (SHA-256)": run.model_sha256,
        "base model": run.base_model,
        "experts": ", ".join(run.expert_names),
        "routing strategy": run.routing_strategy,
        "problems": own_file or benchmark_label(run.benchmark, run.mini, None, 0),
        "tasks": run.subset or f"all {len(run.task_ids)}",
        "hash of the problems": run.dataset_hash,
        "sampling": _sampling(run),
        "length": f"at most {run.max_new_tokens:,} new tokens a sample",
        "ends of samples": ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in run.stops.items()
        ),
        "prompts": "without a chat template"
        if run.force_base_prompt
        else "in the model's chat template, if it has one",
        "computed by": ", ".join(filter(None, (run.backend, run.dtype, attention))),
        "batch size": run.batch_size and f"{run.batch_size:,}",
        "device": run.device,
        "time to generate": None if run.seconds is None else duration(run.seconds),
        "speed": run.tokens_per_second and f"{run.tokens_per_second:,.1f} tokens a second",
        "most memory": run.peak_memory and f"{run.peak_memory / 2**30:.1f} GiB",
        "samples": run.samples,
        "samples (SHA-256)": run.samples_sha256,
        "results": run.results,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    return {name: value for name, value in facts.items() if value}


def _sampling(run: Run) -> str:
    drawn = [
        f"top_p {run.top_p:g}" if run.top_p is not None else "",
        f"seed {run.seed}" if run.seed is not None else "",
    ]
    return ", ".join(filter(None, (sampling_label(run.n_samples, run.temperature), *drawn)))


def duration(seconds: float) -> str:
    """Say a time in the two largest of its units."""
    if seconds < 10:
        return f"{seconds:.1f} seconds"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{_count(hours, 'hour')} {_count(minutes, 'minute')}"
    return f"{_count(minutes, 'minute')} {_count(rest, 'second')}" if minutes else _count(rest, "second")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'s' if number != 1 else ''}"


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
    "LABEL_COLUMNS",
    "MARKED",
    "RunLabel",
    "analysis_label",
    "benchmark_label",
    "data_label",
    "data_of_runs",
    "describe_runs",
    "duration",
    "expert_label",
    "first_of",
    "one_line_names",
    "run_facts",
    "run_labels",
    "sampling_label",
    "strategy_label",
]
