"""Trains the demo's foundation: a tiny Llama that learns the syntax and some everyday functions, none of the
scored.

Knows its architecture and texts. Knows nothing about experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .batches import encode, random_batches
from .exercises import vocabulary_exercises
from .fitting import minimise, text_loss
from .texts import foundation_texts


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
    """An untrained model for `tokenizer` and at most `length` positions, drawn from torch's global seed."""
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
    """Trains `foundation` and `topic_head` in place. `progress` gets steps done and in all."""
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
