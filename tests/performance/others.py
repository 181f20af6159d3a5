"""How fast are base models that the decode step's kernels do not know, against another version of the package?

    git worktree add OTHER VERSION
    python tests/performance/others.py --against OTHER/modeling --json others.json

Milliseconds a token of a whole `generate` (prompt of 256 tokens, 128 new ones), the median of 5, of this version,
of its default path, and of the other version, taking turns in one process. Base models of 16 layers and hidden
size 1,024 with two experts on their attention.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers import models as families
from workbench import alternating, free, generate, import_modeling, report

import dylora_moe.modeling


LAYERS = 16
SIZES = {
    "vocab_size": 151_936,  # `generate` draws prompts of so many
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "head_dim": 128}
KINDS = {
    "Cohere": ("CohereConfig", {}),
    "Cohere 2 (sliding window)": ("Cohere2Config", {"sliding_window": 128}),
    "GLM-4": ("Glm4Config", {"head_dim": 128}),
    "Qwen3-MoE": ("Qwen3MoeConfig", MOE),
}


@torch.no_grad()
def routed(modeling, kind: str):
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(families, name)(**{**SIZES, **fields})
    with torch.device("cuda"):
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(LAYERS) for part in "qkvo"]
    experts = [{"name": name, "r": 16, "target_modules": names} for name in ("one", "two")]
    config = modeling.DyloraMoeConfig(base_config=bare.config, expert_configs=experts)
    model = modeling.DyloraMoeForCausalLM.from_foundation(bare, config).to("cuda").eval()
    for layer in model.expert_layers().values():
        layer.lora_B.normal_(std=0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the `modeling` folder of another version")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--strategies", nargs="+", default=["single:0", "router"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    with report("Base models outside the table", parser) as (options, rows):
        other = None if options.against is None else import_modeling(options.against)
        for kind in options.kinds:
            free()
            model = routed(dylora_moe.modeling, kind)
            models = {"this": (model, {}), "default path": (model, {"fast_decoding": False})}
            if other is not None:
                models["other"] = (routed(other, kind), {})
            for strategy in options.strategies:
                for batch in options.batches:
                    runs = {
                        name: partial(generate, model, batch, 256, 128, routing_strategy=strategy, **given)
                        for name, (model, given) in models.items()
                    }
                    row = {"base model": kind, "strategy": strategy, "batch": batch}
                    for name, times in alternating(runs, 5).items():
                        row[name] = 1000 * statistics.median(times) / 128
                    if other is not None:
                        row["of other"] = row["this"] / row["other"]
                    store = models["this"][0]._decode_graphs
                    row["way"] = store.reason if store.step is None else store.step.description
                    rows.append(row)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
