"""Scored runs as evaluations of W&B Weave: a row for each sample, with its prompt, program and verdicts.

Weave (https://weave-docs.wandb.ai) is a package of its own, `pip install weave`. Where it is not installed, nothing
is sent and nothing is said.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from .task_rows import ScoredRun


# No other library's calls are recorded, and nothing is printed on stdout.
SETTINGS = {"implicitly_patch_integrations": False, "print_call_link": False, "capture_code": False}


def find_weave() -> ModuleType | None:
    """Import Weave; None where it is not installed."""
    try:
        return importlib.import_module("weave")
    except ImportError:
        return None


def log_rows(weave: ModuleType, runs: Mapping[str, ScoredRun], project: str) -> None:
    """Log every scored run as an evaluation of its own.

    Args:
        runs: by what they are called.
        project: ENTITY/PROJECT.

    Raises:
        Exception: whatever Weave raises.
    """
    client = weave.init(project, settings=SETTINGS)
    for name, scored in runs.items():
        _log_run(weave, scored, name)
    client.flush()


def _log_run(weave: ModuleType, scored: ScoredRun, name: str) -> None:
    run = scored.run
    settings = {
        "model": run.model,
        "routing_strategy": run.routing_strategy,
        "benchmark": run.benchmark,
        "subset": run.subset,
        "n_samples": run.n_samples,
        "temperature": run.temperature,
        "max_new_tokens": run.max_new_tokens,
        "dtype": run.dtype,
        "versions": run.versions,
    }
    evaluation = weave.EvaluationLogger(
        name=name, model=run.model_label, dataset=run.benchmark, eval_attributes=settings
    )
    for row in scored.rows():
        inputs = {"task_id": row.task_id, "sample": row.sample, "prompt": row.prompt}
        prediction = evaluation.log_prediction(inputs=inputs, output=row.solution)
        scores: dict[str, Any] = {"base": row.base, "plus": row.plus}
        for test, passed in scores.items():
            if passed is not None:
                prediction.log_score(scorer=test, score=passed)
        prediction.finish()
    evaluation.log_summary(dict(run.scores))


__all__ = ["find_weave", "log_rows"]
