"""What held-out texts cost in nats a token: under the router as it is served, each expert alone, and their oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..texts.encoding import EncodedText
from ..texts.text_losses import text_losses
from .options import FitRouterOptions
from .processes import Processes


ORACLE = "oracle"  # of each token the lowest loss of any expert alone


def mean_losses(
    model: Any,
    tokenizer: Any,
    parts: Sequence[EncodedText],
    strategies: Sequence[str],
    options: FitRouterOptions,
    processes: Processes,
) -> dict[str, float]:
    """Compute the mean loss of a token that counts, in nats, by strategy.

    Args:
        parts: of whole texts.
        strategies: with those of all experts alone (`single:0`, …), the token-level oracle is computed, too.
    """
    texts = list(dict.fromkeys(part.text for part in parts))
    own = [texts[number] for number in processes.own(texts)]
    singles = {f"single:{index}" for index in range(model.config.num_experts)}
    names = [*strategies, *([ORACLE] if singles <= set(strategies) else [])]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # the number of tokens is the last
    if own:
        with processes.autocast():
            found = text_losses(
                model,
                tokenizer,
                own,
                strategies,
                max_length=options.max_length,
                batch_tokens=options.batch_tokens,
            )
        columns = [*found.nats.T, *([] if found.oracle is None else [found.oracle]), found.num_tokens]
        sums = torch.tensor([float(column.sum()) for column in columns], dtype=torch.float64)
    *nats, count = processes.sum(sums).tolist()
    return {name: nat / count for name, nat in zip(names, nats, strict=True)}


__all__ = ["ORACLE", "mean_losses"]
