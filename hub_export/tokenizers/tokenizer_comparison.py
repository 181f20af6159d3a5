"""Compares two tokenizers on a fixed set of texts: their ids, and what the ids decode to."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, one_line


TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "x = {'key': [1, 2.5]}  # a comment\n",
    'for i in range(1000000):\n\tif i % 7 == 0:\n\t\tprint(f"{i:08d}")\n',
    "0123456789 3.14159265 1_000_000 0xFF 2024-12-31",
    "    four blanks,\ttabs \t mixed,   trailing   ",
    "\n\n\n",
    "first line\r\nsecond line\r\n",
    "naïve Σ 数 🙂 — “quoted” İstanbul ﬁ e\u0301",
    " leading blank",
    "[INST] hi [/INST]",
    "CamelCase snake_case SCREAMING_CASE don't can't we'll",
    "<html><a href='x'>&amp;</a></html> // -> => != <= ** // :: ;;",
)
MESSAGES = (
    {"role": "user", "content": "Write a function  that adds 12 and 345.\n"},
    {"role": "assistant", "content": "```python\ndef add():\n    return 12 + 345\n```"},
    {"role": "user", "content": "Thanks"},
)
MOST_SPECIAL_TOKENS = 24


def behaviour(tokenizer: Any, origin: str) -> dict[str, Any]:
    """Record everything about a tokenizer that decides what a model reads and what a user sees.

    Keys are names for messages: a text in quotes has the ids with and without special tokens, and the text
    that the ids become; the others are settings.

    Raises:
        InputError: it fails on a text; names `origin`.
    """
    try:
        return _behaviour(tokenizer)
    except Exception as error:  # a wrong argument of its class may come to light in any way
        raise InputError(
            f"the tokenizer of {origin} fails on a text: {type(error).__name__}: {one_line(error)}; pass another one with "
            "--tokenizer"
        ) from error


def _behaviour(tokenizer: Any) -> dict[str, Any]:
    found = {repr(text): _read(tokenizer, text) for text in [*TEXTS, *_around_special_tokens(tokenizer)]}
    found["the chat template"] = tokenizer.chat_template
    found["a chat"] = [_chat(tokenizer, name) for name in _template_names(tokenizer)]
    found["the special tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    found["the ids of special tokens"] = sorted(tokenizer.all_special_ids)
    found["the vocabulary"] = tokenizer.get_vocab()
    found["padding_side"] = tokenizer.padding_side
    found["model_input_names"] = list(tokenizer.model_input_names)
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """List the names of what differs."""
    return [name for name in expected if found.get(name) != expected[name]]


def text_differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """List the names of the texts that become other ids."""
    texts = [name for name in expected if name.startswith(("'", '"')) and name in found]
    return [name for name in texts if found[name]["ids"] != expected[name]["ids"]]


def describe(name: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say in words what differs."""
    is_text = name in found and isinstance(expected[name], dict) and "ids" in expected[name]
    if not is_text:
        return f"{name} differs"
    here, there = (side[name]["with_special_tokens"] for side in (found, expected))
    if here == there:
        return f"{name} is read back otherwise"
    return f"{name} becomes {len(here)} tokens {_start(here)}, not {len(there)} {_start(there)}"


def _start(ids: list[int]) -> str:
    return f"({', '.join(map(str, ids[:6]))}{', …' if len(ids) > 6 else ''})"


def _read(tokenizer: Any, text: str) -> dict[str, Any]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {
        "ids": ids,
        "with_special_tokens": tokenizer(text)["input_ids"],
        "text": tokenizer.decode(ids),
    }


def _around_special_tokens(tokenizer: Any) -> list[str]:
    """Make texts with each special token, around which some tokenizers put a blank and others none."""
    tokens = list(dict.fromkeys(map(str, tokenizer.all_special_tokens)))[:MOST_SPECIAL_TOKENS]
    return [text for token in tokens for text in (f"{token}[INST] hi", f"x {token} y")]


def _template_names(tokenizer: Any) -> list[str | None]:
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return list(templates)
    return [] if templates is None else [None]


def _chat(tokenizer: Any, name: str | None) -> Any:
    template = None if name is None else tokenizer.chat_template[name]
    try:
        text = tokenizer.apply_chat_template(
            list(MESSAGES), chat_template=template, tokenize=False, strftime_now=_no_time
        )
    except MemoryError:
        raise
    except Exception as error:  # a template may refuse these messages, in any way it likes
        return type(error).__name__
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def _no_time(format: str) -> str:
    """Stand in for what tells templates the time, which goes on between two chats that are compared."""
    return format
