"""What does a prompt cost, and several sequences of one prompt?

    python tests/performance/prefill.py --json prefill.json

Milliseconds until the first new token, the median of 5, fast decoding on and off: one prompt of 256 and of
2,048 tokens, 32 prompts of 256, and one prompt of 2,048 with 32 sequences to draw. The bare foundation and
PEFT's ways to serve several adapters run in the same process.
"""

import argparse
import statistics
from functools import partial

import torch
from workbench import PEERS, foundation, free, generate, report, routed, seconds


CASES = ((1, 256, 1), (1, 2048, 1), (32, 256, 1), (1, 2048, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    with report("Prompts", parser) as (options, rows):

        def add(model, name: str, **arguments) -> None:
            for prompts, tokens, sequences in CASES:
                arguments["num_return_sequences"] = sequences
                run = partial(generate, model, prompts, tokens, 1, **arguments)
                row = {"model": name, "prompts": prompts, "tokens": tokens, "sequences": sequences}
                try:
                    row["ms"] = 1000 * statistics.median(seconds(run, options.repeats))
                except torch.OutOfMemoryError:
                    row["ms"] = "out of memory"
                rows.append(row)
                print(rows[-1], flush=True)

        add(foundation(), "bare foundation")
        add(routed(0), "bare foundation, graphs")
        for name, (build, count) in PEERS.items():
            free()
            add(build(count), name)
        free()
        model = routed(4)
        for strategy in ("single:0", "router", "ensemble"):
            add(model, strategy, routing_strategy=strategy)
            add(model, f"{strategy}, default path", routing_strategy=strategy, fast_decoding=False)


if __name__ == "__main__":
    main()
