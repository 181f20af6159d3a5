"""`.eval_results/*.yaml`: scores in the form that the Hub reads for a model's page and for benchmarks' leaderboards.

Format: https://huggingface.co/docs/hub/eval-results, by huggingface_hub's own classes. A leaderboard takes a score
where the data set is registered as a benchmark (an `eval.yaml` of its own, and the Hub's list); `TASKS` are the ids
that are used until then. Files whose name begins with `dylora-moe_` are an export's, all others a person's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..errors import InputError, one_line
from ..sources.source_folder import SourceFolder
from ..sources.text_files import parse_yaml
from .results import Score


if TYPE_CHECKING:
    from huggingface_hub import EvalResultEntry

FOLDER = ".eval_results"
FILE = re.compile(rf"{re.escape(FOLDER)}/[^/]+\.yaml")
GENERATED = re.compile(rf"{re.escape(FOLDER)}/dylora-moe_[^/]+\.yaml")
DATASETS = {  # on the Hub
    "HumanEval": "openai/openai_humaneval",
    "HumanEval+": "evalplus/humanevalplus",
    "MBPP": "google-research-datasets/mbpp",
    "MBPP+": "evalplus/mbppplus",
}
NUM_TASKS = {"HumanEval": 164, "MBPP": 378}  # of EvalPlus's sets
TASKS = {"HumanEval": "humaneval", "HumanEval+": "humanevalplus", "MBPP": "mbpp", "MBPP+": "mbppplus"}


def write_eval_results(folder: Path, scores: Sequence[Score]) -> None:
    """Write a file for each benchmark and strategy; nothing without scores.

    Args:
        folder: the repo's.
    """
    from huggingface_hub import eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for score in scores:
        name = results_name(TASKS[score.benchmark], score.routing_strategy)
        entries.setdefault(name, []).append(_entry(score))
    for name, its_entries in entries.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(its_entries), sort_keys=False, allow_unicode=True)
        (folder / FOLDER / name).write_text(text, encoding="utf-8")


def results_name(task: str, routing_strategy: str) -> str:
    """Name the file of a strategy's scores on a task."""
    strategy = re.sub(r"[^\w.-]+", "-", routing_strategy)
    return f"dylora-moe_{task}_{strategy}.yaml"


def _entry(score: Score) -> EvalResultEntry:
    from huggingface_hub import EvalResultEntry

    whole = NUM_TASKS[score.benchmark.removesuffix("+")]
    tasks = f"{score.num_tasks} tasks"
    if score.num_tasks != whole:  # a part of the set, or other problems in its place
        tasks += f", where the whole set has {whole}"
    return EvalResultEntry(
        dataset_id=DATASETS[score.benchmark],
        task_id=TASKS[score.benchmark],
        value=round(score.value, 4),
        date=score.date,
        notes=(f"pass@1 as a fraction, by EvalPlus; routing_strategy {score.routing_strategy}; {tasks}"),
    )


def eval_results_in(folder: SourceFolder) -> list[str]:
    """List the files of results in a folder, as paths in it; none where their folder is a link."""
    if folder.is_link(FOLDER) or not folder.has_folder(FOLDER):
        return []
    names = [f"{FOLDER}/{name}" for name in folder.folder(FOLDER).names()]
    return [name for name in names if FILE.fullmatch(name)]


def check_eval_results(folder: SourceFolder, files: Iterable[str]) -> None:
    """Check the files that the Hub would refuse after they had been sent.

    Raises:
        InputError: one is no list of results.
    """
    from huggingface_hub import parse_eval_result_entries

    for name in filter(FILE.fullmatch, files):
        try:
            parse_eval_result_entries(parse_yaml(folder.read_text(name)))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / name} is no list of results as the Hub reads them, {{dataset: {{id, task_id}}, value}} "
                f"each: {one_line(error)}"
            ) from error
