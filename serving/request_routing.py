"""Which experts act on which token of a batch: the strategies of its requests, row by row.

vLLM tells a logits processor of every change of a batch's rows before the model runs, and hands it each request's
sampling parameters; that is how the routed model learns of strategies. As a processor it changes the logits of one
kind of row: a first pass of `best`, whose sampled token is to be the chosen expert's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .strategies import EngineStrategies


# Of this process: what the front end checks requests with, and the processor that waits for its model.
_strategies: EngineStrategies | None = None
_without_model: list[RequestRouting] = []


def check_requests_with(strategies: EngineStrategies) -> None:
    """Check the requests that this process takes in; a process has one engine's front end."""
    global _strategies
    _strategies = strategies


def routing_of_new_model() -> RequestRouting:
    """Give the processor that the engine made for the model that is being built.

    Raises:
        RuntimeError: there is none: this vLLM does not make them as the tested versions do.
    """
    if not _without_model:
        raise RuntimeError(
            "vLLM made no logits processor before the model, so that requests would have no strategy: its "
            "interfaces have changed. Use a version that docs/serving.md names."
        )
    return _without_model.pop()


@dataclass
class Row:
    """One request of the batch.

    Attributes:
        params: its sampling parameters, the same object as long as the request lives in this process.
        strategy: as `RoutingStrategy` writes it; `choose` for a first pass of `best`.
    """

    params: Any
    strategy: str

    @property
    def choice(self) -> torch.Tensor:
        """What a first pass has seen so far: the sum of softmax(gate logits) over its tokens, `[num_experts]`."""
        return vars(self.params)["dylora_moe_choice"]


class RequestRouting(LogitsProcessor):
    """The rows of a worker's batch, and the experts' weights that their strategies give every token.

    Attributes:
        weights: `[max_num_seqs + 1, num_experts]` float32, by row; the last row is of padding and stays zero.
        is_routed: `[max_num_seqs + 1]`, true for rows of `router`, whose weights the router gives.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if _strategies is not None:
            _strategies.of_request(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        config = vllm_config.model_config.hf_config
        self.strategies = EngineStrategies(config)
        self.num_experts = config.num_experts
        self.read_sum = config.router_input == "experts_sum"
        self.device = device
        self.rows: dict[int, Row] = {}
        size = vllm_config.scheduler_config.max_num_seqs + 1
        self.weights = torch.zeros(size, self.num_experts, device=device)
        self.is_routed = torch.zeros(size, dtype=torch.bool, device=device)
        _without_model[:] = [self]

    def is_argmax_invariant(self) -> bool:
        return False

    # The rows

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, _ in batch_update.added:
            self.rows[index] = self._new_row(params)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self.rows[source] = replaced
        self._write_tables()

    def _new_row(self, params: Any) -> Row:
        strategy = self.strategies.of_request(params)
        if strategy.name != "best":
            return Row(params, str(strategy))
        # Kept with the request, since its row may come and go between the chunks of a prompt.
        vars(params).setdefault("dylora_moe_choice", torch.zeros(self.num_experts, device=self.device))
        return Row(params, "choose")

    def _write_tables(self) -> None:
        weights = torch.zeros(self.weights.shape)
        routed = torch.zeros(len(weights), dtype=torch.bool)
        for index, row in self.rows.items():
            if row.strategy == "router":
                routed[index] = True
            elif row.strategy == "choose":
                weights[index] = float(self.read_sum)
            elif row.strategy == "uniform":
                weights[index] = 1 / self.num_experts
            elif row.strategy != "base":
                weights[index, int(row.strategy.removeprefix("single:"))] = 1
        self.weights.copy_(weights)
        self.is_routed.copy_(routed)

    # What the model asks

    @property
    def any_routed(self) -> bool:
        return any(row.strategy == "router" for row in self.rows.values())

    @property
    def any_choosing(self) -> bool:
        return any(row.strategy == "choose" for row in self.rows.values())

    def rows_of_tokens(self, query_start_loc: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Give the row of every token of a batch, `[tokens]`; padding has the last row of the tables.

        Args:
            query_start_loc: where each row's tokens begin, and the end of the last, `[rows + 1]` or longer.
            num_tokens: of the batch, padding included.
        """
        ends = query_start_loc[1 : len(self.rows) + 1]
        tokens = torch.arange(num_tokens, device=query_start_loc.device, dtype=query_start_loc.dtype)
        rows = torch.searchsorted(ends.contiguous(), tokens, right=True)
        return torch.where(rows < len(self.rows), rows, len(self.weights) - 1)

    def note_choices(self, rows: torch.Tensor, positions: torch.Tensor, router_logits: torch.Tensor) -> None:
        """Add what first passes of `best` saw in this step.

        Args:
            rows: the row of every token, `[tokens]`.
            positions: of every token in its prompt, `[tokens]`.
            router_logits: `[tokens, num_experts]`.
        """
        probabilities = router_logits.softmax(dim=-1)
        for index, row in self.rows.items():
            if row.strategy == "choose":
                of_row = rows == index
                if (positions[of_row] == 0).any():  # the first chunk; also of a prompt that was preempted
                    row.choice.zero_()
                row.choice.add_(probabilities[of_row].sum(dim=0))

    # As a logits processor

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, row in self.rows.items():
            if row.strategy == "choose":
                logits[index] = -torch.inf
                logits[index, row.choice.argmax()] = 0
        return logits


__all__ = ["RequestRouting", "check_requests_with", "routing_of_new_model"]
