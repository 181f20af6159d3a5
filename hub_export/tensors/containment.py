"""Keeps reading inside the folder that was given: no symlink, index or path in it may lead to somebody else's
file.

Files in the Hub's cache are symlinks themselves, from `snapshots/<commit>/` to `blobs/`; those are let
through. It knows nothing about formats.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def contained(folder: Path, path: Path) -> Path:
    """`path`, once it is certain that it lies in `folder` when all symlinks are followed.

    Raises:
        InputError: it leads out of the folder.
    """
    root, target = folder.resolve(), _resolved(path)
    roots = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if not any(target == allowed or allowed in target.parents for allowed in roots):
        raise InputError(
            f"{path} leads out of {folder}, to {target}; what lies elsewhere is not read, copy it there"
        )
    return path


def is_contained(folder: Path, path: Path) -> bool:
    try:
        contained(folder, path)
    except InputError:
        return False
    return True


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a symlink to itself, a name with a null byte
        raise InputError(f"{str(path)!r} cannot be followed") from error
