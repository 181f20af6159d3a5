"""Cuts texts into token ids, says which tokens count, and puts texts of like length into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dylora_moe.hub_export.errors import InputError

from .reading import Text


@dataclass(frozen=True)
class EncodedText:
    """The tokens of one text, or of a part of a long one.

    Attributes:
        text: where they come from.
        input_ids: token ids.
        counts: of every token, whether predicting it counts; never the first's, which nothing comes before.
        num_bytes: of the characters (UTF-8) that the counted tokens spell.
        num_prompt_tokens: tokens at the beginning that are the text's prompt's; 0 without a prompt.
    """

    text: Text
    input_ids: list[int]
    counts: list[bool]
    num_bytes: int
    num_prompt_tokens: int = 0


def encode(tokenizer: Any, text: Text, max_length: int, vocab_size: int) -> Iterator[EncodedText]:
    """Cut a text into token ids, in parts of `max_length` tokens at most.

    A prompt's tokens and a text's are encoded together, as a model would meet them; a token counts if a
    character of it stands behind the prompt. A part begins with the last token of the one before, so that each
    token but the text's first is predicted once. Special tokens that the tokenizer adds never count.

    Args:
        tokenizer: a fast one, which says where its tokens lie in the text.
        max_length: 2 or more.
        vocab_size: rows of the model's embeddings.

    Raises:
        InputError: a token id that the model has no embedding for: the texts are in another vocabulary; or a
            tokenizer that does not say where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters its tokens are of; save the model with a fast "
            "tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(
        text.text,
        return_offsets_mapping=True,
        add_special_tokens=True,
        truncation=False,
        verbose=False,  # about more tokens than the model has positions for
    )
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    if ids and max(ids) >= vocab_size:
        raise InputError(
            f"{text.source} has token {max(ids)}, and the model has embeddings for {vocab_size}: the tokenizer is of "
            "another model"
        )
    # Special tokens that the tokenizer adds lie at (0, 0), wherever they stand.
    counted = [end > text.prompt for _, end in places]
    num_bytes = _bytes_of_tokens(text.text, places)
    num_prompt_tokens = (counted.index(True) if True in counted else len(ids)) if text.prompt else 0
    for start in range(0, len(ids) - 1, max_length - 1):
        part = slice(start, start + max_length)
        counts = [False, *counted[part][1:]]
        if any(counts):
            yield EncodedText(
                text=text,
                input_ids=ids[part],
                counts=counts,
                num_bytes=sum(size for size, does in zip(num_bytes[part], counts, strict=True) if does),
                num_prompt_tokens=max(0, num_prompt_tokens - start),
            )


def part_length(config: Any, asked: int | None, most: int) -> int:
    """Say how many tokens a part of a text has: those asked for, else `most` or as many positions as the model has.

    Raises:
        InputError: more are asked for than the model has positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(most, positions or most)
    if positions is not None and asked > positions:
        raise InputError(f"--max_length is {asked}, and the model has {positions} positions")
    return asked


def _bytes_of_tokens(text: str, places: list[tuple[int, int]]) -> list[int]:
    """Count the bytes of the characters (UTF-8) that every token spells; together they are the text's.

    A character that several tokens share belongs to the last of them, and characters that no token claims,
    such as blanks that a tokenizer strips, to the next.
    """
    num_bytes = [0] * len(places)
    own = [token for token, (_, end) in enumerate(places) if end > 0]
    reached = 0
    for token, following in zip(own, [*own[1:], None], strict=True):
        end = places[token][1]
        if following is not None:
            end = min(end, places[following][0])
        if end > reached:
            num_bytes[token] = len(text[reached:end].encode())
            reached = end
    return num_bytes


def batches(texts: Iterable[EncodedText], max_tokens: int, window: int = 512) -> Iterator[list[EncodedText]]:
    """Put texts of like length together, at most `max_tokens` tokens with padding a batch.

    A window of texts is sorted at a time, so that memory stays bounded; a text alone may be longer.
    """
    waiting: list[EncodedText] = []
    for text in texts:
        waiting.append(text)
        if len(waiting) == window:
            yield from _batches_of(waiting, max_tokens)
            waiting = []
    yield from _batches_of(waiting, max_tokens)


def _batches_of(texts: list[EncodedText], max_tokens: int) -> Iterator[list[EncodedText]]:
    batch: list[EncodedText] = []
    for text in sorted(texts, key=lambda text: -len(text.input_ids)):
        # The first is the longest.
        if batch and len(batch[0].input_ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def collate(batch: list[EncodedText], pad_token_id: int, device: Any = None) -> dict[str, Any]:
    """Pad a batch on the right.

    Returns:
        `input_ids`, `attention_mask` (0 at padding) and `counts` (bool), `[batch, sequence]` each.
    """
    import torch

    longest = max(len(text.input_ids) for text in batch)
    shape = (len(batch), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    counts = torch.zeros(shape, dtype=torch.bool)
    for row, text in enumerate(batch):
        length = len(text.input_ids)
        input_ids[row, :length] = torch.tensor(text.input_ids)
        mask[row, :length] = 1
        counts[row, :length] = torch.tensor(text.counts)
    tensors = {"input_ids": input_ids, "attention_mask": mask, "counts": counts}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


__all__ = ["EncodedText", "batches", "collate", "encode", "part_length"]
