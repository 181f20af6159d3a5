"""How fast does a routed model decode, against its bare foundation and PEFT's ways to serve several adapters?

    python tests/performance/decode.py --json decode.json

Milliseconds a token of a whole `generate` (prompt of 256 tokens, 128 new ones), the median of 5, and the ratio to the
bare foundation's `generate` in the same process. PEFT's peers run once, and X-LoRA for 16 new tokens, since it runs two
passes over the whole text at every token.
"""

import argparse
import gc

import torch
from workbench import (
    foundation,
    generate,
    measured_agreement,
    milliseconds_per_token,
    peft_model,
    report,
    route_alike,
    routed,
    xlora_model,
)


def strategies(count: int):
    """Name in the table, strategy, agreement that the gate is biased for."""
    yield from (("single", "single:0", None), ("best", "best", None), ("uniform", "uniform", None))
    yield from (("router, 90 %", "router", 0.9), ("router, worst", "router", None))
    if count == 4:
        yield from (("base", "base", None), ("ensemble", "ensemble", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_peers", action="store_true")
    with report("Decoding", parser) as (options, rows):
        shape = (options.prompt, options.new, options.repeats)
        bare = {}

        def add(model, name: str, experts: int, batch: int, new: int | None = None, agreement=None, **arguments):
            prompt, usual, repeats = shape
            if new is not None:
                generate(model, batch, prompt, 2)
                repeats = 1
            warm = int(new is None)
            took = milliseconds_per_token(model, batch, prompt, new or usual, repeats, warm, **arguments)
            bare.setdefault(batch, took)
            rows.append({"batch": batch, "model": name, "experts": experts, "ms/token": took})
            rows[-1] |= {"of bare": took / bare[batch], "agreement": agreement}
            print(rows[-1], flush=True)

        model = foundation()
        for batch in options.batches:
            add(model, "bare foundation", 0, batch)
        del model
        for count in (0, *options.experts):
            model = routed(count)
            for batch in options.batches:
                if count == 0:
                    add(model, "bare foundation, graphs", 0, batch)
                for name, strategy, agreement in strategies(count) if count else ():
                    seen = None
                    if strategy == "router":
                        route_alike(model, agreement)
                        texts = max(batch, 16)  # one is too few to tell
                        text = generate(model, texts, options.prompt, options.new, routing_strategy=strategy)
                        seen = measured_agreement(model, text, options.prompt)
                    add(model, name, count, batch, agreement=seen, routing_strategy=strategy)
            del model
            gc.collect()
            torch.cuda.empty_cache()
        if options.no_peers:
            return
        for name, count, build, new in (
            ("PEFT, one adapter", 1, peft_model, options.new),
            ("PEFT, four adapters", 4, peft_model, options.new),
            ("PEFT X-LoRA", 4, xlora_model, 16),
        ):
            model = build(count)
            for batch in options.batches:
                add(model, name, count, batch, new=new)
            del model
            gc.collect()


if __name__ == "__main__":
    main()
