"""Exported repos to and from W&B artifacts, by the wandb SDK.

A repo that was pushed comes back as it is; what training left in an artifact is exported on the way.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .errors import InputError, few
from .readers.exported_repo import FORMAT
from .repo.checksums import sha256
from .repo.options import ExportOptions
from .repo.repo_config import is_exported_repo
from .repo.repo_files import RepoFiles, is_replaceable, repo_files
from .sources.hub_and_folders import is_on_hub
from .sources.source_folder import SourceFolder, open_folder
from .sources.wandb_artifacts import (
    ArtifactName,
    cached,
    connect,
    download_to,
    fetch_artifact,
    mode,
    parse_name,
    sdk,
    wandb_errors,
)
from .staging import check_output, check_room, staged_folder
from .unknown_options import refuse_unknown


Progress = Callable[[str], None]

# By these an exported repo is known before anything is downloaded.
REPO_MARKS = {"config.json", "modeling_dylora_moe.py"}


@dataclass
class MirrorPushResult:
    """What was handed to W&B.

    `artifact` has a version unless the run is offline; then `run_folder` is to be synced.
    """

    artifact: str
    offline: bool
    run_folder: Path | None
    files: list[str]
    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "run_folder": None if self.run_folder is None else str(self.run_folder)}


@dataclass
class MirrorPullResult:
    """What is in `output_dir` now.

    `artifact` has its version's number, whatever alias was asked for. `export` is what the exporter returned,
    None where the artifact was a repo.
    """

    output_dir: Path
    artifact: str
    digest: str
    files: list[str]
    export: Any = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        export = None if self.export is None else self.export.to_dict()
        return {**self.__dict__, "output_dir": str(self.output_dir), "export": export}


def mirror_push(
    repo: str | Path,
    artifact: str,
    *,
    aliases: tuple[str, ...] = ("latest",),
    progress: Progress | None = None,
) -> MirrorPushResult:
    """Log an exported repo as an artifact of type `model`, in a run of its own, in the mode of WANDB_MODE.

    Args:
        repo: an exported repo, of either layout. Nothing but the repo's files goes along.
        artifact: `entity/project/name`; W&B gives it the next version.
        aliases: further names of that version.
        progress: is told what is being done.

    Raises:
        InputError: not a complete exported repo; a bad name; no SDK; no API key, or one that is not accepted.
        FailureError: no network, or W&B failed.
    """
    folder, tell = open_folder(repo), progress or (lambda message: None)
    name = parse_name(artifact, version=False)
    content = repo_files(folder)
    wandb = sdk()
    notes = [note for note in [content.note()] if note]
    with wandb_errors(str(name)):
        if mode(wandb) == "disabled":
            raise InputError("WANDB_MODE is disabled, so nothing would be sent; use online or offline")
        offline = mode(wandb) in ("offline", "dryrun")
        if not offline:
            connect()
    if offline:  # the SDK keeps a copy until it is sent
        from wandb import env

        size = sum((folder / file).stat().st_size for file in content.files)
        check_room(
            Path(env.get_data_dir()), size, "name another folder in WANDB_DATA_DIR", "W&B's copy takes"
        )
    tell("computing checksums")
    metadata = _metadata(folder, content)
    if content.layout == "adapter" and metadata["foundation"] is None:
        notes.append(
            "the base model is a folder of this machine: wherever this repo is pulled, it needs base_model="
        )
    with wandb_errors(str(name)), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tell(f"{'staging' if offline else 'sending'} {len(content.files)} files")
        result = _log(wandb, folder, name, content.files, metadata, aliases, None if offline else scratch)
    if offline:
        notes.append(f"offline: `wandb sync {result.run_folder}` sends it")
    result.notes = notes
    for note in notes:
        tell(note)
    return result


def _log(
    wandb: Any,
    folder: SourceFolder,
    name: ArtifactName,
    files: list[str],
    metadata: dict[str, Any],
    aliases: tuple[str, ...],
    scratch: str | None,
) -> MirrorPushResult:
    """Log one artifact in a run of its own.

    Args:
        scratch: where an online run writes what is of no use later; None for an offline run.
    """
    offline = scratch is None
    run = wandb.init(
        entity=name.entity,
        project=name.project,
        job_type="mirror",
        dir=scratch,
        reinit="create_new",  # a run that is going on in this process stays alone
        settings=wandb.Settings(**_private_settings(wandb)),
    )
    try:
        logged = wandb.Artifact(name.name, type="model", metadata=metadata)
        for file in files:
            # an offline run is sent later, when the folder may have changed: the SDK keeps a copy
            logged.add_file(str(folder / file), name=file, policy="mutable" if offline else "immutable")
        run.log_artifact(logged, aliases=list(aliases))
        if not offline:
            logged.wait()
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    full = str(name) if offline else f"{name}:{logged.version}"
    run_folder = Path(run.settings.sync_dir).resolve() if offline else None
    return MirrorPushResult(full, offline, run_folder, files, metadata)


def _private_settings(wandb: Any) -> dict[str, Any]:
    """Make settings under which the run records nothing about this machine, if the installed SDK has them."""
    settings = {
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "silent": True,
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
    }
    return {key: value for key, value in settings.items() if key in wandb.Settings.model_fields}


def _metadata(folder: SourceFolder, content: RepoFiles) -> dict[str, Any]:
    from dylora_moe.version import __version__

    config = content.config
    foundation = config.get("base_model_name_or_path")
    is_local = not is_on_hub(foundation)
    return {
        "format": FORMAT,
        "dylora_moe": __version__,
        "layout": content.layout,
        "experts": [expert["name"] for expert in config.get("expert_configs") or []],
        "foundation": None if is_local else foundation,
        "foundation_revision": config.get("base_model_revision"),
        "sha256": {file: sha256(folder / file) for file in content.weights()},
    }


def mirror_pull(
    artifact: str,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    subfolder: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    export: Callable[..., Any] | None = None,
    **options: Any,
) -> MirrorPullResult:
    """Fetch an artifact as an exported repo, which appears under its name complete or not at all.

    Args:
        artifact: `entity/project/name:version`, with or without a leading `wandb:`.
        output_dir: missing or empty, or with `overwrite` an exported repo, which is replaced.
        subfolder: which folder of the artifact.
        token: an API key, otherwise what the SDK finds.
        progress: is told what is being done.
        export: what turns training's folders into a repo, `hub_export.export` unless given.
        options: handed to `export`; those that would change an artifact that is a repo already are refused.

    Raises:
        InputError: as `download_artifact`; the output folder may not be written; the artifact cannot be
            exported.
        FailureError: no network; damaged files; a full disk.
    """
    final, tell = Path(output_dir), progress or (lambda message: None)
    if export is None:
        from .exporter import export

        refuse_unknown(options, ExportOptions.names())
    name = parse_name(artifact, version=True)
    parts = subfolder.split("/") if subfolder else []
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(f"--subfolder {subfolder!r} is not a folder inside the artifact")
    check_output(final, overwrite, is_replaceable)
    with wandb_errors(artifact, token):
        tell("looking at W&B")
        found = fetch_artifact(artifact, token)
        files = found.manifest.entries
        size = sum(entry.size or 0 for entry in files.values())
        check_room(final, size)
        tell(f"fetching {len(files)} files, {size / 1e6:,.1f} MB")
        full_name = str(name._replace(version=found.version))
        result = MirrorPullResult(final.resolve(), full_name, found.digest, [])
        if not subfolder and set(map(str, files)) >= REPO_MARKS:
            _refuse(options, artifact)
            with staged_folder(final, overwrite, is_replaceable) as content:
                download_to(found, content, artifact)
                _keep_the_repo(content, result)
            return result
        folder = cached(found, artifact)
    fetched = open_folder(folder, artifact)
    if not fetched.has_folder(PurePath(*parts)):
        raise InputError(f"{artifact} holds no folder {subfolder}")
    source = fetched.folder(PurePath(*parts))
    if is_exported_repo(source):
        _refuse(options, artifact)
        with staged_folder(final, overwrite, is_replaceable) as content:
            shutil.copytree(source.path, content, dirs_exist_ok=True)
            _keep_the_repo(content, result)
        return result
    if subfolder:
        options["subfolder"] = subfolder
    result.export = export(folder, final, overwrite=overwrite, progress=progress, **options)
    result.files = repo_files(final).files
    return result


def _refuse(options: dict[str, Any], artifact: str) -> None:
    """Refuse options of an export, where there is nothing to be exported."""
    harmless = ("verify", "trust_remote_code")  # they change nothing about the result
    given = sorted(name for name, value in options.items() if value is not None and name not in harmless)
    if given:
        raise InputError(
            f"{artifact} is an exported repo, which is taken as it is, so {', '.join(given)} would do nothing; leave "
            "it out (`dylora-moe variant` and `export` change a repo)"
        )


def _keep_the_repo(folder: Path, result: MirrorPullResult) -> None:
    """Remove what else the artifact holds: it is no part of the repo, and was not looked at."""
    content = repo_files(folder)
    for name in content.left_out:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content.left_out:
        result.notes.append(f"not part of the repo, so not kept: {few(content.left_out)}")
    result.files = content.files
