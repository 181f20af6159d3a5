"""The optimiser's loop: AdamW with a warm-up, a falling learning rate, and an early stop at the best held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from .objectives import ROWS, Objective
from .options import FitRouterOptions
from .processes import Processes
from .router_states import RouterStates


LOGIT_STEP = 2.0


@dataclass(frozen=True)
class Usage:
    """How a gate uses the experts.

    Attributes:
        shares: by expert, the share of tokens whose logit is the largest.
        entropy: mean entropy of the dense weights of a token, in nats; ln(num_experts) if all are equal.
    """

    shares: list[float]
    entropy: float


@dataclass(frozen=True)
class Epoch:
    """What is told after each pass over the texts. `held_out_loss` is None where nothing is held out."""

    number: int
    step: int
    steps: int
    loss: float
    held_out_loss: float | None
    usage: Usage


@dataclass(frozen=True)
class Fit:
    """What a fit came to: the steps that were taken, after which of them the kept gate was the best, and how it learnt."""

    steps: int
    best_step: int
    learning_rate: float


def train_gate(
    router: Any,
    objective: Objective,
    states: RouterStates,
    options: FitRouterOptions,
    processes: Processes,
    *,
    stops_early: bool,
    tell_step: Callable[[int, int], None] | None = None,
    tell_epoch: Callable[[Epoch], None] | None = None,
) -> Fit:
    """Train the gate in place, and leave it as it was when the held-out loss was lowest.

    Args:
        router: its parameters alone are trained.
        states: of the texts that `Epoch.usage` and the default learning rate are about.
        stops_early: whether there is a held-out loss; else the last gate is kept.
    """
    parameters = list(router.parameters())
    learning_rate = options.learning_rate or default_learning_rate(states, processes)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=options.weight_decay)
    waiting = objective.steps(options.seed)
    total = options.max_steps or options.num_epochs * len(waiting)
    schedule = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(options.warmup_ratio * total),
        num_training_steps=total,
    )
    lowest = objective.held_out_loss() if stops_early else None
    best, best_step, step, number, waited = _copy(parameters), 0, 0, 0, 0
    while step < total and waited < options.patience:
        number += 1
        losses = []
        for item in waiting[: total - step]:
            loss = objective.loss(item)
            _step(loss, optimizer, parameters, processes)
            schedule.step()
            losses.append(loss.detach())
            step += 1
            if tell_step is not None:
                tell_step(step, total)
        held_out = objective.held_out_loss() if stops_early else None
        if tell_epoch is not None:
            mean = float(processes.sum(torch.stack(losses).sum())) / len(losses)
            tell_epoch(Epoch(number, step, total, mean, held_out, usage(router, states, processes)))
        if held_out is None or held_out < lowest:
            best, best_step, lowest, waited = _copy(parameters), step, held_out, 0
        else:
            waited += 1
        waiting = objective.steps(options.seed + number)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return Fit(step, best_step, learning_rate)


def default_learning_rate(states: RouterStates, processes: Processes) -> float:
    """Choose a learning rate by the size of what the gate reads, which differs from model to model.

    A step of Adam moves each of a gate's weights by the learning rate at most, and so a logit by the learning rate
    times the sum of the absolute values of a hidden state: by `LOGIT_STEP` for a mean one.
    """
    total = sum(float(rows.float().abs().sum()) for rows in states.rows.split(ROWS))
    size, count = processes.sum(torch.tensor([total, float(len(states.rows))], dtype=torch.float64)).tolist()
    return LOGIT_STEP * count / size if size > 0 else 1e-3


def _step(loss: torch.Tensor, optimizer: Any, parameters: list[torch.Tensor], processes: Processes) -> None:
    """Take a step by the gradients of all processes together."""
    optimizer.zero_grad()
    if loss.requires_grad:  # not where all of the step's texts are other processes'
        loss.backward()
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = processes.sum(gradient)
    optimizer.step()


def _copy(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def usage(router: Any, states: RouterStates, processes: Processes) -> Usage:
    """Compute how the gate uses the experts at the rows of all processes."""
    num_experts = router.config.num_experts
    counts = torch.zeros(
        num_experts + 1, dtype=torch.float64
    )  # of tokens by expert, and the sum of entropies
    for rows in states.rows.split(ROWS):
        logits = router(rows.to(processes.device))
        counts[:-1] += torch.bincount(logits.argmax(dim=-1), minlength=num_experts).cpu()
        log_weights = F.log_softmax(logits / router.config.router_temperature, dim=-1)
        counts[-1] -= (log_weights.exp() * log_weights).sum().cpu()
    *tokens, entropy = processes.sum(counts).tolist()
    total = max(sum(tokens), 1)
    return Usage([count / total for count in tokens], entropy / total)


__all__ = ["Epoch", "Fit", "Usage", "default_learning_rate", "train_gate", "usage"]
