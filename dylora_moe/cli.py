"""The `dylora-moe` command: reads options, calls the package's functions, prints what they return.

Results go to stdout (as JSON with --json), progress and warnings to stderr. What does the work is imported
only when a command runs.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe import __version__, cli_eval, cli_explore, cli_routers, cli_sharing
from dylora_moe.cli_common import (
    CONTEXT_SETTINGS,
    Json,
    Overwrite,
    check_places,
    chosen_from,
    err,
    given,
    out,
    plain_logging,
    print_json,
    print_lines,
    print_next,
    progress,
    size,
    span,
    takes_options_of,
)
from dylora_moe.cli_help import Group, command
from dylora_moe.eval.terminal_table import print_table
from dylora_moe.hub_export.repo.choices import check_strategy
from dylora_moe.hub_export.repo.options import DTYPES, ROUTER_MODES, ExportOptions
from dylora_moe.hub_export.sources.source_options import SourceOptions


# typer brings its own click or uses the installed one, by its version; these are the classes of the one in
# use
ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")

app = typer.Typer(
    name="dylora-moe",
    help="Mixtures of LoRA experts as Hugging Face models.",
    epilog="dylora-moe demo -o demo_output",
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SOURCE = "A folder, a Hub id or wandb:entity/project/name:version."
# What `verify` has to know of an export to compare its repo with the source.
CHOSEN_IN_EXPORT = (
    "base_model",
    "base_revision",
    "router_input",
    "router_mode",
    "num_experts_per_tok",
    "router_temperature",
    "router_prompts",
    "router",
    "subtract",
    "lora_alpha",
    "expert_names",
    "tokenizer",
    "dtype",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dylora-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Mixtures of LoRA experts as Hugging Face models: export, load, score and compare with stock tools."""


@command(app, example="dylora-moe demo -o demo_output")
def demo(
    output_dir: Annotated[
        Path, typer.Option("-o", "--output_dir", help="Where everything is written.")
    ] = Path("demo_output"),
    seed: Annotated[
        int, typer.Option("--seed", help="Of data and training.", rich_help_panel="Training")
    ] = 0,
) -> None:
    """Train small experts on this machine, export them, and score every strategy with stock EvalPlus."""
    from dylora_moe.demo import run_demo

    run_demo(output_dir, seed=seed)


@command(app, example="dylora-moe inspect training_run/best_model")
@takes_options_of(SourceOptions)
def inspect(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help=SOURCE)],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Show what a source holds: format and why, base model, experts, router, and what is missing."""
    with progress() as tell:
        chosen = given(options, SourceOptions)
        check_places(sources)
        from dylora_moe import hub_export

        result = hub_export.inspect(sources, progress=tell, **chosen)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_inspection(result)


@command(app, example="dylora-moe export loras/python loras/java -o my-moe --router arrow")
@takes_options_of(ExportOptions, [name for name in ExportOptions.names() if name != "verify"])
def export(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help=f"{SOURCE} Several PEFT adapters: one expert each; after a repo, appended to it.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("-o", "--output_dir", help="The repo's folder.")],
    no_verify: Annotated[
        bool, typer.Option("--no_verify", help="Leave out the check against the source.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Write a source as a repo that stock transformers loads, and check it against the source."""
    with progress() as tell:
        chosen = given(options, ExportOptions)
        check_places(sources)
        from dylora_moe import hub_export

        result = hub_export.export(sources, output_dir, progress=tell, verify=not no_verify, **chosen)
    if as_json:
        return print_json(result.to_dict())
    _print_export(result)
    print_next(
        (["dylora-moe", "benchmark", "--model", str(output_dir)], "pass@1 of the default strategy"),
        (["dylora-moe", "push", str(output_dir), "HUB_ID"], "share it"),
    )


