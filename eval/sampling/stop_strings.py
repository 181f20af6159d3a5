"""Where a row of a batch stops: at strings of EvalPlus's, and at those of the model's generation config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StopStringCriteria

from dylora_moe.hub_export.errors import InputError, one_line


class StopStrings:
    """Says whether new tokens spell one of some strings, anywhere in their text, as EvalPlus asks.

    A string that was not there a token ago ends in the last tokens, so their text is looked at first. (A
    string with tokens without text in it may be missed, and its row goes on; trimming cuts its text at the
    same place.)

    Args:
        of_model: the stop strings of the model's generation config, which transformers looks for: at the end
            of prompt and new tokens.

    Raises:
        InputError: transformers cannot look for them with this tokenizer.
    """

    SPARE_TOKENS = 8  # that spell nothing, or parts of one character

    def __init__(self, tokenizer: Any, strings: Sequence[str], of_model: str | Sequence[str] | None = None):
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        try:
            self.criterion = StopStringCriteria(tokenizer, of_model) if of_model else None
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the generation config of the model has stop_strings = {of_model!r}, which transformers cannot look for "
                f"with this tokenizer ({type(error).__name__}: {one_line(error)}); take them out of generation_config.json"
            ) from error
        self.window = max(map(len, self.strings), default=0) + self.SPARE_TOKENS

    def complete(self, new_tokens: list[int], prompt: Sequence[int] = ()) -> bool:
        """Return whether the newest token completes one of the strings."""
        tail = new_tokens[-self.window :]
        if self._spelt(tail) and (len(tail) == len(new_tokens) or self._spelt(new_tokens)):
            return True
        if self.criterion is None:
            return False
        tail = [*prompt, *new_tokens][-self.criterion.maximum_token_len :]
        return bool(self.criterion(torch.tensor([tail]), None))

    def _spelt(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(string in text for string in self.strings)


__all__ = ["StopStrings"]
