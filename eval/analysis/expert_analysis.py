"""What each expert of a mixture is good at on a benchmark, and whether its router is worth having.

    expert_analysis.json    every figure, from pass@1 to the verdict in words: see `docs/report-files.md`

Reads what `benchmark` left in its folder, and has it make what is missing. `expert_statistics` computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.repo.choices import long_dtype
from dylora_moe.hub_export.repo.results import TaskResult, read_results
from dylora_moe.hub_export.staging import write_atomically

from ..benchmark import benchmark
from ..evalplus_bridge.data import canonical_benchmark, load_benchmark
from ..options import DEFAULT_FOLDER, OF_SOURCE, BenchmarkOptions
from ..progress import Progress, TellSpeed
from ..sampling.devices import check_device_map
from ..sampling.loading import FoundModel, find_model
from ..sampling.run_record import DECISIVE, Run, check_results_folder, read_versioned, scored_mixtures
from .expert_statistics import CONFIDENCE, ROUTER, figures, strategies_of
from .files import EXPERTS_FILE, EXPERTS_VERSION, ROUTING_FILE, ROUTING_VERSION
from .task_categories import categories_of


# What is the same in all runs that may be compared.
SAME = (*(name for name in DECISIVE if name != "routing_strategy"), "mini")
DESCRIBED = (
    "model",
    "model_label",
    "model_sha256",
    "model_revision",
    "model_format",
    "expert_names",
    "benchmark",
    "mini",
    "subset",
    "dataset_hash",
    "dataset_file",
    "n_samples",
    "temperature",
    "top_p",
    "seed",
    "max_new_tokens",
    "dtype",
)


@dataclass(frozen=True)
class ExpertAnalysis:
    """What was written, and where; `summary` is the content of `expert_analysis.json`.

    docs/report-files.md lists its fields.
    """

    output_dir: Path
    summary: dict[str, Any]

    @property
    def summary_path(self) -> Path:
        return self.output_dir / EXPERTS_FILE

    def to_dict(self) -> dict[str, Any]:
        return self.summary


def expert_analysis(
    model: str | Path | list[str] | None = None,
    *,
    dataset: str = "humaneval",
    output_dir: str | Path = DEFAULT_FOLDER,
    base_model: str | None = None,
    progress: Progress | None = None,
    tell_speed: TellSpeed | None = None,
    **benchmark_options: Any,
) -> ExpertAnalysis:
    """Compare every expert alone, `base`, `uniform`, `ensemble`, and with a router `router` and `best`.

    What `benchmark` left in `output_dir` with the same options is used, and what is missing is made. Under
    `accelerate launch` the processes share that work; the first one analyses, and the others return an empty
    summary.

    Args:
        model: a mixture, as for `benchmark`. Where neither it nor `adapter_path` is given, the folder alone
            is read: it must hold the results of one mixture, all of them, and nothing is made.
        base_model, progress, tell_speed, benchmark_options: as for `benchmark`.

    Raises:
        InputError: a model without experts, a source or option that cannot be used, or, without a model, a
            folder whose results do not suffice.
        FailureError: the work failed.
    """
    check_packages("evalplus", "scipy")
    BenchmarkOptions.check_names(benchmark_options, expert_analysis)
    folder, dataset = Path(output_dir), canonical_benchmark(dataset)
    check_results_folder(folder)
    source = _one_model(model)
    if source is None and benchmark_options.get("adapter_path") is None:
        runs, trace = _runs_in(folder, dataset, benchmark_options), None
    else:
        options = {"base_model": base_model, **benchmark_options}
        told = {"progress": progress, "tell_speed": tell_speed}
        check_device_map(options.get("device_map"))
        found = find_model(source, **{name: options[name] for name in OF_SOURCE if name in options})
        runs = _runs_of(found, source, dataset, folder, {**options, **told})
        if not PartialState().is_main_process:
            return ExpertAnalysis(folder, {})
        trace = partial(_trace_router, source, dataset, folder, {**options, **told})
        if found.config.routes_by_layer:
            trace = None  # a routing analysis reads a gate
    choices = _router_choices(runs[ROUTER], folder, trace) if ROUTER in runs else None
    summary = analyse(runs, choices)
    write_atomically(folder / EXPERTS_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return ExpertAnalysis(folder, summary)


def analyse(runs: Mapping[str, Run], choices: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compute the content of `expert_analysis.json`.

    Args:
        runs: scored, one for each of `strategies_of`, in that order.
        choices: of `_router_choices`.
    """
    run = next(iter(runs.values()))
    results = {strategy: _results(of_strategy) for strategy, of_strategy in runs.items()}
    categories = _categories(run)
    known = {
        "task_ids": run.task_ids,
        "categories": categories,
        "expert_names": run.expert_names,
        "n_samples": run.n_samples,
    }
    tests = {
        "base": figures({name: [task.base for task in tasks] for name, tasks in results.items()}, **known)
    }
    if all(task.plus is not None for tasks in results.values() for task in tasks):
        tests["plus"] = figures(
            {name: [task.plus for task in tasks] for name, tasks in results.items()}, **known
        )
    headline = "plus" if "plus" in tests else "base"
    return {
        "format_version": EXPERTS_VERSION,
        **{name: getattr(run, name) for name in DESCRIBED},
        "has_router": ROUTER in runs,
        "num_tasks": len(run.task_ids),
        "confidence": CONFIDENCE,
        "runs": {
            strategy: {name: getattr(of_strategy, name) for name in ("samples", "samples_sha256", "results")}
            for strategy, of_strategy in runs.items()
        },
        "headline_tests": headline,
        "verdict": tests[headline]["verdict"],
        "tests": tests,
        "router_choices": None if choices is None else _count_choices(choices, run, categories),
        "tasks": [
            {
                "task_id": task_id,
                "categories": categories[task_id],
                "chosen": choices["chosen"].get(task_id) if choices else None,
                **{
                    kind: {strategy: getattr(tasks[place], kind) for strategy, tasks in results.items()}
                    for kind in tests
                },
            }
            for place, task_id in enumerate(run.task_ids)
        ],
    }


