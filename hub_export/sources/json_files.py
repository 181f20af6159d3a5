"""JSON files that hold an object, with one clear error for what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line


MOST_DEPTH = 100  # tokenizers and configs have less than 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(why_unreadable(path) or f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    _check_depth(path, content)
    return content


def _check_depth(path: Path, content: dict[str, Any]) -> None:
    """Check that functions that call themselves for what is inside can go through it, as writing it again does.

    Raises:
        InputError: it is nested too deep.
    """
    level: list[Any] = [content]
    for _ in range(MOST_DEPTH):
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise InputError(
        f"{path} is nested more than {MOST_DEPTH} deep, and no file of its kind is; look at what it holds"
    )


def why_unreadable(path: Path) -> str | None:
    """Say why a file cannot be read at all: it is missing, this user may not, or it is a Git LFS pointer.

    None where it is none of that.
    """
    from dylora_moe.modeling.loading_dylora_moe import why_unreadable

    return why_unreadable(path)
