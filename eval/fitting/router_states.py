"""What the gate reads, computed once and kept: hidden states of the router's own pass, and each token's best expert.

The pass is without gradients and does not depend on the gate, so it would give the same in every epoch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dylora_moe.hub_export.staging import check_room

from ..texts.encoding import EncodedText, batches, collate
from ..texts.text_losses import token_losses
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
        with_best: whether to keep only positions whose next token counts, and to find the best expert of each.
        progress: is told how many of this process's texts are read, and how many there are.

    Raises:
        FailureError: the temporary folder's disk has no room for the rows.

    Attributes:
        rows: hidden states `[rows, hidden_size]`, in the dtype that the model computes them in.
        places: by number of a text, its rows.
        best: the expert that predicts a row's next token with the lowest loss, `[rows]`; empty unless asked for.
        worth: how far that loss lies below the mean one of all experts, `[rows]` in nats; empty likewise.
    """

    def __init__(
        self,
        model: Any,
        texts: Sequence[EncodedText],
        processes: Processes,
        batch_tokens: int,
        *,
        with_best: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.texts = list(texts)
        self.with_best = with_best
        self._kept = KeptRows(model.config.hidden_size)
        self.places: dict[int, slice] = {}
        own = processes.own(self.texts)
        num_rows = sum(len(self.positions(self.texts[number])) for number in own)
        num_bytes = num_rows * model.config.hidden_size * model.dtype.itemsize
        check_room(
            Path(tempfile.gettempdir()),
            num_bytes,
            "name another folder in TMPDIR",
            "what the gate reads takes",
        )
        numbers = {id(self.texts[number]): number for number in own}
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in batches((self.texts[number] for number in own), batch_tokens):
            with torch.no_grad(), processes.autocast():
                inputs = collate(batch, model.config.pad_token_id or 0, processes.device)
                hidden = router_input(model, inputs)  # [batch, sequence, hidden_size]
                if with_best:
                    best.append(best_experts(model, inputs))
            for row, text in enumerate(batch):
                positions = self.positions(text)
                self.places[numbers[id(text)]] = self._kept.append(hidden[row, positions.to(hidden.device)])
            if progress is not None:
                progress(len(self.places), len(own))
        self.rows = self._kept.read()
        self.best = torch.cat([experts for experts, _ in best]) if best else torch.empty(0, dtype=torch.long)
        self.worth = torch.cat([worth for _, worth in best]) if best else torch.empty(0)

    def positions(self, text: EncodedText) -> torch.Tensor:
        """Say which of a text's positions are kept; those of all its tokens, or those that predict a token that counts."""
        if not self.with_best:
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


def best_experts(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the expert that alone has the lowest loss of each token that counts, row after row.

    Returns:
        The experts, `[counted]`, and how far that loss lies below the mean one of all experts, `[counted]`.
    """
    rows, positions = inputs["counts"].nonzero(as_tuple=True)
    targets = inputs["input_ids"][rows, positions]
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    losses = []
    for expert in range(model.config.num_experts):
        logits = model(**tokens, routing_strategy=f"single:{expert}", use_cache=False).logits
        losses.append(token_losses(logits, rows, positions - 1, targets))
    of_experts = np.stack(losses)  # [num_experts, counted]
    worth = of_experts.mean(axis=0) - of_experts.min(axis=0)
    return torch.from_numpy(of_experts.argmin(axis=0)), torch.from_numpy(worth).float()


__all__ = ["KeptRows", "RouterStates", "routed_pass", "router_input"]
