"""Turns what a user calls a source into a local folder: a path, or a Hub id, which is downloaded to the Hub's cache.

It knows nothing about formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError, one_line


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# what training leaves behind and nothing here ever opens
NEVER_NEEDED = ["optimizer.*", "training_args.bin", "rng_state*.pth", "scheduler.pt", "*.onnx", "*.h5", "*.msgpack"]


@dataclass(frozen=True)
class Source:
    """A local folder, and the name its content goes by (a folder in the Hub's cache is named after a commit)."""

    folder: Path
    name: str


def resolve_source(source: str | Path) -> Source:
    """The folder behind a source.

    Raises:
        InputError: there is no such folder, nor a Hub repo of that name that can be had.
    """
    text = str(source)
    if Path(text).exists():
        return Source(Path(text), Path(text).resolve().name)
    if not HUB_ID.fullmatch(text):
        kind = (
            "a W&B artifact, which cannot be read; download it and give the folder"
            if text.startswith("wandb:")
            else ""
        )
        raise InputError(f"{text} is {kind}" if kind else f"{text} does not exist")
    return Source(_download(text), text.rsplit("/", 1)[-1])


def resolve_sources(sources: str | Path | list[str | Path]) -> list[Source]:
    """One or several sources, in order.

    Raises:
        InputError: none given, the same one twice, or one that cannot be had.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    resolved = [resolve_source(source) for source in sources]
    if not resolved:
        raise InputError("no source given")
    folders = [source.folder.resolve() for source in resolved]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder} is given more than once")
    return resolved


def _download(hub_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    # Its own name for the errors of the network library beneath, which is not the same one in every version.
    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=NEVER_NEEDED))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        raise InputError(
            f"{hub_id} is neither a local folder nor a Hub repo that can be downloaded: {one_line(error)}"
        ) from error
