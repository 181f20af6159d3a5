"""Opens the folders that commands read: `open_folder` checks the folder, `folder / name` the paths in it.

A source, a base model, a tokenizer or an exported repo may come from anywhere. No link in it, and no path that
a file of it names, may lead to other files of this machine, and what is opened is a plain file: no FIFO, which
would wait for a writer, and no device. The Hub's cache is made of links, from `snapshots/<commit>/` to `blobs/`;
those are followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from ..errors import InputError
from ..staging import check_name
from .json_files import read_json
from .text_files import read_text


NOT_ALLOWED = "{} may not be read by this user (permission denied)"


def open_folder(
    folder: str | Path | SourceFolder,
    name: str | None = None,
    *,
    may_link_out: bool = False,
    remedy: str = "copy it there",
) -> SourceFolder:
    """Open a folder for reading; one that is open already is returned as it is.

    Args:
        name: what its content is called, where that is not the folder's own name (the Hub's cache names folders
            after commits).
        may_link_out: follow links that lead out of the folder. For folders that the user vouches for, such as a
            base model that consists of links to another disk.
        remedy: what to do about a link that leads out.

    Raises:
        InputError: it does not exist, is no folder, has a name that is no text, or this user may not look into it.
    """
    if isinstance(folder, SourceFolder):
        return folder
    path = Path(folder)
    check_name(path)
    if is_forbidden(path):
        raise InputError(NOT_ALLOWED.format(path))
    if not exists(path):
        raise InputError(f"{path} does not exist")
    if not path.is_dir():
        raise InputError(f"{path} is a file; give the folder it belongs to")
    return SourceFolder(path, name or path.resolve().name, None if may_link_out else _roots(path), remedy)


class SourceFolder:
    """An open folder. `folder / "a/b.json"` is the path of something in it, once it is certain that it is in it.

    Attributes:
        path: as the user gave it; error messages show it.
        name: what its content is called.
    """

    def __init__(self, path: Path, name: str, roots: list[Path] | None, remedy: str):
        self.path = path
        self.name = name
        self._remedy = remedy
        self._roots = roots  # where links may lead; None: anywhere

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"SourceFolder({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | PurePath) -> Path:
        """Give the path of something in the folder, which need not exist. The name may come from a file.

        Raises:
            InputError: the name, or a link on the way, leads out of the folder, or it is neither a file nor a
                folder.
        """
        relative = PurePath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in str(name):
            raise InputError(f"{str(name)!r} leads out of {self}; only what lies in the folder is read")
        path = self.path
        for part in relative.parts:
            path = path / part
            if self._roots is not None and os.path.islink(path):
                self._check_link(path, self._roots)
        if _is_special(path):
            raise InputError(
                f"{path} is no plain file but a FIFO, a socket or a device; put a copy in its place"
            )
        return path

    def _check_link(self, path: Path, roots: list[Path]) -> None:
        target = Path(os.path.realpath(path))
        if os.path.islink(target):  # what `realpath` gives up on
            raise InputError(f"{path} is a link that leads back to itself; put the file itself in its place")
        if not any(target == root or root in target.parents for root in roots):
            raise InputError(
                f"{path} leads out of {self}, to {target}; what lies elsewhere is not read, {self._remedy}"
            )

    def has(self, name: str | PurePath) -> bool:
        """Whether there is a file of this name."""
        return (self / name).is_file()

    def has_folder(self, name: str | PurePath) -> bool:
        """Whether there is a folder of this name."""
        return (self / name).is_dir()

    def names(self, pattern: str = "*") -> list[str]:
        """List the names in the folder that match a pattern, sorted."""
        return sorted(name for name in os.listdir(self.path) if fnmatchcase(name, pattern))

    def is_link(self, name: str | PurePath) -> bool:
        """Whether this is a link, or lies in a folder that is one."""
        parts = PurePath(name).parts
        return any(os.path.islink(self.path.joinpath(*parts[: depth + 1])) for depth in range(len(parts)))

    def entries(self) -> list[os.DirEntry[str]]:
        """List what is in the folder, whatever it is, sorted by name; links are told, not followed."""
        with os.scandir(self.path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def files(self) -> Iterator[str]:
        """Yield the files in it and in the folders inside, as paths with "/".

        Left out are folders that are links, and sockets and FIFOs, such as one of git's own.
        """
        for entry in self.entries():
            if entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{name}" for name in self.folder(entry.name).files())
            elif (entry.is_symlink() or entry.is_file()) and self.has(entry.name):
                yield entry.name

    def folder(self, name: str | PurePath) -> SourceFolder:
        """Open a folder inside; links in it may lead as far as those of this folder."""
        path = self / name
        return SourceFolder(path, path.name, self._roots, self._remedy)

    def folders(self, pattern: str = "*", holding: str = "") -> list[SourceFolder]:
        """Open the folders inside whose names match a pattern, sorted; only those that hold a file, if one is named.

        Raises:
            InputError: one of them is a link that leads out of the folder.
        """
        names = self.names(pattern)
        return [self.folder(name) for name in names if os.path.exists(os.path.join(self.path, name, holding))]

    def read_json(self, name: str | PurePath, *, required: bool = True) -> dict[str, Any]:
        """Read a JSON object; an empty one where there is no such file and none is required.

        Raises:
            InputError: the file is missing, damaged, or holds something else.
        """
        path = self / name
        return read_json(path) if required or path.is_file() else {}

    def read_text(self, name: str | PurePath, errors: str = "strict") -> str:
        """Read a text file; `errors` says what to do with bytes that are no UTF-8, as for `open`.

        Raises:
            InputError: it is larger than honest ones are.
            OSError, ValueError: as `open` and decoding do.
        """
        return read_text(self / name, errors)

    def called(self, name: str) -> SourceFolder:
        """Give the same folder under another name."""
        return SourceFolder(self.path, name, self._roots, self._remedy)

    def parent(self) -> SourceFolder:
        """Give the folder in which it lies: the run of a checkpoint."""
        path = self.path.resolve().parent
        return SourceFolder(path, path.name, _roots(path), self._remedy)


def _roots(path: Path) -> list[Path]:
    root = path.resolve()
    return [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder.

    Raises:
        InputError: no file can have such a long name.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise InputError(f"{str(path)[:200]}… is no name of a file, it is too long") from error
        return False  # nothing is there
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def exists(path: str | Path) -> bool:
    """Whether there is anything under a path, which may be no path at all."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a path, a null byte, or in a folder that may not be entered
        return False


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
