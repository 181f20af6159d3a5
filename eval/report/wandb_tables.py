"""Logs a report's tables to Weights & Biases, as one run, and every sample to its Weave, where that is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError, one_line
from dylora_moe.hub_export.sources.wandb_artifacts import NAME, connect, mode, sdk, wandb_errors

from ..sharing.task_rows import scored_runs
from ..sharing.weave_rows import find_weave, log_rows
from .content import read_folder
from .report_table import ReportTable
from .run_labels import one_line_names
from .tables import report_tables, scores


OFFLINE = ("offline", "dryrun", "disabled")  # modes of the SDK


def check_wandb(project: str) -> tuple[str | None, str]:
    """Check that tables can be logged to W&B now. Returns entity, if one is named, and project.

    Args:
        project: PROJECT or ENTITY/PROJECT.

    Raises:
        InputError: no SDK, no API key, or another form of project.
        FailureError: W&B does not answer.
    """
    *entity, name = project.split("/")
    if len(entity) > 1 or not all(NAME.fullmatch(part) for part in (*entity, name)):
        raise InputError(f"--wandb_project is {project!r}; it has the form PROJECT or ENTITY/PROJECT")
    wandb = sdk()
    with wandb_errors(project):
        if mode(wandb) not in OFFLINE:
            connect()
    return (entity[0] if entity else None), name


def log_to_wandb(folder: str | Path, project: str) -> str:
    """Log every table of the folder's report, and the scores as the run's summary. Returns the run's name.

    With the package `weave`, every sample of the scored runs is logged, too; a failure of that is a `DyloraMoeWarning`.

    Args:
        project: PROJECT or ENTITY/PROJECT.

    Raises:
        InputError: as `check_wandb`, or a folder with nothing to report.
        FailureError: W&B does not answer.
    """
    entity, name = check_wandb(project)
    tables = report_tables(read_folder(folder))
    wandb = sdk()
    with wandb_errors(project):
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(
            project=name,
            entity=entity,
            job_type="evaluation",
            settings=settings,
            dir=str(folder),
        )
        try:
            run.log(
                {
                    table.name: wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
                    for table in tables.values()
                }
            )
            if "scores" in tables:
                run.summary.update(scores_summary(tables["scores"]))
            _log_samples(folder, run)
        finally:
            run.finish()
    return run.name


def _log_samples(folder: str | Path, run: Any) -> None:
    weave = find_weave()
    if weave is None:
        return
    try:
        if mode(sdk()) in OFFLINE:
            raise InputError("it has no offline mode")
        runs = scored_runs(folder)
        names = one_line_names(
            scores([scored.run for scored in runs]).records(),
            always=("routing strategy", "model", "benchmark"),
        )
        log_rows(weave, dict(zip(names, runs, strict=True)), f"{run.entity}/{run.project}")
    except Exception as error:  # of many kinds, and the tables are logged
        message = f"the samples were not logged to Weave: {one_line(error)}"
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def scores_summary(scores: ReportTable) -> dict[str, float]:
    """Return every score under `model/strategy/benchmark/measure`, with what else distinguishes its run."""
    records = scores.records()
    others = one_line_names(records, columns=("tasks", "samples a task", "settings"))
    summary = {}
    for row, other in zip(records, others, strict=True):
        where = "/".join(filter(None, (row["model"], row["routing strategy"], row["benchmark"], other)))
        summary |= {
            f"{where}/{name}": value for name, value in row.items() if "pass@" in name and value is not None
        }
    return summary


__all__ = ["check_wandb", "log_to_wandb"]
