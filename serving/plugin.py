"""What vLLM calls in each of its processes: it makes the model known under its config and architecture."""

from __future__ import annotations

import logging


ARCHITECTURE = "DyloraMoeForCausalLM"


def register() -> None:
    """Register config, model class and changes of an engine's config; entry point of `vllm.general_plugins`.

    Nothing else of vLLM changes: other models are served as without this package.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from dylora_moe.modeling.configuration_dylora_moe import DyloraMoeConfig

    AutoConfig.register(DyloraMoeConfig.model_type, DyloraMoeConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "dylora_moe.serving.routed_model:DyloraMoeForCausalLM")
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .engine_config import DyloraMoeEngineConfig
    except ImportError as error:
        # A vLLM that has changed still serves other models; `check_engine` refuses ours.
        logging.getLogger(__name__).warning("dylora-moe cannot serve mixtures by this vLLM: %s", error)
    else:
        MODELS_CONFIG_MAP[ARCHITECTURE] = DyloraMoeEngineConfig


__all__ = ["ARCHITECTURE", "register"]
