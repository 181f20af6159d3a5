"""JSON files that hold an object, with one clear error for what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line


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
    return content


def why_unreadable(path: Path) -> str | None:
    """Say why a file cannot be read at all: it is missing, this user may not, or it is a Git LFS pointer.

    None where it is none of that.
    """
    from dylora_moe.modeling.loading_dylora_moe import why_unreadable

    return why_unreadable(path)
