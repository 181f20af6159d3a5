"""Finds the tokenizer that belongs in an exported repo, and writes it there so that it gives the same ids.

The rule: a repo's tokenizer gives what stock transformers gives for the source's tokenizer beside the
*foundation*, whose config decides which class reads the files.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DyloraMoeWarning, FailureError, InputError
from ..foundation.reference import is_available, is_local, local_folder
from ..repo.options import ExportOptions
from ..sources.json_files import read_json
from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.mixture import FoundationReference, Mixture
from .tokenizer_arguments import OF_THE_LOADING_CALL
from .tokenizer_comparison import behaviour, describe, differences, text_differences
from .tokenizer_files import (
    TOKENIZER_CONFIG,
    copy_tokenizer,
    fetch_tokenizer,
    has_tokenizer,
    load_tokenizer,
    needs_own_code,
    warn_about_missed_arguments,
    write_json,
)


# The class that takes tokenizer.json unchanged, by the name that transformers 4 knows, too.
UNCHANGED = "PreTrainedTokenizerFast"
# Below this share of the model's tokens, a part of the vocabulary may be missing.
LEAST_SHARE = 0.01


@dataclass
class FoundTokenizer:
    """A source's tokenizer, loaded as stock transformers does beside the foundation.

    Attributes:
        origin: the folder or Hub id it came from.
        folder: where its files lie.
        base_config: the foundation's config; None where that is not on this machine.
        has_own_code: it runs code of its own, which the user trusts.
    """

    origin: str
    folder: SourceFolder
    tokenizer: Any
    base_config: Any = None
    has_own_code: bool = False

    @cached_property
    def behaviour(self) -> dict[str, Any]:
        return behaviour(self.tokenizer, self.origin)


def open_tokenizer(
    origin: str,
    folder: str | Path | SourceFolder,
    base_config: Any,
    foundation: str | None,
    trust_remote_code: bool = False,
) -> FoundTokenizer:
    """Load a tokenizer beside a foundation.

    Args:
        base_config: the foundation's config; None: by what the tokenizer's own files say.
        foundation: its name, by which transformers knows some models whose files name a wrong class.

    Raises:
        InputError: see `load_tokenizer`.
    """
    from transformers import PreTrainedConfig

    config = PreTrainedConfig() if base_config is None else copy.deepcopy(base_config)
    config._name_or_path = foundation or ""
    folder = open_folder(folder)
    tokenizer = load_tokenizer(folder, config, trust_remote_code)
    warn_about_missed_arguments(folder, tokenizer)
    return FoundTokenizer(
        origin, folder, tokenizer, base_config, trust_remote_code and needs_own_code(folder)
    )


def find_tokenizer(
    options: ExportOptions, mixture: Mixture, foundation: FoundationReference, base_config: Any
) -> FoundTokenizer | None:
    """Find the tokenizer given, else the source's own, else the foundation's.

    Returns:
        None for layout `adapter` where it is missing with the foundation, with a warning.

    Raises:
        InputError: none is to be found, one cannot be read or has no vocabulary, or the adapters' own ones
            have different vocabularies.
    """

    def opened(origin: str, folder: SourceFolder) -> FoundTokenizer:
        return open_tokenizer(origin, folder, base_config, foundation.name, options.trust_remote_code)

    if options.tokenizer is not None:
        return opened(options.tokenizer, fetch_tokenizer(options.tokenizer))
    own = [folder for folder in mixture.folders if has_tokenizer(folder)]
    if own:
        found = _common([opened(str(folder), folder) for folder in own])
        _compare_with_foundations(found, foundation)
        return found
    name = foundation.name
    if is_local(foundation):
        beside = local_folder(foundation)
        may_have_one = beside is not None and has_tokenizer(beside)
    else:
        may_have_one = name is not None
    if may_have_one:
        try:
            remedy = "copy it there, or pass a tokenizer with --tokenizer"
            return opened(name, fetch_tokenizer(name, foundation.revision, remedy))
        except InputError:
            if options.layout != "adapter" or is_available(foundation):
                raise
    if options.layout == "adapter" and name is not None and not is_available(foundation):
        message = (
            f"the repo has no tokenizer: neither the source nor this machine has one; load that of {name}"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)
        return None
    places = [str(folder) for folder in mixture.folders] + ([name] if name else [])
    raise InputError(f"no tokenizer in {', '.join(places)}; pass one with --tokenizer")


def _common(found: list[FoundTokenizer]) -> FoundTokenizer:
    """Take the first of several tokenizers, which must agree on what each token is."""
    first = found[0]
    for other in found[1:]:
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise InputError(
                f"the tokenizers in {first.folder} and {other.folder} have different vocabularies; say which with "
                "--tokenizer"
            )
        texts = text_differences(other.behaviour, first.behaviour)
        which, kept = f"in {first.folder} and {other.folder}", "the first is kept (--tokenizer chooses)"
        if texts:
            message = f"the tokenizers {which} make different tokens of {texts[0]}; {kept}"
            warnings.warn(message, DyloraMoeWarning, stacklevel=2)
        if other.tokenizer.chat_template != first.tokenizer.chat_template:
            message = f"the chat templates {which} differ; {kept}"
            warnings.warn(message, DyloraMoeWarning, stacklevel=2)
    return first


def _compare_with_foundations(found: FoundTokenizer, foundation: FoundationReference) -> None:
    """Warn where the source's tokenizer gives other ids than the one that lies with the foundation.

    Raises:
        InputError: most of the foundation's tokens are not in it.
    """
    own = foundations_tokenizer(foundation)
    if own is None:
        return
    vocabulary, expected = found.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    moved = [token for token, id_ in expected.items() if vocabulary.get(token) != id_]
    if 2 * len(moved) > len(expected):
        raise InputError(
            f"the tokenizer in {found.folder} has {len(moved)} of the {len(expected)} tokens of the base model's own "
            f"({own.folder}) not at all, or under other ids; a file of it may be missing, or pass one with --tokenizer"
        )
    texts = text_differences(found.behaviour, own.behaviour)
    if texts:
        message = (
            f"the tokenizer in {found.folder}, which the repo gets, is not the base model's ({own.folder}): "
            f"{describe(texts[0], found.behaviour, own.behaviour)}; --tokenizer chooses"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def foundations_tokenizer(foundation: FoundationReference) -> FoundTokenizer | None:
    """Load the tokenizer beside the foundation's weights on this machine; None where there is none."""
    folder = local_folder(foundation)
    if folder is None or not has_tokenizer(folder):
        return None
    try:
        found = FoundTokenizer(str(folder), folder, load_tokenizer(folder, name=foundation.name))
        found.behaviour  # noqa: B018  (it may fail on a text)
        return found
    except InputError:
        return None  # nothing to compare with; a command that needs it says why


