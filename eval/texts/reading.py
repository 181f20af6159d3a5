"""Reads texts for training and for measuring the loss: JSONL files, plain files, and folders of plain files.

A line of a JSONL file (`.jsonl`) is an object with `text`, or with `prompt` and `completion`, of which only the
completion counts; `group`, `expert` and `task_id` are optional. Any other file is one text. Nothing is kept: texts
come one after the other, as often as they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError, one_line


FIELDS = ("text", "prompt", "completion", "group", "expert", "task_id")
LARGEST_TEXT = 64 * 2**20  # bytes of a file, or of a line of JSON


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        text: all of it.
        prompt: characters at its beginning that do not count.
        group: what kind of text it is: the line's own `group`, else its expert, else the file's name without
            its ending, else the folder's.
        source: file, and line of a JSONL file; no two texts have the same.
        expert: which expert it is for, as the line says; `None` for any.
        task_id: which task it belongs to, as the line says.
    """

    text: str
    prompt: int
    group: str
    source: str
    expert: str | None = None
    task_id: str | None = None


class Texts(Iterable[Text]):
    """Texts in files and folders, read again each time they are asked for; a file that is named twice once.

    Args:
        paths: JSONL files, other files, folders; or one of them. Hidden files, and files that are not text
            (UTF-8), are left out of a folder.

    Raises:
        InputError: a path that is not there, a line that is not such an object, or no text at all; while reading.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        for path in self.paths:
            if not path.exists():
                raise InputError(f"{path} is not there; give files or folders with texts")
            if path.suffix.lower() == ".json":
                raise InputError(
                    f"{path}: is it one text, or one object a line? Name it .txt or .jsonl, which says so"
                )

    def __iter__(self) -> Iterator[Text]:
        found = False
        seen: set[Path] = set()
        for path in self.paths:
            for file, group in _files_in(path):
                if file.resolve() in seen:
                    continue
                seen.add(file.resolve())
                for text in _texts_of_file(file, group):
                    found = True
                    yield text
        if not found:
            names = ", ".join(str(path) for path in self.paths)
            raise InputError(
                f"no text in {names or 'nothing'}: give a JSONL file with `text`, or a folder of files"
            )


def _files_in(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield files, each with its folder's name if it was found in one."""
    if not path.is_dir():
        yield path, None
        return
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not is_hidden:
            yield file, path.resolve().name


def _texts_of_file(file: Path, folder: str | None) -> Iterator[Text]:
    try:
        if file.suffix.lower() == ".jsonl":
            yield from _lines(file)
            return
        if file.stat().st_size > LARGEST_TEXT:
            raise InputError(
                f"{file} is one text of more than {LARGEST_TEXT // 2**20} MiB: make a JSONL file of it"
            )
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        if folder is not None:
            return
        raise InputError(f"{file} is not a text: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error
    if text.strip():
        yield Text(text, 0, folder or file.stem, str(file))


def _lines(file: Path) -> Iterator[Text]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(LARGEST_TEXT + 1):
            number += 1
            if len(line) > LARGEST_TEXT:
                raise InputError(f"{file}, line {number}, is longer than {LARGEST_TEXT // 2**20} MiB")
            if line.strip():
                yield _text_of_line(line, file, number)


def _text_of_line(line: bytes, file: Path, number: int) -> Text:
    source = f"{file}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is no JSON: {one_line(error)}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{source} is no object with `text`")
    values = {name: _string(entry, name, source) for name in FIELDS}
    prompt = values["prompt"] or ""
    if values["text"] is None and values["completion"] is None:
        has = ", ".join(map(repr, entry)) or "nothing"
        raise InputError(f"{source} has neither `text` nor `completion`; it has {has}")
    if values["text"] is not None and values["completion"] is not None:
        raise InputError(f"{source} has both `text` and `completion`: give one of them")
    text = values["text"] if values["completion"] is None else prompt + values["completion"]
    if values["completion"] is None and prompt:
        raise InputError(f"{source} has `prompt` without `completion`")
    if not text[len(prompt) :].strip():
        raise InputError(f"{source} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source} has half a surrogate pair, which is no character") from error
    group = values["group"] or values["expert"] or file.stem
    return Text(text, len(prompt), group, source, values["expert"], values["task_id"])


def _string(entry: dict[str, Any], name: str, source: str) -> str | None:
    value = entry.get(name)
    if name in ("expert", "task_id", "group") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{source}: `{name}` is {value!r:.60}, which is no string")
    return value


__all__ = ["Text", "Texts"]
