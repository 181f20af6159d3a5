"""The vLLM plugin: exported repos behind a serving engine, with the routing strategies that it can compute.

Nothing is imported from here by the rest of the package: vLLM finds `register` by its entry point. Read
`routed_model.py` first. What changes in an engine's config is in `engine_config.py`, which strategy a request has in
`request_routing.py` and `scheduler.py`, how streams share weights in `streams.py`, and how experts get their
weights and where they act in `expert_weights.py` and `routed_linear.py`.
"""

from .plugin import register


__all__ = ["register"]
