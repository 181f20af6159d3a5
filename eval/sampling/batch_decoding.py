"""Decoding many prompts at once, each row as if it were alone: its own stop, its own random numbers.

A decoding loop for `model.generate(custom_generate=…)`, so that caches, masks, positions and logits
processors are those of transformers. Rows that are done leave the batch, unless fast decoding runs it, whose
steps are recorded for a number of rows.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError
from dylora_moe.hub_export.foundation.last_position import LastPosition, last_position

from .generation_options import refuse_options
from .stop_strings import StopStrings


# Settings of a generation config for which a row has to be alone: they count padding, or remember the batch.
ALONE = {
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "forced_bos_token_id": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
}
# A growing one takes any other's place, since rows cannot leave it; what is computed is the same.
GROWING_CACHES = (None, "dynamic", "offloaded", "quantized")


@dataclass(frozen=True)
class Row:
    """One sample to be made.

    Attributes:
        task_id, sample: what it is; they also seed its random numbers.
        input_ids: the prompt's tokens.
        expert_id: its expert, for the routing strategies that let the caller choose.
    """

    task_id: str
    sample: int
    input_ids: list[int]
    expert_id: int | None = None


# Why a row ended: the model's end-of-sequence token, a stop string, as many tokens as were asked for, or a
# model that has no further position (see `hub_export.last_position`).
END_OF_SEQUENCE, STOP_STRING = "end_of_sequence", "stop_string"
MAX_NEW_TOKENS, LAST_POSITION = "max_new_tokens", "last_position"

# Called with a finished row, its new tokens, the end-of-sequence token among them, and why it ended.
Finished = Callable[[Row, list[int], str], None]
# Called with the number of new tokens of a step, over all rows.
Stepped = Callable[[int], None]


def decode_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    finished: Finished,
    *,
    stop_strings: Sequence[str],
    batch_size: int,
    seed: int = 0,
    stepped: Stepped | None = None,
    **arguments: Any,
) -> int:
    """Generate for every row, batch by batch, and report each when it is done; return the last batch size.

    Longest prompts first: rows of like length share a batch, and too large a batch shows at once. Where the
    memory does not suffice the batch is halved and its unfinished rows begin again.

    Args:
        stop_strings: a row is done at the token that completes one of them, or one of those of the generation
            config.
        seed: of sampling. Each row draws from a generator of its own, made from (seed, task, sample), so that
            batches, processes and interruptions change nothing.
        stepped: is told after every step how many tokens it gave.
        arguments: of `model.generate`, the same for all rows.

    Raises:
        InputError: the generation config asks for what is not made in batches, see `generation_options`, or a
            prompt has more tokens than the model has positions.
        FailureError: the memory does not suffice for a single row.
    """
    settings = {**vars(model.generation_config), **arguments}
    refuse_options(settings)
    if _is_for_single_rows(model, settings):
        batch_size = 1
    stops = StopStrings(tokenizer, stop_strings, settings.get("stop_strings"))
    end = last_position(model)
    room = {(row.task_id, row.sample): _room(model, tokenizer, row, end) for row in rows}
    _warn_of_positions(model, rows, arguments.get("max_new_tokens", 0), end)
    waiting = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    while waiting:
        batch, done = waiting[:batch_size], set()
        if _padding_gives_nan(model) or _padding_takes_positions(
            end, batch[0], arguments.get("max_new_tokens", 0)
        ):
            batch = [row for row in batch if len(row.input_ids) == len(batch[0].input_ids)]

        def note(row: Row, tokens: list[int], stop: str, done: set = done) -> None:
            finished(row, tokens, stop)
            done.add((row.task_id, row.sample))

        too_large = False
        try:
            _decode_batch(model, tokenizer, batch, note, stepped, stops, room, seed, arguments)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size == 1:
                raise FailureError(
                    f"the memory does not suffice for {batch[0].task_id} alone, a prompt of {len(batch[0].input_ids)} "
                    "tokens; use a smaller --max_new_tokens, another --dtype, or --device_map auto"
                ) from error
            too_large = True
        if too_large:  # and the error is gone, which held the batch's tensors
            batch_size = len(batch) // 2 or 1
            if hasattr(model, "forget_decoding_sessions"):  # the larger batch's buffers
                model.forget_decoding_sessions()
            clear_device_cache()
        waiting = [row for row in waiting if (row.task_id, row.sample) not in done]
    return batch_size


def _is_for_single_rows(model: Any, settings: dict[str, Any]) -> bool:
    values = ((settings.get(name), usual) for name, usual in ALONE.items())
    # Rows cannot leave a quantised cache, which is scaled by what else is in it, nor the states of a
    # recurrent model, which are no cache of tokens.
    whole = settings.get("cache_implementation") == "quantized" or getattr(model, "_is_stateful", False)
    return whole or any(value not in (None, usual) for value, usual in values)


def _room(model: Any, tokenizer: Any, row: Row, end: LastPosition | None) -> float:
    """Count the new tokens that a row has positions for. The last is never read, so it needs none.

    Raises:
        InputError: the prompt has no room itself.
    """
    if end is None:
        return math.inf
    taken = end.taken(visible(model, tokenizer, row.input_ids))
    if taken > end.positions:
        raise InputError(
            f"the prompt of {row.task_id} is {taken} tokens long, and the model has {end.positions} positions; choose "
            "other tasks with --id_range or --limit"
        )
    return end.positions - taken + 1


def _warn_of_positions(
    model: Any, rows: Sequence[Row], max_new_tokens: int, end: LastPosition | None
) -> None:
    longest = max((len(row.input_ids) for row in rows), default=0) + max_new_tokens
    if end is not None:
        # The last token is never read.
        limit, what = (
            end.positions + 1,
            f"has {end.positions} positions: samples that reach the last one end there",
        )
    else:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        what = f"is made for {limit}"
    if limit is not None and longest > limit:
        message = f"the longest prompt with --max_new_tokens {max_new_tokens} takes {longest} tokens, and the model {what}"
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def _padding_takes_positions(end: LastPosition | None, longest: Row, max_new_tokens: int) -> bool:
    """Return whether rows of different lengths must not share a batch, since padding would change them."""
    if end is None:
        return False
    return end.shifts or (end.counts_padding and len(longest.input_ids) + max_new_tokens - 1 > end.positions)


def _padding_gives_nan(model: Any) -> bool:
    """Return whether rows of different lengths must not share a batch because of float64.

    The eager attention of transformers takes its softmax in float32, in which the mask value of float64 is
    -inf, so that padding, which sees nothing, becomes NaN.
    """
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return model.dtype == torch.float64 and attention == "eager"


def _decode_batch(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    finished: Finished,
    stepped: Stepped | None,
    stops: StopStrings,
    room: dict[tuple[str, int], float],
    seed: int,
    arguments: dict[str, Any],
) -> None:
    length = max(len(row.input_ids) for row in rows)
    # A row's own first token is one that the model knows, and that no penalty on tokens of the prompt takes
    # amiss.
    padded = [row.input_ids[:1] * (length - len(row.input_ids)) + row.input_ids for row in rows]
    mask = [[0] * (length - len(row.input_ids)) + visible(model, tokenizer, row.input_ids) for row in rows]
    if model.generation_config.cache_implementation not in GROWING_CACHES:
        arguments = {**arguments, "cache_implementation": "dynamic"}
    if rows[0].expert_id is not None:
        arguments = {**arguments, "expert_ids": torch.tensor([row.expert_id for row in rows])}
    generators = [row_generator(seed, row) for row in rows]
    rooms = [room[row.task_id, row.sample] for row in rows]
    loop = _Loop(rows, finished, stops, generators, rooms, stepped)
    model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        pad_token_id=tokenizer.eos_token_id,
        num_return_sequences=1,
        stop_strings=None,  # the loop's own
        custom_generate=loop,
        **arguments,
    )


def visible(model: Any, tokenizer: Any, input_ids: list[int]) -> list[int]:
    """Return the attention mask that transformers makes of a prompt that comes alone and without a mask.

    EvalPlus's prompts do. The padding token, here the tokenizer's end of sequence, which chat templates
    write, is hidden unless the model ends with it, too.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    hidden = None if tokenizer.eos_token_id in ends else tokenizer.eos_token_id
    return [int(token != hidden) for token in input_ids]


