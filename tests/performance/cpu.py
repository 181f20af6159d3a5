"""How fast does a small routed model decode and train on a CPU? For comparing one version of the package with another.

    python tests/performance/cpu.py --json cpu.json

Milliseconds, the median of 7: a token of greedy `generate` (prompt of 64 tokens, 64 new ones) for every strategy at batch 1
and 8, and a training step of 4 rows of 128 tokens. A Llama of 8 layers and hidden size 256 with four experts on all linear
layers. Needs nothing of the package but its model, so that an older one can be put on the path.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


STRATEGIES = ("base", "single:1", "best", "router", "uniform", "round_robin", "ensemble")
PROMPT, NEW, LAYERS = 64, 64, 8


def small_model() -> DyloraMoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    base = LlamaConfig(vocab_size=4000, bos_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    modules = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(LAYERS) for kind in "qkvo"]
    modules += [f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(LAYERS) for kind in ("gate", "up", "down")]
    experts = [{"name": f"e{index}", "r": 16, "lora_alpha": 32, "target_modules": modules} for index in range(4)]
    model = DyloraMoeForCausalLM(DyloraMoeConfig(base_config=base, expert_configs=experts)).eval()
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B.normal_(std=0.02)
    return model


def milliseconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, figures = small_model(), {}
    for batch in (1, 8):
        ids = torch.randint(0, 4000, (batch, PROMPT))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for strategy in STRATEGIES:
            arguments = {"max_new_tokens": NEW, "do_sample": False, "routing_strategy": strategy}
            took = milliseconds(lambda: model.generate(**inputs, **arguments), options.repeats)  # noqa: B023
            figures[f"{strategy}, batch {batch}"] = took / NEW

    ids = torch.randint(0, 4000, (4, 128))
    model.train()

    def step():
        model(input_ids=ids, labels=ids, routing_strategy="router").loss.backward()
        model.zero_grad(set_to_none=True)

    figures["training step, router"] = milliseconds(step, options.repeats)
    for name, took in figures.items():
        print(f"{name:24} {took:8.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