@command(app, example="dylora-moe variant my-moe --routing_strategy single:python -o my-moe-python")
def variant(
    repo: Annotated[Path, typer.Argument(metavar="REPO", help="An exported repo.")],
    output_dir: Annotated[Path, typer.Option("-o", "--output_dir", help="The variant's folder.")],
    routing_strategy: Annotated[
        str | None, typer.Option("--routing_strategy", help="The variant's default strategy.")
    ] = None,
    router_mode: Annotated[
        str | None,
        typer.Option(
            "--router_mode",
            help="dense or sparse, as in training or in use alone; or auto.",
            **chosen_from(ROUTER_MODES),
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a folder that shares a repo's weights and differs in its default strategy or router mode."""
    if routing_strategy is not None:
        check_strategy(routing_strategy)
    from dylora_moe import hub_export

    result = hub_export.make_variant(
        repo,
        output_dir=output_dir,
        routing_strategy=routing_strategy,
        router_mode=router_mode,
        overwrite=overwrite,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(
            f"{result.output_dir}: {result.routing_strategy}"
            + (f", router mode {result.router_mode}" if router_mode is not None else "")
            + f" (weights: {result.weights} to {result.repo})"
        )


@command(app, example="dylora-moe verify my-moe --against training_run/best_model")
@takes_options_of(SourceOptions, ["subfolder", "revision"])
@takes_options_of(ExportOptions, CHOSEN_IN_EXPORT, help="As given to export.")
def verify(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="An exported repo: a folder or a Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="What it was exported from; repeatable for several adapters."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust_remote_code", help="Run the repo's code even where it is not this package's."),
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Check a repo's files, checksums, code and tokenizer, and compare it with its source."""
    with progress() as tell:
        chosen = given(options, ExportOptions)
        check_places([repo, *(against or ())])
        from dylora_moe import hub_export

        result = hub_export.verify(
            repo,
            progress=tell,
            against=against or None,
            trust_remote_code=trust_remote_code,
            **chosen,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        marks = {True: "ok", False: "WRONG", None: "-"}
        for finding in result.findings:
            print_lines(out, f"{marks[finding.passed]:<5}  {finding.what}: {finding.detail}", indent=" " * 7)
    if not result.passed:
        raise typer.Exit(1)
    if not as_json:
        _print_next_of_verify(repo, is_compared=bool(against))


@command(app, example="dylora-moe merge my-moe --expert python -o python-merged")
def merge(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="An exported repo: a folder or a Hub id.")],
    expert: Annotated[str, typer.Option("--expert", help="The expert's name or number.")],
    output_dir: Annotated[Path, typer.Option("-o", "--output_dir", help="The model's folder.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base_model", help="The base model of a repo of layout adapter, if it is elsewhere now."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="What is stored; else as the base model. bf16, fp16, fp32 do, too.",
            **chosen_from(DTYPES),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge one expert into the base model: an ordinary model that any server loads without custom code."""
    with progress() as tell:
        check_places([repo])
        from dylora_moe import hub_export

        where = {"output_dir": output_dir, "base_model": base_model}
        result = hub_export.merge(repo, expert=expert, **where, dtype=dtype, progress=tell)
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(f"{result.output_dir}: expert {result.expert} in {result.dtype}")
        checked = (
            "checked: its logits equal those of the expert" if result.passed else "not checked: its logits"
        )
        out.print(
            f"{checked}, largest difference {result.difference:.1e} (rounding allows {result.allowed:.1e})"
        )
        if result.dtype != "float32":
            out.print(f"rounded to {result.dtype}, as it was written, they differ by {result.rounding:.1e}")


cli_sharing.add_commands(app)
cli_eval.add_commands(app)
cli_routers.add_commands(app)
cli_explore.add_commands(app)


def _print_inspection(result: Any) -> None:
    out.print(f"{result.format}: {result.reason}")
    revision = f" at revision {result.foundation.revision}" if result.foundation.revision else ""
    where = result.foundation.folder or "not on this machine"
    out.print(f"base model: {result.foundation.name or 'not named'}{revision} ({where})")
    rows = [
        [
            str(index),
            expert.name,
            span(expert.rank),
            span(expert.lora_alpha) + (" rsLoRA" if expert.use_rslora else ""),
            str(expert.num_layers),
            ", ".join(f"{name} x {count}" for name, count in expert.modules.items()),
            f"{expert.num_parameters:,}",
            size(expert.num_bytes),
            ", ".join(expert.dtypes),
        ]
        for index, expert in enumerate(result.experts)
    ]
    if rows:
        headings = ("", "expert", "rank", "alpha", "layers", "modules", "parameters", "size", "dtype")
        print_table(out, headings, rows)
    out.print(
        "router: " + (", ".join(f"{k} {v}" for k, v in result.router.items()) if result.router else "none")
    )
    if result.routing_strategy:
        out.print(f"default strategy: {result.routing_strategy}")
    out.print(f"tokenizer: {result.tokenizer or 'none'}")
    for dtype, parts in result.memory.items():
        total = "base model unknown" if parts["total"] is None else f"{size(parts['total'])} in all"
        out.print(f"memory in {dtype}: {total}, experts {size(parts['experts'])}")
    for note in result.notes:
        out.print(f"note: {note}")
    for problem in result.missing:
        out.print(f"missing: {problem}")


def _print_next_of_verify(repo: str, is_compared: bool) -> None:
    """Say what may follow a repo that is as it should be."""
    steps = [(["dylora-moe", "benchmark", "--model", repo], "pass@1 of the default strategy")]
    if not is_compared:
        compared = ["dylora-moe", "verify", repo, "--against", "SOURCE"]
        steps.insert(0, (compared, "compare it with what it was made of"))
    if Path(repo).exists():
        steps.append((["dylora-moe", "push", repo, "HUB_ID"], "share it"))
    print_next(*steps)


def _print_export(result: Any) -> None:
    out.print(f"{result.output_dir}: exported ({result.format}: {result.reason})")
    router = "with a router" if result.router else "without a router"
    router += " in every layer" if result.router_kind == "arrow" else ""
    out.print(f"experts: {', '.join(result.experts)}, {router}; default strategy: {result.routing_strategy}")
    check = result.check
    if check is None:
        out.print("not checked against the source")
        return
    out.print(f"checked: {check.num_tensors} tensors of experts and router are the source's, bit by bit")
    if check.num_routed_layers:
        out.print(f"checked: prototypes on {check.num_routed_layers} layers are those of the experts")
    if check.compared_logits:
        outcome = (
            "equal the source's" if check.passed else "compared, not all of which can be told from wrong ones"
        )
        out.print(f"checked: {len(check.comparisons)} quantities {outcome}, {check.describe()}")
    else:
        out.print("not checked: logits, because the base model is not on this machine")


def _quiet() -> None:
    """Silence other libraries' messages; on a terminal their loading bars stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"warning: {' '.join(str(message).split())}")


def _show_traceback(kind: type[BaseException], error: BaseException, where: Any) -> None:
    print_lines(err, "".join(traceback.format_exception(kind, error, where)))


INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit.

    The exit code is 0 if all went well, 2 for bad input, 1 for a failure, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with warnings.catch_warnings(), plain_logging():
            _quiet()
            code = app(args=cli_eval.spread(arguments), prog_name="dylora-moe", standalone_mode=False)
            _leave_process_group()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        code = _report(error)
    if code == INTERRUPTED:  # typer has this code for it, too
        err.print("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _leave_process_group() -> None:
    """Leave the processes of `accelerate launch`; NCCL warns of leaks where nobody does."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _report(error: Exception) -> int:
    """Print an error as one line on stderr, and return the exit code."""
    from dylora_moe.hub_export.errors import DyloraMoeError, one_line

    if isinstance(error, ClickException):
        hint = ""
        if isinstance(error, UsageError) and error.ctx is not None:
            hint = f" ('{error.ctx.command_path} --help' shows what is understood)"
            takes_model = any(param.name == "model" for param in error.ctx.command.params)
            if takes_model and "unexpected extra argument" in error.format_message():
                hint = f"; models are named with --model{hint}"
        err.print(f"error: {' '.join(error.format_message().split())}{hint}")
        return error.exit_code
    if isinstance(error, DyloraMoeError):
        err.print(f"error: {error}")
        return error.exit_code
    err.print(f"error: {type(error).__name__}: {one_line(error)} (--debug shows where)")
    return 1
