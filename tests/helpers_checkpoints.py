"""Small sources to export, built on the fly: a foundation, a final checkpoint of DyLoRA-MoE's training, PEFT
adapters."""

import json
import shutil
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


VOCABULARY = 97
HIDDEN = 32
LAYERS = 2


def save_foundation(
    folder: Path,
    hidden_size: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **fields,
) -> Path:
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
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = ["<s>", "</s>", "<pad>", "<unk>", *(chr(code) for code in range(33, 33 + VOCABULARY - 4))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
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
        tensors[f"{prefix}.lora_A.expert_{expert}.weight"] = (
            torch.randn(rank, inputs, generator=generator) * scale
        )
        tensors[f"{prefix}.lora_B.expert_{expert}.weight"] = (
            torch.randn(outputs, rank, generator=generator) * scale
        )
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
    """A final checkpoint as the training code writes it, quirks included: `expert_1.pt` holds expert_10's,
    too."""
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


def save_adapter(
    folder: Path, foundation: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **fields
) -> Path:
    """An adapter as PEFT saves it, with random B matrices (PEFT starts them at zero)."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    model = PeftModel(AutoModelForCausalLM.from_pretrained(foundation, dtype=torch.float32), config)
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
            folder / "everywhere",
            foundation,
            seed=3,
            r=3,
            target_modules="all-linear",
            layers_to_transform=None,
        ),
    ]


def adalora_model(foundation: Path, steps: int = 10, seed: int = 0, **fields) -> PeftModel:
    """An AdaLoRA model after real steps of training, in which PEFT's own allocator pruned the ranks of its
    layers."""
    torch.manual_seed(seed)
    fields = {
        "init_r": 6, "target_r": 3, "lora_alpha": 5, "tinit": 1, "tfinal": 2, "total_step": 10,
        "target_modules": ["q_proj", "v_proj", "down_proj"], **fields,
    }  # fmt: skip
    foundation_model = LlamaForCausalLM.from_pretrained(foundation, dtype=torch.float32)
    model = PeftModel(foundation_model, AdaLoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05
    )
    rows = torch.randint(0, VOCABULARY, (2, 8))
    for step in range(1, steps + 1):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def save_adalora_adapter(folder: Path, foundation: Path, **fields) -> Path:
    """An AdaLoRA adapter as PEFT saves it: layers pruned to different ranks, at least one of them to none."""
    model = adalora_model(foundation, **fields)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def expert_model(foundation: Path | str, num_experts: int, rank: int, alpha: float) -> PeftModel:
    """PEFT's own model with adapters `expert_<i>`, as the training code has it; random, rank by expert."""
    torch.manual_seed(5)
    base = LlamaForCausalLM.from_pretrained(foundation, dtype=torch.float32)
    model = None
    for index in range(num_experts):
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.05,
            target_modules=["q_proj", "v_proj", "down_proj"],
        )
        if model is None:
            model = PeftModel(base, config, adapter_name="expert_0")
        else:
            model.add_adapter(f"expert_{index}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def random_gate(num_experts: int, hidden_size: int = HIDDEN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "weight": torch.randn(num_experts, hidden_size, generator=generator),
        "bias": torch.randn(num_experts, generator=generator),
    }


def save_trainer_checkpoint(
    folder: Path,
    foundation: Path | str,
    num_experts: int = 3,
    rank: int = 4,
    alpha: float = 8,
    router: str = "router.safetensors",
    tokenizer: bool = False,
) -> Path:
    """`checkpoint-<step>/` as the trainer saves it, with what nobody must open, too. PEFT nests the adapters
    itself."""
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json",
        {"model_type": "dylora-moe", "num_experts": num_experts, "checkpoint_type": "peft_only"},
    )
    model = expert_model(foundation, num_experts, rank, alpha)
    for index in range(num_experts):
        name = f"expert_{index}"
        place = folder / "peft_adapters" / name
        model.save_pretrained(place, selected_adapters=[name])
        (place / "README.md").unlink(missing_ok=True)
    gate = {f"gate.{key}": value for key, value in random_gate(num_experts).items()}
    (save_file if router.endswith(".safetensors") else torch.save)(gate, folder / router)
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(b"not to be opened")
    write_json(folder / "trainer_state.json", {"global_step": 10, "best_model_checkpoint": None})
    if tokenizer:
        save_tokenizer(folder)
    return folder


def whole_model_tensors(
    foundation: Path | str, num_experts: int, rank: int, head: str
) -> dict[str, torch.Tensor]:
    """The training wrapper's state dict. `head` is "as it is", "equal" to the embedding, or "trained"."""
    model = expert_model(foundation, num_experts, rank, alpha=1)
    tensors = {f"foundation_model.{key}": value.clone() for key, value in model.state_dict().items()}
    head_key = "foundation_model.base_model.model.lm_head.weight"
    if head != "as it is":
        tensors[head_key] = tensors["foundation_model.base_model.model.model.embed_tokens.weight"].clone()
    if head == "trained":
        tensors[head_key] += (
            torch.randn(tensors[head_key].shape, generator=torch.Generator().manual_seed(3)) * 0.1
        )
    return {**tensors, **{f"router.gate.{key}": value for key, value in random_gate(num_experts).items()}}


def save_whole_model(
    folder: Path,
    foundation: Path | str,
    num_experts: int = 3,
    rank: int = 4,
    alpha: float | None = 8,
    head: str = "as it is",
    config: bool = True,
    file: str = "model.safetensors",
    shards: int = 1,
) -> Path:
    """The whole state dict of the training wrapper, beside a copy of the foundation's config."""
    folder.mkdir(parents=True)
    if config:
        own = json.loads((Path(foundation) / "config.json").read_text())
        own.update(
            base_model_name_or_path=str(foundation), _dylora_num_experts=num_experts, _dylora_lora_r=rank
        )
        own.update({"_dylora_lora_dropout": 0.05}, **({} if alpha is None else {"_dylora_lora_alpha": alpha}))
        write_json(folder / "config.json", own)
    write_tensors(folder, whole_model_tensors(foundation, num_experts, rank, head), file, shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], file: str, shards: int) -> None:
    """One file, or several with the index that names them."""
    save = save_file if file.endswith(".safetensors") else torch.save
    if shards == 1:
        save(tensors, folder / file)
        return
    stem, suffix = file.rsplit(".", 1)
    weight_map = {
        key: f"{stem}-{number % shards + 1:05}-of-{shards:05}.{suffix}"
        for number, key in enumerate(sorted(tensors))
    }
    for name in set(weight_map.values()):
        save({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    write_json(folder / f"{file}.index.json", {"metadata": {}, "weight_map": weight_map})


def low_rank_sums(expert) -> dict[str, torch.Tensor]:
    """What an expert that a reader gave adds to each layer's weight, computed in float64."""
    sums = {}
    for module, layer in expert.layers.items():
        matrix_a, matrix_b = expert.read(module)
        assert tuple(matrix_a.shape) == (layer.rank, layer.in_features)
        assert tuple(matrix_b.shape) == (layer.out_features, layer.rank)
        scale = layer.lora_alpha / (layer.rank**0.5 if expert.use_rslora else layer.rank)
        sums[module] = scale * matrix_b.double() @ matrix_a.double()
    return sums


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
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
