"""Scored runs as records of Every Eval Ever (https://github.com/evaleval/every_eval_ever), schema 0.3.0.

eee/data/<problems>/<developer>/<model>/<uuid>.json            one run: its model, settings and scores
eee/data/<problems>/<developer>/<model>/<uuid>_samples.jsonl   a line for each sample and kind of tests

The paths are those of the schema's own collection. A model that is not on the Hub is of the developer "local", and a
file of the user's own in a data set's place is called "own_problems".
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError, few
from dylora_moe.hub_export.repo.eval_results import DATASETS, TASKS
from dylora_moe.hub_export.sources.hub_and_folders import is_hub_id
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.staging import check_output, staged_folder

from ..analysis.statistics import interval
from ..sampling.run_record import Run
from ..scoring.scoring import pass_at_k_of_tasks
from .task_rows import SampleRow, ScoredRun, scored_runs


FOLDER = "eee"
SCHEMA_VERSION = "0.3.0"
LOCAL = "local"
OWN_PROBLEMS = "own_problems"
DATASETS_OF_TASKS = {TASKS[name]: dataset for name, dataset in DATASETS.items()}
RECORD = re.compile(r"data/[^/]+/[^/]+/[^/]+/[0-9a-f-]{36}(\.json|_samples\.jsonl)")
UNSAFE = re.compile(r"[^\w.+-]+|^\.+|\.+$")  # in a part of a path
INTERVAL = "over tasks: Wilson's score interval, or a percentile bootstrap where tasks have several samples"


def check_records(record_format: str, folder: str | Path) -> None:
    """Check, before the work, that records of this form may be written to a benchmark's folder.

    Raises:
        InputError: another form than "eee", or `eee` in the folder holds other things too.
    """
    if record_format != FOLDER:
        raise InputError(f"--format {record_format} is not known; it can be {FOLDER} (Every Eval Ever)")
    place = Path(folder) / FOLDER
    if place.exists():
        check_output(place, True, _is_replaceable)


def write_records(folder: str | Path) -> Path:
    """Write a record of every scored run in a benchmark's folder, in place of those from before.

    Runs whose problems cannot be had any more are left out, with a `DyloraMoeWarning`.

    Returns:
        The records' folder.

    Raises:
        InputError: no run has results, or the records' folder holds other things too.
        FailureError: they cannot be written.
    """
    runs = scored_runs(folder)
    if not runs:
        raise InputError(
            f"{folder} holds no scored run whose problems can be had, so there is nothing to record"
        )
    with staged_folder(Path(folder) / FOLDER, True, _is_replaceable) as staged:
        for scored in runs:
            _write(scored, staged)
    return Path(folder) / FOLDER


def _is_replaceable(folder: Path) -> bool:
    others = [name for name in open_folder(folder).files() if not RECORD.fullmatch(name)]
    if others:
        raise InputError(f"{folder} holds other things than records ({few(others)}); move them elsewhere")
    return True


def _write(scored: ScoredRun, folder: Path) -> None:
    """Write a run's two files, the record last: it holds the other's checksum."""
    run, identifier = scored.run, _uuid(scored.run)
    place = "/".join(("data", _problems(run), *map(_part, _model_id(run).split("/", 1))))
    (folder / place).mkdir(parents=True, exist_ok=True)
    name = f"{place}/{identifier}_samples.jsonl"
    digest, num_rows = hashlib.sha256(), 0
    with open(folder / name, "wb") as file:
        for row in _instances(scored, identifier):
            line = json.dumps(row).encode() + b"\n"
            digest.update(line)
            file.write(line)
            num_rows += 1
    record = _record(run, identifier)
    record["detailed_evaluation_results"] = {
        "format": "jsonl",
        "file_path": name,
        "hash_algorithm": "sha256",
        "checksum": digest.hexdigest(),
        "total_rows": num_rows,
    }
    text = json.dumps(record, indent=2, allow_nan=False)
    (folder / place / f"{identifier}.json").write_text(text + "\n", encoding="utf-8")


def _uuid(run: Run) -> str:
    """Make a UUID (version 4 in form) of the samples, so that the same samples have one record."""
    identity = json.dumps([run.samples, run.model_sha256, run.model_revision, run.samples_sha256])
    return str(uuid.UUID(bytes=hashlib.sha256(identity.encode()).digest()[:16], version=4))


def _model_id(run: Run) -> str:
    if run.model_revision is not None and is_hub_id(run.model) and "/" in run.model:
        return run.model
    return f"{LOCAL}/{run.model_label}"


def _part(name: str) -> str:
    """Make a name a part of a path on any system."""
    return UNSAFE.sub("_", name) or "_"


def _evaluation_id(run: Run, identifier: str) -> str:
    return f"{_problems(run)}/{_model_id(run)}/{identifier}"


def _problems(run: Run, plus: bool = False) -> str:
    """Name a run's problems with their base tests, or with the plus tests, too."""
    name = run.benchmark if run.dataset_file is None else OWN_PROBLEMS
    return f"{name}plus" if plus else name


