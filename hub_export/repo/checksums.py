"""SHA256SUMS: what an export wrote, in the form that `sha256sum --check` understands.

Covered is what decides what a repo computes: weights, config, code and what it needs. The card and the
default strategy are the owner's to change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import InputError
from ..sources.source_folder import SourceFolder, open_folder


FILE = "SHA256SUMS"
COVERED = ("*.safetensors", "config.json", "*.py", "requirements.txt")
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def covered_files(folder: Path | SourceFolder) -> list[str]:
    """List the files that have a checksum, sorted: what the patterns name, and the experts' folders."""
    repo = open_folder(folder)
    names = [name for name in repo.names() if any(fnmatchcase(name, pattern) for pattern in COVERED)]
    if repo.has_folder("experts"):
        for expert in repo.folder("experts").folders():
            names += [f"experts/{expert.name}/{name}" for name in expert.names()]
    return sorted(name for name in names if repo.has(name))


def write_checksums(folder: Path) -> None:
    lines = [f"{sha256(folder / name)}  {name}\n" for name in covered_files(folder)]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def replace_covered(folder: Path, name: str, text: str) -> None:
    """Write another text to a file, and its checksum, unless the old one did not match already."""
    with renewed_checksums(folder, [name]):
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def renewed_checksums(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Write the checksums of files that change meanwhile, unless the old one did not match already.

    Args:
        names: of the files; one that is not there yet is listed afterwards.
    """
    checksums = read_checksums(folder)
    if checksums is None:
        yield
        return
    right = [
        name for name in names if not (folder / name).exists() or checksums.get(name) == sha256(folder / name)
    ]
    yield
    checksums |= {name: sha256(folder / name) for name in right}
    lines = [f"{checksums[name]}  {name}\n" for name in sorted(checksums)]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def differing_files(folder: SourceFolder) -> list[str] | None:
    """Say which covered files are not what was exported; None where there is no list of checksums.

    Raises:
        InputError: the list is damaged, or a file lies elsewhere.
    """
    stored = read_checksums(folder)
    if stored is None:
        return None
    wrong = []
    for name, digest in stored.items():
        if not folder.has(name):
            wrong.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            wrong.append(f"{name} is not what was exported")
    return wrong + [f"{name} was not exported" for name in covered_files(folder) if name not in stored]


def read_checksums(folder: Path | SourceFolder) -> dict[str, str] | None:
    """Read the checksum of each file; None where there is no such list.

    Raises:
        InputError: a line is none of a checksum file, or names a file outside the folder.
    """
    repo = open_folder(folder)
    path = repo / FILE
    if not path.is_file():
        return None
    found = {}
    for line in repo.read_text(FILE, errors="replace").splitlines():
        match = LINE.fullmatch(line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise InputError(f"{path}: {line[:100]!r} is not a checksum and a file of this folder")
        found[match[2]] = match[1]
    return found
