"""The tokenizer of a repo, as `verify` looks at it: does it give the ids that it gives beside the foundation?

Every function returns whether that is so, None where it was not looked at, and a sentence about it.
"""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from ..tensors.mixture import FoundationReference
from ..tokenizers.tokenizer import FoundTokenizer, foundations_tokenizer, lacks_vocabulary, open_tokenizer
from ..tokenizers.tokenizer_arguments import arguments_that_are_opened
from ..tokenizers.tokenizer_comparison import TEXTS, behaviour, describe, differences, text_differences
from ..tokenizers.tokenizer_files import FILTERS, has_tokenizer, load_tokenizer


Outcome = tuple[bool | None, str]

SAMPLES = (TEXTS[0], TEXTS[1], "naïve Σ 数 🙂")  # which every tokenizer of code gives back


def check_tokenizer(folder: SourceFolder, config: Any) -> Outcome:
    """Check that it has a vocabulary, and gives the ids here that it gives beside the foundation."""
    if not has_tokenizer(folder):
        return None, "there is none"
    for name in FILTERS:
        opened = arguments_that_are_opened(folder.read_json(name, required=False))
        if opened:
            arguments = ", ".join(opened)
            return (
                False,
                f"{name} gives {arguments}, which a tokenizer may open as a file of the machine that loads it",
            )
    tokenizer = load_tokenizer(folder, config)
    lack = lacks_vocabulary(tokenizer)
    if lack is not None:
        return False, f"it {lack}; the file that holds its vocabulary is missing"
    here = behaviour(tokenizer, str(folder))
    wrong = _not_read_back(tokenizer)
    if wrong is not None:
        return False, wrong
    if config.base_config is not None:
        beside = open_tokenizer(str(folder), folder, config.base_config, config.base_model_name_or_path)
        names = differences(here, beside.behaviour)
        if names:
            detail = describe(names[0], here, beside.behaviour)
            return False, f"beside its base model it is read otherwise: {detail}; export it again"
    notes = _notes(here, len(tokenizer), config)
    if notes:
        return None, "; ".join(notes)
    return True, f"{len(tokenizer)} tokens; {len(TEXTS)} texts become the base model's tokens and text again"


def compare_with_source(folder: SourceFolder, config: Any, source: FoundTokenizer) -> Outcome:
    """Check that the repo's tokenizer gives the ids that the source's gives beside the foundation."""
    try:
        here = behaviour(load_tokenizer(folder, config), str(folder))
    except InputError as error:
        return False, str(error)
    texts, others = text_differences(here, source.behaviour), differences(here, source.behaviour)
    if not others:
        return True, f"it gives the tokens of {source.origin}"
    # a chat template or a padding side is the owner's to change
    passed = False if texts else None
    return passed, describe((texts or others)[0], here, source.behaviour)


def _not_read_back(tokenizer: Any) -> str | None:
    """Say which text's tokens become a text of other tokens; None where all come back. Unknown tokens may not."""
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        ids_again = tokenizer(again, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        if ids_again != ids and (unknown is None or unknown not in ids):
            return f"{text!r} becomes {len(ids)} tokens, and their text {len(ids_again)} others"
    return None


def _notes(here: dict[str, Any], num_tokens: int, config: Any) -> list[str]:
    """Say what a user should know and an owner may have meant."""
    notes = []
    rows = None if config.base_config is None else config.get_text_config().vocab_size
    if rows is not None and num_tokens > rows:
        notes.append(f"it has {num_tokens} tokens, and the base model embeds {rows}")
    reference = FoundationReference(config.base_model_name_or_path, config.base_model_revision)
    own = foundations_tokenizer(reference)
    texts = [] if own is None else text_differences(here, own.behaviour)
    if texts:
        notes.append(f"it is not the base model's ({own.folder}): {describe(texts[0], here, own.behaviour)}")
    return notes
