"""The commands that learn from texts: `fit-router` and `grow`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.cli_common import Json, check_places, err, given, out, print_json, takes_options_of
from dylora_moe.cli_help import command
from dylora_moe.cli_progress import is_main_process, steps
from dylora_moe.eval.fitting.grow_options import GrowOptions
from dylora_moe.eval.fitting.options import FitRouterOptions
from dylora_moe.eval.terminal_table import print_table


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    fitted = "dylora-moe fit-router my-moe --texts texts.jsonl -o my-moe-routed"
    command(app, "fit-router", example=fitted)(fit_router)
    grown = "dylora-moe grow my-moe --texts new.jsonl --old_texts old.jsonl -o grown"
    command(app, example=grown)(grow)


@takes_options_of(FitRouterOptions, groups={"seed": "Training"})
def fit_router(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="An exported repo: a folder or a Hub id.")],
    texts: Annotated[
        list[str],
        typer.Option(
            "--texts",
            help="JSONL with `text`, or `prompt` and `completion`, and perhaps `expert`; or folders. Several may follow.",
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("-o", "--output_dir", help="The folder of the repo with the gate.")
    ],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Fit a repo's router to texts, with base model and experts frozen; writes a repo that differs in its gate."""
    chosen = given(options, FitRouterOptions)
    check_places([repo])
    with steps() as progress:
        from dylora_moe import eval as evaluation

        result = evaluation.fit_router(
            repo, texts, output_dir=output_dir, progress=progress, tell_epoch=_print_epoch, **chosen
        )
    if not is_main_process():
        return
    if as_json:
        print_json(result.to_dict())
    else:
        _print_result(result)


@takes_options_of(GrowOptions, groups={"seed": "Training", "lora_alpha": "Training"})
def grow(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="An exported repo: a folder or a Hub id.")],
    texts: Annotated[
        list[str], typer.Option("--texts", help="New texts, as of fit-router. Several may follow.")
    ],
    output_dir: Annotated[
        Path, typer.Option("-o", "--output_dir", help="The folder of the repo with the new expert.")
    ],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Add an expert for texts that are new to a repo: train it, fit the router again, and say what was forgotten."""
    chosen = given(options, GrowOptions)
    check_places([repo])
    with steps() as progress:
        from dylora_moe import eval as evaluation

        result = evaluation.grow(repo, texts, output_dir=output_dir, progress=progress, **chosen)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_growth(result)


def _print_growth(result: Any) -> None:
    out.print(f"{result.output_dir}: with the new expert {result.expert}; {result.novelty.sentence()}")
    rows = []
    for group in result.groups:
        figures = (group.before, group.after, group.change, group.best_old, group.new)
        before, after, change, best_old, new = figures
        name = f"{group.group} (new)" if group.is_new else group.group
        rows.append(
            [name, f"{before:.4f}", f"{after:.4f}", f"{change:+.1%}", f"{best_old:.4f}", f"{new:.4f}"]
        )
    headings = ("held-out texts", "before", "after", "change", "best old expert", result.expert)
    print_table(out, headings, rows, numbers=range(1, len(headings)))
    out.print("nats a token, under the router as it is served before and after, and under experts alone")


def _print_epoch(epoch: Any) -> None:
    if is_main_process():
        held_out = "" if epoch.held_out_loss is None else f", held out {epoch.held_out_loss:.4f}"
        shares = " ".join(f"{share:.0%}" for share in epoch.usage.shares)
        err.print(
            f"epoch {epoch.number}, step {epoch.step} of {epoch.steps}: loss {epoch.loss:.4f}{held_out}; shares {shares}, "
            f"entropy {epoch.usage.entropy:.2f}"
        )


def _print_result(result: Any) -> None:
    out.print(
        f"{result.output_dir}: the gate fitted to {result.num_texts} texts, {result.steps} steps, that of step "
        f"{result.best_step} kept; default strategy: router"
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result.shares.items())
    out.print(f"first at a token: {shares}; entropy of the weights {result.entropy:.2f} nats")
    if result.loss_after is None:
        return
    losses = {"router": result.loss_after, "before": result.loss_before, **result.losses}
    rows = [[name, f"{loss:.4f}"] for name, loss in losses.items()]
    print_table(out, (f"{result.num_held_out} held-out texts", "nats a token"), rows, numbers=[1])


__all__ = ["add_commands"]
