"""The commands that score, analyse and measure: `benchmark`, `expert-analysis`, `routing-analysis`, `loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.cli_common import Json, err, given, out, print_json, split, takes_options_of
from dylora_moe.cli_failures import LateFailures, scores_are_shown
from dylora_moe.cli_old_options import option_name, translate
from dylora_moe.cli_progress import is_main_process, steps
from dylora_moe.eval.options import DEFAULT_FOLDER, BenchmarkOptions, LossOptions


# Options that take several values, as in `--benchmarks humaneval mbpp`.
SEVERAL = ("--model", "--benchmarks", "--routing_strategy", "--adapter_path", "--texts", "--old_texts")
COMMANDS = ("benchmark", "expert-analysis", "routing-analysis", "loss", "fit-router", "grow")
MODEL = "A folder, a Hub id or wandb:entity/project/name:version."


Model = Annotated[list[str] | None, typer.Option("--model", help=f"{MODEL} Several may follow.")]
Artifact = Annotated[
    str | None, typer.Option("--wandb_artifact", help="entity/project/name:version, instead of --model.")
]
Dataset = Annotated[str, typer.Option("--dataset", help="humaneval or mbpp.")]
Project = Annotated[
    str | None,
    typer.Option(
        "--wandb_project", help="Log the tables to this W&B project, and with the package weave every sample."
    ),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="eee: a record of each run and sample for Every Eval Ever, too."),
]
Folder = Annotated[Path, typer.Option("-o", "--output_dir", help="Where everything is written.")]


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(benchmark)
    app.command("expert-analysis")(expert_analysis)
    app.command("routing-analysis")(routing_analysis)
    app.command()(loss)


def spread(arguments: Sequence[str]) -> list[str]:
    """Repeat options that are given several values, as the parser wants it.

    `--benchmarks humaneval mbpp` becomes `--benchmarks humaneval --benchmarks mbpp`, and `--model=a b` becomes
    `--model=a --model b`. Options of the old benchmark script become today's.
    """
    arguments = translate(arguments)
    if not arguments or arguments[0].replace("_", "-") not in COMMANDS:
        return list(arguments)
    repeated: list[str] = []
    option = None  # the one with several values that is being read, as it is spelt
    has_value = False
    for argument in arguments:
        is_number = argument.lstrip("-").replace(".", "").isdigit()
        if argument.startswith("-") and not is_number:
            option = argument.partition("=")[0] if option_name(argument) in SEVERAL else None
            has_value = "=" in argument
        elif option is not None:
            if has_value:
                repeated.append(option)
            has_value = True
        repeated.append(argument)
    return repeated


@takes_options_of(BenchmarkOptions)
def benchmark(
    model: Model = None,
    wandb_artifact: Artifact = None,
    benchmarks: Annotated[
        list[str] | None, typer.Option("--benchmarks", help="humaneval, mbpp; several may follow.")
    ] = None,
    routing_strategy: Annotated[
        list[str] | None,
        typer.Option("--routing_strategy", help="Several may follow; else the repo's default."),
    ] = None,
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    record_format: Format = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Score models with EvalPlus: every model, strategy and benchmark, one table and one report."""
    if record_format is not None:
        from dylora_moe.eval.sharing.every_eval_ever import check_records

        check_records(record_format, output_dir)
    _check_needs(wandb_project)
    with scores_are_shown(output_dir, err if as_json else out), steps() as progress:
        from dylora_moe.eval.benchmark import benchmark as run

        result = run(
            _models(model, wandb_artifact),
            benchmarks=split(benchmarks) or ["humaneval"],
            strategies=split(routing_strategy),
            output_dir=output_dir,
            progress=progress,
            tell_speed=progress.tell_speed,
            **given(options),
        )

    def table(result: Any, console: Any) -> None:
        from dylora_moe.eval.report.tables import scores
        from dylora_moe.eval.sampling.run_record import read_runs

        scores(result.runs, read_runs(result.folder)).print(console)

    _show(result, table, output_dir, wandb_project, as_json, record_format)


@takes_options_of(BenchmarkOptions)
def expert_analysis(
    model: Model = None,
    wandb_artifact: Artifact = None,
    dataset: Dataset = "humaneval",
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    as_json: Json = False,
    **options: Any,
) -> None:
    """Say what each expert is good at, and if the router is worth having; generates only what is missing."""
    _check_needs(wandb_project)
    from dylora_moe.eval.analysis import expert_analysis as analysis
    from dylora_moe.eval.report.expert_tables import print_expert_analysis

    with scores_are_shown(output_dir, err if as_json else out):
        result = _analyse(
            analysis.expert_analysis, _models(model, wandb_artifact), dataset, output_dir, options
        )
    _show(result, print_expert_analysis, output_dir, wandb_project, as_json)


