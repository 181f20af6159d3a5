"""Finds the tokenizer that belongs in an exported repo. It knows nothing about experts or weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .containment import contained
from .errors import DyloraMoeWarning, InputError
from .foundation import at_hand
from .mixture import FoundationReference, Mixture
from .options import ExportOptions


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".vocab")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def find_tokenizer(
    options: ExportOptions, mixture: Mixture, foundation: FoundationReference
) -> tuple[Any, str | None]:
    """The tokenizer and where it came from: the one given, else the source's own, else the foundation's.

    For layout `adapter` it may be missing with the foundation, which is said; then (None, None).

    Raises:
        InputError: none is to be found, one cannot be read, or the adapters' own ones have different vocabularies.
    """
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer, None, options.trust_remote_code), options.tokenizer
    own = [folder for folder in mixture.folders if has_tokenizer(folder)]
    if own:
        return _common(own, options.trust_remote_code), str(own[0])
    name = foundation.name
    if name is not None and not (Path(name).is_absolute() and not has_tokenizer(Path(name))):
        try:
            return load_tokenizer(name, foundation.revision, options.trust_remote_code), name
        except InputError:
            if options.layout != "adapter" or at_hand(foundation):
                raise
    if options.layout == "adapter" and name is not None and not at_hand(foundation):
        message = f"the repo has no tokenizer: neither the source nor this machine has one; load that of {name}"
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)
        return None, None
    places = [str(folder) for folder in mixture.folders] + ([name] if name else [])
    raise InputError(f"no tokenizer in {', '.join(places)}; pass one with --tokenizer")


def _common(folders: list[Path], trust_remote_code: bool) -> Any:
    """The first of several tokenizers that must agree on what each token is."""
    for folder in folders:
        for path in [*folder.glob("*.*"), *folder.glob("additional_chat_templates/*")]:
            if path.suffix in TOKENIZER_SUFFIXES:
                contained(folder, path)  # a chat template may be any text of this machine
    tokenizers = [load_tokenizer(str(folder), None, trust_remote_code) for folder in folders]
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


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or a Hub repo.

    Raises:
        InputError: there is none, or it needs code of its own that is not trusted.
    """
    from transformers import AutoTokenizer

    from dylora_moe.modeling.layouts_dylora_moe import why_not_loaded

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise many kinds, bare Exception among them
        why = why_not_loaded(name, error, TOKENIZER_SUFFIXES)
        raise InputError(f"the tokenizer of {name} cannot be read: {why}; pass one with --tokenizer") from error
    if not trust_remote_code:
        # saved along, it would run for those who trust the repo
        tokenizer.init_kwargs.pop("auto_map", None)
        tokenizer._auto_map = None
    return tokenizer