def check_vocabulary(found: FoundTokenizer, num_embeddings: int | None) -> None:
    """Warn where tokenizer and model have different numbers of tokens.

    Args:
        num_embeddings: of the foundation; None where that is not on this machine.

    Raises:
        InputError: the tokenizer has no vocabulary to speak of: its class was loaded without the file that
            holds it.
    """
    tokenizer = found.tokenizer
    lack = lacks_vocabulary(tokenizer)
    if lack is not None:
        raise InputError(
            f"the tokenizer of {found.origin} {lack}; the file that holds its vocabulary is missing there "
            "(tokenizer.json, tokenizer.model, or vocab.json with merges.txt): copy it, or pass a tokenizer with --tokenizer"
        )
    if num_embeddings is not None and len(tokenizer) > num_embeddings:
        message = (
            f"the tokenizer has {len(tokenizer)} tokens, the base model embeds {num_embeddings}: the rest cannot be read by "
            "the model"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)
    elif num_embeddings is not None and len(tokenizer) < LEAST_SHARE * num_embeddings:
        message = (
            f"the tokenizer of {found.origin} has {len(tokenizer)} tokens, and the base model embeds {num_embeddings}: a file "
            "of it may be missing"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def lacks_vocabulary(tokenizer: Any) -> str | None:
    """Say that a tokenizer has no vocabulary; None where it has one.

    Special and added tokens alone are none: `tokenizer_config.json` lists them, thousands with some models.
    """
    listed = {*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab()}
    count = len(tokenizer.get_vocab().keys() - listed)
    if count > 1:  # some classes have one of their own, the blank
        return None
    return "has no tokens but its special ones" + (" and one more" if count else "")


def warn_about_older_transformers(found: FoundTokenizer) -> None:
    """Warn where tokenizer.json, taken unchanged, gives other ids: transformers 4 trained with those."""
    other = unchanged_behaviour(found)
    texts = [] if other is None else text_differences(found.behaviour, other)
    if texts:
        message = (
            f"transformers {_version()} reads the tokenizer of {found.origin} by its class {type(found.tokenizer).__name__}, "
            f"which gives other tokens than its tokenizer.json: {describe(texts[0], found.behaviour, other)}; transformers 4 "
            "used the latter, so experts trained with it saw other tokens"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def unchanged_behaviour(found: FoundTokenizer) -> dict[str, Any] | None:
    """Measure the source's tokenizer.json without what a class makes of it; None where no class does."""
    is_unchanged = type(found.tokenizer).__name__ == "TokenizersBackend"
    if found.has_own_code or is_unchanged or not found.folder.has("tokenizer.json"):
        return None
    with tempfile.TemporaryDirectory(prefix="dylora-moe-tokenizer-") as directory:
        folder = Path(directory)
        copy_tokenizer(found.folder, folder)
        _declare_class(folder, UNCHANGED)
        from transformers import PreTrainedConfig

        return behaviour(load_tokenizer(folder, PreTrainedConfig(), is_unknown=False), found.origin)


def _version() -> str:
    import transformers

    return transformers.__version__


def write_tokenizer(found: FoundTokenizer, folder: Path, config: Any) -> None:
    """Write a tokenizer into a model's folder, so that stock transformers gives the same ids there.

    The source's files are copied byte for byte, except for what the allow-list drops. Where the model's own
    config would make transformers choose another class than the foundation's config does, `tokenizer_class`
    names the right one; where that is not enough, the loaded tokenizer is saved.

    Args:
        config: of the model in `folder`.

    Raises:
        FailureError: no way of writing it gives the same ids.
    """
    if found.has_own_code:
        found.tokenizer.save_pretrained(folder)
        _drop_loading_call(folder / TOKENIZER_CONFIG)
        return
    first = None
    for write in (_write_copy, _write_class, _write_saved):
        write(found, folder)
        written = behaviour(load_tokenizer(folder, config, is_unknown=False), found.origin)
        wrong = differences(written, found.behaviour)
        if not wrong:
            return
        first = first or describe(wrong[0], written, found.behaviour)
    raise FailureError(
        f"the tokenizer of {found.origin} cannot be written so that it gives the same tokens apart from its base model: {first}; "
        "pass another one with --tokenizer"
    )


def _drop_loading_call(path: Path) -> None:
    """Leave out what says how the tokenizer was loaded here."""
    fields = read_json(path)
    write_json(path, {key: value for key, value in fields.items() if key not in OF_THE_LOADING_CALL})


def _write_copy(found: FoundTokenizer, folder: Path) -> None:
    copy_tokenizer(found.folder, folder)


def _write_class(found: FoundTokenizer, folder: Path) -> None:
    name = type(found.tokenizer).__name__
    _declare_class(folder, UNCHANGED if name == "TokenizersBackend" else name)


def _write_saved(found: FoundTokenizer, folder: Path) -> None:
    """Save the loaded tokenizer as it is in memory; classes that build theirs from parts would build it again."""
    with tempfile.TemporaryDirectory(prefix="dylora-moe-tokenizer-") as directory:
        found.tokenizer.save_pretrained(directory)
        copy_tokenizer(open_folder(directory), folder)
    if (folder / "tokenizer.json").is_file():
        _declare_class(folder, UNCHANGED)


def _declare_class(folder: Path, name: str) -> None:
    path = folder / TOKENIZER_CONFIG
    fields = read_json(path) if path.is_file() else {}
    write_json(path, {**fields, "tokenizer_class": name})
