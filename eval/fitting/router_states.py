"""What the gate reads, computed once and kept: hidden states of the router's own pass, and each token's best expert.

The pass is without gradients and does not depend on the gate, so it would give the same in every epoch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..texts.encoding import EncodedText, batches, collate
from .processes import Processes


class KeptRows:
    """Rows of numbers, `[rows, width]`, in a temporary file; the system reads from it what is asked for.

    They are kept in the dtype that they come in, bit for bit.
    """

    def __init__(self, width: int):
        self._file = tempfile.NamedTemporaryFile(prefix="dylora-moe-states-")  # noqa: SIM115  (closed with the object)
        self._width = width
        self._dtype = torch.float32
        self._num_rows = 0

    def append(self, rows: torch.Tensor) -> slice:
        """Write rows behind the others. Returns where they are."""
        rows = rows.detach().cpu().contiguous()
        self._file.write(rows.view(torch.uint8).numpy().data)
        self._dtype = rows.dtype
        start, self._num_rows = self._num_rows, self._num_rows + len(rows)
        return slice(start, self._num_rows)

    def read(self) -> torch.Tensor:
        """Map all rows, `[rows, width]`; the file lives as long as this object."""
        self._file.flush()
        if self._num_rows == 0:
            return torch.empty(0, self._width)
        size = self._num_rows * self._width
        mapped = torch.from_file(self._file.name, shared=False, size=size, dtype=self._dtype)
        return mapped.view(self._num_rows, self._width)


class RouterStates:
    """The gate's input at the tokens of this process's texts.

    Args:
        texts: all texts; `processes` says which are read here.
        predicting_alone: whether to keep only positions whose next token counts.
        with_best: whether to compute each position's best expert.
        progress: is told how many of this process's texts are read, and how many there are.

    Attributes:
        rows: hidden states `[rows, hidden_size]`, in the dtype that the model computes them in.
        places: by number of a text, its rows.
        best: the expert that predicts a row's next token with the lowest loss, `[rows]`; empty unless asked for.
    """

    def __init__(
        self,
        model: Any,
        texts: Sequence[EncodedText],
        processes: Processes,
        batch_tokens: int,
        *,
        predicting_alone: bool = False,
        with_best: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.texts = list(texts)
        self.predicting_alone = predicting_alone
        self._kept = KeptRows(model.config.hidden_size)
        self.places: dict[int, slice] = {}
        own = processes.own(self.texts)
        numbers = {id(self.texts[number]): number for number in own}
        best: list[torch.Tensor] = []
        for batch in batches((self.texts[number] for number in own), batch_tokens):
            with torch.no_grad(), processes.autocast():
                inputs = collate(batch, model.config.pad_token_id or 0, processes.device)
                hidden = router_input(model, inputs)  # [batch, sequence, hidden_size]
                experts = best_experts(model, inputs) if with_best else None  # [batch, sequence - 1]
            for row, text in enumerate(batch):
                positions = self.positions(text)
                self.places[numbers[id(text)]] = self._kept.append(hidden[row, positions.to(hidden.device)])
                if experts is not None:
                    best.append(experts[row, positions.to(experts.device)].cpu())
            if progress is not None:
                progress(len(self.places), len(own))
        self.rows = self._kept.read()
        self.best = torch.cat(best) if best else torch.empty(0, dtype=torch.long)

    def positions(self, text: EncodedText) -> torch.Tensor:
        """Say which of a text's positions are kept; those of all its tokens, or those that predict a token that counts."""
        if not self.predicting_alone:
            return torch.arange(len(text.input_ids))
        return torch.tensor(text.counts[1:]).nonzero().flatten()


def router_input(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the router's own pass: what the gate reads, `[batch, sequence, hidden_size]`."""
    return routed_pass(model, inputs).router_hidden_states(stream=None)


def routed_pass(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Prepare a pass of strategy `router` without a KV cache."""
    return model.routed_pass(
        model.foundation,
        model.routing_strategy("router"),
        past_key_values=None,
        use_cache=False,
        expert_ids=None,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )


def best_experts(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Find the expert with the lowest loss of each next token, alone: `[batch, sequence - 1]`."""
    losses = [
        strategy_losses(model, inputs, f"single:{index}")[:, 1:] for index in range(model.config.num_experts)
    ]
    return torch.stack(losses).argmin(dim=0)


def strategy_losses(model: Any, inputs: dict[str, torch.Tensor], strategy: str) -> torch.Tensor:
    """Compute the loss of every token under a strategy, `[batch, sequence]` in nats; 0 of the first ones."""
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return token_losses(
        model(**tokens, routing_strategy=strategy, use_cache=False).logits, inputs["input_ids"]
    )


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute -log p of every token given those before it, `[batch, sequence]` in nats; 0 of the first ones."""
    targets = input_ids[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )  # [batch * (sequence - 1)]
    return F.pad(losses.view(targets.shape), (1, 0))


__all__ = ["KeptRows", "RouterStates", "routed_pass", "router_input", "strategy_losses", "token_losses"]
