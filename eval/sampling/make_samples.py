"""One samples file from beginning to end: what is asked, what exists, what is missing, EvalPlus's files.

The processes of `accelerate launch` share the missing samples; the main one writes the files.
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError

from ..evalplus_bridge.data import Benchmark
from ..scoring.sanitizing import sanitize_programs
from .batch_decoding import LAST_POSITION, Row
from .loading import FoundModel
from .run_record import LOCKS, Run, file_sha256, read_runs, write_run
from .sample_journal import SampleJournal, Samples
from .speed import SpeedMeter, peak_memory


# Called with the number of samples that are done, and of all.
Progress = Callable[[int, int], None]
# `batch_decoding.decode_rows` with its model and tokenizer, or the same by another engine.
Decode = Callable[..., Any]


def make_samples(
    run: Run,
    benchmark: Benchmark,
    model: FoundModel,
    load: Callable[[], Decode],
    *,
    batch_size: int,
    overwrite: bool = False,
    state: Any = None,
    progress: Progress | None = None,
    tell_speed: Callable[[float, float], None] | None = None,
    sanitize: Callable[..., list[str]] = sanitize_programs,
) -> Run:
    """Generate what is missing of a run's samples, and write EvalPlus's files and the record.

    Args:
        run: what is wanted; its folder may hold the same run, finished or not.
        model: where the samples come from; `load` loads it, and is not called when nothing is missing.
        overwrite: throw away what another run left under the same name, instead of refusing.
        state: accelerate's `PartialState` where several processes share the work.
        tell_speed: is told tokens a second and the seconds that are left, of this process.
        sanitize: `sanitize_programs`, with its `workers` and `progress`.

    Returns:
        The run with its samples' hash, on every process.

    Raises:
        InputError: the folder holds another run, or other samples, under the same name, or another command is
            making them just now.
    """
    process, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    with _alone(run, process):
        return _make(
            run,
            benchmark,
            model,
            load,
            batch_size,
            overwrite,
            state,
            process,
            processes,
            progress,
            tell_speed,
            sanitize,
        )


def _make(
    run: Run,
    benchmark: Benchmark,
    model: FoundModel,
    load: Callable[[], Decode],
    batch_size: int,
    overwrite: bool,
    state: Any,
    process: int,
    processes: int,
    progress: Progress | None,
    tell_speed: Callable[[float, float], None] | None,
    sanitize: Callable[..., list[str]],
) -> Run:
    from ..evalplus_bridge.decoder import ask

    tell = progress or (lambda done, total: None)
    journal = SampleJournal(run.samples_path, process)
    recorded = _claim(run, journal, overwrite) if process == 0 else None
    _wait(state)
    recorded = recorded or _recorded(run)
    if recorded.has_samples:
        _wait(state)
        if process == 0:
            journal.remove()  # left by a process that ended just then
        return recorded
    tokenizer = model.load_tokenizer()
    decoder = {
        "temperature": run.temperature,
        "max_new_tokens": run.max_new_tokens,
        "force_base_prompt": run.force_base_prompt,
    }
    questions, stop_strings = ask(benchmark, tokenizer, **decoder)
    there = journal.read()
    rows = _missing(run, questions, there)[process::processes]
    _wait(state)  # no process adds a sample before all have seen which are missing
    meter = None
    if rows:
        decode = load()
        meter = SpeedMeter(len(rows), run.max_new_tokens, tell_speed)
        journal.begin()
        done = count(len(there) + 1)
        tell(len(there), len(there) + len(rows))

        def finished(row: Row, tokens: list[int], stop: str) -> None:
            journal.add(row.task_id, row.sample, tokens, stop)
            meter.finished += 1
            tell(next(done), len(there) + len(rows))

        decode(
            rows,
            finished,
            stop_strings=stop_strings,
            batch_size=batch_size,
            seed=run.seed or 0,
            stepped=meter.add,
            **questions[0].generation,
            **({"routing_strategy": run.routing_strategy} if model.is_mixture else {}),
        )
    _wait(state)
    if process == 0:
        if meter is not None and not there:
            _record_speed(recorded, meter, journal.read())
        _finish(recorded, benchmark, tokenizer, journal, sanitize, decoder)
    _wait(state)
    return recorded if process == 0 else _recorded(run)


def _record_speed(recorded: Run, meter: SpeedMeter, samples: Samples) -> None:
    """Record what all processes together did, of samples that were made without an interruption."""
    recorded.seconds = meter.seconds()
    tokens = sum(len(sample.tokens) for sample in samples.values())
    recorded.tokens_per_second = round(tokens / recorded.seconds, 2)
    if recorded.backend != "vllm":  # whose engine takes what it may
        recorded.peak_memory = peak_memory()


@contextmanager
def _alone(run: Run, process: int) -> Iterator[None]:
    """Keep other commands from making the same samples file; the lock of a killed process is free."""
    from ..evalplus_bridge.decoder import unfinished_files

    if process:
        yield  # the first process holds it for all of a command's
        return
    path = run.folder / LOCKS / f"{run.samples.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another command is making {run.samples_path} just now; wait for it, or choose another -o"
        ) from None
    try:
        shutil.rmtree(unfinished_files(run.samples_path), ignore_errors=True)  # a killed command's
        yield
    finally:
        lock.release()


def _claim(run: Run, journal: SampleJournal, overwrite: bool) -> Run:
    """Record what is about to be made, or find that it was begun or finished before.

    Raises:
        InputError: something else has the name.
    """
    before = next((other for other in read_runs(run.folder) if other.samples == run.samples), None)
    differences = [] if before is None else before.differences(run)
    problem = None
    if not run.samples_path.exists() and not journal.paths():
        pass  # a run that was begun, and ended before its first sample, binds no other
    elif before is None:
        problem = "which no benchmark recorded"
    elif differences:
        problem = f"of another run ({'; '.join(differences)})"
    elif before.samples_sha256 is not None and not before.has_samples and run.samples_path.exists():
        problem = "which changed since they were made"
    if problem is not None and not overwrite:
        raise InputError(
            f"{run.samples_path} holds samples {problem}; choose another -o, or throw them away with --overwrite"
        )
    usable = before is not None and not differences and (before.samples_sha256 is None or before.has_samples)
    if problem is None and usable:
        return before
    for path in (run.samples_path, run.raw_samples_path, run.results_path):
        path.unlink(missing_ok=True)
    journal.remove()
    write_run(run)
    return run


def _recorded(run: Run) -> Run:
    return next(other for other in read_runs(run.folder) if other.samples == run.samples)


def _missing(run: Run, questions: list, there: dict) -> list[Row]:
    """List the rows that have no sample yet, ordered to spread the long ones evenly over processes."""
    rows = []
    for place, question in enumerate(questions):
        for sample in range(run.n_samples):
            expert_id = None
            if run.routing_strategy == "round_robin":
                # The turn that each sample has in EvalPlus's own order.
                expert_id = (place * run.n_samples + sample) % len(run.expert_names)
            if (question.task_id, sample) not in there:
                rows.append(Row(question.task_id, sample, question.input_ids, expert_id))
    return sorted(rows, key=lambda row: len(row.input_ids), reverse=True)


def _finish(
    recorded: Run,
    benchmark: Benchmark,
    tokenizer: Any,
    journal: SampleJournal,
    sanitize: Callable[..., list[str]],
    decoder: dict[str, Any],
) -> None:
    from ..evalplus_bridge.decoder import write_samples

    samples = journal.read()
    lacking = recorded.n_samples * len(benchmark.tasks) - len(samples)
    if lacking:
        raise FailureError(f"{recorded.samples_path} lacks {lacking} samples; run the same command again")
    recorded.stops = _stops(recorded, samples)
    completions = {name: sample.tokens for name, sample in samples.items()}
    keep = partial(sanitize, kept=journal.sanitized_path)
    write_samples(
        recorded.samples_path, benchmark, tokenizer, completions, recorded.n_samples, keep, **decoder
    )
    recorded.samples_sha256 = file_sha256(recorded.samples_path)
    recorded.raw_samples_sha256 = file_sha256(recorded.raw_samples_path)
    write_run(recorded)
    journal.remove()  # last: what they held is safe now


def _stops(run: Run, samples: Samples) -> dict[str, int]:
    """Count samples by why they ended; a model's last position cuts them off, too."""
    stops = Counter(sample.stop for sample in samples.values() if sample.stop is not None)
    if stops[LAST_POSITION]:
        message = (
            f"{stops[LAST_POSITION]} of {len(samples)} samples of {run.samples} ended at the model's last position, "
            f"before --max_new_tokens {run.max_new_tokens}"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=4)
    return dict(sorted((reason, count) for reason, count in stops.items() if count))


def _wait(state: Any) -> None:
    if state is not None and state.num_processes > 1:
        state.wait_for_everyone()


def samples_name(label: str, backend: str, strategy: str, benchmark: Benchmark, temperature: float) -> str:
    """Make EvalPlus's name of a samples file with the strategy in it, `<benchmark>/<identifier>.jsonl`."""
    parts = [label, backend, strategy.replace(":", "-"), "temp", str(temperature)]
    if benchmark.mini:
        parts.append("mini")
    if benchmark.id_range is not None:
        parts += ["tasks", *map(str, benchmark.id_range)]
    elif benchmark.subset is not None:
        parts += ["first", str(len(benchmark.tasks))]
    return (Path(benchmark.name) / ("_".join(parts) + ".jsonl")).as_posix()


__all__ = ["make_samples", "samples_name"]
