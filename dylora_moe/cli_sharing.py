"""The commands that share a repo: `push` to the Hub, `mirror push` and `mirror pull` with W&B."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.cli_common import (
    CONTEXT_SETTINGS,
    Json,
    Overwrite,
    chosen_from,
    given,
    out,
    print_json,
    progress,
    takes_options_of,
)
from dylora_moe.cli_help import Group, command
from dylora_moe.hub_export.repo.options import LAYOUTS, ExportOptions


Repo = Annotated[Path, typer.Argument(metavar="REPO", help="An exported repo.")]


def add_commands(app: typer.Typer) -> None:
    """Register `push` and the group `mirror`."""
    mirror = typer.Typer(
        help="To and from W&B artifacts.",
        cls=Group,
        epilog="dylora-moe mirror pull my-team/my-project/my-moe:latest -o my-moe",
        context_settings=CONTEXT_SETTINGS,
        rich_markup_mode=None,
    )
    command(app, example="dylora-moe push my-moe my-name/my-moe --private")(push)
    pushed = "dylora-moe mirror push my-moe my-team/my-project/my-moe --alias best"
    command(mirror, "push", example=pushed)(mirror_push)
    pulled = "dylora-moe mirror pull my-team/my-project/my-moe:latest -o my-moe"
    command(mirror, "pull", example=pulled)(mirror_pull)
    app.add_typer(mirror, name="mirror")


def push(
    repo: Repo,
    hub_id: Annotated[str, typer.Argument(metavar="HUB_ID", help="org/name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it a private repo, or an existing one private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="A branch, made if it is not there.", rich_help_panel="Output"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create or update a Hub repo that holds what the folder holds."""
    with progress() as tell:
        from dylora_moe.hub_export.hub_push import push as send

        result = send(repo, hub_id, private=private, revision=revision, progress=tell)
    if as_json:
        return print_json(result.to_dict())
    deleted = f", {len(result.deleted)} of an earlier export deleted" if result.deleted else ""
    out.print(f"{result.url}: {len(result.uploaded)} files sent{deleted}")
    out.print(f"revision {result.revision}, commit {result.commit}")
    _print_notes(result.notes)


def mirror_push(
    repo: Repo,
    artifact: Annotated[
        str, typer.Argument(metavar="ENTITY/PROJECT/NAME", help="The artifact, without a version.")
    ],
    aliases: Annotated[
        list[str] | None, typer.Option("--alias", help="A name of this version; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Log a repo as a W&B artifact of type model."""
    with progress() as tell:
        _quiet_sdk()
        from dylora_moe.hub_export.mirror import mirror_push as send

        result = send(repo, artifact, aliases=tuple(aliases or ("latest",)), progress=tell)
    if as_json:
        return print_json(result.to_dict())
    done = f"staged in {result.run_folder}" if result.offline else "logged"
    out.print(f"{result.artifact}: {len(result.files)} files {done}")
    _print_notes(result.notes)


@takes_options_of(
    ExportOptions, ["base_model", "base_revision", "routing_strategy", "lora_alpha", "tokenizer"]
)
def mirror_pull(
    artifact: Annotated[str, typer.Argument(metavar="ENTITY/PROJECT/NAME:VERSION", help="The artifact.")],
    output_dir: Annotated[Path, typer.Option("-o", "--output_dir", help="The repo's folder.")],
    subfolder: Annotated[
        str | None, typer.Option("--subfolder", help="Which folder of the artifact.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="adapter: the base model stays where it is.", **chosen_from(LAYOUTS)),
    ] = None,
    overwrite: Overwrite = False,
    no_verify: Annotated[
        bool, typer.Option("--no_verify", help="Leave out the check against the source.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Fetch a W&B artifact as a repo; what training left is exported on the way, with these options."""
    options |= {"layout": layout, "verify": False if no_verify else None}
    chosen = given(options, ExportOptions)
    with progress() as tell:
        _quiet_sdk()
        from dylora_moe.hub_export.mirror import mirror_pull as fetch

        result = fetch(
            artifact, output_dir, overwrite=overwrite, subfolder=subfolder, progress=tell, **chosen
        )
    if as_json:
        return print_json(result.to_dict())
    how = "an exported repo, as it was" if result.export is None else f"exported ({result.export.format})"
    out.print(f"{result.output_dir}: {result.artifact}, {how}")
    _print_notes(result.notes)


def _quiet_sdk() -> None:
    """Silence the W&B SDK's own messages and prompts."""
    os.environ.setdefault("WANDB_SILENT", "true")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        out.print(f"note: {note}")
