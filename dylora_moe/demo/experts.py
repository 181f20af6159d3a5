"""Trains the demo's experts: LoRA adapters on one foundation, each for its own family.

An expert is trained for the router's errors, too. Nothing tells a router the family of a text's first tokens,
and later it errs now and then. On a text of one family the other experts do next to nothing, so an expert
meets that case in training by being switched off at some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .fitting import Batch, Example, layer_states, minimise, random_batches, text_loss


ANY_TOKEN_SHARE = 0.04  # of tokens at which the expert is off
LATE_START_SHARE = 0.5  # of rows whose first tokens go without it
LATEST_START = 10


class MisroutedTokens:
    """Switches one adapter off at random tokens of the passes made inside `applied`.

    The same seed gives the same tokens.
    """

    def __init__(self, peft_model: PeftModel, adapter: str, seed: int):
        self._layers = [
            layer.lora_B[adapter]
            for layer in peft_model.modules()
            if isinstance(layer, LoraLayer) and adapter in layer.lora_B
        ]
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def applied(self, shape: torch.Size) -> Iterator[None]:
        """Switch the adapter off at random tokens of passes over token ids of this shape [rows, length]."""
        on = self._tokens_with_expert(shape).unsqueeze(-1)
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: output * on) for layer in self._layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _tokens_with_expert(self, shape: torch.Size) -> torch.Tensor:
        """Draw where the expert acts (1.0) and where not (0.0), of the given shape [rows, length]."""
        rows, length = shape
        on = torch.rand(shape, generator=self._generator) >= ANY_TOKEN_SHARE
        starts = torch.randint(1, LATEST_START + 1, (rows, 1), generator=self._generator)
        late = torch.rand(rows, 1, generator=self._generator) < LATE_START_SHARE
        on &= (torch.arange(length) >= starts) | ~late
        return on.float()


NEUTRAL_WEIGHT = 3.0


def with_experts(foundation: PreTrainedModel, adapters: Sequence[str], *, rank: int, alpha: int) -> PeftModel:
    """Add an untrained adapter per name to the foundation, on all its linear layers but the output layer."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(foundation, config, adapter_name=adapters[0])
    for adapter in adapters[1:]:
        peft_model.add_adapter(adapter, config)
    return peft_model


def train_expert(
    peft_model: PeftModel,
    adapter: str,
    topic_head: nn.Linear,
    *,
    own_texts: Sequence[Example],
    other_texts: Sequence[Example],
    seed: int,
    steps: int,
    own_rows: int,
    other_rows: int,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> None:
    """Teach one adapter, in place, to write `own_texts` and to change nothing about `other_texts`.

    Without the second, the experts would drown one another where all are active, which is what the router
    reads. Of other families' texts an expert learns only to compute what the foundation computes, and that
    solves none of them. `topic_head` is only read. `progress` gets steps done and in all.
    """
    padding = peft_model.config.pad_token_id
    own_batches = random_batches(own_texts, rows=own_rows, steps=steps, seed=seed, padding=padding)
    other_batches = random_batches(other_texts, rows=other_rows, steps=steps, seed=seed, padding=padding)
    misrouted = MisroutedTokens(peft_model, adapter, seed)

    def losses():
        for done, (own, other) in enumerate(zip(own_batches, other_batches, strict=True), start=1):
            with misrouted.applied(own.input_ids.shape):
                loss = text_loss(peft_model, topic_head, own)
            yield loss + NEUTRAL_WEIGHT * _change(peft_model, other)
            progress(done, steps)

    peft_model.set_adapter(adapter)
    peft_model.train()
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    minimise(losses(), parameters, steps, learning_rate)


def _change(peft_model: PeftModel, batch: Batch) -> torch.Tensor:
    """Measure the change of hidden states by the active expert: squared, relative, mean over layers."""
    with torch.no_grad(), peft_model.disable_adapter():
        expected = layer_states(peft_model, batch)
    changed = layer_states(peft_model, batch)
    shares = [
        (state - target).square().mean() / target.square().mean()
        for state, target in zip(changed, expected, strict=True)
    ]
    return torch.stack(shares).mean()
