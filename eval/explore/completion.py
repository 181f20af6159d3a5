"""The text of the tokens so far, cut where each token ends, and what the experts did in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .routing import Routing


UNFINISHED = "\ufffd"  # how a tokenizer writes the first bytes of a character whose others are to come


@dataclass
class Completion:
    """A text that grows token by token.

    Attributes:
        text: what `tokenizer.decode` makes of the tokens so far.
        seconds: since generation began.
    """

    tokenizer: Any
    num_experts: int
    token_ids: list[int] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    _ends: list[int] = field(default_factory=list)

    def append(self, token_id: int, routing: Routing) -> None:
        """Add a token; what it adds to a character may be the last of it."""
        self.token_ids.append(token_id)
        self.routings.append(routing)
        self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self._ends.append(len(self.text.rstrip(UNFINISHED)))

    def pieces(self) -> list[tuple[str, Routing]]:
        """Cut the text at the tokens' ends; joined, the pieces are the text. Tokens without text are left out."""
        pieces, begin = [], 0
        for number, (end, routing) in enumerate(zip(self._ends, self.routings, strict=True), start=1):
            end = len(self.text) if number == len(self._ends) else max(end, begin)
            if end > begin:
                pieces.append((self.text[begin:end], routing))
            begin = end
        return pieces

    def shares(self) -> list[float]:
        """Compute the share of tokens that each expert leads, by expert."""
        leaders = [routing.leader for routing in self.routings]
        return [leaders.count(expert) / max(1, len(leaders)) for expert in range(self.num_experts)]

    def layers(self) -> dict[str, torch.Tensor]:
        """Average every layer's weights over the tokens: `[num_experts]` by layer; empty without routers in them."""
        if not self.routings:
            return {}
        labels = sorted(self.routings[0].layers, key=lambda label: (not label.isdecimal(), len(label), label))
        return {
            label: torch.stack([routing.layers[label] for routing in self.routings]).mean(dim=0)
            for label in labels
        }


__all__ = ["Completion"]
