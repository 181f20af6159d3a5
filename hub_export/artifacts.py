"""W&B artifacts to folders: what the manifest says is checked before anything is fetched, what came is checked after it.

It knows nothing about formats.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from .errors import FailureError, InputError
from .staging import staged_folder
from .wandb_sdk import connect, parse_name, wandb_errors


def fetch_artifact(name: str, token: str | None = None) -> Any:
    """The SDK's object for an artifact, its manifest checked. Nothing of its content is here yet. In `wandb_errors`.

    Raises:
        InputError: a bad name; no key; no such artifact; a manifest with a path that leaves the folder.
    """
    artifact = connect(token).artifact(str(parse_name(name, version=True)))
    check_manifest(artifact.manifest.entries, name)
    return artifact


def check_manifest(entries: dict[str, Any], name: str) -> None:
    """No path leaves the folder or hides another, and nothing is taken from elsewhere: not from this machine's own
    files (`file://`), and not from addresses that whoever made the artifact chose.

    Raises:
        InputError: names the first such entry.
    """
    if not entries:
        raise InputError(f"{name} holds no files")
    taken: set[str] = set()
    for path, entry in entries.items():
        parts = str(path).split("/")
        unsafe = any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\0-\x1f]", str(path))
        if unsafe or str(entry.path) != str(path):
            raise InputError(
                f"{name} holds a file with the path {str(path)!r}, which is not one inside a folder; refused"
            )
        if entry.ref is not None:
            raise InputError(f"{name} holds {path} as a reference to {entry.ref}, and not the file itself; refused")
        taken.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    for path in entries:
        if str(path) in taken:
            raise InputError(f"{name} holds {path} both as a file and as a folder; refused")


def download_to(artifact: Any, folder: Path, name: str) -> list[str]:
    """Fetch everything into an empty folder and compare it with the manifest. Returns the paths. In `wandb_errors`.

    Raises:
        FailureError: a file is missing or differs from what the manifest promises.
    """
    # not skip_cache=True: the SDK (0.31) keeps that path in an object that its threads share, and mixes files up
    with wandb_errors(name):  # else a lost connection, an OSError too, would be taken for a full disk
        artifact.download(root=str(folder))
    entries = artifact.manifest.entries
    found = set()
    for directory, folders, files in os.walk(folder):
        for path in (Path(directory, name) for name in [*folders, *files]):
            if path.is_symlink():
                raise FailureError(f"{name}: {path.relative_to(folder)} came as a link; refused")
        found |= {Path(directory, file).relative_to(folder).as_posix() for file in files}
    if found != set(map(str, entries)):
        wrong = sorted(found ^ set(map(str, entries)))
        raise FailureError(f"{name}: what came differs from the manifest: {', '.join(wrong[:3])}")
    for path, entry in entries.items():
        if _digest(folder / path, entry) != entry.digest:
            raise FailureError(
                f"{name}: {path} differs from what the manifest promises; if it happens again, empty the SDK's cache "
                "with `wandb artifact cache cleanup 0B`"
            )
    return sorted(found)


def _digest(path: Path, entry: Any) -> str:
    if (entry.extra or {}).get("alg", "MD5") != "MD5":
        from wandb.sdk.lib.hashutil import xxh128_file_b64  # newer servers may ask for it

        return xxh128_file_b64(str(path))
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return base64.b64encode(digest.digest()).decode()


def download_artifact(artifact: str, *, token: str | None = None) -> Path:
    """The folder of a W&B artifact, in a cache: complete or absent, and fetched once for each content.

    Args:
        artifact: `entity/project/name:version`, with or without a leading `wandb:`.
        token: an API key, otherwise what the SDK finds (WANDB_API_KEY, `wandb login`).

    Returns:
        A folder with the artifact's own name, below $WANDB_CACHE_DIR or the SDK's cache.

    Raises:
        InputError: the SDK is not installed; a bad name; no API key, or one that is not accepted; no such artifact; one
            whose paths leave the folder.
        FailureError: no network; damaged files; a full disk.
    """
    parse_name(artifact, version=True)
    with wandb_errors(artifact, token):
        return cached(fetch_artifact(artifact, token), artifact)


def cached(artifact: Any, name: str) -> Path:
    """As `download_artifact`, of an artifact whose manifest was checked. In `wandb_errors`."""
    # The digest stands for paths and contents, whatever alias was asked for; hashed, it is safe as a folder's name.
    parts = parse_name(name, version=True)
    key = hashlib.sha256(f"{parts.entity}/{parts.project}/{parts.name} {artifact.digest}".encode()).hexdigest()[:32]
    folder = cache_folder() / key / re.sub(r"[^\w.-]", "_", parts.name)
    if not _is_complete(folder, artifact.manifest.entries):
        # whatever is there was damaged after it had been put there complete
        with staged_folder(folder, overwrite=True, is_replaceable=lambda _: True) as content:
            download_to(artifact, content, name)
    return folder


def cache_folder() -> Path:
    from wandb import env

    return Path(env.get_cache_dir()) / "dylora-moe"


def _is_complete(folder: Path, entries: dict[str, Any]) -> bool:
    try:
        return all((folder / path).lstat().st_size == entry.size for path, entry in entries.items())
    except OSError:
        return False
