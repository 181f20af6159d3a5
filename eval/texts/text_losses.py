"""Computes the loss of texts under routing strategies: of every text a sum, batch by batch.

What is kept of a text is a few numbers, and logits are turned into losses some positions at a time, so memory
does not grow with the texts and holds no second copy of a batch's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dylora_moe.hub_export.errors import FailureError, InputError

from .encoding import EncodedText, batches, collate, encode, part_length
from .reading import Text


MAX_LENGTH = 1024
BATCH_TOKENS = 4096
LARGEST_LOGITS = 2**30  # bytes of a batch's logits, unless the caller says how many tokens a batch has
LARGEST_CHUNK = 2**26  # bytes of the logits, in float32, that become losses at a time
TAKES_TURNS = "round_robin"


@dataclass(frozen=True)
class TextLosses:
    """Sums over the counted tokens of every text, in the order in which the texts were read.

    Attributes:
        strategies: names of the columns of `nats`.
        groups: of every text.
        num_tokens: that count, `[texts]`.
        num_bytes: that these spell, `[texts]`.
        nats: minus the log probability of the text under every strategy, `[texts, strategies]`.
        oracle: the same with each token under the expert that predicts it best, `[texts]`; experts alone, not
            the base model. `None` unless all of several experts are among the strategies.
    """

    strategies: list[str]
    groups: list[str]
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    nats: np.ndarray
    oracle: np.ndarray | None


def text_losses(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Text],
    strategies: Sequence[str],
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TextLosses:
    """Compute the loss of every text under every strategy: one forward each of every batch.

    `best` chooses a row's expert from the prompt, where the text has one, as `generate` does. Without a prompt
    it reads the text, or the part of a long one, whose tokens it then predicts. What such hindsight is worth is
    little: one choice among N experts says at most ln N nats about a text.

    Args:
        model: in evaluation mode; an ordinary one for the strategy `base` alone.
        texts: no two with the same `source`.
        strategies: in canonical form.
        max_length: tokens of a part, see `encode`; `MAX_LENGTH`, or as many positions as the model has.
        batch_tokens: with padding; `BATCH_TOKENS`, or as many as leave the logits below `LARGEST_LOGITS`.
        progress: called with the number of texts done.

    Raises:
        InputError: see `encode`; more positions than the model has; `round_robin`; or no token that counts.
        FailureError: a loss that is no finite number, or too little memory for a single text.
    """
    refuse_turns(strategies)
    strategies = list(strategies)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    sums = _Sums(len(strategies) + 1)
    length = part_length(model.config, max_length, MAX_LENGTH)
    parts = sums.noted(texts, tokenizer, length, vocab_size)
    if batch_tokens is None:
        batch_tokens = _batch_tokens(model, strategies)
    for batch in batches(parts, batch_tokens):
        sums.add(batch, _sums_of(model, batch, strategies))
        if progress is not None:
            progress(sums.num_texts_done)
    return sums.result(strategies, has_oracle=bool(_experts_among(model, strategies)))


def refuse_turns(strategies: Sequence[str]) -> None:
    """Raise InputError for `round_robin`, whose loss is one of an order of texts."""
    if TAKES_TURNS in strategies:
        raise InputError(
            f"routing strategy {TAKES_TURNS!r} gives each text the next expert, so its loss is that of an order of texts; "
            "leave it out"
        )


def _batch_tokens(model: Any, strategies: Sequence[str]) -> int:
    """Choose the tokens of a batch by what a forward holds for each."""
    size = model.dtype.itemsize
    if "ensemble" in strategies:  # every expert's logits, their log probabilities, and these once more
        size = model.config.num_experts * (size + 8)
    of_a_token = model.config.get_text_config().vocab_size * size
    return max(1, min(BATCH_TOKENS, LARGEST_LOGITS // of_a_token))


class _Sums:
    """Gathers the sums of texts whose parts come in any order."""

    def __init__(self, num_columns: int):
        self.num_columns = num_columns
        self.rows: dict[str, int] = {}  # by source
        self.groups: list[str] = []
        self.counts: list[np.ndarray] = []  # tokens and bytes
        self.nats: list[np.ndarray] = []
        self.num_texts_done = 0

    def noted(
        self, texts: Iterable[Text], tokenizer: Any, max_length: int, vocab_size: int
    ) -> Iterator[EncodedText]:
        """Yield the parts of all texts, and note each text of which a token counts."""
        for text in texts:
            for part in encode(tokenizer, text, max_length, vocab_size):
                if text.source not in self.rows:
                    self.rows[text.source] = len(self.rows)
                    self.groups.append(text.group)
                    self.counts.append(np.zeros(2, dtype=np.int64))
                    self.nats.append(np.zeros(self.num_columns))
                yield part

    def add(self, batch: Sequence[EncodedText], nats: np.ndarray) -> None:
        """Add the sums of a batch's parts, `[parts, columns]`."""
        for part, of_part in zip(batch, nats, strict=True):
            row = self.rows[part.text.source]
            self.num_texts_done += not self.counts[row].any()
            self.counts[row] += (sum(part.counts), part.num_bytes)
            self.nats[row] += of_part

    def result(self, strategies: list[str], has_oracle: bool) -> TextLosses:
        if not self.rows:
            raise InputError(
                "no token of these texts counts: each has one token at most, which nothing comes before"
            )
        counts, nats = np.array(self.counts), np.array(self.nats)
        return TextLosses(
            strategies=strategies,
            groups=self.groups,
            num_tokens=counts[:, 0],
            num_bytes=counts[:, 1],
            nats=nats[:, :-1],
            oracle=nats[:, -1] if has_oracle else None,
        )


