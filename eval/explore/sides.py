"""One prompt under one strategy, or under two beside each other: what the page shows, step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .completion import Completion
from .shown import completion_html
from .strategies import STRATEGIES, split
from .streaming import encode_prompt, stream_tokens


SECONDS_BETWEEN = 0.1  # two states that are shown


@dataclass(frozen=True)
class Asked:
    """What the page asks of the model.

    Attributes:
        strategies: one for each side; None for a side that stays empty.
        chat: whether the prompt goes into the chat template.
    """

    prompt: str
    strategies: tuple[str | None, ...]
    chat: bool = False
    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0


def write_sides(model: Any, tokenizer: Any, asked: Asked, stop: threading.Event) -> Iterator[list[str]]:
    """Generate the sides one after the other, since a seed is the whole process's, and yield the HTML of all.

    Raises:
        ValueError: there is no prompt, or an unknown strategy.
        Exception: whatever `generate` raises.
    """
    if not asked.prompt.strip():
        raise ValueError("type a prompt first")
    sides = [""] * len(asked.strategies)
    for place, strategy in enumerate(asked.strategies):
        if strategy is None or stop.is_set():
            continue
        for html in _write_side(model, tokenizer, asked, strategy, stop):
            sides[place] = html
            yield list(sides)


def _write_side(
    model: Any, tokenizer: Any, asked: Asked, strategy: str, stop: threading.Event
) -> Iterator[str]:
    names = model.config.expert_names
    title = describe(strategy, names)
    completion = Completion(tokenizer, len(names))
    inputs = encode_prompt(tokenizer, asked.prompt, asked.chat)
    tokens = stream_tokens(
        model,
        inputs,
        strategy,
        temperature=asked.temperature,
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
        stop=stop,
    )
    begin = shown = time.monotonic()
    yield completion_html(completion, names, title, "reading the prompt")
    for token_id, routing in tokens:
        completion.append(token_id, routing)
        completion.seconds = time.monotonic() - begin
        if time.monotonic() - shown >= SECONDS_BETWEEN:
            shown = time.monotonic()
            yield completion_html(completion, names, title, "writing")
    is_cut = len(completion.token_ids) == asked.max_new_tokens
    how = "stopped" if stop.is_set() else "cut at the most new tokens" if is_cut else "ended by the model"
    yield completion_html(completion, names, title, how)


def describe(strategy: str, names: list[str]) -> str:
    """Say what a strategy in canonical form does, and with which expert."""
    name, expert = split(strategy)
    written = f"{strategy} ({names[expert]})" if ":" in strategy else name
    return f"{written}: {STRATEGIES[name]}"


__all__ = ["Asked", "describe", "write_sides"]
