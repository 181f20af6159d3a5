"""What says whether a model is still the same: a hash of every file that decides what it computes.

Looks at files and at where a foundation lies, and loads no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePath
from typing import Any

from dylora_moe.hub_export.repo.checksums import sha256
from dylora_moe.hub_export.repo.repo_files import NOT_COMPUTED_WITH
from dylora_moe.hub_export.sources.hub_and_folders import NAMES
from dylora_moe.hub_export.sources.source_folder import SourceFolder, open_folder

from .run_record import RUN_FILE


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Fields of a mixture's files that say where its foundation lies; what it is, its own files say.
WHERE_THE_FOUNDATION_LIES = {
    "config.json": ("base_model_name_or_path", "base_model_revision", "_name_or_path"),
    "adapter_config.json": ("base_model_name_or_path", "revision"),
}


def file_hashes(folder: Path | SourceFolder, by_date: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash every file of a model's folder, by its path in it.

    Left out is what a person may write beside a model, what training leaves behind and nothing ever opens,
    and folders of benchmarks.

    Args:
        folder: a path may hold links to other folders: hashes tell nothing of what lies there.
        by_date: suffixes of files of which size and time of the last change are taken instead of the content.
    """
    opened = open_folder(folder, may_link_out=True)
    hashes = {}
    names = [PurePath(name) for name in opened.files()]
    benchmarks = {name.parent for name in names if name.name == RUN_FILE} - {PurePath()}
    for name in names:
        if benchmarks.intersection(name.parents):
            continue
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if hidden or name.name in NOT_COMPUTED_WITH or any(name.match(pattern) for pattern in NAMES):
            continue
        path = opened / name
        hashes[name.as_posix()] = _size_and_date(path) if name.suffix in by_date else sha256(path)
    return hashes


def mixture_hashes(folder: Path, config: Any) -> dict[str, str]:
    """Hash every file of an exported repo, and its foundation's files where these are not in it.

    Where the foundation lies does not count: the same foundation in another folder makes the same model.
    """
    hashes = file_hashes(folder)
    for name in hashes:
        fields = WHERE_THE_FOUNDATION_LIES.get(Path(name).name)
        if fields is not None:
            hashes[name] = _without(folder / name, fields)
    if config.weights_layout == "adapter":
        hashes |= foundation_hashes(config.base_model_name_or_path, config.base_model_revision)
    return hashes


def foundation_hashes(
    name: str | None, revision: str | None, by_date: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return the hashes of a foundation's files under `foundation/`, or its name and commit on the Hub."""
    if name is None:
        return {}
    if Path(name).is_dir():
        return {f"foundation/{file}": digest for file, digest in file_hashes(Path(name), by_date).items()}
    return {"foundation": f"{name}@{hub_commit(name, revision) or revision}"}


def hub_commit(name: str, revision: str | None) -> str | None:
    """Find the commit that a revision of a Hub repo stands for now; None where neither Hub nor cache say."""
    from huggingface_hub import errors, hf_hub_download

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors):
        return None
    return commit_in(path)


def commit_in(path: Path) -> str | None:
    """Read the commit that a path in the Hub's cache names; None for any other path."""
    return next((part for part in reversed(path.parts) if COMMIT.fullmatch(part)), None)


def digest(hashes: dict[str, str]) -> str:
    """Compute one SHA-256 for all files of `file_hashes`."""
    return hashlib.sha256(
        "".join(f"{name} {content}\n" for name, content in hashes.items()).encode()
    ).hexdigest()


def _size_and_date(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


def _without(path: Path, fields: tuple[str, ...]) -> str:
    """Hash a JSON file's content without some of its fields, those of its objects included."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: stripped(entry) for name, entry in value.items() if name not in fields}
        return value

    content = stripped(json.loads(path.read_text(encoding="utf-8")))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