def _one_model(model: Any) -> str | None:
    if isinstance(model, list | tuple):
        if len(model) > 1:
            raise InputError(
                f"{len(model)} models are given, and one mixture is analysed at a time; name its adapters with "
                "--adapter_path"
            )
        model = model[0] if model else None
    return None if model is None else str(model)


def _runs_of(
    found: FoundModel,
    source: str | None,
    dataset: str,
    folder: Path,
    options: dict[str, Any],
) -> dict[str, Run]:
    """Return every strategy's run, making those that are missing."""
    if not found.is_mixture:
        raise InputError(
            f"{found.source} is an ordinary model without experts, so there is nothing to analyse"
        )
    strategies = strategies_of(len(found.expert_names), found.config.has_router)
    made = benchmark([source], benchmarks=[dataset], strategies=strategies, output_dir=folder, **options)
    return {run.routing_strategy: run for run in made.runs}


def _runs_in(folder: Path, benchmark_name: str, options: dict[str, Any]) -> dict[str, Run]:
    """Return the runs of the one mixture whose results a folder holds."""
    there = scored_mixtures(folder, benchmark_name, options)
    groups: dict[str, dict[str, Run]] = {}
    for run in there:
        if not _unlike(run, options):
            key = json.dumps([getattr(run, name) for name in SAME], default=str)
            groups.setdefault(key, {})[run.routing_strategy] = run
    if not groups:
        raise InputError(
            f"{folder} holds no scored run with these options ({'; '.join(_unlike(there[0], options))}); change them, or "
            "name a model with --model to make them"
        )
    if len(groups) > 1:
        first, second = (next(iter(group.values())) for group in list(groups.values())[:2])
        raise InputError(
            f"{folder} holds results of several mixtures or options ({'; '.join(first.differences(second))}); say which "
            "with --model or these options"
        )
    (runs,) = groups.values()
    num_experts = len(next(iter(runs.values())).expert_names)
    strategies = strategies_of(num_experts, has_router=bool({"router", "best"} & set(runs)))
    missing = [strategy for strategy in strategies if strategy not in runs]
    if missing:
        raise InputError(
            f"{folder} lacks results of {', '.join(missing)}; name the model with --model to make them"
        )
    return {strategy: runs[strategy] for strategy in strategies}


