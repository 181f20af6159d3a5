"""Random mixtures on random foundations, and both sides of the check of each in one process."""

import copy
import random

import torch
import transformers
from helpers_models import PeftLoop

from dylora_moe.hub_export.checking import check_repo, comparison
from dylora_moe.hub_export.checking.peft_reference import Reference
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


VOCABULARY = 300
ROWS = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ATTENTION = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj")
FAMILIES = {
    "Llama": ("LlamaConfig", {}, ATTENTION),
    "Qwen2": ("Qwen2Config", {}, ATTENTION),
    "Gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}, ATTENTION),
    "GPT-2": ("GPT2Config", {}, ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_proj")),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4}, ATTENTION),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
        ATTENTION,
    ),
}


def random_mixture(
    seed: int, layers: tuple[int, ...] = (2, 3, 6, 12, 20, 30)
) -> tuple[str, DyloraMoeForCausalLM]:
    """A mixture of three experts in float32, in evaluation mode, and what it is in a few words."""
    choose = random.Random(seed)
    family, scale, num_layers = choose.choice(list(FAMILIES)), choose.choice((0.02, 0.05, 0.1, 0.3, 0.5)), 0
    num_layers, tied, expert_scale = (
        choose.choice(layers),
        choose.random() < 0.3,
        choose.choice((0.01, 0.1, 0.3)),
    )
    dtype = choose.choice((torch.float32, torch.bfloat16))
    kind, fields, targets = FAMILIES[family]
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2 if family != "GPT-2" else None,
        initializer_range=scale,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **fields,
    )
    modules = [target.format(layer) for layer in range(num_layers) for target in targets]
    experts = [{"name": f"e{i}", "r": 4, "lora_alpha": 8, "target_modules": modules} for i in range(3)]
    router = {
        "router_input": choose.choice(("base", "experts_sum")),
        "router_mode": choose.choice(("sparse", "dense")),
        "num_experts_per_tok": choose.choice((1, 2)),
    }
    torch.manual_seed(seed)
    model = DyloraMoeForCausalLM(DyloraMoeConfig(base_config=config, expert_configs=experts, **router)).eval()
    with torch.no_grad():
        for parameter in model.foundation.parameters():
            parameter.copy_(parameter.to(dtype))
        for layer in model.expert_layers().values():
            layer.lora_A.normal_(std=expert_scale)
            layer.lora_B.normal_(std=expert_scale)
        for parameter in model.router.parameters():
            parameter.normal_()
    words = f"{family}, {num_layers} layers, scale {scale}, experts {expert_scale}, {dtype}, tied {tied}, {router}"
    return words, model


def source_side(model: DyloraMoeForCausalLM, precision: torch.dtype) -> comparison.Computed:
    """What PEFT computes of the same weights, with its rounding."""
    loop, config = PeftLoop(model), model.config
    names = ("router_input", "router_mode", "num_experts_per_tok", "router_temperature")
    gate = {name: getattr(config, name) for name in names}
    gate.update({name: getattr(model.router.gate, name).detach().clone() for name in ("weight", "bias")})
    return comparison.Computed(*Reference(loop.peft, config.expert_names, gate, precision).measure(ROWS))


def repo_side(
    model: DyloraMoeForCausalLM, precision: torch.dtype, source: comparison.Computed
) -> dict[str, torch.Tensor]:
    """What the model itself computes, with the experts chosen by the source's router logits."""
    ready = check_repo.ready(copy.deepcopy(model), precision)
    return dict(check_repo.quantities(ready, ROWS, source.values["router logits"]))


def report(model: DyloraMoeForCausalLM, source: comparison.Computed, found: dict, precision: torch.dtype):
    comparisons = comparison.compare(source, found, model.router.gate.bias.detach())
    return comparison.CheckReport(
        comparisons, model.config.expert_names, precision=str(precision).removeprefix("torch.")
    )


# What may go wrong with a repo, done to the model that stands for it.


def _scale(model, factor):
    for layer in model.expert_layers().values():
        layer.layout = tuple(
            (rank, scale * factor if i == 1 else scale) for i, (rank, scale) in enumerate(layer.layout)
        )
    model._describe_foundation()


def _swap(model):
    for layer in model.expert_layers().values():
        for stack in (layer.lora_A, layer.lora_B):
            stack.data = torch.cat([stack.data[4:8], stack.data[:4], stack.data[8:]])


def _a_layer(model):
    return list(model.expert_layers().values())[-2]


def _transpose(model):
    weight = _a_layer(model).base_layer.weight  # of the queries, or of GPT-2's all three
    size = min(weight.shape)
    weight.data[:size, :size] = weight.data[:size, :size].T.clone()


def _zero(model):
    layer = _a_layer(model)
    layer.lora_B.data[layer.rows(1)] = 0


CORRUPTIONS = {
    "alpha is twice as large": lambda model: _scale(model, 2),
    "alpha is 5 % larger": lambda model: _scale(model, 1.05),
    "two experts are swapped": _swap,
    "the gate has no bias": lambda model: model.router.gate.bias.data.zero_(),
    "a matrix is transposed": _transpose,
    "a matrix is zero": _zero,
}
