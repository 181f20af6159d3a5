"""Turns what a user calls a source into a local folder: a path, a Hub id or a W&B artifact, which are
downloaded.

It knows nothing about formats.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, one_line
from .hub_errors import check_token


ARTIFACT = "wandb:"
NOT_ALLOWED = "{} may not be read by this user (permission denied)"
HUB_ID = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# What training leaves behind and nothing here ever opens, at the top of a repo or in a folder of it.
NAMES = ("optimizer.*", "training_args.bin", "rng_state*.pth", "scheduler.pt", "*.onnx", "*.h5", "*.msgpack")
NEVER_NEEDED = [pattern for name in NAMES for pattern in (name, f"*/{name}")]


@dataclass(frozen=True)
class Source:
    """A local folder, and the name its content goes by (a folder in the Hub's cache is named after a commit).

    Attributes:
        note: what was chosen in it, where it holds several checkpoints.
    """

    folder: Path
    name: str
    note: str | None = None


def resolve_source(source: str | Path, revision: str | None = None) -> Source:
    """The folder behind a source.

    Args:
        revision: of a Hub repo.

    Raises:
        InputError: there is no such folder, nor a Hub repo or artifact of that name that can be had.
    """
    text = str(source)
    if _exists(text):
        if revision is not None:
            raise InputError(f"--revision is for repos on the Hub; {text} is a folder of this machine")
        _check_allowed(Path(text))
        return Source(Path(text), Path(text).resolve().name)
    if text.startswith(ARTIFACT):
        from .wandb_artifacts import download_artifact

        if revision is not None:
            raise InputError(f"--revision is for repos on the Hub; {text} states its version after the colon")
        name = text.removeprefix(ARTIFACT)
        return Source(download_artifact(name), name.rsplit("/", 1)[-1].partition(":")[0])
    if not HUB_ID.fullmatch(text):
        raise InputError(NOT_ALLOWED.format(text) if is_forbidden(text) else f"{text} does not exist")
    return Source(_download(text, revision), text.rsplit("/", 1)[-1])


def is_elsewhere(source: str | Path) -> bool:
    """Whether a source has to be fetched."""
    text = str(source)
    return not _exists(text) and (text.startswith(ARTIFACT) or HUB_ID.fullmatch(text) is not None)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or a null byte
        return False


def resolve_sources(sources: str | Path | list[str | Path], revision: str | None = None) -> list[Source]:
    """One or several sources, in order.

    Args:
        revision: of the first one, on the Hub.

    Raises:
        InputError: none given, the same one twice, or one that cannot be had.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    resolved = [resolve_source(source, None if index else revision) for index, source in enumerate(sources)]
    if not resolved:
        raise InputError("no source given")
    folders = [source.folder.resolve() for source in resolved]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder} is given more than once")
    return resolved


def is_forbidden(folder: str | Path) -> bool:
    """Whether this user may not look into a folder, or may not even see whether it is there."""
    try:
        with os.scandir(folder):
            os.stat(os.path.join(folder, "."))  # listing needs another permission than opening what is in it
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _check_allowed(folder: Path) -> None:
    """Raises InputError: this user may not look into it or a folder in it, which would look empty."""
    if not folder.is_dir():
        return
    if is_forbidden(folder):
        raise InputError(NOT_ALLOWED.format(folder))
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and is_forbidden(inner):
            raise InputError(NOT_ALLOWED.format(inner))


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