def _record(run: Run, identifier: str) -> dict[str, Any]:
    content = json.loads(run.results_path.read_text(encoding="utf-8"))
    record = {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": _evaluation_id(run, identifier),
        "evaluation_timestamp": content.get("date"),
        "retrieved_timestamp": str(int(time.time())),
        "source_metadata": {
            "source_name": "dylora-moe",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "evalplus",
            "version": run.versions.get("evalplus", "unknown"),
            "additional_details": {f"version of {name}": version for name, version in run.versions.items()},
        },
        "model_info": _model_info(run),
        "evaluation_results": [
            _result(run, name, tasks) for name, tasks in pass_at_k_of_tasks(run.results_path).items()
        ],
    }
    return {name: value for name, value in record.items() if value is not None}


def _model_info(run: Run) -> dict[str, Any]:
    engine = "vllm" if run.backend == "vllm" else "transformers"
    known = {
        "model_revision": run.model_revision,
        "model_sha256": run.model_sha256,
        "model_format": run.model_format,
        "base_model": run.base_model,
        "expert_names": json.dumps(run.expert_names) if run.expert_names else None,
    }
    return {
        "name": run.model_label,
        "id": _model_id(run),
        "developer": _model_id(run).split("/")[0],
        "inference_engine": {"name": engine, "version": run.versions.get(engine, "unknown")},
        "additional_details": {
            "deployment_type": "self_deployed",
            "model_availability": "unknown" if _model_id(run).startswith(f"{LOCAL}/") else "open_weights",
            **_texts(known),
        },
    }


def _result(run: Run, measure: str, tasks: list[float]) -> dict[str, Any]:
    """Describe one score.

    Args:
        measure: "pass@1", "plus_pass@1" and so on.
        tasks: each task's estimate of it.
    """
    k = int(measure.partition("@")[2])
    problems = _problems(run, measure.startswith("plus"))
    low, high = interval(tasks)
    return {
        "evaluation_result_id": _result_id(problems, k),
        "evaluation_name": problems,
        "source_data": _source(run, problems),
        "metric_config": {
            "evaluation_description": f"pass@{k} of {problems}, the mean of EvalPlus's estimates of each task",
            "metric_id": "pass_at_k",
            "metric_name": f"pass@{k}",
            "metric_kind": "pass_rate",
            "metric_unit": "proportion",
            "metric_parameters": {"k": k},
            "lower_is_better": False,
            "score_type": "continuous",
            "min_score": 0.0,
            "max_score": 1.0,
        },
        "score_details": {
            "score": run.scores[measure],
            "uncertainty": {
                "confidence_interval": {
                    "lower": float(low),
                    "upper": float(high),
                    "confidence_level": 0.95,
                    "method": INTERVAL,
                },
                "num_samples": len(tasks),
            },
        },
        "generation_config": _generation(run),
    }


def _result_id(problems: str, k: int) -> str:
    return f"{problems}.pass@{k}"


def _source(run: Run, problems: str) -> dict[str, Any]:
    known = {"evalplus_hash": run.dataset_hash, "subset": run.subset, "mini": "true" if run.mini else None}
    if run.dataset_file is not None:
        details = _texts({**known, "file": run.dataset_file, "num_tasks": len(run.task_ids)})
        return {"dataset_name": problems, "source_type": "other", "additional_details": details}
    return {
        "dataset_name": problems,
        "source_type": "hf_dataset",
        "hf_repo": DATASETS_OF_TASKS[problems],
        "hf_split": "test",
        "samples_number": len(run.task_ids),
        "sample_ids": run.task_ids,
        "additional_details": _texts(known),
    }


def _generation(run: Run) -> dict[str, Any]:
    arguments = {"temperature": run.temperature, "top_p": run.top_p, "max_tokens": run.max_new_tokens}
    names = (
        "routing_strategy",
        "n_samples",
        "seed",
        "dtype",
        "attn_implementation",
        "force_base_prompt",
        "backend",
        "batch_size",
        "device",
    )
    return {
        "generation_args": arguments,
        "additional_details": _texts({name: getattr(run, name) for name in names}),
    }


def _texts(values: dict[str, Any]) -> dict[str, str]:
    """Make values text, as the schema has additional details; those that are not known are left out."""
    return {name: str(value) for name, value in values.items() if value is not None}


def _instances(scored: ScoredRun, identifier: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample and each kind of tests, which belong to pass@1."""
    for row in scored.rows():
        for plus, passed in ((False, row.base), (True, row.plus)):
            if passed is not None:
                yield _instance(scored.run, identifier, row, _problems(scored.run, plus), passed)


def _instance(run: Run, identifier: str, row: SampleRow, problems: str, passed: bool) -> dict[str, Any]:
    asked = {"raw": row.prompt, "reference": [row.reference]}
    identity = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    statuses = {"base_status": row.base_status, "plus_status": row.plus_status, "sample": row.sample}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": _evaluation_id(run, identifier),
        "model_id": _model_id(run),
        "evaluation_name": problems,
        "evaluation_result_id": _result_id(problems, 1),
        "sample_id": row.task_id,
        "sample_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "interaction_type": "single_turn",
        "input": asked,
        "output": {"raw": [row.raw]},
        "answer_attribution": [
            {
                "turn_idx": 0,
                "source": "output.raw",
                "extracted_value": row.solution,
                "extraction_method": "evalplus.sanitize",
                "is_terminal": True,
            }
        ],
        "evaluation": {"score": float(passed), "is_correct": passed},
        "metadata": _texts(statuses),
    }


__all__ = ["check_records", "write_records"]
