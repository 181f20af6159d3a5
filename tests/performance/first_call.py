"""How much longer does the first `generate` of a process take than the next?

    python tests/performance/first_call.py --json first_call.json

Seconds of the first and of the third call (a prompt of 256 tokens, 16 new ones), in a process of its own, with
Triton's cache of compiled kernels empty and filled, and on the default path. A base model of Qwen2.5-Coder-1.5B's
shape with four experts of rank 16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from workbench import generate, report, routed, seconds


STRATEGIES = ("base", "single:0", "router")


def measure(strategy: str, batch: int, is_fast: bool) -> dict[str, float]:
    """Time the calls of this process."""
    model = routed(4)

    def call():
        generate(model, batch, 256, 16, routing_strategy=strategy, fast_decoding=is_fast)

    first, _, third = seconds(call, 3, warm=0)
    return {"first": first, "third": third, "longer": first - third}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    with report("First calls, seconds", parser) as (options, rows):
        if options.measure:
            print(json.dumps(measure(*json.loads(options.measure))))
            return
        for batch in options.batches:
            for strategy in options.strategies:
                with tempfile.TemporaryDirectory() as cache:
                    for name, is_fast in (("empty", True), ("filled", True), ("default path", False)):
                        child = [
                            sys.executable,
                            __file__,
                            "--measure",
                            json.dumps([strategy, batch, is_fast]),
                        ]
                        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
                        output = subprocess.run(
                            child, env=environment, check=True, capture_output=True, text=True
                        )
                        found = next(line for line in output.stdout.splitlines() if line.startswith("{"))
                        rows.append(
                            {"batch": batch, "strategy": strategy, "cache": name, **json.loads(found)}
                        )
                        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
