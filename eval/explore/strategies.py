"""The routing strategies that the page offers, with what each does in a few words."""

from __future__ import annotations

from typing import Any


SINGLE = "single"
# In the words of the command line's help (`hub_export.repo.choices`, which a Space does not
# have), without how an expert is named.
STRATEGIES = {
    "router": "the router's weights at every token",
    "best": "one expert a prompt: the one that the router prefers there",
    SINGLE: "that expert alone",
    "ensemble": "the mean of all experts' next-token probabilities",
    "round_robin": "each new sequence gets the next expert",
    "base": "no expert: the base model alone",
    "uniform": "all experts with equal weights",
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
