"""Vocabulary exercises for the demo's foundation: random tokens, each said twice.

The embeddings are frozen when the experts are trained, and they also serve as the output layer. A token that
the foundation never wrote is one that no expert can learn to write; these exercises leave no such token. They
carry no Python and no wording of any problem. Knows nothing about models.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from .batches import Example


TOKENS = 14


def vocabulary_exercises(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Example]:
    """`count` examples over the whole vocabulary but the special tokens, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    chosen = ordinary[torch.randint(len(ordinary), (count, TOKENS), generator=generator)]
    rows = chosen.repeat_interleave(2, dim=1).tolist()
    return [Example([*row, tokenizer.eos_token_id], learned_from=0) for row in rows]
