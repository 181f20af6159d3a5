"""Scores models with EvalPlus: every model x strategy x benchmark, each model loaded once.

Prompts, stops, trimming and scoring are EvalPlus's own. `sampling` makes the samples, `scoring` scores them;
here is the order of the work.
"""

from __future__ import annotations

from .front_door import run_command


if __name__ == "__main__":  # before what takes long is imported, which `--help` can do without
    run_command("benchmark")

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError, one_line
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.sources.hub_and_folders import check_source
from dylora_moe.hub_export.staging import check_room

from .evalplus_bridge.data import Benchmark, canonical_benchmark, load_benchmark
from .evalplus_bridge.tokenizer_round_trip import warn_of_tokenizer
from .options import DEFAULT_FOLDER, BenchmarkOptions
from .progress import Progress, TellSpeed, told
from .sampling.batch_decoding import decode_rows
from .sampling.devices import check_device_map
from .sampling.generation_options import refuse_for_vllm, refuse_options
from .sampling.loading import FoundModel, distinct_labels, find_model
from .sampling.make_samples import Decode, make_samples, samples_name
from .sampling.run_record import Run, check_results_folder, file_sha256, open_results, write_run
from .sampling.vllm_decoding import VllmDecoder, check_vllm, vllm_decoder
from .scoring.sanitizing import sanitize_programs


# How long a process waits for the others, which may have longer samples: NCCL's own ten minutes are too few.
PATIENCE = timedelta(days=7)
RECORDED_PACKAGES = ("dylora-moe", "torch", "transformers", "accelerate", "evalplus")

# Of one new token, in the journal and in EvalPlus's three files: its number, and its text three times.
BYTES_A_TOKEN = 24


