"""What the GPU benchmarks share: a foundation of Qwen2.5-Coder-1.5B's shape with random weights, routed
models on it, PEFT's peers, and how time is taken.
"""

import gc
import importlib.util
import json
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


RANK, VOCABULARY, LAYERS = 16, 151_936, 28
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def foundation_config(**fields) -> Qwen2Config:
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=32_768, **{**sizes, **heads, **fields})


@torch.no_grad()
def foundation(dtype=torch.bfloat16, device="cuda", layers: int = LAYERS):
    """Random weights, of which the embeddings are large: with the usual small ones hidden states of a text
    are all alike, and so are the router's choices. The last norm keeps the head, which has the same weights,
    from repeating tokens."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            foundation_config(num_hidden_layers=layers), dtype=dtype
        ).eval()
    model.get_input_embeddings().weight.normal_()
    model.model.norm.weight.copy_(0.02 * torch.randn_like(model.model.norm.weight).sign())
    return model


def routed(
    num_experts: int, dtype=torch.bfloat16, device="cuda", layers: int = LAYERS
) -> DyloraMoeForCausalLM:
    """Experts on all linear layers, none of them zero."""
    bare = foundation(dtype, device, layers)
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in ATTENTION]
    modules += [f"model.layers.{layer}.mlp.{kind}" for layer in range(layers) for kind in FEED_FORWARD]
    experts = [
        {"name": f"e{index}", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules}
        for index in range(num_experts)
    ]
    config = DyloraMoeConfig(base_config=bare.config, expert_configs=experts)
    model = DyloraMoeForCausalLM.from_foundation(bare, config).to(device)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_A.normal_(std=0.02)
            layer.lora_B.normal_(std=0.02)
        if model.router is not None:
            model.router.gate.weight.normal_()
            model.router.gate.bias.zero_()
    return model


@torch.no_grad()
def route_alike(model: DyloraMoeForCausalLM, agreement: float | None) -> None:
    """Bias the gate so that two tokens get the same expert in that share of cases, as far as choices of
    neighbours are independent, which the foundation sees to; `None`: all experts alike often, so that they
    agree in 1/N."""
    gate = model.router.gate
    count = gate.weight.shape[0]
    ids = torch.randint(0, VOCABULARY, (32, 384), device=model.device)
    gate.weight.normal_()
    gate.bias.zero_()
    passes = [model.foundation_body(rows).last_hidden_state[:, 192:].float() for rows in ids.split(8)]
    hidden = torch.cat(passes).flatten(0, 1)
    logits = gate(hidden)
    gate.weight.div_(logits.std(dim=0)[:, None])
    gate.bias.copy_(-gate(hidden).mean(dim=0))
    if agreement is None:
        return
    logits = gate(hidden)
    # With expert 0 in a share p of cases, two agree in p^2 + (1 - p)^2 / (N - 1) of them.
    share = max(
        p / 1000 for p in range(500, 1001) if (p / 1000) ** 2 + (1 - p / 1000) ** 2 / (count - 1) <= agreement
    )
    gate.bias[0] += (logits[:, 1:].max(dim=-1).values - logits[:, 0]).quantile(share)


@torch.no_grad()
def measured_agreement(model: DyloraMoeForCausalLM, sequences: torch.Tensor, prompt: int) -> float:
    """The share of generated tokens whose expert is that of the token before."""
    hidden = torch.cat([model.foundation_body(row[None]).last_hidden_state for row in sequences])
    experts = model.router(hidden).argmax(dim=-1)[:, prompt - 1 :]
    return (experts[:, 1:] == experts[:, :-1]).float().mean().item()


def peft_model(count: int, device="cuda"):
    """PEFT with `count` adapters, all of them active."""
    model = None
    for index in range(count):
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*ATTENTION, *FEED_FORWARD])
        if model is None:
            model = get_peft_model(foundation(device=device), config, adapter_name="e0")
        else:
            model.add_adapter(f"e{index}", config)
    model.base_model.set_adapter([f"e{index}" for index in range(count)])
    return model.to(device, torch.bfloat16).eval()


def xlora_model(count: int, device="cuda", **fields):
    with tempfile.TemporaryDirectory() as directory:
        save_adapters(count, directory, device)
        return (
            xlora_from(foundation(device=device), directory, count, **fields)
            .to(device, torch.bfloat16)
            .eval()
        )


def save_adapters(count: int, directory: str | Path, device="cuda") -> None:
    """PEFT's folders `e0`, `e1` and so on."""
    peft_model(count, device).save_pretrained(directory)


def xlora_from(bare, directory: str | Path, count: int, **fields):
    """X-LoRA on adapters that are read from `save_adapters`' folders."""
    bare.config.use_cache = False
    paths = {str(index): str(Path(directory) / f"e{index}") for index in range(count)}
    sizes = {"hidden_size": bare.config.hidden_size, "xlora_depth": 4}
    return get_peft_model(bare, XLoraConfig(task_type="CAUSAL_LM", adapters=paths, **sizes, **fields))


def free() -> None:
    """The memory of models that nothing refers to any more; PEFT's refer to themselves, so that they wait for
    a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PEERS = {  # what serves adapters without this project: the function that builds it, and how many it takes
    "PEFT, one adapter": (peft_model, 1),
    "PEFT, four adapters": (peft_model, 4),
    "PEFT X-LoRA": (xlora_model, 4),
}


def import_modeling(folder: Path):
    """The `modeling` of another version, beside this one's: its modules import each other relatively."""
    spec = importlib.util.spec_from_file_location("other_modeling", folder / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable, repeats: int, warm: int = 1) -> list[float]:
    times = []
    for _ in range(warm + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return times[warm:]


def alternating(
    functions: dict[str, Callable], repeats: int, warm: int = 1, between: Callable | None = None
) -> dict[str, list[float]]:
    """Seconds of each, taking turns, so that a busy machine is busy for all; `between` runs before each,
    untimed."""
    times = {name: [] for name in functions}
    for turn in range(warm + repeats):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            if between is not None:
                between()
            times[name] += seconds(functions[name], 1, warm=0)
    return {name: taken[warm:] for name, taken in times.items()}


def generate(model, batch: int, prompt: int, new: int, **arguments) -> torch.Tensor:
    """Random prompts; tokens are drawn, since a random model that takes the best one repeats itself."""
    ids = torch.randint(0, VOCABULARY, (batch, prompt), device=next(model.parameters()).device)
    drawing = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **drawing, **arguments
    )


@contextmanager
def report(title: str, parser: ArgumentParser) -> Iterator[tuple]:
    """Yields the parsed arguments and a list to fill with rows, dicts of the same keys; prints and writes
    them."""
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict] = []
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    try:
        yield arguments, rows
    finally:
        table = Table(title=f"{title} ({device}, {', '.join(f'{k} {v}' for k, v in versions.items())})")
        for key in dict.fromkeys(key for row in rows for key in row):
            table.add_column(key, no_wrap=True)
        for row in rows:
            table.add_row(*(_text(row.get(column.header)) for column in table.columns))
        Console(width=160).print(table)
        if arguments.json is not None:
            arguments.json.write_text(
                json.dumps({"device": device, "versions": versions, "rows": rows}, indent=2)
            )


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
