"""Logs a report's tables to Weights & Biases, as one run."""

from __future__ import annotations

from pathlib import Path

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.sources.wandb_artifacts import NAME, connect, mode, sdk, wandb_errors

from .content import read_folder
from .report_table import ReportTable
from .run_labels import one_line_names
from .tables import report_tables


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
        if mode(wandb) not in ("offline", "dryrun", "disabled"):
            connect()
    return (entity[0] if entity else None), name


def log_to_wandb(folder: str | Path, project: str) -> str:
    """Log every table of the folder's report, and the scores as the run's summary. Returns the run's name.

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
        finally:
            run.finish()
    return run.name


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