class _Loop:
    """One batch's decoding loop, in the form that `generate` calls, after `GenerationMixin._sample`."""

    def __init__(
        self,
        rows: list[Row],
        finished: Finished,
        stop_strings: StopStrings,
        generators: list[np.random.Generator],
        room: list[float],
        stepped: Stepped | None = None,
    ):
        self.rows = list(rows)
        self.finished = finished
        self.stepped = stepped or (lambda num_tokens: None)
        self.stop_strings = stop_strings
        self.generators = generators
        self.room = room  # new tokens that each row has positions for
        self.new_tokens: list[list[int]] = [[] for _ in rows]
        self.going_on = list(range(len(rows)))  # the places of those that are not done

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> torch.LongTensor:
        # Only our models have it, and only with their optional files. Its rows all go on to the end, past
        # their last position.
        reaches_last_position = min(self.room) < generation_config.max_length - input_ids.shape[1]
        fast = None if reaches_last_position else getattr(model, "decoding_fast", None)
        with nullcontext() if fast is None else fast(generation_config, model_kwargs) as decoding:
            return self._run(model, decoding, input_ids, logits_processor, generation_config, model_kwargs)

    def _run(
        self, model, decoding, input_ids, logits_processor, generation_config, model_kwargs: dict[str, Any]
    ) -> torch.LongTensor:
        max_new_tokens = generation_config.max_length - input_ids.shape[1]
        end = generation_config._eos_token_tensor
        end = set() if end is None else set(end.reshape(-1).tolist())
        for processor in logits_processor:
            if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):
                # the padding of rows that may leave; it is harmless here
                processor.prompt_ignore_length = None

        def step(forward):
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
            )
            return forward(**inputs, return_dict=True)

        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        # as `generate` does: a mixture of experts has faster steps on a GPU
        with model._optimize_model_for_decode():
            while True:
                model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
                scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
                scores = logits_processor(input_ids, scores)  # `remove_invalid_values` takes NaN away
                wrong = (scores if len(scores) == len(self.going_on) else scores[self.going_on]).isnan().any()
                tokens = self._choose(scores, generation_config.do_sample)
                read = _start_reading(torch.cat([tokens, wrong[None].to(tokens.dtype)]))
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
                if decoding is not None and input_ids.shape[1] < generation_config.max_length:
                    # of all rows; while the GPU computes, their tokens are looked at
                    outputs = step(decoding)
                *tokens, wrong = read()
                if wrong:
                    name = self.rows[self.going_on[0]].task_id
                    raise FailureError(
                        f"the model's logits are NaN (at {name} or beside it); try another --dtype"
                    )
                self._take(tokens, end, max_new_tokens)
                if not self.going_on:
                    return input_ids
                if decoding is None:
                    if len(self.going_on) < len(tokens):
                        input_ids, model_kwargs = self._drop_done(input_ids, model_kwargs)
                    outputs = step(model)

    def _choose(self, scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
        """Choose each row's token: scores `[rows, vocabulary]` -> `[rows]`."""
        if not do_sample:
            return scores.argmax(dim=-1)
        # Where a row's random number falls in the running sum of its probabilities.
        sums = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        drawn = torch.tensor([generator.random() for generator in self.generators], device=scores.device)
        drawn = drawn.to(sums.dtype)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)

    def _take(self, tokens: list[int], end: set[int], max_new_tokens: int) -> None:
        """Give every row that goes on its new token, and tell those that are done with it."""
        self.stepped(len(self.going_on))
        going_on = []
        for place in self.going_on:
            new_tokens = self.new_tokens[place]
            new_tokens.append(tokens[place])
            row, room = self.rows[place], self.room[place]
            stop = why_ended(row, new_tokens, end, self.stop_strings, max_new_tokens, room)
            if stop is None:
                going_on.append(place)
            else:
                self.finished(row, new_tokens, stop)
        self.going_on = going_on

    def _drop_done(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]):
        self.rows = [self.rows[place] for place in self.going_on]
        self.new_tokens = [self.new_tokens[place] for place in self.going_on]
        self.generators = [self.generators[place] for place in self.going_on]
        self.room = [self.room[place] for place in self.going_on]
        kept = torch.tensor(self.going_on, device=input_ids.device)
        self.going_on = list(range(len(kept)))
        return _select_rows(input_ids, model_kwargs, kept)


