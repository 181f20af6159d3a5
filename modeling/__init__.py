"""The model: configuration, expert layers, router, KV cache, generation, loading and saving.

Read `modeling_dylora_moe` first (the models and their forward), then `experts_dylora_moe` (the layer) and
`routing_dylora_moe` (a routed pass). A routing strategy is a class in `routing_strategies_dylora_moe`. All
files are copied into every exported repo: they import torch, transformers and each other. The `fast_` ones
are optional.
"""

from .configuration_dylora_moe import DyloraMoeConfig
from .modeling_dylora_moe import DyloraMoeForCausalLM, DyloraMoeModel


__all__ = ["DyloraMoeConfig", "DyloraMoeForCausalLM", "DyloraMoeModel"]
