"""Small routed models of every family that the decode step's kernels know, and the step in Triton's interpreter."""

import pytest
import torch
from helpers_models import VOCABULARY, build
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig
from transformers import models as families
from transformers.pytorch_utils import Conv1D


SIZES = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ALTERNATING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def partial_rotary(factor: float) -> dict:
    return {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}


# By name, the config's class and what differs from `SIZES`: every family, and what its configs switch on.
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA_3},
    ),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            **ALTERNATING,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**ALTERNATING, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    ),
    "phi3": ("Phi3Config", {"sliding_window": 9}),
    "phi3-partial": ("Phi3Config", {"rope_parameters": partial_rotary(0.5), "num_attention_heads": 2}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 7}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 2, "no_rope_layer_interval": 2}),
    "stablelm": (
        "StableLmConfig",
        {"rope_parameters": partial_rotary(0.25), "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "gpt2": ("GPT2Config", {}),
}


def family_config(variant: str, **fields) -> PreTrainedConfig:
    """Make a base model's config; `fields` are spelled as most configs spell them."""
    kind, own = VARIANTS[variant]
    fields = {**SIZES, **own, **fields}
    if kind != "GPT2Config":
        return getattr(families, kind)(**fields)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
    del fields["num_key_value_heads"]
    return GPT2Config(**{names.get(name, name): value for name, value in fields.items()})


def experts_on_linear_layers(config: PreTrainedConfig) -> list[dict]:
    """Three experts of unequal ranks, scales and targets, on all linear layers together."""
    with torch.device("meta"):
        foundation = AutoModelForCausalLM.from_config(config)
    names = [
        name
        for name, module in foundation.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
    ]
    return [
        {"name": "first", "r": 3, "lora_alpha": 6, "target_modules": names},
        {"name": "second", "r": 5, "lora_alpha": 6, "target_modules": names[::2]},
        {"name": "third", "r": 2, "lora_alpha": 3, "target_modules": names[1:]},
    ]


def build_family(variant: str, seed: int = 0, config_fields: dict | None = None, **fields):
    """Build a routed model of a family, with random weights everywhere, norms and biases too."""
    config = family_config(variant, **fields)
    model = build(config, experts_on_linear_layers(config), seed=seed, **(config_fields or {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.foundation.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".lora_" in name or parameter.dim() > 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.2)
    return model


# Base models that the kernels do not know, and whose own forward a graph can capture.
OTHERS: dict[str, tuple[str, dict]] = {
    "cohere": ("CohereConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}


def build_other(kind: str, seed: int = 5):
    """Build a routed model on a base model that the kernels do not know, experts on its attention."""
    name, fields = OTHERS[kind]
    sizes = {**SIZES, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    config = getattr(families, name)(**{**sizes, **fields})
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qvo"]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    return build(config, experts, seed=seed)


def interpret_quickly(monkeypatch, step) -> None:
    """Cut products into few programs, which is what the interpreter's time goes by. `step` is the module."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    few = step.Blocks(64, 64, 4)
    monkeypatch.setattr(step, "BLOCKS", {rows: dict.fromkeys(step.BLOCKS[rows], few) for rows in step.BLOCKS})
    monkeypatch.setattr(step, "TRANSPOSED", dict.fromkeys(step.TRANSPOSED, few))
    monkeypatch.setattr(
        step, "rank_blocks", lambda product: step.Blocks(16, step.power_of_two(product.inputs), 4)
    )
