"""The whole demo: train, save, export, make variants, score each with stock EvalPlus, show the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.extras import check_packages

from .checkpoint import save_final_checkpoint, save_foundation
from .problems import FAMILIES, load_problems, write_dataset
from .scoring import build_table, caption, folder_name, score_strategies, summarise
from .training import ADAPTERS, Recipe, TrainedParts, train


RESULTS = "results.json"
STARTED = ".dylora-moe-demo"  # tells a folder of ours, finished or not, from any other
LEFT_BEHIND = ("checkpoint", "foundation", "repo", "variants", "evalplus")

DEFAULT_STRATEGY = "router"
STRATEGIES = (
    DEFAULT_STRATEGY,
    "best",
    *(f"single:{index}" for index in range(len(FAMILIES))),
    "ensemble",
    "round_robin",
    "uniform",
    "base",
)


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    console: Console | None = None,
) -> dict:
    """Run the demo into `output_dir`, and return what it writes to results.json.

    A folder that holds a finished demo of this seed is not done again: its table is shown. What an
    interrupted demo left is cleared away first. Any other folder must be empty or absent. The table is
    printed to `console` (standard output unless given), progress to standard error. Raises `InputError` for a
    folder that holds something else or without EvalPlus, and `StockEvalPlusError` when EvalPlus fails.
    """
    folder = Path(output_dir).resolve()
    console = console or Console()
    results = _finished(folder, seed)
    if results is None:
        check_packages("evalplus")
        _clear(folder)
        with _progress() as progress:
            parts = _train(seed, recipe or Recipe(), progress)
            repos = _save_and_export(parts, folder, progress)
            rows = _score(repos, folder, progress)
        results = {
            "seed": seed,
            "problems": len(load_problems()),
            "caption": caption(len(load_problems())),
            "pass@1": rows,
        }
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    else:
        console.print(f"{folder} holds this demo's results already; remove the folder to run it again.")
    console.print(build_table(results["pass@1"], results["problems"]))
    return results


def _train(seed: int, recipe: Recipe, progress: Progress) -> TrainedParts:
    tasks = {
        stage: progress.add_task(f"train {stage}", total=steps, start=False)
        for stage, steps in recipe.stages().items()
    }
    with _one_thread():
        return train(seed, recipe, lambda stage, done, steps: _update(progress, tasks[stage], done))


def _save_and_export(parts: TrainedParts, folder: Path, progress: Progress) -> dict[str, Path]:
    """Write checkpoint, repo and variants; return the folder of each strategy's model."""
    from dylora_moe.hub_export import export, make_variant

    task = progress.add_task("save, export, check", total=2 + len(STRATEGIES))
    checkpoint = folder / "checkpoint"
    foundation = folder / "foundation"
    save_final_checkpoint(
        parts.peft_model,
        parts.gate,
        parts.tokenizer,
        adapters=ADAPTERS,
        foundation_folder=foundation,
        folder=checkpoint,
    )
    # last, because the adapters leave the model for good
    save_foundation(parts.peft_model.unload(), parts.tokenizer, foundation)
    progress.advance(task)
    repos = {DEFAULT_STRATEGY: folder / "repo"}
    export([checkpoint], output_dir=repos[DEFAULT_STRATEGY], routing_strategy=DEFAULT_STRATEGY)
    progress.advance(task, 2)
    for strategy in STRATEGIES[1:]:
        repos[strategy] = folder / "variants" / folder_name(strategy)
        make_variant(repos[DEFAULT_STRATEGY], routing_strategy=strategy, output_dir=repos[strategy])
        progress.advance(task)
    return repos


def _score(repos: dict[str, Path], folder: Path, progress: Progress) -> dict[str, dict[str, float]]:
    total = len(load_problems())
    tasks = {
        strategy: progress.add_task(f"EvalPlus, {strategy}", total=total, start=False) for strategy in repos
    }
    results = score_strategies(
        repos,
        dataset_path=write_dataset(folder / "problems.jsonl"),
        folder=folder / "evalplus",
        progress=lambda strategy, answered: _update(progress, tasks[strategy], answered),
    )
    return summarise(results)


def _update(progress: Progress, task: TaskID, done: int) -> None:
    progress.start_task(task)  # its clock runs from the first call; later ones change nothing
    progress.update(task, completed=done)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: as fast as two for so small a model, and faster where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finished(folder: Path, seed: int) -> dict | None:
    """Return the results of a finished demo of this seed, if the folder holds them.

    Raises:
        InputError: it holds those of another seed.
    """
    if not (folder / STARTED).is_file() or not (folder / RESULTS).is_file():
        return None
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    if results["seed"] != seed:
        raise InputError(f"{folder} holds the demo of seed {results['seed']}: choose another folder with -o")
    return results


def _clear(folder: Path) -> None:
    """Make the folder empty and mark it as the demo's; only what an earlier demo left is removed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / STARTED).is_file():
            raise InputError(
                f"{folder} is not an empty folder: choose another one with -o (nothing in it was touched)"
            )
        for name in LEFT_BEHIND:
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).write_text("This folder is written by `dylora-moe demo`.\n", encoding="utf-8")
