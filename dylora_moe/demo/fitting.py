"""What the training of the demo's foundation and of its experts share: the optimiser and the losses.

Knows nothing about which texts are learned, or by which part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .batches import IGNORED, Batch


TOPIC_WEIGHT = 1.0
WARM_UP_SHARE = 0.1


def minimise(
    losses: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter], steps: int, learning_rate: float
) -> None:
    """Takes one step on each of `steps` losses, with a short warm-up and then a learning rate that falls to
    zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=WARM_UP_SHARE
    )
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def text_loss(model: nn.Module, topic_head: nn.Linear, batch: Batch) -> torch.Tensor:
    """The usual causal loss, and whether `topic_head` can tell from every hidden state what kind of value it
    is about.

    A large foundation's hidden states tell such things by themselves; one this small keeps only what it is
    asked for, and the router has nothing else to read. The head is not part of what training leaves.
    """
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        output_hidden_states=True,
    )
    topic_logits = topic_head(output.hidden_states[-1])
    topic_loss = nn.functional.cross_entropy(
        topic_logits.flatten(0, 1), batch.topics.flatten(), ignore_index=IGNORED
    )
    return output.loss + TOPIC_WEIGHT * topic_loss


def layer_states(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The hidden states after each layer, those of padding left out; each of shape [tokens, hidden]."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    kept = batch.attention_mask.bool()
    return [states[kept] for states in output.hidden_states[1:]]
