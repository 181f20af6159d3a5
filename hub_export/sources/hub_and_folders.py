"""Turns what a user calls a source (a path, a Hub id, a W&B artifact) into an open folder, downloading it if need be."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError, one_line
from .hub_errors import check_token
from .source_folder import NOT_ALLOWED, SourceFolder, exists, is_forbidden, open_folder
from .source_options import SourceOptions


ARTIFACT = "wandb:"
HUB_ID = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# What training leaves behind and nothing here ever opens, at the top of a repo or in a folder of it.
NAMES = ("optimizer.*", "training_args.bin", "rng_state*.pth", "scheduler.pt", "*.onnx", "*.h5", "*.msgpack")
NEVER_NEEDED = [pattern for name in NAMES for pattern in (name, f"*/{name}")]


def check_source(source: str | Path) -> None:
    """Check what can be told of a source at once: its folder, the form of its name, or that W&B can be asked.

    Raises:
        InputError: there is no such folder and it is no Hub id, or an artifact cannot be had without SDK or API key.
    """
    text = str(source)
    if exists(text):
        return
    if text.startswith(ARTIFACT):
        from .wandb_artifacts import check_credentials, parse_name, wandb_errors

        parse_name(text, version=True)
        with wandb_errors(text):
            check_credentials()
    elif not is_hub_id(text):
        raise InputError(NOT_ALLOWED.format(text) if is_forbidden(text) else f"{text} does not exist")


def open_source_folder(source: str | Path, revision: str | None = None) -> SourceFolder:
    """Open the folder behind a source.

    Args:
        revision: of a Hub repo.

    Raises:
        InputError: there is no such folder, nor a Hub repo or artifact of that name that can be had.
    """
    check_source(source)
    text = str(source)
    if exists(text):
        if revision is not None:
            raise InputError(f"--revision is for repos on the Hub; {text} is a folder of this machine")
        folder = open_folder(text)
        _check_allowed(folder)
        return folder
    if text.startswith(ARTIFACT):
        from .wandb_artifacts import download_artifact

        if revision is not None:
            raise InputError(f"--revision is for repos on the Hub; {text} states its version after the colon")
        artifact = text.removeprefix(ARTIFACT)
        return open_folder(download_artifact(artifact), artifact.rsplit("/", 1)[-1].partition(":")[0])
    return open_folder(_download(text, revision), text.rsplit("/", 1)[-1])


def open_source_folders(sources: str | Path | list[str | Path], options: SourceOptions) -> list[SourceFolder]:
    """Open the folders of one or several sources, in order.

    Raises:
        InputError: none given, the same one twice, or one that cannot be had.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise InputError("no source given")
    for source in sources:  # before the first is fetched
        check_source(source)
    first, *others = sources
    folders = [open_source_folder(first, options.revision), *map(open_source_folder, others)]
    paths = [folder.path.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path} is given more than once")
    return folders


def is_hub_id(name: str | None) -> bool:
    """Whether a text has the form of a Hub id: `name` or `organisation/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name is None or not HUB_ID.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_hub(name: str | None) -> bool:
    """Whether a model's name is a Hub id, and not a folder of this machine."""
    return is_hub_id(name) and not exists(name)


def is_elsewhere(source: str | Path) -> bool:
    """Whether a source has to be fetched."""
    text = str(source)
    return is_on_hub(text) or (text.startswith(ARTIFACT) and not exists(text))


def _check_allowed(folder: SourceFolder) -> None:
    """Raise InputError if this user may not look into a folder inside, which would look empty."""
    for name in folder.names():
        path = folder.path / name
        if path.is_dir() and is_forbidden(path):
            raise InputError(NOT_ALLOWED.format(path))


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, get_token, snapshot_download

    check_token(get_token() or "none")
    # Its own name for the errors of the network library beneath, which is not the same one in every version.
    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=NEVER_NEEDED))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{hub_id}{at} is neither a local folder nor a Hub repo that can be downloaded: {one_line(error)}"
        ) from error
