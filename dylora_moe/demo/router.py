"""Trains the demo's gate to tell the family of a token's text, with all experts active.

That input (`router_input: experts_sum`) is what training checkpoints of this layout have fed their routers.
The foundation and the experts are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import nn

from .fitting import Example, pad


ROWS = 32
WEIGHT_DECAY = 0.01


def train_gate(
    peft_model: PeftModel,
    adapters: Sequence[str],
    examples: Sequence[Sequence[Example]],
    *,
    steps: int,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> nn.Linear:
    """Train a gate [hidden] → [experts] to tell from each token's hidden state whose text it stands in.

    `examples[i]` are texts of the family that `adapters[i]` was trained on. `progress` gets steps done and in
    all.
    """
    hidden_states, families = _router_inputs(peft_model, adapters, examples)
    gate = nn.Linear(hidden_states.shape[-1], len(adapters))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        loss = nn.functional.cross_entropy(gate(hidden_states), families)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, steps)
    return gate


@torch.no_grad()
def _router_inputs(
    peft_model: PeftModel, adapters: Sequence[str], examples: Sequence[Sequence[Example]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's last hidden state, after the final norm [tokens, hidden], and family [tokens]."""
    peft_model.eval()
    peft_model.base_model.set_adapter(list(adapters))
    hidden_states, families = [], []
    for index, texts in enumerate(examples):
        for start in range(0, len(texts), ROWS):
            batch = pad(texts[start : start + ROWS], peft_model.config.pad_token_id)
            output = peft_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            )
            kept = output.hidden_states[-1][batch.attention_mask.bool()]
            hidden_states.append(kept)
            families.append(torch.full((len(kept),), index))
    return torch.cat(hidden_states), torch.cat(families)