@takes_options_of(BenchmarkOptions)
def routing_analysis(
    model: Model = None,
    wandb_artifact: Artifact = None,
    dataset: Dataset = "humaneval",
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    as_json: Json = False,
    **options: Any,
) -> None:
    """Say what the router does: weights, confidence, switches, balance, by task and by category."""
    _check_needs(wandb_project)
    from dylora_moe.eval.analysis import routing_analysis as analysis
    from dylora_moe.eval.report.routing_tables import print_routing_analysis

    with scores_are_shown(output_dir, err if as_json else out):
        result = _analyse(
            analysis.routing_analysis, _models(model, wandb_artifact), dataset, output_dir, options
        )
    _show(result, print_routing_analysis, output_dir, wandb_project, as_json)


@takes_options_of(LossOptions)
def loss(
    repo: Annotated[str | None, typer.Argument(metavar="REPO", help=MODEL)] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--texts", help="Held-out texts: JSONL files, other files, folders; several may follow."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The same as REPO.")] = None,
    wandb_artifact: Artifact = None,
    routing_strategy: Annotated[
        list[str] | None,
        typer.Option("--routing_strategy", help="Several may follow; else all but ensemble and round_robin."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("-o", "--output_dir", help="Where loss.json and loss.csv are written, if anywhere."),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Measure the loss of held-out texts: what each expert predicts, and if the router knows which to use."""
    sources = [
        source for source in (repo, *(_models([model] if model else None, wandb_artifact) or ())) if source
    ]
    if len(sources) > 1:
        raise typer.BadParameter("takes one model", param_hint="REPO")
    if not texts:
        raise typer.BadParameter("names the held-out texts, and is missing", param_hint="--texts")
    has_report = output_dir is not None and (output_dir / "report.html").is_file()
    if has_report:
        _check_needs(None)
    with steps() as progress:
        from dylora_moe.eval.texts.loss import measure_loss

        result = measure_loss(
            sources[0] if sources else None,
            texts,
            strategies=split(routing_strategy),
            output_dir=output_dir,
            progress=progress,
            **given(options),
        )

    def show(result: Any, console: Any) -> None:
        from dylora_moe.eval.report.loss_tables import print_loss

        print_loss(result.summary, console)

    _show(result, show, output_dir if has_report else None, None, as_json)


def _analyse(
    analyse: Callable, models: list[str] | None, dataset: str, folder: Path, options: dict[str, Any]
) -> Any:
    if models is not None and len(models) > 1:
        raise typer.BadParameter("takes one model", param_hint="--model")
    model = models[0] if models else None
    with steps() as progress:
        told = {"progress": progress, "tell_speed": progress.tell_speed}
        return analyse(model, dataset=dataset, output_dir=folder, **told, **given(options))


def _models(models: list[str] | None, artifact: str | None) -> list[str] | None:
    artifacts = [] if artifact is None else [f"wandb:{artifact.removeprefix('wandb:')}"]
    return [*(models or []), *artifacts] or None


def _check_needs(project: str | None) -> None:
    """Check, before hours of work begin, that the report and W&B can be written at the end."""
    from dylora_moe.hub_export.extras import REPORT, check_packages

    check_packages(*REPORT)
    if project is not None:
        from dylora_moe.eval.report.wandb_tables import check_wandb

        check_wandb(project)


def _show(
    result: Any,
    show: Callable,
    folder: Path | None,
    project: str | None,
    as_json: bool,
    record_format: str | None = None,
) -> None:
    """Print a result; with a folder, write its report and records, and log its tables to a project of W&B."""
    if not is_main_process():
        return
    report, records, failures = None, None, LateFailures(folder)
    try:
        if folder is not None:
            with failures.of("the report cannot be made"):
                from dylora_moe.eval.report.page import write_report

                report = write_report(folder)
            if record_format is not None:
                with failures.of("the records cannot be made"):
                    from dylora_moe.eval.sharing.every_eval_ever import write_records

                    records = write_records(folder)
            with failures.of(f"the tables cannot be logged to {project}"):
                _log(folder, project)
    finally:  # the result was computed, whatever becomes of the page and of W&B
        if as_json:
            places = {"report": None if report is None else str(report)}
            places |= {} if records is None else {"records": str(records)}
            print_json({**result.to_dict(), **places})
        else:
            show(result, out)
            if report is not None:
                out.print(f"report: {report}")
            if records is not None:
                out.print(f"records: {records}")
    failures.tell()


def _log(folder: Path, project: str | None) -> None:
    if project is not None:
        from dylora_moe.eval.report.wandb_tables import log_to_wandb

        log_to_wandb(folder, project)


__all__ = ["add_commands", "spread"]
