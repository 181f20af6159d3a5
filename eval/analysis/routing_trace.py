"""What the router does at every token of a text, and the figures that follow from its weights.

One pass of the model over prompt and completion, several texts at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.foundation.last_position import LastPosition, last_position

from ..sampling.batch_decoding import visible


BATCH_SIZE = 8


Row = tuple[list[int], list[int]]  # token ids, and 0 for those that the model does not see


@dataclass(frozen=True)
class Text:
    """A prompt and what a model made of it. `name` is the task's id."""

    name: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Trace:
    """The router's work on one text, in float32 on the CPU.

    Attributes:
        text: what was read.
        tokens: the text of each token; joined, they are prompt and completion, as far as the model has
            positions. Empty for what has no text of its own: a token that marks the beginning, the later
            parts of a character of several tokens.
        num_prompt_tokens: how many of them are the prompt's.
        weights: `[tokens, num_experts]`, what each expert counts for at the token: each row sums to 1, and is
            zero outside the top k where the model routes sparsely.
        probabilities: `[tokens, num_experts]`, softmax of the gate's logits. How sure the gate is shows here
            even where it routes to a single expert, whose weight is then always 1.
    """

    text: Text
    tokens: list[str]
    num_prompt_tokens: int
    weights: torch.Tensor
    probabilities: torch.Tensor

    @property
    def whole(self) -> TokenRouting:
        return TokenRouting(self.weights, self.probabilities)

    @property
    def prompt(self) -> TokenRouting:
        return TokenRouting(
            self.weights[: self.num_prompt_tokens], self.probabilities[: self.num_prompt_tokens]
        )

    @property
    def completion(self) -> TokenRouting:
        return TokenRouting(
            self.weights[self.num_prompt_tokens :], self.probabilities[self.num_prompt_tokens :]
        )


@dataclass(frozen=True)
class TokenRouting:
    """A part of a text. `weights` and `probabilities` are of shape `[tokens, num_experts]`."""

    weights: torch.Tensor
    probabilities: torch.Tensor

    def __len__(self) -> int:
        return self.weights.shape[0]

    @property
    def num_experts(self) -> int:
        return self.weights.shape[1]

    @property
    def argmax(self) -> torch.Tensor:
        """The expert with the largest weight at each token, `[tokens]`; of equals, the first."""
        return self.weights.argmax(dim=-1)

    @property
    def switches(self) -> int:
        """From how many tokens to the next that expert changes."""
        return int((self.argmax[1:] != self.argmax[:-1]).sum())

    @property
    def steps(self) -> int:
        """How often it could have."""
        return max(0, len(self) - 1)


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Compute the entropy in nats, `[tokens, num_experts]` -> `[tokens]`: 0 to log N."""
    return torch.special.entr(weights).sum(dim=-1)


def normalized(entropy_in_nats: float, num_experts: int) -> float:
    """Return entropy as a share of log N, the largest possible; 0 for a single expert."""
    return entropy_in_nats / math.log(num_experts) if num_experts > 1 else 0.0


def trace_texts(
    model: Any, tokenizer: Any, texts: Iterable[Text], *, batch_size: int = BATCH_SIZE
) -> Iterator[Trace]:
    """Trace one text after the other, in the order given; no more than a batch of them is ever held.

    Args:
        model: a `DyloraMoeForCausalLM` with a router, in evaluation mode.
        batch_size: texts to a pass; where the memory does not suffice for them, a pass takes half as many.

    Raises:
        InputError: the model has no router.
        FailureError: the memory does not suffice for a single text, or the router's logits are not finite.
    """
    if getattr(model, "router", None) is None:
        raise InputError("this model has no router, so there is no routing to analyse")
    texts, end = iter(texts), last_position(model)
    while batch := list(islice(texts, batch_size)):
        tokenized = [tokenize(tokenizer, text) for text in batch]
        rows = [
            _up_to(
                end, token_ids, visible(model, tokenizer, token_ids[:count]) + [1] * (len(token_ids) - count)
            )
            for token_ids, _, count in tokenized
        ]
        logits = _router_logits(model, rows, batch)
        for text, (_, tokens, num_prompt_tokens), of_text in zip(batch, tokenized, logits, strict=True):
            if not of_text.isfinite().all():
                raise FailureError(
                    f"the router's logits over {text.name} are not finite numbers; try another --dtype"
                )
            yield Trace(
                text=text,
                tokens=tokens[: len(of_text)],
                num_prompt_tokens=num_prompt_tokens,
                weights=model.router.weights(of_text, dense=model.routes_densely),
                probabilities=of_text.softmax(dim=-1),
            )


def _up_to(end: LastPosition | None, token_ids: list[int], seen: list[int]) -> Row:
    """Cut a row at the model's last position, behind which it read nothing when it wrote the text, either."""
    while end is not None and end.taken(seen) > end.positions:
        token_ids, seen = token_ids[:-1], seen[:-1]
    return token_ids, seen


