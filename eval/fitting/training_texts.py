"""The texts that a gate is fitted to: read, checked, a share of each group held out, cut into tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import InputError, one_line
from dylora_moe.hub_export.repo.checksums import sha256

from ..sampling.model_identity import digest
from ..texts.encoding import EncodedText, encode
from ..texts.reading import Text, Texts


PART_LENGTH = 512
MOST_UNKNOWN = 0.5  # of the tokens, before the texts are taken for another vocabulary's


@dataclass(frozen=True)
class FittingTexts:
    """Encoded texts, or parts of long ones: those that the gate learns from, and those held out."""

    train: list[EncodedText]
    held_out: list[EncodedText]


def read_texts(paths: Sequence[str | Path], config: Any, *, all_name_experts: bool) -> list[Text]:
    """Read all texts.

    Args:
        config: the mixture's, which says the experts.
        all_name_experts: whether each text must name its expert.

    Raises:
        InputError: no text, one that is damaged, an expert that the mixture does not have, or none where one is
            needed; names the file and the line.
    """
    texts = list(Texts(paths))
    for text in texts:
        if text.expert is not None:
            try:
                config.expert_index(text.expert)
            except ValueError as error:
                raise InputError(f"{text.source}: {one_line(error, 500)}") from error
        elif all_name_experts:
            raise InputError(
                f"{text.source} names no expert, and --targets texts needs one of every text: add `expert`, or leave out "
                "--targets"
            )
    return texts


def split_texts(texts: Sequence[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """Hold out a share of each group's texts, at least one of a group of several. Returns the others, and these.

    Of copies of a text the first stays, or one could be held out and another learned from.
    """
    groups: dict[str, list[Text]] = defaultdict(list)
    seen: set[tuple[str, str, int]] = set()
    for text in texts:
        key = (text.group, text.text, text.prompt)
        if key in seen:
            continue
        seen.add(key)
        groups[text.group].append(text)
    train, held_out = [], []
    for group in sorted(groups):
        members = groups[group]
        random.Random(f"{seed} {group}").shuffle(members)
        count = max(1, round(share * len(members))) if share > 0 and len(members) > 1 else 0
        count = min(count, len(members) - 1)
        held_out += members[:count]
        train += members[count:]
    return train, held_out


def encode_texts(
    texts: Sequence[Text], tokenizer: Any, *, max_length: int, vocab_size: int
) -> list[EncodedText]:
    """Cut texts into tokens.

    Raises:
        InputError: most tokens are unknown to the tokenizer, or to the model's embeddings.
    """
    encoded = [part for text in texts for part in encode(tokenizer, text, max_length, vocab_size)]
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        total = sum(len(part.input_ids) for part in encoded)
        share = sum(part.input_ids.count(unknown) for part in encoded) / max(total, 1)
        if share > MOST_UNKNOWN:
            raise InputError(
                f"{share:.0%} of the texts' tokens are unknown to the repo's tokenizer: the texts are in another vocabulary"
            )
    return encoded


def describe_texts(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Name each file or folder, without where it lies, and hash what it holds (SHA-256)."""
    described = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            content = digest({file.relative_to(path).as_posix(): sha256(file) for file in files})
        else:
            content = sha256(path)
        described.append({"name": path.resolve().name, "sha256": content})
    return described


__all__ = ["PART_LENGTH", "FittingTexts", "describe_texts", "encode_texts", "read_texts", "split_texts"]