def why_ended(
    row: Row, new_tokens: list[int], end: set[int], stops: StopStrings, max_new_tokens: int, room: float
) -> str | None:
    """Say why a row ends with its newest token; None where it goes on.

    Args:
        end: the model's end-of-sequence tokens.
        room: new tokens that the row has positions for.
    """
    if new_tokens[-1] in end:
        return END_OF_SEQUENCE
    if stops.complete(new_tokens, row.input_ids):
        return STOP_STRING
    if len(new_tokens) >= max_new_tokens:
        return MAX_NEW_TOKENS
    return LAST_POSITION if len(new_tokens) >= room else None


def _start_reading(tensor: torch.Tensor) -> Callable[[], list]:
    """Return a function that waits for a tensor alone, not for later work of the GPU, and reads it."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    on_host = tensor.to("cpu", non_blocking=True)
    there = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> list:
        there.synchronize()
        return on_host.tolist()

    return read


def row_generator(seed: int, row: Row) -> np.random.Generator:
    """Make a random generator that belongs to one sample, whatever else is drawn."""
    return np.random.Generator(np.random.Philox(row_seed(seed, row)))


def row_seed(seed: int, row: Row) -> int:
    """Make a seed of 128 bits that belongs to one sample."""
    digest = hashlib.sha256(f"{seed}:{row.task_id}:{row.sample}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def _select_rows(input_ids: torch.Tensor, model_kwargs: dict[str, Any], kept: torch.Tensor):
    """Keep only unfinished rows in prompt, KV cache and everything else that goes by rows."""
    batch = input_ids.shape[0]
    selected = {}
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch:
            value = value[kept.to(value.device)]
        selected[name] = value
    for name in ("past_key_values", "cache"):  # the second from transformers 5.24 on
        if selected.get(name) is not None:
            selected[name].batch_select_indices(kept)
    return input_ids[kept], selected


__all__ = ["Row", "StopStrings", "decode_rows", "row_generator", "row_seed", "visible", "why_ended"]
