"""The model: config, experts, router, routing strategies, cache and model classes.

Copied as it stands into every exported repo, so it depends on torch and transformers alone.
"""

from .configuration_dylora_moe import DyloraMoeConfig
from .modeling_dylora_moe import DyloraMoeForCausalLM, DyloraMoeModel


__all__ = ["DyloraMoeConfig", "DyloraMoeForCausalLM", "DyloraMoeModel"]
