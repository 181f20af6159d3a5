"""What held-out texts cost in nats a token: under the router as it is served, each expert alone, and their oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..texts.encoding import EncodedText, batches, collate
from .processes import Processes
from .router_states import strategy_losses


ORACLE = "oracle"  # of each token the lowest loss of any expert alone


@torch.no_grad()
def mean_losses(
    model: Any,
    texts: Sequence[EncodedText],
    strategies: Sequence[str],
    processes: Processes,
    batch_tokens: int,
) -> dict[str, float]:
    """Compute the mean loss of a token that counts, in nats, by strategy.

    Args:
        strategies: with those of all experts alone (`single:0`, …), the token-level oracle is computed, too.
    """
    singles = [f"single:{index}" for index in range(model.config.num_experts)]
    with_oracle = set(singles) <= set(strategies)
    names = [*strategies, *([ORACLE] if with_oracle else [])]
    totals = torch.zeros(len(names), dtype=torch.float64)
    own = [texts[number] for number in processes.own(list(texts))]
    for batch in batches(own, batch_tokens):
        inputs = collate(batch, model.config.pad_token_id or 0, processes.device)
        with processes.autocast():
            losses = {strategy: strategy_losses(model, inputs, strategy) for strategy in strategies}
        if with_oracle:
            losses[ORACLE] = torch.stack([losses[name] for name in singles]).amin(dim=0)
        totals += torch.stack([losses[name][inputs["counts"]].double().sum() for name in names]).cpu()
    count = sum(sum(text.counts) for text in texts)
    return dict(zip(names, (processes.sum(totals) / count).tolist(), strict=True))


__all__ = ["ORACLE", "mean_losses"]