def _sums_of(model: Any, batch: list[EncodedText], strategies: list[str]) -> np.ndarray:
    """Compute the sums of a batch; where the memory does not suffice, of its halves."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    try:
        return _pass_over(model, batch, strategies)
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        if len(batch) == 1:
            raise FailureError(
                f"the memory does not suffice for {batch[0].text.source}, of {len(batch[0].input_ids)} tokens; use a smaller "
                "--max_length, another --dtype, or --device_map auto"
            ) from error
    clear_device_cache()
    half = len(batch) // 2
    return np.concatenate([_sums_of(model, part, strategies) for part in (batch[:half], batch[half:])])


@torch.inference_mode()
def _pass_over(model: Any, batch: list[EncodedText], strategies: list[str]) -> np.ndarray:
    """Compute the sums of every part, `[parts, strategies + 1]`, the oracle's in the last column."""
    inputs = collate(batch, pad_token_id=0, device=model.device)
    rows, positions = inputs.pop("counts").nonzero(as_tuple=True)
    targets = inputs["input_ids"][rows, positions]
    experts = _experts_among(model, strategies)
    sums = np.zeros((len(batch), len(strategies) + 1))
    lowest = np.full(len(targets), np.inf)
    for column, strategy in enumerate(strategies):
        logits = model(**inputs, **_routing(model, strategy, batch, inputs), use_cache=False).logits
        losses = token_losses(logits, rows, positions - 1, targets)
        del logits  # before the next strategy's
        if not np.isfinite(losses).all():
            source = batch[int(rows[int(np.argmin(np.isfinite(losses)))])].text.source
            raise FailureError(
                f"the loss of {source} under {strategy!r} is no finite number; try another --dtype"
            )
        if strategy in experts:
            lowest = np.minimum(lowest, losses)
        sums[:, column] = np.bincount(rows.cpu().numpy(), weights=losses, minlength=len(batch))
    if experts:
        sums[:, -1] = np.bincount(rows.cpu().numpy(), weights=lowest, minlength=len(batch))
    return sums


def token_losses(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> np.ndarray:
    """Compute minus the log probability of each target, `[targets]`, in float32 or better.

    Args:
        logits: `[batch, sequence, vocab_size]`.
        rows, positions: of the logits that predict each target, `[targets]`.
        targets: token ids, `[targets]`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    at_a_time = max(1, LARGEST_CHUNK // (logits.shape[-1] * dtype.itemsize))
    losses = []
    for start in range(0, len(targets), at_a_time):
        chunk = slice(start, start + at_a_time)
        row, position, target = (index[chunk].to(logits.device) for index in (rows, positions, targets))
        chosen = logits[row, position].to(dtype)  # [targets of the chunk, vocab_size]
        losses.append(F.cross_entropy(chosen, target, reduction="none").cpu())
    return torch.cat(losses).double().numpy()


def _experts_among(model: Any, strategies: Sequence[str]) -> list[str]:
    """List the strategies of single experts, if there are several experts and all are among the strategies."""
    num_experts = getattr(model.config, "num_experts", 0) if is_mixture(model) else 0
    experts = [f"single:{expert}" for expert in range(num_experts)]
    return experts if num_experts > 1 and set(experts) <= set(strategies) else []


def _routing(
    model: Any, strategy: str, batch: Sequence[EncodedText], inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the arguments of a forward that say how experts are chosen."""
    if not is_mixture(model):
        return {}
    num_prompt_tokens = torch.tensor([[part.num_prompt_tokens] for part in batch], device=model.device)
    if strategy != "best" or not num_prompt_tokens.any():
        return {"routing_strategy": strategy}
    mask = inputs["attention_mask"]
    is_prompt = torch.arange(mask.shape[1], device=model.device) < num_prompt_tokens
    read = torch.where(num_prompt_tokens > 0, mask * is_prompt, mask)
    expert_ids = model._best_experts_of_prompts(inputs["input_ids"], {"attention_mask": read})
    return {"routing_strategy": strategy, "expert_ids": expert_ids}


def is_mixture(model: Any) -> bool:
    """Say whether it is a mixture of experts of this project, rather than an ordinary model."""
    return model.config.model_type == "dylora_moe"


__all__ = ["TextLosses", "is_mixture", "refuse_turns", "text_losses", "token_losses"]
