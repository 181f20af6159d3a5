"""The routing strategies that the page offers, with what each does in a few words."""

from __future__ import annotations

from typing import Any


SINGLE = "single"
STRATEGIES = {
    "router": "the router's weights at every token",
    "best": "the router's favourite over the prompt writes everything",
    SINGLE: "one expert writes everything",
    "ensemble": "the experts' distributions over the next token, mixed equally",
    "round_robin": "the next expert with every completion",
    "uniform": "all experts at once, with equal weights",
    "base": "the base model without experts",
}
OF_A_ROUTER = ("router", "best")


def offered(config: Any) -> list[str]:
    """List the strategies that a mixture of this config can do, the router's first."""
    return [name for name in STRATEGIES if config.has_router or name not in OF_A_ROUTER]


def spelled(name: str, expert: int) -> str:
    """Spell a strategy as `generate` takes it; `expert` is for `single` alone."""
    return f"{SINGLE}:{expert}" if name == SINGLE else name


def split(strategy: str) -> tuple[str, int]:
    """Split a strategy in canonical form into its name and its expert's number, 0 where it has none."""
    name, _, expert = strategy.partition(":")
    return name, int(expert or 0)


__all__ = ["STRATEGIES", "offered", "spelled", "split"]
