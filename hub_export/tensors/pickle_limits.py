"""How much a PyTorch file may unfold to, found out before torch unfolds it.

    <name>.pt, a zip archive     <name>/data.pkl          a pickle that names tensors and their storages
                                 <name>/data/0 …          a storage each, as it lies in memory
    the form before torch 1.6    pickles, then storages

`torch.load(weights_only=True)` runs no code of a pickle, and goes on for as long as the pickle says: a
compressed archive inflates, a few bytes make an array of gigabytes, and thirty lists that hold the list before
twice are 2^30 entries to whatever walks or prints them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line


# torch.save writes about 32 operations a tensor, and most tensors' storages are a record each; 64 experts on 560
# layers in one file are 2,300,000. torch.load takes two seconds for a million.
OPERATIONS = 300_000
OPERATIONS_PER_RECORD = 100
BYTES_PER_OPERATION = 64  # of a file whose tensors have a few hundred numbers each, or share their storage
MOST_OPERATIONS = 3_000_000
MOST_PICKLE = 64 * 1024**2  # bytes, for 200,000 tensors
BYTES_PER_RECORD = 1024
# Operations that put what they take from the stack into one new thing; and those that make an empty one.
TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2}
EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE")
# How often everything that a pickle names may be named, in all; and how deep it may be nested.
REPETITIONS = 10
MOST_NESTED = 100
# Tied weights are named twice, and slices of one tensor may be saved with the whole of it.
MOST_UNFOLDED = 8
SMALL = 64 * 1024**2  # bytes, which may be unfolded from any file
# What makes bytes of any length out of a number. A checkpoint holds none.
REFUSED = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode")
NOT_READ = "torch.save writes nothing of the kind, and it is not read; get the file from where it was made"


def check_size(path: Path) -> None:
    """Check that a file does not unfold to more than it can honestly hold.

    Raises:
        InputError: it does; the message says in which way.
        pickle.UnpicklingError: a pickle in it is damaged.
        RuntimeError, OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":  # by which torch tells the two forms apart
            _check_archive(path)
            return
        file.seek(0)
        start = io.BytesIO(file.read(MOST_PICKLE))
    for _ in range(5):  # magic number, version, system, content, storages
        _check_pickle(path, start, _most_operations(path, 0))


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            check_unfolded(path, sum(record.file_size for record in records))
            most = MOST_PICKLE + BYTES_PER_RECORD * len(records)
            for record in records:
                is_pickle = record.filename.lower().endswith(".pkl")
                if (is_pickle or "/data/" not in record.filename) and record.file_size > most:
                    raise InputError(
                        f"{path}: {record.filename} in it has {record.file_size:,} bytes; {NOT_READ}"
                    )
                if is_pickle:
                    most_operations = _most_operations(path, len(records))
                    _check_pickle(path, io.BytesIO(archive.read(record)), most_operations)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise RuntimeError(str(error)) from error


def _most_operations(path: Path, num_records: int) -> int:
    found = OPERATIONS + OPERATIONS_PER_RECORD * num_records + path.stat().st_size // BYTES_PER_OPERATION
    return min(found, MOST_OPERATIONS)


def check_unfolded(path: Path, size: int) -> None:
    """Check how many bytes of tensors or records a file gives, for what it has on the disk.

    Raises:
        InputError: they are more than tied weights and slices account for.
    """
    stored = path.stat().st_size
    if size > MOST_UNFOLDED * stored + SMALL:
        raise InputError(
            f"{path} has {stored:,} bytes and unfolds to {size:,}: it is compressed, or its tensors repeat what is stored; "
            "save it again with torch.save, each tensor after .clone()"
        )


def _check_pickle(path: Path, file: io.BytesIO, most: int) -> None:
    try:
        size, height = _unfolded(_operations(path, file, most))
    except InputError:
        raise
    except Exception as error:  # of many kinds; what comes before the damage could keep torch busy
        raise pickle.UnpicklingError(one_line(error)) from error
    if size > most * REPETITIONS or height > MOST_NESTED:
        raise InputError(
            f"{path}: what it holds is nested {height} deep or stands in so many places that it never ends; {NOT_READ}"
        )


def _operations(path: Path, file: io.BytesIO, most: int) -> Iterator[tuple[str, Any]]:
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > most:
            raise InputError(
                f"{path} takes more than {most:,} operations to read, too many for its {path.stat().st_size:,} bytes; if it is "
                "honest, save its tensors as safetensors"
            )
        if operation.name == "GLOBAL" and argument in REFUSED:
            raise InputError(f"{path} holds more than tensors: {argument.replace(' ', '.')}; {NOT_READ}")
        yield operation.name, argument


def _unfolded(operations: Iterator[tuple[str, Any]]) -> tuple[int, int]:
    """Count the entries that a pickle holds, each as often as it is named, and how deep they are nested.

    Every list stands for a container and holds those in it, None for anything else.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for name, argument in operations:
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TAKEN:
            inside = stack[-TAKEN[name] :]
            del stack[-TAKEN[name] :]
            stack.append(inside)
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "TUPLE":
            stack, inside = marks.pop(), stack
            stack.append(inside)
        elif name in EMPTY:
            stack.append([])
        elif name in ("APPENDS", "SETITEMS"):
            stack, inside = marks.pop(), stack
            _put(stack, inside)
        elif name in ("APPEND", "BUILD"):
            _put(stack, [stack.pop()])
        elif name == "SETITEM":
            value = stack.pop()
            _put(stack, [stack.pop(), value])
        elif name not in ("PROTO", "STOP"):
            stack.append(None)
    return _measured([*marks, stack], {}, 0)


def _put(stack: list[Any], inside: list[Any]) -> None:
    if stack[-1] is not None:
        stack[-1].extend(inside)


def _measured(node: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    if node is None:
        return 1, 0
    if depth > MOST_NESTED:
        return 1, depth
    if not node:  # of which there may be millions
        return 1, 1
    if id(node) not in known:
        inside = [_measured(child, known, depth + 1) for child in node]
        known[id(node)] = (
            1 + sum(size for size, _ in inside),
            1 + max((height for _, height in inside), default=0),
        )
    return known[id(node)]
