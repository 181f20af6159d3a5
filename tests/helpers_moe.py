"""Small mixture-of-experts foundations with layers beside the stacked experts: dense ones and shared ones."""

import torch
import transformers
from torch import nn


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {**FEW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = {
    **GROUPS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

# Named by the layers that PEFT leaves out when a config targets them by their names.
MOE_FOUNDATIONS = {
    "dense: qwen3 moe": ("Qwen3MoeConfig", {**FEW, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
    "dense: qwen3 moe, every second": (
        "Qwen3MoeConfig",
        {**FEW, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 2},
    ),
    "dense and shared: glm4 moe": (
        "Glm4MoeConfig",
        {**GROUPS, "head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "dense and shared: deepseek v3": ("DeepseekV3Config", {**LATENT, "first_k_dense_replace": 1}),
    "dense alone: deepseek v3": ("DeepseekV3Config", {**LATENT, "first_k_dense_replace": 2}),
    "none: qwen2 moe": ("Qwen2MoeConfig", {**FEW, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "none: mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}


def moe_config(name: str):
    config, fields = MOE_FOUNDATIONS[name]
    return getattr(transformers, config)(**{**SIZES, **fields})


def moe_model(name: str):
    """With weights of a size at which every layer counts."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(moe_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms stay as they are
                parameter.normal_(std=0.2)
        model.lm_head.weight.normal_()
    return model.eval()


def linear_layers(model) -> dict[str, tuple[int, int]]:
    """Every linear layer with (in, out)."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
