"""A model's `generate` in a thread, with every token as it comes and the experts' part in it."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .routing import Routing, RoutingReader


Streamed = tuple[int, Routing]  # a token's id and how it was routed

# One text at a time: a seed is the whole process's, and a hook the whole model's.
_generating = threading.Lock()


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Tokenize a prompt, `[1, tokens]`: as a user's message in the chat template, or as it is."""
    if not chat:
        return dict(tokenizer(prompt, return_tensors="pt"))
    messages = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    )


def generation_settings(model: Any, temperature: float, max_new_tokens: int) -> GenerationConfig:
    """Make the model's own generation config greedy, or sample at a temperature, one token at a time."""
    settings = copy.deepcopy(model.generation_config)
    # A streamer takes one text; of several tokens that are checked at once, one alone has its own routing.
    settings.update(max_new_tokens=max_new_tokens, num_beams=1, num_return_sequences=1)
    settings.update(prompt_lookup_num_tokens=None)
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature)
    else:
        settings.update(do_sample=False)
    return settings


def stream_tokens(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    strategy: str,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[Streamed]:
    """Generate, and yield each new token with its routing; the tokens are those of `generate` with the same options.

    Args:
        model: a `DyloraMoeForCausalLM` in evaluation mode.
        inputs: of one prompt, as `encode_prompt` returns them.
        strategy: as `routing_strategy` of `generate`.
        temperature: 0 for greedy decoding.
        seed: set with `torch.manual_seed` before the first token.
        stop: ends the text after the next token, once it is set.

    Raises:
        ValueError: an unknown strategy; lists the valid ones.
        Exception: whatever `generate` raises.
    """
    reader = RoutingReader(model, strategy)
    settings = generation_settings(model, temperature, max_new_tokens)
    settings.routing_strategy, settings.output_router_logits = strategy, reader.needs_logits
    left = threading.Event()  # set once the tokens are no longer read
    found: queue.Queue[Streamed | Exception | None] = queue.Queue()

    def generate() -> None:
        streamer = _Streamer(found)
        with _generating:
            hook = model.register_forward_hook(
                lambda _, __, arguments, output: streamer.predicted(reader.read(arguments, output)),
                with_kwargs=True,
            )
            try:
                torch.manual_seed(seed)
                model.generate(
                    **inputs,
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=[_Stopped(left if stop is None else stop, left)],
                )
                found.put(None)
            except Exception as error:  # goes to the thread that asked
                found.put(error)
            finally:
                hook.remove()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        while (token := found.get()) is not None:
            if isinstance(token, Exception):
                raise token
            yield token
    finally:
        left.set()
        thread.join()


class _Streamer(BaseStreamer):
    """Puts every token into a queue, with the routing of the forward before it."""

    def __init__(self, found: queue.Queue):
        self._found = found
        self._has_prompt = False
        self._routing: Routing | None = None

    def predicted(self, routing: Routing) -> None:
        self._routing = routing

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # which transformers puts first
            self._has_prompt = True
            return
        for token_id in value.flatten().tolist():
            self._found.put((token_id, self._routing))

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """Ends a text as soon as one of the events is set."""

    def __init__(self, *events: threading.Event):
        self._events = events

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_set = any(event.is_set() for event in self._events)
        return torch.full((input_ids.shape[0],), is_set, device=input_ids.device)


__all__ = ["encode_prompt", "generation_settings", "stream_tokens"]
