"""Which format a folder is in: one reader per format, asked in turn.

To add a format, write a file with FORMAT, DESCRIPTION, `recognise(folder)` and `read(folders, names, reason, options)`
and name it in READERS. This file knows nothing about what any format looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import exported_repo, final_checkpoint, peft_adapters
from .errors import InputError, one_line
from .mixture import Mixture, ReadOptions
from .sources import Source


READERS: tuple[ModuleType, ...] = (exported_repo, final_checkpoint, peft_adapters)


MALFORMED = (TypeError, AttributeError, ValueError, KeyError, IndexError, OverflowError, RuntimeError, re.error)


@dataclass(frozen=True)
class Detection:
    """The format of a folder and what gave it away."""

    format: str
    reason: str
    reader: ModuleType


def detect(folder: str | Path) -> Detection:
    """The format of a local folder, by the content of its files.

    Raises:
        InputError: no reader knows it; the message says what was found there.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder it belongs to")
    for reader in READERS:
        reason = reader.recognise(folder)
        if reason is not None:
            return Detection(reader.FORMAT, reason, reader)
    known = "; ".join(f"{reader.FORMAT} ({reader.DESCRIPTION})" for reader in READERS)
    raise InputError(f"{folder} is of no known format: found {_content(folder)}; known are {known}")


def read_sources(sources: list[Source], options: ReadOptions) -> Mixture:
    """Detect and read one or several sources, which must all be of one format.

    Raises:
        InputError: formats differ, or a source is damaged or unknown.
    """
    found = [detect(source.folder) for source in sources]
    for source, detection in zip(sources, found, strict=True):
        if detection.reader is not found[0].reader:
            raise InputError(
                f"the sources are of different formats: {sources[0].folder} is a {found[0].format}, "
                f"{source.folder} a {detection.format}; export them apart"
            )
    folders = [source.folder for source in sources]
    try:
        return found[0].reader.read(folders, [source.name for source in sources], found[0].reason, options)
    except MALFORMED as error:  # a field of a kind that its name does not lead one to expect
        raise InputError(
            f"{', '.join(map(str, folders))} cannot be read as a {found[0].format}, since a field of it is malformed: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _content(folder: Path, most: int = 8) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if not names:
        return "nothing (an empty folder)"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
