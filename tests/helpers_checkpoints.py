"""Small sources to export, built on the fly: a foundation, a final checkpoint of DyLoRA-MoE's training, PEFT adapters."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


VOCABULARY = 97
HIDDEN = 32
LAYERS = 2


def save_foundation(folder: Path, hidden_size: int = HIDDEN, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """A random Llama with a tokenizer, and a head wide enough that experts make a visible difference."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = LlamaConfig(**{**defaults, **fields})
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = ["<s>", "</s>", "<pad>", "<unk>", *(chr(code) for code in range(33, 33 + VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def layer_shapes(hidden_size: int = HIDDEN) -> dict[str, tuple[int, int]]:
    """Layers that the tests adapt, with (in, out)."""
    shapes = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj"] = (hidden_size, hidden_size)
        shapes[f"{prefix}.self_attn.v_proj"] = (hidden_size, hidden_size // 2)
        shapes[f"{prefix}.mlp.down_proj"] = (48, hidden_size)
    return shapes


def final_checkpoint_tensors(expert: int, rank: int, hidden_size: int = HIDDEN, scale: float = 0.2) -> dict:
    """What `expert_<i>.pt` holds, with random numbers of the expert's own seed."""
    generator = torch.Generator().manual_seed(100 + expert)
    tensors = {}
    for module, (inputs, outputs) in layer_shapes(hidden_size).items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.expert_{expert}.weight"] = torch.randn(rank, inputs, generator=generator) * scale
        tensors[f"{prefix}.lora_B.expert_{expert}.weight"] = torch.randn(outputs, rank, generator=generator) * scale
    return tensors


def save_final_checkpoint(
    folder: Path,
    foundation: Path | str,
    num_experts: int = 3,
    rank: int = 4,
    alpha: float | None = 8,
    hidden_size: int = HIDDEN,
    tokenizer: bool = True,
) -> Path:
    """A final checkpoint as the training code writes it, quirks included: `expert_1.pt` holds expert_10's, too."""
    (folder / "peft_adapters").mkdir(parents=True)
    (folder / "dylo_moe_state").mkdir()
    config = {
        "model_type": "dylora-moe",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "base_model_name_or_path": str(foundation),
        "_dylora_num_experts": num_experts,
        "_dylora_lora_r": rank,
        "_dylora_lora_dropout": 0.05,
    }
    if alpha is not None:
        config["_dylora_lora_alpha"] = alpha
    write_json(folder / "config.json", config)
    experts = [final_checkpoint_tensors(index, rank, hidden_size) for index in range(num_experts)]
    for index in range(num_experts):
        held = {}
        for other in range(num_experts):
            if f"expert_{other}".startswith(f"expert_{index}"):
                held.update(experts[other])
        torch.save(held, folder / "peft_adapters" / f"expert_{index}.pt")
    save_router(folder, num_experts, hidden_size)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_router(folder: Path, num_experts: int, hidden_size: int = HIDDEN, **fields) -> None:
    generator = torch.Generator().manual_seed(7)
    state = {
        "gate_state_dict": {
            "weight": torch.randn(num_experts, hidden_size, generator=generator),
            "bias": torch.randn(num_experts, generator=generator),
        },
        "num_experts": num_experts,
        "input_size": hidden_size,
        "top_k": 1,
        "temperature": 2.0,
        **fields,
    }
    torch.save(state, folder / "dylo_moe_state" / "router.pt")


def save_adapter(folder: Path, foundation: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """An adapter as PEFT saves it, with random B matrices (PEFT starts them at zero)."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    model = PeftModel(LlamaForCausalLM.from_pretrained(foundation, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
                parameter.data = parameter.data.to(dtype)
    saved = folder.with_name(folder.name + "_saved")
    model.save_pretrained(saved)
    (saved / "README.md").unlink(missing_ok=True)
    shutil.move(saved, folder)
    return folder


def save_adapters(folder: Path, foundation: Path) -> list[Path]:
    """Three adapters of unequal ranks and targets: rsLoRA, patterns, a regular expression, all-linear."""
    return [
        save_adapter(
            folder / "plain",
            foundation,
            seed=1,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            alpha_pattern={"layers.0.self_attn.q_proj": 3},
        ),
        save_adapter(
            folder / "stabilised",
            foundation,
            seed=2,
            r=8,
            lora_alpha=6,
            use_rslora=True,
            target_modules=r".*\.1\..*_proj",
        ),
        save_adapter(
            folder / "everywhere", foundation, seed=3, r=3, target_modules="all-linear", layers_to_transform=None
        ),
    ]


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))


def change_json(path: Path, **fields) -> None:
    """Set fields of a JSON object; None removes one."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            content.pop(name, None)
        else:
            content[name] = value
    write_json(path, content)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