@dataclass
class BenchmarkResult:
    """What `benchmark` returns: its runs in the order model, benchmark, strategy; `folder` holds their files."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "runs": [run.to_dict() for run in self.runs]}


def benchmark(
    models: str | Path | Sequence[str | Path | None] | None,
    *,
    benchmarks: str | Sequence[str] = ("humaneval",),
    strategies: str | Sequence[str] | None = None,
    output_dir: str | Path = DEFAULT_FOLDER,
    score: bool = True,
    keep_model: bool = False,
    progress: Progress | None = None,
    tell_speed: TellSpeed | None = None,
    **options: Any,
) -> BenchmarkResult:
    """Make and score the samples of every model x strategy x benchmark, those that the folder lacks.

    Under `accelerate launch` the processes share the tasks, and the first one scores.

    Args:
        models: sources; None where `adapter_path` and `base_model` say it all.
        strategies: routing strategies, of mixtures; each one's own default unless given.
        score: whether to score; otherwise only samples are made.
        progress: is told what is being done, and how much of it; `tell_speed` how fast samples are made.
        keep_model: whether the last model stays in memory for the next call (not vLLM's); `forget_model`
            frees it.
        options: see `BenchmarkOptions`.

    Raises:
        InputError: an option, a source or a strategy that cannot be used, or a folder that holds another run.
        FailureError: the work failed, or the disk has no room for the samples.
    """
    check_packages("evalplus")
    chosen = BenchmarkOptions.of(options, benchmark)
    # Everything that may be wrong is checked before anything long begins, what takes no time first.
    names = [benchmarks] if isinstance(benchmarks, str) else list(benchmarks)
    names = list(dict.fromkeys(map(canonical_benchmark, names)))
    sources, folder = _as_list(models), Path(output_dir)
    for source in (*sources, *_as_list(chosen.adapter_path)):
        if source is not None:
            check_source(source)
    check_results_folder(folder)
    check_device_map(chosen.device_map)
    if chosen.backend == "vllm":
        check_vllm()
    if score:
        _check_settings(chosen)
    state = _processes()
    # What EvalPlus downloads is written in place: no process may read half of it.
    with state.local_main_process_first():
        sets = [
            load_benchmark(name, mini=chosen.mini, id_range=chosen.id_range, limit=chosen.limit)
            for name in names
        ]
    wanted = [strategies] if isinstance(strategies, str) else strategies
    with told(progress, "reading the models" if len(sources) > 1 else "reading the model"):
        found = distinct_labels([find_model(source, **chosen.of_source) for source in sources])
    mixtures = any(model.is_mixture for model in found)
    # Beside a mixture an ordinary model is there to compare with, whatever is wanted of the mixture.
    plans = [
        (model, model.strategies(wanted if model.is_mixture or not mixtures else None)) for model in found
    ]
    for model in found:
        settings = model.generation_settings()
        refuse_options(settings, model.source)
        if model.backend == "vllm":
            refuse_for_vllm(settings, chosen.temperature > 0, model.source)
        model.check_base_model()
    _check_room(folder, plans, sets, chosen)
    _check_folder(folder, found)
    result = BenchmarkResult(folder)
    for model, routing_strategies in plans:
        result.runs += _runs_of(
            model, routing_strategies, sets, folder, chosen, state, keep_model, progress, tell_speed
        )
    if score and state.is_main_process:
        result.runs = [_score(run, chosen, progress) for run in result.runs]
    return result


def _as_list(models: Any) -> list[Any]:
    if models is None or isinstance(models, str | Path):
        return [models]
    return list(models) or [None]


def _processes() -> Any:
    """Return accelerate's state, told if the processes are on CPUs; else they do not know of each other."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def _check_settings(options: BenchmarkOptions) -> None:
    from .scoring.check_workers import check_start
    from .scoring.scoring import check_settings

    check_settings(options.sandbox)
    check_start(options.sandbox)


def _check_room(
    folder: Path,
    plans: Sequence[tuple[FoundModel, list[str]]],
    sets: Sequence[Benchmark],
    options: BenchmarkOptions,
) -> None:
    """Check that the disk has room for the samples that are to be made, if all are as long as they may be."""
    names = [
        (samples_name(model.label, model.backend, strategy, data, options.temperature), len(data.tasks))
        for model, strategies in plans
        for strategy in strategies
        for data in sets
    ]
    num_samples = sum(count for name, count in names if not (folder / name).exists()) * options.n_samples
    num_bytes = num_samples * options.max_new_tokens * BYTES_A_TOKEN
    remedy = "choose another -o, or a lower --n_samples or --max_new_tokens"
    check_room(folder, num_bytes, remedy, f"{num_samples} samples as long as they may be take")


def _check_folder(folder: Path, models: Sequence[FoundModel]) -> None:
    for model in models:
        # Its files would be the model's, whose hash says whether it is still the same.
        if folder.resolve() in (model.folder.resolve(), Path(model.source).resolve()):
            raise InputError(f"-o {folder} is the model's own folder; choose another, it may lie in it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder} cannot be made: {one_line(error)}") from error
    open_results(folder)


def _runs_of(
    model: FoundModel,
    strategies: Sequence[str],
    sets: Sequence[Benchmark],
    folder: Path,
    options: BenchmarkOptions,
    state: Any,
    keep_model: bool,
    progress: Progress | None,
    tell_speed: TellSpeed | None,
) -> Iterator[Run]:
    """Make the samples of one model, which is loaded when the first of them is missing."""
    with told(progress, f"computing checksums of {model.label}"):
        _ = model.files
    with ExitStack() as loaded:

        @cache
        def load() -> Decode:
            with told(progress, f"loading {model.label}"):
                return load_now()

        def load_now() -> Decode:
            if model.backend == "vllm":
                tokenizer = model.load_tokenizer()
                decode = loaded.enter_context(_by_vllm(model, tokenizer, strategies, sets, options)).decode
            else:
                load_model = model.load_once if keep_model else model.load
                found = load_model(
                    dtype=options.dtype,
                    device=state.device,
                    device_map=options.device_map,
                    attn_implementation=options.attn_implementation,
                )
                tokenizer, decode = found.tokenizer, partial(decode_rows, found.model, found.tokenizer)
            if state.is_main_process:
                warn_of_tokenizer(model.label, tokenizer, sets, options.force_base_prompt)
            return decode

        for data in sets:
            for strategy in strategies:
                run = _describe(model, strategy, data, folder, options, state)
                what = f"{model.label}, {strategy}, {data.name}"
                tell = None if progress is None else partial(progress, what)
                sanitizing = None if progress is None else partial(progress, f"sanitizing {what}")
                yield make_samples(
                    run,
                    data,
                    model,
                    load,
                    batch_size=options.batch_size,
                    overwrite=options.overwrite,
                    state=state,
                    progress=tell,
                    tell_speed=None if tell_speed is None else partial(tell_speed, what),
                    sanitize=partial(
                        sanitize_programs,
                        workers=options.parallel or os.cpu_count() or 1,
                        progress=sanitizing,
                    ),
                )


def _by_vllm(
    model: FoundModel,
    tokenizer: Any,
    strategies: Sequence[str],
    sets: Sequence[Benchmark],
    options: BenchmarkOptions,
) -> AbstractContextManager[VllmDecoder]:
    """Start an engine with positions for the longest prompt of all data sets."""
    from .evalplus_bridge.decoder import ask

    lengths = [
        len(question.input_ids)
        for data in sets
        for question in ask(
            data,
            tokenizer,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            force_base_prompt=options.force_base_prompt,
        )[0]
    ]
    return vllm_decoder(
        model,
        tokenizer,
        strategies,
        max(lengths),
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        tensor_parallel_size=options.tensor_parallel_size,
    )


def _describe(
    model: FoundModel, strategy: str, data: Benchmark, folder: Path, options: BenchmarkOptions, state: Any
) -> Run:
    sampled = options.temperature > 0
    return Run(
        folder=folder,
        samples=samples_name(model.label, model.backend, strategy, data, options.temperature),
        model=model.source,
        model_label=model.label,
        model_sha256=model.sha256,
        model_files=model.files,
        model_revision=model.revision,
        base_model=model.base_model,
        model_format=model.format,
        expert_names=model.expert_names,
        backend=model.backend,
        routing_strategy=strategy,
        benchmark=data.name,
        mini=data.mini,
        dataset_hash=data.dataset_hash,
        dataset_file=data.file,
        task_ids=data.task_ids,
        subset=data.subset,
        n_samples=options.n_samples,
        temperature=options.temperature,
        top_p=0.95 if sampled else None,
        seed=options.seed if sampled else None,
        max_new_tokens=options.max_new_tokens,
        dtype=options.dtype,
        attn_implementation=None if model.backend == "vllm" else options.attn_implementation,
        force_base_prompt=options.force_base_prompt,
        batch_size=options.batch_size,
        device=_device_name(state.device),
        versions=_versions(model.backend),
    )


def score_run(
    run: Run,
    *,
    base_only: bool = False,
    parallel: int | None = None,
    sandbox: bool = False,
    progress: Callable[[int, int], None] | None = None,
    tell_expected: Callable[[int, int], None] | None = None,
) -> Run:
    """Score a run's samples and record it, unless that was done and nothing has changed since.

    Results in which checks had no verdict are never final: they are made again.

    Raises:
        InputError, FailureError: as `score_samples`.
    """
    from .scoring.scoring import lost_checks, pass_at_k, score_samples

    if run.has_results and run.base_only <= base_only and not lost_checks(run.results_path):
        return run
    run.results_path.unlink(missing_ok=True)  # EvalPlus would take it for these samples'
    path = score_samples(
        run.samples_path,
        run.benchmark,
        task_ids=run.task_ids if run.subset else None,
        mini=run.mini,
        base_only=base_only,
        parallel=parallel,
        sandbox=sandbox,
        progress=progress,
        tell_expected=tell_expected,
    )
    scored = replace(
        run,
        results=path.relative_to(run.folder).as_posix(),
        results_sha256=file_sha256(path),
        base_only=base_only,
        scores=pass_at_k(path),
    )
    write_run(scored)
    return scored


def _score(run: Run, options: BenchmarkOptions, progress: Progress | None) -> Run:
    what = f"scoring {run.model_label}, {run.routing_strategy}, {run.benchmark}"
    return score_run(
        run,
        base_only=options.base_only,
        parallel=options.parallel,
        sandbox=options.sandbox,
        progress=None if progress is None else partial(progress, what),
        tell_expected=None
        if progress is None
        else partial(progress, f"computing expected outputs of {run.benchmark}"),
    )


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


@cache
def _versions(backend: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            found[name] = one_line(error)
    if backend == "vllm":
        from vllm import __version__  # its packages have several names

        found["vllm"] = __version__
    return found


__all__ = ["BenchmarkOptions", "BenchmarkResult", "benchmark", "score_run"]
