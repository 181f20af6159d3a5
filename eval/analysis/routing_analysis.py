"""What the router of a mixture does on a benchmark: which experts act where, how surely and how evenly.

    routing_tasks.jsonl     a line a task: its tokens, the weights at each of them, what follows from these
    routing_analysis.json   the whole set: shares, categories, load balance, agreement; tasks without tokens

Reads the completions that `benchmark` left in its folder, or has it make them. `routing_trace` traces,
`routing_summary` computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.staging import staged_file, write_atomically

from ..benchmark import benchmark
from ..evalplus_bridge.data import Benchmark, canonical_benchmark, load_benchmark
from ..options import DEFAULT_FOLDER, BenchmarkOptions
from ..progress import Progress, TellSpeed, told
from ..sampling.devices import check_device_map
from ..sampling.loading import FoundModel, LoadedModel, find_model
from ..sampling.run_record import Run, check_results_folder, file_sha256
from .files import ROUTING_FILE, ROUTING_TASKS_FILE, ROUTING_VERSION
from .routing_inputs import STRATEGY, Results, read_texts, run_of_router, runs_of
from .routing_summary import RoutingSummary
from .routing_trace import Trace, trace_texts
from .task_categories import categories_of


DIGITS = 4
DESCRIBED = (
    "model",
    "model_label",
    "benchmark",
    "mini",
    "dataset_file",
    "samples",
    "samples_sha256",
    "n_samples",
    "temperature",
    "dtype",
)


@dataclass(frozen=True)
class RoutingAnalysis:
    """What was written, and where; `summary` is the content of `routing_analysis.json`.

    docs/report-files.md lists its fields.
    """

    output_dir: Path
    summary: dict[str, Any]

    @property
    def summary_path(self) -> Path:
        return self.output_dir / ROUTING_FILE

    @property
    def tasks_path(self) -> Path:
        return self.output_dir / ROUTING_TASKS_FILE

    def to_dict(self) -> dict[str, Any]:
        return self.summary


def routing_analysis(
    model: str | Path | None = None,
    *,
    dataset: str = "humaneval",
    output_dir: str | Path = DEFAULT_FOLDER,
    samples: str | None = None,
    progress: Progress | None = None,
    tell_speed: TellSpeed | None = None,
    **options: Any,
) -> RoutingAnalysis:
    """Trace the router over every task's prompt and completion, and sum up.

    The completions are the first sample of each task that the strategy `router` gave. They are taken from
    `output_dir` where a benchmark of the same model left them, for all of its tasks, or those of `id_range`
    and `limit`; otherwise `benchmark` makes them first. What each expert can do alone comes from the runs of
    `single:0` and so on, where that folder holds them for every expert.

    Args:
        model: a source, as for `benchmark`; None where `adapter_path` says it all.
        dataset: "humaneval" or "mbpp".
        samples: which completions, as `run.json` names their file, where the folder may hold several that
            would do.
        progress, tell_speed: as for `benchmark`.
        options: see `BenchmarkOptions`; `batch_size` is that of the traced texts, too. Where there are
            completions already, those that decide how they are made do not count: the trace is in the run's
            own dtype.

    Raises:
        InputError: a model without a router, or a source, an option or a folder that cannot be used.
        FailureError: the work failed.
    """
    check_packages("evalplus", "scipy")
    chosen = BenchmarkOptions.of(options, routing_analysis)
    folder, dataset = Path(output_dir), canonical_benchmark(dataset)
    check_results_folder(folder)
    check_device_map(chosen.device_map)
    found = find_model(model, **chosen.of_source)
    if not (found.is_mixture and found.config.has_router):
        raise InputError(f"{found.source} has no router, so there is no routing to analyse")
    if found.config.routes_by_layer:
        raise InputError(
            f"{found.source} has a router in every layer (arrow), and routing-analysis reads the logits of a gate; "
            "expert-analysis compares `router` and `best` with the experts alone"
        )
    tasks = load_benchmark(dataset, mini=chosen.mini, id_range=chosen.id_range, limit=chosen.limit)
    run, runs = _completions(found, tasks, folder, samples)
    if run is None:
        benchmark(
            model,
            benchmarks=tasks.name,
            strategies=STRATEGY,
            output_dir=folder,
            progress=progress,
            tell_speed=tell_speed,
            **options,
        )
        run, runs = _completions(found, tasks, folder, samples)
    if run is None:
        raise FailureError(
            f"{folder} holds no samples of {found.label}, though it was benchmarked; do that again"
        )
    found.check_base_model()
    with told(progress, f"loading {found.label}"):
        loaded = found.load(
            dtype=run.dtype,
            device=PartialState().device,
            device_map=chosen.device_map,
            attn_implementation=chosen.attn_implementation,
        )
    task_ids = [task_id for task_id in run.task_ids if task_id in tasks.tasks]
    texts = read_texts(run, tasks, task_ids, loaded.tokenizer)
    traces = trace_texts(loaded.model, loaded.tokenizer, texts, batch_size=chosen.batch_size)
    results = Results(run, runs, loaded.expert_names)
    tell = progress or (lambda what, done, total: None)
    tell("routing", 0, len(task_ids))
    traced = _trace(
        traces,
        tasks,
        results,
        loaded,
        folder / ROUTING_TASKS_FILE,
        lambda n: tell("routing", n, len(task_ids)),
    )
    subset = tasks.subset or run.subset
    summary = {**_description(run, loaded), "subset": subset, "tests": results.tests, **traced}
    summary["tasks_sha256"] = file_sha256(folder / ROUTING_TASKS_FILE)
    write_atomically(folder / ROUTING_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return RoutingAnalysis(folder, summary)


def _completions(
    found: FoundModel, tasks: Benchmark, folder: Path, samples: str | None
) -> tuple[Run | None, list[Run]]:
    """Find the run to analyse, if there is one, and every run of this model on this data."""
    runs = runs_of(found, tasks, folder)
    return run_of_router([run for run in runs if samples in (None, run.samples)], tasks), runs


def _trace(
    traces: Iterator[Trace],
    tasks: Benchmark,
    results: Results,
    loaded: LoadedModel,
    path: Path,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """Write each task's line as soon as it is traced, and return what the set as a whole shows."""
    summary = RoutingSummary(loaded.expert_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged, open(staged, "w", encoding="utf-8") as file:
        for number, trace in enumerate(traces, start=1):
            name = trace.text.name
            known = summary.add(
                trace,
                categories_of(tasks.tasks[name]),
                results.passed(name),
                results.experts_passed(name),
            )
            file.write(json.dumps(task_line(known, trace), allow_nan=False, separators=(",", ":")) + "\n")
            done(number)
    return summary.to_dict()


def task_line(known: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """Make a line of `routing_tasks.jsonl`: what is known of the task, and every token."""
    return {
        **_rounded(known),
        "num_prompt_tokens": trace.num_prompt_tokens,
        "tokens": trace.tokens,
        "weights": _rounded(trace.weights.tolist()),
        "gate_probabilities": _rounded(trace.probabilities.tolist()),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        rounded = round(value, DIGITS)
        # 0 and not 0.0, as most weights of a sparse router are
        return int(rounded) if rounded.is_integer() else rounded
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return value


def _description(run: Run, loaded: LoadedModel) -> dict[str, Any]:
    """Describe which samples were traced, and how the model turns logits into weights."""
    dense = loaded.model.routes_densely
    config = loaded.model.config
    return {
        "format_version": ROUTING_VERSION,
        **{name: getattr(run, name) for name in DESCRIBED},
        "expert_names": loaded.expert_names,
        "routing": {
            "mode": "dense" if dense else "sparse",
            "num_experts_per_tok": None if dense else config.num_experts_per_tok,
            "temperature": config.router_temperature if dense else None,
            "router_input": config.router_input,
        },
    }


__all__ = ["RoutingAnalysis", "routing_analysis"]
