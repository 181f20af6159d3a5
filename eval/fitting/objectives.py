"""What a gate is fitted to: the language modeling loss of the dense mixture, or the choice of the best expert.

Both give one epoch's steps, the same in every process; a step's loss, of which each process computes its part; and
the held-out loss.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dylora_moe.modeling.routing_dylora_moe import balance_loss

from ..texts.encoding import batches, collate
from .processes import Processes
from .router_states import RouterStates, routed_pass


# Texts that are sorted by length together: with few, batches hold more padding; with many, they are the same each time.
WINDOW = 64
ROWS = 16384  # that a gate reads at once, where nothing but the sum counts


@dataclass
class Objective(ABC):
    """What `gate_training.train_gate` minimises.

    Args:
        states, held_out: what the gate reads at the texts that it learns from, and at those held out.
        batch_tokens: tokens of a step.
    """

    model: Any
    processes: Processes
    states: RouterStates
    held_out: RouterStates
    batch_tokens: int

    @abstractmethod
    def steps(self, seed: int) -> list[Any]:
        """List an epoch's steps, in the order of this seed."""

    @abstractmethod
    def loss(self, step: Any) -> torch.Tensor:
        """Compute this process's part of the mean loss of a step, with gradients to the gate."""

    @abstractmethod
    def held_out_loss(self) -> float:
        """Compute the mean loss of the held-out texts, over all processes."""


