"""Which routing strategies an engine serves, and what each needs of it."""

from __future__ import annotations

from typing import Any

from dylora_moe.modeling.configuration_dylora_moe import DyloraMoeConfig
from dylora_moe.modeling.routing_strategies_dylora_moe import RoutingStrategy, resolve_routing_strategy


# The name of the argument, in a request's `extra_args` (offline) and `vllm_xargs` (in the server's JSON).
ARGUMENT = "routing_strategy"

WHY_NOT_SERVED = {
    "ensemble": "it mixes the next-token distributions of all experts, and an engine samples each request from one",
    "round_robin": "requests reach an engine in no order of their own; name an expert in each, as single:<expert>",
}
WHY_NOT_ARROW = (
    "this mixture has a router in every layer (arrow), whose weights are of each layer's own input; serve it with another "
    """default, --hf-overrides '{"routing_strategy": "uniform"}' or single:<expert>"""
)


def served_strategy(text: Any, config: DyloraMoeConfig) -> RoutingStrategy:
    """Resolve a strategy that an engine is asked for.

    Raises:
        ValueError: not a valid form, or one that is not served; the message says why.
    """
    strategy = resolve_routing_strategy(text, config)
    if strategy.name in WHY_NOT_SERVED:
        raise ValueError(
            f"Routing strategy {str(strategy)!r} is not served: {WHY_NOT_SERVED[strategy.name]}."
        )
    if strategy.needs_router and config.routes_by_layer:
        raise ValueError(f"Routing strategy {str(strategy)!r} is not served: {WHY_NOT_ARROW}.")
    return strategy


class EngineStrategies:
    """The strategies of one engine: its default, and what requests may name.

    Args:
        config: the mixture's, with the engine's default as `routing_strategy`.

    Attributes:
        default: what a request without a strategy gets.
        num_streams: passes over the tokens, each with a KV cache of its own: two if the default is `router`.
    """

    def __init__(self, config: DyloraMoeConfig):
        self.config = config
        self.default = served_strategy(getattr(config, ARGUMENT, None), config)
        self.num_streams = self.default.num_streams

    def of_request(self, params: Any) -> RoutingStrategy:
        """Give the strategy of a request by its sampling parameters.

        Raises:
            ValueError: one that is not served, or that this engine has no stream for.
        """
        text = (params.extra_args or {}).get(ARGUMENT)
        if text is None:
            strategy = self.default
        elif not isinstance(text, str):
            raise ValueError(f"`{ARGUMENT}` is {text!r}; it must be a text, such as 'single:0'.")
        else:
            strategy = served_strategy(text, self.config)
        if strategy.num_streams > self.num_streams:
            raise ValueError(
                f"Routing strategy {str(strategy)!r} needs a second KV cache, and this engine was started with "
                f"{str(self.default)!r}, which has one. Start it with --hf-overrides "
                f'\'{{"{ARGUMENT}": "{strategy}"}}\'; it then serves all strategies.'
            )
        if strategy.name == "best" and params.prompt_logprobs is not None:
            raise ValueError(
                "Routing strategy 'best' has no `prompt_logprobs`: its expert is chosen once the prompt was read. Ask "
                "for those of single:<expert>."
            )
        return strategy


__all__ = ["ARGUMENT", "EngineStrategies", "served_strategy"]
