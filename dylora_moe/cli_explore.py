"""The command that shows a mixture in a browser: `explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.cli_common import (
    Json,
    check_places,
    given,
    out,
    print_json,
    print_next,
    progress,
    takes_options_of,
)
from dylora_moe.cli_help import command
from dylora_moe.eval.explore.options import ExploreOptions


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    command(app, example="dylora-moe explore ./my-mixture --port 7860")(explore)


@takes_options_of(ExploreOptions)
def explore(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="A folder, a Hub id or wandb:entity/project/name:version.")
    ],
    space: Annotated[
        Path | None,
        typer.Option("--space", help="Write the folder of a Space for the Hub id REPO, and serve nothing."),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Look at a mixture in a browser: a prompt in, the completion coloured by expert as it streams."""
    chosen = given(options, ExploreOptions)
    if space is not None:
        return _write_space(repo, space, as_json, chosen)
    with progress() as tell:
        check_places([repo])
        from dylora_moe.eval.explore.serving import serve_page

        served = serve_page(repo, progress=tell, **chosen)
    if as_json:
        print_json({"address": served.address})
    else:
        out.print(f"{served.address} (Ctrl-C ends it)")
    try:
        served.wait()
    finally:
        served.close()


def _write_space(repo: str, folder: Path, as_json: bool, options: dict[str, Any]) -> None:
    from dylora_moe.eval.explore.space import write_space

    result = write_space(repo, folder, **options)
    if as_json:
        return print_json(result.to_dict())
    out.print(f"{result.output_dir}: a Space that shows {result.repo}, {len(result.files)} files")
    upload = ["hf", "upload", "ORG/NAME", str(result.output_dir), "--repo-type", "space"]
    print_next((upload, "publish it"))
