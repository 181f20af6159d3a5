"""The last position of a model (its context length), for the models that cannot go past one.

GPT-2 and similar models look positions up in a table, learned or computed once: a token after the last one is
an IndexError on a CPU, and on a GPU the end of the process. Rotary models go on, however badly.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch


# What transformers calls tables of positions: embeddings, and buffers of sines and cosines (GPT-J, CodeGen).
TABLES = ("wpe", "position_embeddings", "embed_positions", "positions_embed")
# Model types whose table is neither: CTRL's is a plain attribute, MPT's are biases of the attention.
OTHERS = ("ctrl", "mpt")
# Model types in which a mask or a bias over the whole cache ends, so that padding takes positions, too.
WHOLE_CACHE = ("gpt_neo", "openai-gpt", "mpt")


@dataclass(frozen=True)
class LastPosition:
    """How many positions a model has.

    Attributes:
        positions: their number.
        counts_padding: whether every token of the cache takes one, instead of those that the attention mask
            shows.
        shifts: whether padding at the left also moves a text to other positions than it has alone.
    """

    positions: int
    counts_padding: bool = False
    shifts: bool = False

    def taken(self, attention_mask: list[int]) -> int:
        """Count the positions that a prompt takes, from its mask without padding."""
        return len(attention_mask) if self.counts_padding else sum(attention_mask)


def last_position(model: Any) -> LastPosition | None:
    """Find out where a causal language model's positions end; None where they do not.

    Tried on the families of transformers 5.23: each one's last position is that of its config, except those
    of XLM and ProphetNet, whose own `generate` fails before it.

    Args:
        model: of transformers, or a mixture.
    """
    model = getattr(model, "foundation", model)
    config = model.config.get_text_config()
    table = _table_of_positions(model.get_decoder())
    if table is None and config.model_type not in OTHERS:
        return None
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    told = "position_ids" in inspect.signature(model.forward).parameters
    return LastPosition(
        positions=positions or len(table),
        counts_padding=not told or config.model_type in WHOLE_CACHE,
        shifts=not told and table is not None,
    )


def _table_of_positions(model: torch.nn.Module) -> torch.Tensor | None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in TABLES:
            return module.weight
    return next((buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in TABLES), None)


__all__ = ["LastPosition", "last_position"]