def _unlike(run: Run, options: Mapping[str, Any]) -> list[str]:
    """Say in which of the given options a run differs."""
    given = {name: options[name] for name in SAME if options.get(name) is not None}
    if "dtype" in given:
        given["dtype"] = long_dtype(given["dtype"])
    if run.temperature == 0:
        given.pop("seed", None)  # nothing is drawn
    return [
        f"{name} is {getattr(run, name)}, not {value}"
        for name, value in given.items()
        if getattr(run, name) != value
    ]


def _results(run: Run) -> list[TaskResult]:
    """Read the result of every task of a run, in its order."""
    results = read_results(run.results_path)
    missing = [task_id for task_id in run.task_ids if task_id not in results]
    if missing:
        raise InputError(
            f"{run.results_path} lacks {len(missing)} of the run's tasks, {missing[0]} first; score it again"
        )
    return [results[task_id] for task_id in run.task_ids]


def _categories(run: Run) -> dict[str, list[str]]:
    data = load_benchmark(run.benchmark, mini=run.mini)
    if data.dataset_hash != run.dataset_hash:
        raise InputError(
            f"the runs are of a {run.benchmark} data set with hash {run.dataset_hash}, and the one on this machine has "
            f"{data.dataset_hash}; name that file in {run.benchmark.upper()}_OVERRIDE_PATH"
        )
    return {task_id: categories_of(data.tasks[task_id]) for task_id in run.task_ids}


def _router_choices(run: Run, folder: Path, trace: Callable[[str], Any] | None) -> dict[str, Any] | None:
    """Return `chosen` and `expert_shares` by task, from the routing analysis of this run's samples.

    Args:
        trace: makes the routing analysis of a samples file; None if that cannot be, and then neither may be
            known.
    """
    content = _routing_analysis_of(run, folder)
    if content is None and trace is not None:
        trace(run.samples)
        content = _routing_analysis_of(run, folder)
    if content is None:
        return None
    return {
        "chosen": {task["task_id"]: task["chosen"] for task in content["tasks"]},
        "expert_shares": {task["task_id"]: task["expert_shares"] for task in content["tasks"]},
    }


def _routing_analysis_of(run: Run, folder: Path) -> dict[str, Any] | None:
    """Read the routing analysis in the folder, if it is of these very samples and of all the run's tasks."""
    path = folder / ROUTING_FILE
    if not path.is_file():
        return None
    content = read_versioned(path, ROUTING_VERSION, "delete it, and it is made again")
    of_these = (content["samples"], content["samples_sha256"]) == (run.samples, run.samples_sha256)
    traced = {task["task_id"] for task in content["tasks"]}
    return content if of_these and traced >= set(run.task_ids) else None


def _trace_router(
    source: str | None,
    dataset: str,
    folder: Path,
    options: dict[str, Any],
    samples: str,
) -> None:
    from .routing_analysis import routing_analysis

    routing_analysis(source, dataset=dataset, output_dir=folder, samples=samples, **options)


def _count_choices(
    choices: Mapping[str, Any], run: Run, categories: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Count, for every expert, the tasks that are mostly its own, and average its share of the weights."""
    experts = range(len(run.expert_names))

    def counts(task_ids: list[str]) -> list[int]:
        chosen = [choices["chosen"][task_id] for task_id in task_ids]
        return [chosen.count(expert) for expert in experts]

    shares = [choices["expert_shares"][task_id] for task_id in run.task_ids]
    shares = [of_task for of_task in shares if of_task is not None]
    names = dict.fromkeys(category for task_id in run.task_ids for category in categories[task_id])
    mean_shares = None
    if shares:
        mean_shares = [sum(of_task[expert] for of_task in shares) / len(shares) for expert in experts]
    return {
        "counts": counts(run.task_ids),
        "mean_expert_shares": mean_shares,
        "categories": [
            {"category": name, "counts": counts([task for task in run.task_ids if name in categories[task]])}
            for name in names
        ],
    }


__all__ = ["ExpertAnalysis", "analyse", "expert_analysis"]
