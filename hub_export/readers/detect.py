"""Which format a folder is in: one reader per format, asked in turn.

To add a format, write a file with FORMAT, DESCRIPTION, `recognise(folder)` and `read(folders, names, reason,
options)` and name it in READERS. This file knows nothing about what any format looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import InputError, one_line
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


MALFORMED = (
    TypeError, AttributeError, ValueError, KeyError, IndexError, OverflowError, RuntimeError, OSError, re.error,
)  # fmt: skip


class UnknownFormatError(InputError):
    """A folder that no reader knows. One that a reader knows and finds damaged is another `InputError`."""


@dataclass(frozen=True)
class Detection:
    """The format of a folder and what gave it away."""

    format: str
    reason: str
    reader: ModuleType


def detect(folder: str | Path) -> Detection:
    """The format of a local folder, by the content of its files.

    Raises:
        UnknownFormatError: no reader knows it; the message says what was found there.
        InputError: it does not exist, or the file that would tell is damaged.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder it belongs to")
    for reader in READERS:
        reason = _recognise(reader, folder)
        if reason is not None:
            return Detection(reader.FORMAT, reason, reader)
    known = "; ".join(f"{reader.FORMAT} ({reader.DESCRIPTION})" for reader in READERS)
    raise UnknownFormatError(f"{folder} is of no known format: found {_content(folder)}; known are {known}")


def _recognise(reader: ModuleType, folder: Path) -> str | None:
    try:
        return reader.recognise(folder)
    except InputError:
        raise
    except MALFORMED as error:
        raise InputError(
            f"{folder} cannot be looked at: {type(error).__name__}: {one_line(error)}"
        ) from error


def _content(folder: Path, most: int = 8) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if not names:
        return "nothing (an empty folder)"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
