"""Which arguments of a stored tokenizer may reach its class: an allow-list by key and type.

transformers hands every field of `tokenizer_config.json` and `special_tokens_map.json` to the tokenizer's
class, and some classes open what they find there: with `"vocab": "/proc/self/environ"`, BertTokenizer makes
tokens of the environment, which saving or pushing the tokenizer would publish. So only what cannot name a
file is handed on.
"""

from __future__ import annotations

import inspect
import re
from typing import Any


# Arguments of the call that loaded the tokenizer before it was saved; they say nothing about it.
OF_THE_LOADING_CALL = {"is_local", "local_files_only", "trust_remote_code", "force_download", "use_fast"}
# Other files for other versions of transformers, instead of tokenizer.json.
VERSIONS = "fast_tokenizer_files"
# What a class may open: the number 3 is a file to Python's `open`, too.
OPENED = re.compile(r"vocab|merges|init_inputs|.*_(file|files|path|dir)")

TOKEN_COLLECTIONS = {
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "chat_control_tokens",
}
TEMPLATES = {"chat_template", "tool_use_template", "grounded_generation_template"}
CHOICES = {
    "padding_side": {"left", "right"},
    "truncation_side": {"left", "right"},
    "errors": {"strict", "replace", "ignore"},
}
TOKEN_FIELDS = {
    "content": str,
    "lstrip": bool,
    "rstrip": bool,
    "normalized": bool,
    "single_word": bool,
    "special": bool,
}
NAME = re.compile(r"[A-Za-z_]\w*")


def allowed_arguments(stored: dict[str, Any]) -> dict[str, Any]:
    """Filter the fields of a `tokenizer_config.json` that cannot name a file or code.

    Numbers, booleans, token strings and token dicts under their own keys (`</s>` and `/` are tokens, not
    paths), chat templates, the class's name, and the few strings that are one of a fixed set. Everything else
    is left out.
    """
    return {key: value for key, value in stored.items() if _is_allowed(key, value)}


def allowed_tokens(stored: dict[str, Any]) -> dict[str, Any]:
    """Filter the fields of a `special_tokens_map.json` that are tokens. transformers makes arguments of all."""
    return {key: value for key, value in stored.items() if _is_token_argument(key, value)}


def missed_arguments(stored: dict[str, Any], tokenizer: Any) -> list[str]:
    """List the fields of a `tokenizer_config.json` that are left out, and might have made other tokens.

    Those that the tokenizer's class takes, but for the files that it opens, which the loader finds by itself.
    """
    taken: set[str] = set()
    for kind in type(tokenizer).__mro__:
        if "__init__" in vars(kind) and kind is not object:
            taken |= inspect.signature(kind.__init__).parameters.keys()
    kept = allowed_arguments(stored).keys() | OF_THE_LOADING_CALL
    missed = [name for name in stored if name in taken - kept and not OPENED.fullmatch(name)]
    versions = stored.get(VERSIONS)
    if isinstance(versions, list) and set(map(str, versions)) - {"tokenizer.json"}:
        missed.append(VERSIONS)
    return missed


def arguments_that_are_opened(stored: dict[str, Any]) -> list[str]:
    """List the arguments with a text that some classes open as a file. transformers saves none of them."""
    return [key for key in ("vocab", "merges", "init_inputs") if not _has_no_text(stored.get(key))]


def _is_allowed(key: str, value: Any) -> bool:
    if key in OF_THE_LOADING_CALL or OPENED.fullmatch(key):
        return False
    if _has_no_text(value) or _is_token_argument(key, value):
        return True
    if key in TEMPLATES:
        return _is_template(value)
    if key in CHOICES:
        return value in CHOICES[key] if isinstance(value, str) else False
    if key == "tokenizer_class":
        return _is_name(value)
    if key == "model_input_names":
        return isinstance(value, list) and all(map(_is_name, value))
    if key == "added_tokens_decoder":
        return isinstance(value, dict) and all(
            id_.isdecimal() and isinstance(token, dict) and _is_token(token) for id_, token in value.items()
        )
    return False


def _is_token_argument(key: str, value: Any) -> bool:
    if key in TOKEN_COLLECTIONS:
        tokens = value.values() if isinstance(value, dict) else value
        return value is None or (isinstance(value, dict | list) and all(map(_is_token, tokens)))
    return key.endswith("_token") and (value is None or _is_token(value))


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    fields = {name: field for name, field in value.items() if name != "__type"}
    is_known = all(
        name in TOKEN_FIELDS and isinstance(field, TOKEN_FIELDS[name]) for name, field in fields.items()
    )
    return is_known and "content" in fields and value.get("__type", "AddedToken") == "AddedToken"


def _is_template(value: Any) -> bool:
    """Say whether it is one text, or several by name: `{name: text}` or `[{"name": …, "template": …}]`."""
    if isinstance(value, list):
        return all(
            isinstance(entry, dict) and all(isinstance(text, str) for text in entry.values())
            for entry in value
        )
    texts = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(text, str) for text in texts)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _has_no_text(value: Any) -> bool:
    """Say whether it is made of numbers, booleans and null alone."""
    if isinstance(value, dict):
        return all(map(_has_no_text, value.values()))
    if isinstance(value, list):
        return all(map(_has_no_text, value))
    return value is None or isinstance(value, bool | int | float)