@dataclass
class LanguageModelingObjective(Objective):
    """Mean token loss of the dense mixture, plus `router_aux_loss_coef` times the balance loss.

    Every token's weights are softmax(router logits / temperature) over all experts, whatever the model's
    `router_mode`; the router's own pass is read from `states`.
    """

    def __post_init__(self) -> None:
        self._numbers = {id(text): number for number, text in enumerate(self.states.texts)}

    def steps(self, seed: int) -> list[list[int]]:
        """List an epoch's steps, each the numbers of its texts."""
        chooser = random.Random(seed)
        texts = list(self.states.texts)
        chooser.shuffle(texts)
        found = list(batches(texts, self.batch_tokens, WINDOW))
        chooser.shuffle(found)
        return [[self._numbers[id(text)] for text in batch] for batch in found]

    def loss(self, step: list[int]) -> torch.Tensor:
        texts = [self.states.texts[number] for number in step]
        own = [number for number in step if number in self.states.places]
        num_experts = self.model.config.num_experts
        sums, loss = torch.zeros(num_experts, device=self.processes.device), 0.0
        if own:
            losses, weights = self._forward(self.states, own)
            loss = losses.sum() / sum(sum(text.counts) for text in texts)
            sums = weights.sum(dim=0)
        mean = self.processes.with_others(sums) / sum(len(text.input_ids) for text in texts)
        # Of one token, whose weights are the mean: the balance loss reads nothing else.
        balance = balance_loss(mean.view(1, 1, num_experts), None)
        if not self.processes.is_main:
            balance = balance - balance.detach()  # it counts once, and has every process's gradient
        return loss + self.model.config.router_aux_loss_coef * balance

    @torch.no_grad()
    def held_out_loss(self) -> float:
        total, numbers = 0.0, {id(text): number for number, text in enumerate(self.held_out.texts)}
        own = [self.held_out.texts[number] for number in self.held_out.places]
        for batch in batches(own, self.batch_tokens):
            losses, _ = self._forward(self.held_out, [numbers[id(text)] for text in batch])
            total += float(losses.sum())
        count = sum(sum(text.counts) for text in self.held_out.texts)
        return float(self.processes.sum(torch.tensor(total))) / count

    def _forward(self, states: RouterStates, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the dense mixture.

        Returns:
            The losses of the tokens that count, `[counted]`, and the weights of all tokens, `[tokens, num_experts]`.
        """
        inputs = collate(
            [states.texts[number] for number in numbers],
            self.model.config.pad_token_id or 0,
            self.processes.device,
        )
        hidden = torch.nn.utils.rnn.pad_sequence(
            [states.rows[states.places[number]] for number in numbers], batch_first=True
        )
        routed = routed_pass(self.model, inputs)
        with self.processes.autocast(), dense_routing(self.model):
            routed.router_logits = self.model.router(hidden.to(self.processes.device))
            weights = routed.routing_weights(stream=None)
            logits = routed.strategy.run(routed).logits
        rows, positions = inputs["counts"].nonzero(as_tuple=True)
        chosen = logits[rows, positions - 1].float()  # [counted, vocab_size]
        losses = F.cross_entropy(chosen, inputs["input_ids"][rows, positions], reduction="none")
        return losses, weights[inputs["attention_mask"].bool()]


@dataclass
class OracleObjective(Objective):
    """Cross-entropy of softmax(router logits / temperature) to the right expert of every row of `states`.

    Args:
        targets: the expert of each of the rows, `[rows]`, and of those of `held_out`.
        worth: how much each row counts, `[rows]`, if not all the same, and of those of `held_out`.
    """

    targets: tuple[torch.Tensor, torch.Tensor]
    worth: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        worth = self.worth or tuple(torch.ones(len(part)) for part in self.targets)
        self._worth, self._held_out_worth = (self._with_mean_one(part) for part in worth)
        self._own_row = _own_rows(self.states)

    def steps(self, seed: int) -> list[torch.Tensor]:
        """List an epoch's steps, each the numbers of its rows, which count those of all processes."""
        order = torch.randperm(len(self._own_row), generator=torch.Generator().manual_seed(seed))
        return list(order.split(self.batch_tokens))

    def loss(self, step: torch.Tensor) -> torch.Tensor:
        rows = self._own_row[step]
        rows = rows[rows >= 0]
        return self._sum(self.states.rows[rows], self.targets[0][rows], self._worth[rows]) / len(step)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        held_out = (self.held_out.rows, self.targets[1], self._held_out_worth)
        parts = [part.split(ROWS) for part in held_out]
        total = sum(float(self._sum(*part)) for part in zip(*parts, strict=True))
        count = sum(len(self.held_out.positions(text)) for text in self.held_out.texts)
        return float(self.processes.sum(torch.tensor(total))) / count

    def _with_mean_one(self, worth: torch.Tensor) -> torch.Tensor:
        """Scale so that the mean over the rows of all processes is 1."""
        total, count = self.processes.sum(torch.tensor([float(worth.sum()), float(len(worth))])).tolist()
        return worth * (count / total) if total > 0 else torch.ones_like(worth)

    def _sum(self, rows: torch.Tensor, targets: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
        logits = self.model.router(rows.to(self.processes.device))
        scaled = logits / self.model.config.router_temperature
        losses = F.cross_entropy(scaled, targets.to(logits.device), reduction="none")
        return (losses * worth.to(logits.device)).sum()


def _own_rows(states: RouterStates) -> torch.Tensor:
    """Map the rows of all processes, text after text, to those of this one; -1 where it is another's."""
    parts = []
    for number, text in enumerate(states.texts):
        count = len(states.positions(text))
        place = states.places.get(number)
        parts.append(torch.full((count,), -1) if place is None else torch.arange(place.start, place.stop))
    return torch.cat(parts)


def named_experts(states: RouterStates, config: Any) -> torch.Tensor:
    """List the expert that the text of each row names, `[rows]`."""
    targets = torch.empty(len(states.rows), dtype=torch.long)
    for number, place in states.places.items():
        targets[place] = config.expert_index(states.texts[number].text.expert)
    return targets


@contextmanager
def dense_routing(model: Any) -> Iterator[None]:
    """Route densely meanwhile, whatever the config says: sparse weights of one expert have no gradient."""
    before = model.config.router_mode
    model.config.router_mode = "dense"
    try:
        yield
    finally:
        model.config.router_mode = before


__all__ = [
    "LanguageModelingObjective",
    "Objective",
    "OracleObjective",
    "dense_routing",
    "named_experts",
]
