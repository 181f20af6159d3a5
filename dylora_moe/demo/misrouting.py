"""Trains an expert for what the router will do to it: at some tokens, another expert acts instead.

Nothing tells a router the family of a text's first tokens, and later it errs now and then. On a text of one
family the other experts do next to nothing, so an expert meets that case in training by being switched off at
some tokens. Knows how PEFT names an adapter's layers. Knows nothing about the texts or the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer


ANY_TOKEN_SHARE = 0.04  # of tokens at which the expert is off
LATE_START_SHARE = 0.5  # of rows whose first tokens go without it
LATEST_START = 10


class MisroutedTokens:
    """Switches one adapter off at random tokens of the passes made inside `applied`; the same seed, the same
    tokens."""

    def __init__(self, peft_model: PeftModel, adapter: str, seed: int):
        self._layers = [
            layer.lora_B[adapter]
            for layer in peft_model.modules()
            if isinstance(layer, LoraLayer) and adapter in layer.lora_B
        ]
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def applied(self, shape: torch.Size) -> Iterator[None]:
        """For passes over token ids of the given shape [rows, length]."""
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
        """1.0 where the expert acts and 0.0 where not, of the given shape [rows, length]."""
        rows, length = shape
        on = torch.rand(shape, generator=self._generator) >= ANY_TOKEN_SHARE
        starts = torch.randint(1, LATEST_START + 1, (rows, 1), generator=self._generator)
        late = torch.rand(rows, 1, generator=self._generator) < LATE_START_SHARE
        on &= (torch.arange(length) >= starts) | ~late
        return on.float()
