"""Finds the tokenizer that belongs in an exported repo. It knows nothing about experts or weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .errors import DyloraMoeWarning, InputError, one_line
from .mixture import FoundationReference, Mixture


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    given: str | None, mixture: Mixture, foundation: FoundationReference | None, trust_remote_code: bool
) -> tuple[Any, str]:
    """The tokenizer and where it came from: `given`, else the source's own, else the foundation's.

    Raises:
        InputError: none is to be found, one cannot be read, or the adapters' own ones have different vocabularies.
    """
    if given is not None:
        return _load(given, None, trust_remote_code), given
    own = [folder for folder in mixture.folders if has_tokenizer(folder)]
    if own:
        return _common(own, trust_remote_code), str(own[0])
    name = foundation.name if foundation is not None else None
    if name is None or (Path(name).is_absolute() and not has_tokenizer(Path(name))):
        places = [str(folder) for folder in mixture.folders] + ([name] if name else [])
        raise InputError(f"no tokenizer in {', '.join(places)}; pass one with --tokenizer")
    return _load(name, foundation.revision, trust_remote_code), name


def _common(folders: list[Path], trust_remote_code: bool) -> Any:
    """The first of several tokenizers that must agree on what each token is."""
    tokenizers = [_load(str(folder), None, trust_remote_code) for folder in folders]
    first = tokenizers[0]
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        if tokenizer.get_vocab() != first.get_vocab():
            raise InputError(
                f"the tokenizers in {folders[0]} and {folder} have different vocabularies; say which with --tokenizer"
            )
        if tokenizer.chat_template != first.chat_template:
            warnings.warn(
                f"the chat templates in {folders[0]} and {folder} differ; the first is kept (--tokenizer chooses)",
                DyloraMoeWarning,
                stacklevel=2,
            )
    return first


def _load(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise many kinds, bare Exception among them
        raise InputError(
            f"the tokenizer of {name} cannot be read: {one_line(error)}; pass one with --tokenizer"
        ) from error
