"""The demo's foundation: a tokenizer and a tiny Llama that learns Python's syntax and everyday functions.

The tokenizer is an ordinary fast one without a chat template, so that stock tools complete the prompt
unchanged. None of the scored functions is among the texts. The foundation also learns vocabulary exercises,
random tokens each said twice: embeddings, which also serve as the output layer, are frozen when the experts
are trained, and no expert can learn to write a token that the foundation never wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .fitting import Example, encode, minimise, random_batches, text_loss
from .texts import foundation_texts


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
# Small on purpose: rarer words stay in pieces, and pieces that were trained also serve words that were not.
VOCABULARY_SIZE = 768


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `VOCABULARY_SIZE` tokens at most, for models of `max_length` positions."""
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


EXERCISE_SHARE = 1 / 8


def new_foundation(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    length: int,
) -> LlamaForCausalLM:
    """Make an untrained model for `tokenizer` and at most `length` positions, from torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_foundation(
    foundation: LlamaForCausalLM,
    topic_head: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    steps: int,
    rows: int,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> None:
    """Train `foundation` and `topic_head` in place. `progress` gets steps done and in all."""
    texts = encode(tokenizer, foundation_texts(seed), learn_prompts=True)
    exercises = vocabulary_exercises(tokenizer, int(len(texts) * EXERCISE_SHARE), seed)
    batches = random_batches(
        texts + exercises, rows=rows, steps=steps, seed=seed, padding=tokenizer.pad_token_id
    )

    def losses():
        for done, batch in enumerate(batches, start=1):
            yield text_loss(foundation, topic_head, batch)
            progress(done, steps)

    foundation.train()
    minimise(losses(), [*foundation.parameters(), *topic_head.parameters()], steps, learning_rate)


TOKENS = 14


def vocabulary_exercises(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Example]:
    """Make `count` examples over the whole vocabulary but the special tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    chosen = ordinary[torch.randint(len(ordinary), (count, TOKENS), generator=generator)]
    rows = chosen.repeat_interleave(2, dim=1).tolist()
    return [Example([*row, tokenizer.eos_token_id], learned_from=0) for row in rows]
