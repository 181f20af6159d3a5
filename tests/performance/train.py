"""What does a training step cost with all experts stacked, against PEFT's loop over its active adapters?

    python tests/performance/train.py --json train.json

Forward and backward of 8 rows of 512 tokens in bfloat16, experts on all linear layers, the median of 5: under
given weights (`uniform`), with the router's own pass besides, PEFT with one and with four active adapters,
X-LoRA with four that are trained, too, and the bare foundation, of which all weights are trained.
"""

import argparse
import statistics

import torch
from workbench import PEERS, VOCABULARY, foundation, free, report, routed, seconds, xlora_model


BATCH, TOKENS = 8, 512


def step(model, **arguments):
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), device="cuda")

    def run():
        model(input_ids=ids, labels=ids, use_cache=False, **arguments).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    with report("A training step", parser) as (options, rows):

        def add(model, name: str, experts: int, **arguments) -> None:
            torch.cuda.reset_peak_memory_stats()
            took = 1000 * statistics.median(seconds(step(model, **arguments), options.repeats, warm=2))
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append({"model": name, "experts": experts, "ms/step": took, "peak GiB": peak})
            print(rows[-1], flush=True)

        model = foundation().train()
        add(model, "bare foundation", 0)
        del model
        for name, (build, count) in PEERS.items():
            free()
            model = build(count, **({"use_trainable_adapters": True} if build is xlora_model else {})).train()
            add(model, name, count)
            del model
        for count in (4, 32):
            free()
            model = routed(count).train()
            add(model, "given weights", count, routing_strategy="uniform")
            add(model, "router", count, routing_strategy="router")
            del model


if __name__ == "__main__":
    main()
