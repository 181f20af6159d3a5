"""How fast does a routed model decode on one GPU, and spread over several?

    python tests/performance/devices.py --json devices.json

A Llama of 0.2B random parameters in bfloat16 with 4 experts on its attention, in a repo of its own in a
temporary folder. For each number of GPUs there are: seconds to load with `device_map`, milliseconds a token
for `single:0` and `router`, greedy, batch 1, 64 new tokens, the median of 5; and whether the tokens are those
of one GPU. The same for the bare foundation, in the same process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


NEW_TOKENS, REPEATS, LAYERS = 64, 5, 12


def save(folder: Path) -> None:
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(LAYERS) for kind in kinds]
    experts = [
        {"name": f"e{index}", "r": 16, "lora_alpha": 32, "target_modules": modules} for index in range(4)
    ]
    model = DyloraMoeForCausalLM(DyloraMoeConfig(base_config=base, expert_configs=experts))
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B.normal_(std=0.02)
    model.to(torch.bfloat16).save_pretrained(folder / "repo")
    model.foundation.to(torch.bfloat16)
    model.merge_expert(0).save_pretrained(folder / "foundation")


def spread(prefix: str, count: int) -> dict[str, int]:
    """Layers in equal parts; what follows them on the last GPU."""
    places = {f"{prefix}model.layers.{layer}": layer * count // LAYERS for layer in range(LAYERS)}
    rest = {f"{prefix}model.embed_tokens": 0, f"{prefix}model.rotary_emb": 0}
    rest |= {f"{prefix}model.norm": count - 1, f"{prefix}lm_head": count - 1}
    return {**rest, **places, **({"router": 0} if prefix else {})}


def measure(model, ids: torch.Tensor, **arguments) -> tuple[float, list[int]]:
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **arguments
        )
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:]) / NEW_TOKENS, tokens[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, reference = [], {}
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        for count in range(1, torch.cuda.device_count() + 1):
            for name, prefix, strategies in (
                ("foundation", "", [None]),
                ("repo", "foundation.", ["single:0", "router"]),
            ):
                start = time.perf_counter()
                model = AutoModelForCausalLM.from_pretrained(
                    Path(directory) / name,
                    trust_remote_code=True,
                    dtype=torch.bfloat16,
                    device_map=spread(prefix, count),
                )
                load = time.perf_counter() - start
                ids = torch.arange(10, 42)[None].to("cuda:0")
                for strategy in strategies:
                    per_token, tokens = measure(
                        model, ids, **({"routing_strategy": strategy} if strategy else {})
                    )
                    first = reference.setdefault((name, strategy), tokens)
                    rows.append(
                        {
                            "gpus": count,
                            "model": strategy or "foundation",
                            "load_seconds": load,
                            "milliseconds_per_token": per_token,
                            "tokens_as_on_one_gpu": tokens == first,
                        }
                    )
                del model
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    for row in rows:
        print(
            "  ".join(
                f"{key}: {value:.2f}" if isinstance(value, float) else f"{key}: {value}"
                for key, value in row.items()
            )
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
