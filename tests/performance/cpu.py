"""How fast does a small routed model decode and train on a CPU, for one version of the package against
another?

    git worktree add OTHER VERSION
    python tests/performance/cpu.py --against OTHER/modeling --json cpu.json

Milliseconds, the median of 12, this version and the other taking turns in one process, and the ratio of their
fastest runs, which scatter less: a token of greedy `generate` (prompt of 64 tokens, 32 new ones) for every
strategy at batch 1 and 8, and a training step of 4 rows of 128 tokens. A Llama of 8 layers and hidden size
256 with four experts on all linear layers.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig
from workbench import alternating, import_modeling, report

import dylora_moe.modeling


STRATEGIES = ("base", "single:1", "best", "router", "uniform", "round_robin", "ensemble")
PROMPT, NEW, LAYERS = 64, 32, 8


def small_model(modeling):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    base = LlamaConfig(vocab_size=4000, bos_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    modules = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(LAYERS) for kind in "qkvo"]
    modules += [
        f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(LAYERS) for kind in ("gate", "up", "down")
    ]
    experts = [
        {"name": f"e{index}", "r": 16, "lora_alpha": 32, "target_modules": modules} for index in range(4)
    ]
    model = modeling.DyloraMoeForCausalLM(modeling.DyloraMoeConfig(base_config=base, expert_configs=experts))
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B.normal_(std=0.02)
    return model


def decode(model, batch: int, strategy: str) -> None:
    ids = torch.randint(0, 4000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    arguments = {"max_new_tokens": NEW, "do_sample": False, "routing_strategy": strategy}
    model.eval().generate(ids, attention_mask=torch.ones_like(ids), **arguments)


def training_step(model) -> None:
    ids = torch.randint(0, 4000, (4, 128), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids, routing_strategy="router").loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the folder `modeling` of another version")
    parser.add_argument("--repeats", type=int, default=12)
    with report("On a CPU", parser) as (options, rows):
        models = {"this": small_model(dylora_moe.modeling)}
        if options.against is not None:
            models["other"] = small_model(import_modeling(options.against))

        def add(name: str, batch: int, per: int, run, *arguments) -> None:
            functions = {version: partial(run, model, *arguments) for version, model in models.items()}
            times = {
                version: [1000 * s / per for s in taken]
                for version, taken in alternating(functions, options.repeats).items()
            }
            row = {"what": name, "batch": batch, "ms": statistics.median(times["this"])}
            if "other" in times:
                row["other, ms"] = statistics.median(times["other"])
                row["fastest, this of other"] = min(times["this"]) / min(times["other"])
            rows.append(row)
            print(row, flush=True)

        for batch in (1, 8):
            for strategy in STRATEGIES:
                add(strategy, batch, NEW, decode, batch, strategy)
        add("training step, router", 4, 1, training_step)


if __name__ == "__main__":
    main()
