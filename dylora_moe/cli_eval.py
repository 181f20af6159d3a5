"""The commands that score, analyse and measure: `benchmark`, `expert-analysis`, `routing-analysis`, `loss`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.cli_common import (
    Json,
    check_places,
    chosen_from,
    err,
    given,
    out,
    print_json,
    print_next,
    split,
    takes_options_of,
)
from dylora_moe.cli_failures import LateFailures, scores_are_shown
from dylora_moe.cli_help import command
from dylora_moe.cli_old_options import option_name, translate
from dylora_moe.cli_progress import is_main_process, steps
from dylora_moe.eval.options import DEFAULT_FOLDER, NO_MODEL, BenchmarkOptions, LossOptions
from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.choices import STRATEGIES, check_strategy


# Options that take several values, as in `--benchmarks humaneval mbpp`.
SEVERAL = (
    *("--model", "--benchmarks", "--dataset", "--routing_strategy", "--adapter_path", "--texts"),
    "--old_texts",
)
COMMANDS = ("benchmark", "expert-analysis", "routing-analysis", "loss", "fit-router", "grow")
MODEL = "A folder, a Hub id or wandb:entity/project/name:version."


Model = Annotated[list[str] | None, typer.Option("--model", help=f"{MODEL} Several may follow.")]
OneModel = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="<str>", help=MODEL),
]
Artifact = Annotated[
    str | None, typer.Option("--wandb_artifact", help="entity/project/name:version, instead of --model.")
]
Benchmarks = Annotated[
    list[str] | None,
    typer.Option(
        "--benchmarks",
        "--dataset",
        help="EvalPlus's problems; humanevalplus and mbppplus mean the same. humaneval unless given.",
        **chosen_from(("humaneval", "mbpp")),
    ),
]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--routing_strategy",
        help="Several may follow; else the repo's default. See the list below.",
        autocompletion=lambda: [name.removesuffix("EXPERT") for name in STRATEGIES],
    ),
]
Project = Annotated[
    str | None,
    typer.Option(
        "--wandb_project", help="Log the tables to this W&B project, and with the package weave every sample."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="eee: a record of each run and sample for Every Eval Ever, too.",
        **chosen_from(("eee",)),
    ),
]
Folder = Annotated[Path, typer.Option("-o", "--output_dir", help="Where everything is written.")]


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    scored = "dylora-moe benchmark --model my-moe --routing_strategy router best base"
    command(app, example=scored)(benchmark)
    analysed = "dylora-moe expert-analysis --model my-moe --dataset mbpp"
    command(app, "expert-analysis", example=analysed)(expert_analysis)
    routed = "dylora-moe routing-analysis --model my-moe --dataset humaneval"
    command(app, "routing-analysis", example=routed)(routing_analysis)
    command(app, example="dylora-moe loss my-moe --texts held_out.jsonl -o losses")(loss)


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
    benchmarks: Benchmarks = None,
    routing_strategy: Strategies = None,
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    record_format: Format = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Score models with EvalPlus: every model, strategy and benchmark, one table and one report."""
    chosen = given(options, BenchmarkOptions)
    models = _models(model, wandb_artifact)
    _check_model(models, chosen)
    names, strategies = _names(benchmarks), _strategies(routing_strategy)
    if record_format is not None:
        from dylora_moe.eval.sharing.every_eval_ever import check_records

        check_records(record_format, output_dir)
    _check_needs(wandb_project)
    with scores_are_shown(output_dir, err if as_json else out), steps() as progress:
        from dylora_moe.eval.benchmark import benchmark as run

        result = run(
            models,
            benchmarks=names,
            strategies=strategies,
            output_dir=output_dir,
            progress=progress,
            tell_speed=progress.tell_speed,
            **chosen,
        )

    def table(result: Any, console: Any) -> None:
        from dylora_moe.eval.report.tables import scores
        from dylora_moe.eval.sampling.run_record import read_runs

        scores(result.runs, read_runs(result.folder)).print(console)

    _show(result, table, output_dir, wandb_project, as_json, record_format)
    if is_main_process() and not as_json:
        _print_next_of_benchmark(result, models, names, output_dir, chosen)


@takes_options_of(BenchmarkOptions)
def expert_analysis(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="<str>", help=f"{MODEL} Without one, what the output folder holds is analysed."
        ),
    ] = None,
    wandb_artifact: Artifact = None,
    benchmarks: Benchmarks = None,
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    as_json: Json = False,
    **options: Any,
) -> None:
    """Say what each expert is good at, and if the router is worth having; generates only what is missing."""
    source, chosen = _of_analysis(model, wandb_artifact, benchmarks, options)
    if source is None and "adapter_path" not in chosen:
        from dylora_moe.eval.evalplus_bridge.data import canonical_benchmark
        from dylora_moe.eval.sampling.run_record import scored_mixtures

        scored_mixtures(output_dir, canonical_benchmark(chosen["dataset"]), chosen)
    _check_needs(wandb_project)
    from dylora_moe.eval.analysis import expert_analysis as analysis
    from dylora_moe.eval.report.expert_tables import print_expert_analysis

    with scores_are_shown(output_dir, err if as_json else out):
        result = _analyse(analysis.expert_analysis, source, output_dir, chosen)
    _show(result, print_expert_analysis, output_dir, wandb_project, as_json)


