"""Adapters on the stacked experts of small mixture-of-experts foundations, as PEFT and an older transformers
saved them."""

import torch
import transformers
from helpers_checkpoints import write_json
from helpers_moe import SIZES, moe_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file


# What the matrices of one expert were called: before they were stacked, in which part of the layer, with
# their shapes.
OLD_NAMES = {
    "none: mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "dense: qwen3 moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "none: qwen2 moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def gpt_oss():
    """Stacks as [in, out], with biases, gates between the others, and a gate of its own."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{**SIZES, "num_local_experts": 4, "head_dim": 8, "intermediate_size": 24}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return random_weights(model)


def nemotron():
    """Stacks without a gate."""
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        **{**SIZES, "head_dim": 8}, layers_block_type=["attention", "moe"], n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    )  # fmt: skip
    return random_weights(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def random_weights(model):
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            parameter.normal_(std=0.2)
    return model.eval()


def stacked_experts(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def write_old_adapter(
    folder, foundation, kind, rank=4, alpha=8, seed=0, matrices=(0, 1, 2), also=(), **fields
):
    """An adapter with a pair of matrices for every single expert, and on the layers whose names end with
    `also`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    place, names = OLD_NAMES[kind]
    model = moe_model(kind)
    shapes = {}
    for path, experts in stacked_experts(model).items():
        count, hidden, inner = experts.down_proj.shape
        sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
        parent = path.replace(".mlp.experts", f".{place}.experts")
        for number in range(count):
            shapes |= {f"{parent}.{number}.{names[matrix]}": sizes[matrix] for matrix in matrices}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith(tuple(also)):
            shapes[path] = (module.in_features, module.out_features)
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            torch.randn(rank, inputs, generator=generator) * 0.2
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(outputs, rank, generator=generator) * 0.2
        )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "base_model_name_or_path": str(foundation), **fields,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    return folder


@torch.no_grad()
def with_old_adapter(model, adapter, kind, alpha=8, rank=4):
    """The model with such an adapter added to its weights: to each matrix of each expert, s B A."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    place, names = OLD_NAMES[kind]
    for path, experts in stacked_experts(model).items():
        parent = path.replace(".mlp.experts", f".{place}.experts")
        inner = experts.down_proj.shape[-1]
        for number in range(len(experts.down_proj)):
            parts = (
                experts.gate_up_proj[number, :inner], experts.gate_up_proj[number, inner:], experts.down_proj[number]
            )  # fmt: skip
            for name, part in zip(names, parts, strict=True):
                key = f"base_model.model.{parent}.{number}.{name}.lora_{{}}.weight"
                if key.format("A") in tensors:
                    part += alpha / rank * tensors[key.format("B")] @ tensors[key.format("A")]
    for path, module in model.named_modules():
        key = f"base_model.model.{path}.lora_{{}}.weight"
        if key.format("A") in tensors:
            module.weight += alpha / rank * tensors[key.format("B")] @ tensors[key.format("A")]
    return model


def write_new_adapter(folder, foundation, kind, parameters, modules=(), rank=4, alpha=8, seed=0, **fields):
    """An adapter that PEFT itself made and saved, on parameters and modules. `kind` may be the foundation
    itself."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(modules), target_parameters=list(parameters), **fields
    )
    model = get_peft_model(moe_model(kind) if isinstance(kind, str) else kind, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(foundation)
    model.save_pretrained(folder)
    return folder
