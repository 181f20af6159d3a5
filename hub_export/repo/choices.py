"""What can be said of an option's value before any model is read: dtypes and routing strategies.

Nothing that takes long is imported here, so that a wrong value is refused at once.
"""

from __future__ import annotations

from ..errors import InputError
from ..unknown_options import did_you_mean


SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# As a help text lists them; the registry of `routing_strategies_dylora_moe` has the same names in the same order.
STRATEGIES = {
    "router": "the router's weights at every token",
    "best": "one expert a prompt: the one that the router prefers there",
    "single:EXPERT": "that expert alone, by its name or its number",
    "ensemble": "the mean of all experts' next-token probabilities",
    "round_robin": "each new sequence gets the next expert",
    "base": "no expert: the base model alone",
    "uniform": "all experts with equal weights",
}


def long_dtype(name: str | None) -> str | None:
    """Return a dtype's full name, as torch has it: `bfloat16` for `bf16`. Any other text stays."""
    return SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


def check_strategy(text: str) -> None:
    """Check that a text has the form of a routing strategy, of whatever model.

    Raises:
        InputError: its name is not known, or it has an expert where none belongs, or lacks one.
    """
    name, colon, expert = text.partition(":")
    forms = {form.partition(":")[0]: form for form in STRATEGIES}
    if name not in forms:
        problem = f"is not known{did_you_mean(name, forms)}"
    elif ":" in forms[name] and not expert:
        problem = f"needs an expert: {forms[name]}"
    elif ":" not in forms[name] and colon:
        problem = f"takes nothing after it: {name}"
    else:
        return
    raise InputError(f"routing strategy {text!r} {problem}. Valid: {', '.join(STRATEGIES)}")


__all__ = ["STRATEGIES", "check_strategy", "long_dtype"]