@takes_options_of(BenchmarkOptions)
def routing_analysis(
    model: OneModel = None,
    wandb_artifact: Artifact = None,
    benchmarks: Benchmarks = None,
    wandb_project: Project = None,
    output_dir: Folder = Path(DEFAULT_FOLDER),
    as_json: Json = False,
    **options: Any,
) -> None:
    """Say what the router does: weights, confidence, switches, balance, by task and by category."""
    source, chosen = _of_analysis(model, wandb_artifact, benchmarks, options)
    _check_model(None if source is None else [source], chosen)
    _check_needs(wandb_project)
    from dylora_moe.eval.analysis import routing_analysis as analysis
    from dylora_moe.eval.report.routing_tables import print_routing_analysis

    with scores_are_shown(output_dir, err if as_json else out):
        result = _analyse(analysis.routing_analysis, source, output_dir, chosen)
    _show(result, print_routing_analysis, output_dir, wandb_project, as_json)


@takes_options_of(LossOptions, groups={"batch_tokens": "Texts"})
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
    chosen = given(options, LossOptions)
    check_places([repo] if repo else [])
    sources = [
        source for source in (repo, *(_models([model] if model else None, wandb_artifact) or ())) if source
    ]
    if len(sources) > 1:
        raise typer.BadParameter("takes one model", param_hint="REPO")
    if not texts:
        raise InputError("no texts are given; name held-out ones with --texts")
    _check_model(sources, chosen)
    strategies = _strategies(routing_strategy)
    has_report = output_dir is not None and (output_dir / "report.html").is_file()
    if has_report:
        _check_needs(None)
    with steps() as progress:
        from dylora_moe.eval.texts.loss import measure_loss

        result = measure_loss(
            sources[0] if sources else None,
            texts,
            strategies=strategies,
            output_dir=output_dir,
            progress=progress,
            **chosen,
        )

    def show(result: Any, console: Any) -> None:
        from dylora_moe.eval.report.loss_tables import print_loss

        print_loss(result.summary, console)

    _show(result, show, output_dir if has_report else None, None, as_json)


def _of_analysis(
    model: list[str] | None, artifact: str | None, benchmarks: list[str] | None, options: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Return the one model of an analysis, and its options, which are checked, with one benchmark."""
    chosen = given(options, BenchmarkOptions)
    models, names = _models(model, artifact), _names(benchmarks)
    if models is not None and len(models) > 1:
        raise typer.BadParameter("takes one model", param_hint="--model")
    if len(names) > 1:
        raise typer.BadParameter("takes one benchmark", param_hint="--benchmarks")
    return models[0] if models else None, {"dataset": names[0], **chosen}


def _analyse(analyse: Callable, source: str | None, folder: Path, chosen: dict[str, Any]) -> Any:
    with steps() as progress:
        told = {"progress": progress, "tell_speed": progress.tell_speed}
        return analyse(source, output_dir=folder, **told, **chosen)


def _models(models: list[str] | None, artifact: str | None) -> list[str] | None:
    """Return all sources that are named; None if there is none."""
    artifacts = [] if artifact is None else [f"wandb:{artifact.removeprefix('wandb:')}"]
    check_places(models or ())
    return [*(models or []), *artifacts] or None


def _check_model(models: list[str] | None, chosen: dict[str, Any]) -> None:
    """Raise InputError if nothing says what the model is."""
    if not models and "adapter_path" not in chosen:
        raise InputError(NO_MODEL)


def _names(benchmarks: list[str] | None) -> list[str]:
    from dylora_moe.eval.evalplus_bridge.data import canonical_benchmark

    names = split(benchmarks) or ["humaneval"]
    for name in names:
        canonical_benchmark(name)
    return names


def _strategies(strategies: list[str] | None) -> list[str] | None:
    wanted = split(strategies)
    for strategy in wanted or ():
        check_strategy(strategy)
    return wanted


def _print_next_of_benchmark(
    result: Any, models: list[str] | None, benchmarks: list[str], folder: Path, chosen: dict[str, Any]
) -> None:
    """Say what may follow the scores of one mixture: its analysis, with the options of this run."""
    if models is None or len(models) > 1 or not result.runs[0].expert_names:
        return
    words = ["dylora-moe", "expert-analysis", "--model", models[0], "--dataset", benchmarks[0]]
    default = {field.name: field.default for field in dataclasses.fields(BenchmarkOptions)}
    for name, value in chosen.items():
        if value == default[name] or name == "overwrite":
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    print_next(([*words, "-o", str(folder)], "what each expert is good at"))


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
