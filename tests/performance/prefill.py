"""What does a prompt cost, and several sequences of one prompt?

    python tests/performance/prefill.py --json prefill.json

Milliseconds until the first new token, the median of 5, fast decoding on and off: one prompt of 256 and of 2,048 tokens,
32 prompts of 256, and one prompt of 2,048 with 32 sequences to draw.
"""

import argparse
import statistics

from workbench import foundation, generate, report, routed, seconds


CASES = ((1, 256, 1), (1, 2048, 1), (32, 256, 1), (1, 2048, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    with report("Prompts", parser) as (options, rows):

        def add(model, name: str, **arguments) -> None:
            for prompts, tokens, sequences in CASES:
                arguments["num_return_sequences"] = sequences
                times = seconds(lambda: generate(model, prompts, tokens, 1, **arguments), options.repeats)  # noqa: B023
                row = {"model": name, "prompts": prompts, "tokens": tokens, "sequences": sequences}
                rows.append({**row, "ms": 1000 * statistics.median(times)})
                print(rows[-1], flush=True)

        add(foundation(), "bare foundation")
        model = routed(4)
        for strategy in ("single:0", "router", "ensemble"):
            add(model, strategy, routing_strategy=strategy)
            add(model, f"{strategy}, ordinary", routing_strategy=strategy, fast_decoding=False)


if __name__ == "__main__":
    main()