def _router_logits(model: Any, rows: list[Row], texts: list[Text]) -> list[torch.Tensor]:
    """Compute every row's router logits `[tokens, num_experts]`, in float32 on the CPU."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    try:
        return _pass_over(model, rows)
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        if len(rows) == 1:
            raise FailureError(
                f"the memory does not suffice for {texts[0].name}, of {len(rows[0][0])} tokens; use another --dtype, "
                "or --device_map auto"
            ) from error
    clear_device_cache()
    half = len(rows) // 2
    return [
        *_router_logits(model, rows[:half], texts[:half]),
        *_router_logits(model, rows[half:], texts[half:]),
    ]


@torch.inference_mode()
def _pass_over(model: Any, rows: list[Row]) -> list[torch.Tensor]:
    length = max(len(token_ids) for token_ids, _ in rows)
    # Padded on the right: nothing that counts comes after it.
    padded = [token_ids + [0] * (length - len(token_ids)) for token_ids, _ in rows]
    mask = torch.tensor([seen + [0] * (length - len(seen)) for _, seen in rows], device=model.device)
    output = model(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0),  # as `generate` counts them
        routing_strategy="router",
        output_router_logits=True,
        logits_to_keep=1,
        use_cache=False,
    )
    logits = output.router_logits.float().cpu()
    return [of_row[: len(token_ids)] for of_row, (token_ids, _) in zip(logits, rows, strict=True)]


def tokenize(tokenizer: Any, text: Text) -> tuple[list[int], list[str], int]:
    """Tokenize a text: token ids, their texts, and how many are the prompt's.

    The prompt's tokens are those that the model was given. The completion's are those of the whole text after
    them, or, where the whole text is cut otherwise at the boundary, those of the completion alone.
    """
    whole = _encode(tokenizer, text.prompt + text.completion)
    prompt = _encode(tokenizer, text.prompt)
    count = len(prompt[0])
    if whole[0][:count] == prompt[0]:
        return *whole, count
    completion = _encode(tokenizer, text.completion, add_special_tokens=False)
    return prompt[0] + completion[0], prompt[1] + completion[1], count


def _encode(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], list[str]]:
    if not tokenizer.is_fast:
        # It does not say which characters a token stands for; this is how it writes the token itself.
        token_ids = tokenizer(text, **options)["input_ids"]
        return token_ids, tokenizer.convert_ids_to_tokens(token_ids)
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    ends, shown = [end for _, end in encoded["offset_mapping"]], 0
    tokens = []
    for number, end in enumerate(ends):
        # What no token stands for goes with the next one, or with the last.
        end = len(text) if number == len(ends) - 1 else max(end, shown)
        tokens.append(text[shown:end])
        shown = end
    return encoded["input_ids"], tokens


__all__ = ["Text", "TokenRouting", "Trace", "entropy", "normalized", "trace_texts"]
