"""JSON files that hold an object, with one clear error for what is wrong with one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line
from .text_files import MOST_DEPTH, MOST_TEXT, read_text


# A value takes some 70 bytes of memory, and two characters of the file. The largest tokenizer.json holds 2,000,000,
# the index of a model with 100,000 tensors 200,000.
MOST_VALUES = 4_000_000
# A config is read by several readers in turn. That of 64 experts with a rank and an alpha of their own on each of
# 560 layers holds 110,000.
MOST_IN_CONFIG = 1_000_000
CONFIGS = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json")
# transformers makes lists of this length of a config; the deepest public models have less than 200 layers.
COUNT_OF_LAYERS = re.compile(r"(.*_)?(n_?)?(layers?|depth|blocks?)|attention_types", re.IGNORECASE)
MOST_LAYERS = 1_000
MOST_LABELS = 100_000  # of a classifier, each of which gets a name
# Sizes, tokens and positions lie far below; 2^40 of them fit no memory.
MOST_NUMBER = 2**32


def read_json(path: Path, most_bytes: int = MOST_TEXT) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: the file is missing, is not JSON, holds something else than an object, or is larger than honest
            ones are.
    """
    try:
        text = read_text(path, most=most_bytes)
        _check_count(path, text)
        content = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(why_unreadable(path) or f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    _check_depth(path, content)
    if path.name == "config.json":
        check_model_config(path, content)
    return content


def _check_count(path: Path, text: str) -> None:
    """Raise InputError if a text holds more values than honest files; commas and brackets are faster to count."""
    most = MOST_IN_CONFIG if path.name in CONFIGS else MOST_VALUES
    count = text.count(",") + text.count("[") + text.count("{")
    if count > most:
        raise InputError(
            f"{path} holds {count:,} values or so, and a file of its kind has no more than {most:,}; it is not read: look at "
            "what it holds"
        )


def check_model_config(where: Path | str, fields: Any) -> None:
    """Check the numbers of a model's config, before transformers makes lists and modules of them.

    Raises:
        InputError: one is larger than in any model; names it.
    """
    waiting = [("", fields)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            # GPT-Neo's counts of layers; sizes of each layer are no counts
            inside = name if name == "attention_types" else ""
            waiting += [(inside, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool) and value > _most(name):
            raise InputError(
                f"{where}: {name} is {_shown(value)}, and no model has more than {_most(name):,}; correct it"
            )


def _most(name: str) -> int:
    if COUNT_OF_LAYERS.fullmatch(name):
        return MOST_LAYERS
    return MOST_LABELS if name == "num_labels" else MOST_NUMBER


def _shown(number: int) -> str:
    return str(number) if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"


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
