"""The demo's tokenizer: a byte-level BPE trained on the training texts.

Knows nothing about models. What it saves is an ordinary fast tokenizer, without a chat template, so that
stock tools complete the prompt as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
# Small on purpose: rarer words stay in pieces, and pieces that were trained also serve words that were not.
VOCABULARY_SIZE = 768


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY_SIZE` tokens at most, trained on `texts`, for models of `max_length`
    positions."""
    tokenizer = Tokenizer(models.BPE())
    # A newline is always a token of its own: a prompt that ends in one must end just where a training prompt
    # does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
