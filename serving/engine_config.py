"""What a mixture changes in the config of the engine that serves it, and what it refuses there."""

from __future__ import annotations

import os
from typing import Any

import vllm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dylora_moe.modeling.configuration_dylora_moe import DyloraMoeConfig
from dylora_moe.modeling.loading_dylora_moe import read_generation_config

from .request_routing import check_requests_with
from .strategies import ARGUMENT, EngineStrategies, served_strategy


logger = init_logger(f"vllm.{__name__}")

TESTED_VERSIONS = ("0.32.0",)  # of vLLM, on its CPU engine
SCHEDULER = "dylora_moe.serving.scheduler.RoutedScheduler"
REQUEST_ROUTING = "dylora_moe.serving.request_routing:RequestRouting"


class DyloraMoeEngineConfig(VerifyAndUpdateConfig):
    """vLLM's hook for an architecture: runs once, in the process that makes the engine's config."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Fix the engine's strategy, refuse what is not served, and name scheduler and request routing.

        Raises:
            ValueError: an option that a mixture is not served with; the message names it and a remedy.
        """
        if vllm.__version__.split("+")[0] not in TESTED_VERSIONS:
            logger.warning(
                "dylora-moe was tested with vLLM %s, and this is %s.",
                ", ".join(TESTED_VERSIONS),
                vllm.__version__,
            )
        model_config = vllm_config.model_config
        config = model_config.hf_config
        _check_overrides(model_config.hf_overrides)
        default = served_strategy(_default_strategy(model_config), config)
        setattr(config, ARGUMENT, str(default))
        strategies = EngineStrategies(config)
        _check_base_model(model_config)
        _refuse(vllm_config, strategies)
        _use_own_parts(vllm_config)
        check_requests_with(strategies)


def _check_overrides(overrides: Any) -> None:
    """Raise ValueError for a field that is none of a mixture's config, where it would change nothing."""
    if not isinstance(overrides, dict):
        return  # a function of the user's
    known = {ARGUMENT, *vars(DyloraMoeConfig()), *dir(DyloraMoeConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"--hf-overrides has {unknown[0]!r}, which is no field of a mixture's config. For a field of the base model's "
            f'write {{"base_config": {{"{unknown[0]}": …}}}}.'
        )


def _default_strategy(model_config: Any) -> str | None:
    """Read the engine's strategy: `--hf-overrides`, else the repo's `generation_config.json`."""
    override = getattr(model_config.hf_config, ARGUMENT, None)
    if override is not None:
        return override
    stored = read_generation_config(model_config.model, {"revision": model_config.revision})
    return getattr(stored, ARGUMENT, None)


def _check_base_model(model_config: Any) -> None:
    """Raise ValueError for a base model that vLLM does not have, or whose past is no KV cache."""
    base = model_config.hf_config.base_config
    known = base.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.model_type, base.model_type)]
    remedy = "Run it with transformers, or serve one expert that `dylora-moe merge` made a model of."
    if known[0] not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"The base model is a {known[0]}, which vLLM {vllm.__version__} does not have. {remedy}"
        )
    found, _ = ModelRegistry.inspect_model_cls(known, model_config)
    if found.has_inner_state or found.is_attention_free or not found.is_text_generation_model:
        raise ValueError(
            f"The base model is a {known[0]}, which is no decoder with a KV cache alone. {remedy}"
        )


def _refuse(vllm_config: Any, strategies: EngineStrategies) -> None:
    """Raise ValueError for what would give other tokens, or none."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    own_scheduler = vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER)
    kv_from_elsewhere = cache.kv_offloading_size is not None or vllm_config.kv_transfer_config is not None
    # Each layer of the base model's own experts waits for all processes, and each skips the router's pass or not.
    uneven_passes = strategies.num_streams > 1 and parallel.data_parallel_size > 1 and model_config.is_moe
    refused = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "quantisation (--quantization)": model_config.quantization is not None,
        "adapters on top (--enable-lora)": vllm_config.lora_config is not None,
        "pooling (--runner pooling)": model_config.runner_type == "pooling",
        "a scheduler of your own (--scheduler-cls)": own_scheduler,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        # Their keys are of the tokens alone, and they would hide a part of the prompt from a choice.
        "keys and values from elsewhere (--kv-transfer-config, --kv-offloading-size)": kv_from_elsewhere,
        "layers that see a part of the tokens (--kv-sharing-fast-prefill)": cache.kv_sharing_fast_prefill,
        f"--data-parallel-size and {strategies.default}, on a base model with experts of its own; use "
        "--tensor-parallel-size, or single:<expert>": uneven_passes,
        "a base model of latent attention, which takes weights of its layers past the experts": model_config.use_mla,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"A mixture is not served with {what}.")


def _use_own_parts(vllm_config: Any) -> None:
    """Name the scheduler and the request routing, and switch off what cannot follow a request's strategy."""
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    vllm_config.scheduler_config.async_scheduling = False
    processors = list(vllm_config.model_config.logits_processors or [])
    if REQUEST_ROUTING not in processors:
        vllm_config.model_config.logits_processors = [*processors, REQUEST_ROUTING]
    # The routed model decides in Python which streams run, so graphs are recorded inside a stream alone.
    if vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    # Files of compiled forward functions are named by class alone: one stream would load the other's.
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    # Model Runner V2 takes another kind of logits processor, which is not told of a batch's rows.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if vllm_config.use_v2_model_runner:
        raise ValueError("A mixture needs vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")


def check_engine(vllm_config: Any) -> None:
    """Make sure that the engine has what gives requests their strategies and keeps their caches apart.

    Raises:
        RuntimeError: this vLLM did not run the hook above, or did not keep what it set.
    """
    has_scheduler = vllm_config.scheduler_config.scheduler_cls == SCHEDULER
    if not has_scheduler or REQUEST_ROUTING not in (vllm_config.model_config.logits_processors or []):
        raise RuntimeError(
            f"vLLM {vllm.__version__} has changed an interface that routing needs; use {', '.join(TESTED_VERSIONS)}."
        )


__all__ = ["DyloraMoeEngineConfig", "check_engine"]
