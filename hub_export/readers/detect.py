"""Finds out which format a folder is in: one reader per format, asked in turn.

To add a format, write a file with FORMAT, DESCRIPTION, `recognise(folder)` and `read(folders, options)`, and name
it in READERS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import InputError, one_line
from ..sources.source_folder import SourceFolder, open_folder
from . import exported_repo, final_checkpoint, merged_model, peft_adapters, trainer_checkpoint, whole_model


# In this order: what is more particular first, and an ordinary model last.
READERS: tuple[ModuleType, ...] = (
    exported_repo,
    whole_model,
    trainer_checkpoint,
    final_checkpoint,
    peft_adapters,
    merged_model,
)

# What Python raises where a file holds another kind of value than its name leads one to expect.
MALFORMED = (
    TypeError,
    AttributeError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    RuntimeError,
    OSError,
    re.error,
)


class UnknownFormatError(InputError):
    """A folder that no reader knows. One that a reader knows and finds damaged is another `InputError`."""


@dataclass(frozen=True)
class Detection:
    """The format of a folder and what gave it away."""

    format: str
    reason: str
    reader: ModuleType


def detect(folder: str | Path | SourceFolder) -> Detection:
    """Find out the format of a local folder, by the content of its files.

    Raises:
        UnknownFormatError: no reader knows it; the message says what was found there.
        InputError: it does not exist, or the file that would tell is damaged.
    """
    folder = open_folder(folder)
    for reader in READERS:
        reason = _recognise(reader, folder)
        if reason is not None:
            return Detection(reader.FORMAT, reason, reader)
    known = "; ".join(f"{reader.FORMAT} ({reader.DESCRIPTION})" for reader in READERS)
    raise UnknownFormatError(f"{folder} is of no known format: found {_content(folder)}; known are {known}")


def _recognise(reader: ModuleType, folder: SourceFolder) -> str | None:
    try:
        return reader.recognise(folder)
    except InputError:
        raise
    except MALFORMED as error:
        raise InputError(
            f"{folder} cannot be looked at: {type(error).__name__}: {one_line(error)}"
        ) from error


def _content(folder: SourceFolder, most: int = 8) -> str:
    names = [name + ("/" if (folder.path / name).is_dir() else "") for name in folder.names()]
    if not names:
        return "nothing (an empty folder)"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
