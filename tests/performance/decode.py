"""How fast does a routed model decode, against its bare foundation and PEFT's ways to serve several adapters?

    python tests/performance/decode.py --json decode.json

Milliseconds a token of a whole `generate` (prompt of 256 tokens, 128 new ones), the median of 9, and the
ratio to the bare foundation's `generate` in the same process. `step` is the replay of a step's graph alone and
`prompt` one token of `generate`; `GB/s` is of the weights that the step reads, and `hits` the share of speculative
steps that were right. `first` is what the first call takes longer, in seconds: capturing its graphs,
and whatever else runs for the first time. With `--compiled`, transformers' own static cache with compilation
runs beside them. Models with few and with many
experts take turns. PEFT's peers run five times for 32 new tokens, and X-LoRA for 16, since it runs two passes
over the whole text at every token.
"""

import argparse
import statistics
from functools import partial

from floor import bytes_of, milliseconds
from workbench import (
    PEERS,
    alternating,
    foundation,
    free,
    generate,
    measured_agreement,
    report,
    route_alike,
    routed,
    seconds,
    xlora_model,
)

from dylora_moe.modeling import fast_decoding_dylora_moe as fast_decoding


CLOSE = 0.015
STRATEGIES = (  # name in the table, strategy, agreement that the gate is biased for
    ("single", "single:0", None),
    ("best", "best", None),
    ("round_robin", "round_robin", None),
    ("uniform", "uniform", None),
    ("router, 77 %", "router", 0.77),
    ("router, worst", "router", None),
    ("base", "base", None),
    ("ensemble", "ensemble", None),
)


def parts_of(model, batch: int, prompt: int, arguments: dict) -> dict[str, float]:
    """Milliseconds of a step's graph and of the prompt, where the model has graphs."""
    store = vars(model).get("_decode_graphs")
    if store is None or not store.graphs:
        return {}
    graph = next(reversed(store.graphs.values()))
    captured = graph._whole
    if graph.speculated and graph.hit_rate >= fast_decoding.SPECULATION_PAYS:
        captured = graph._speculative
    graph.length.fill_(prompt)
    parts = {"step": milliseconds(captured.graph.replay)}
    strategy = arguments.get("routing_strategy", "base")
    passes = 2 if strategy == "router" and captured is graph._whole else 1
    parts["GB/s"] = bytes_of(model, strategy, passes, 0, batch, prompt) / parts["step"] / 1e6
    if graph.speculated:
        parts["hits"] = graph.hits / graph.speculated
    prompts = seconds(partial(generate, model, batch, prompt, 1, **arguments), 3)
    return {**parts, "prompt": 1000 * statistics.median(prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", default=[row[0] for row in STRATEGIES], help="names in the table"
    )
    parser.add_argument("--no_peers", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    with report("Decoding", parser) as (options, rows):
        bare = {}

        def add(
            name: str,
            models: dict[int, object],
            batch: int,
            few: int | None = None,
            agreement=None,
            **arguments,
        ):
            """Rows for models by their number of experts, which take turns; `few`: new tokens of a slow
            peer."""
            new, repeats = (few, min(options.repeats, 5)) if few else (options.new, options.repeats)
            runs = {
                count: partial(generate, model, batch, options.prompt, new, **arguments)
                for count, model in models.items()
            }
            first = alternating(runs, 1, warm=0)
            for count, times in alternating(runs, repeats, warm=0).items():
                took = [1000 * seconds / new for seconds in times]
                bare.setdefault(batch, statistics.median(took))
                row = {"batch": batch, "model": name, "experts": count, "ms/token": statistics.median(took)}
                row |= {"of bare": row["ms/token"] / bare[batch], "fastest": min(took)}
                row["first"] = first[count][0] - statistics.median(times)
                row |= parts_of(models[count], batch, options.prompt, arguments)
                rows.append({**row, "agreement": (agreement or {}).get(count)})
                print(rows[-1], flush=True)

        def routes_alike(models: dict[int, object], batch: int, agreement: float | None) -> dict[int, float]:
            seen = {}
            for count, model in models.items():
                aim, texts = agreement, max(batch, 16)  # one is too few to tell
                for _ in range(4):
                    route_alike(model, aim)
                    text = generate(model, texts, options.prompt, options.new, routing_strategy="router")
                    seen[count] = measured_agreement(model, text, options.prompt)
                    if agreement is None or abs(seen[count] - agreement) < CLOSE:
                        break
                    aim += (
                        agreement - seen[count]
                    )  # generated tokens are not quite as independent as random ones
            return seen

        model = foundation()
        for batch in options.batches:
            add("bare foundation", {0: model}, batch)
        model = routed(0)
        for batch in options.batches:
            add("bare foundation, graphs", {0: model}, batch)
        model = None
        models = {count: routed(count) for count in options.experts}
        for batch in options.batches:
            for name, strategy, agreement in STRATEGIES:
                if name not in options.only:
                    continue
                some = models if strategy != "ensemble" else {min(models): models[min(models)]}
                seen = routes_alike(some, batch, agreement) if strategy == "router" else {}
                add(name, some, batch, agreement=seen, routing_strategy=strategy)
                for model in some.values():
                    model.forget_decoding_sessions()
                if options.compiled and strategy in ("base", "single:0", "router"):
                    static = {"cache_implementation": "static", "fast_decoding": False}
                    add(
                        f"{name}, compiled",
                        {min(some): some[min(some)]},
                        batch,
                        routing_strategy=strategy,
                        **static,
                    )
        model = models = some = None
        for name, (build, count) in PEERS.items() if not options.no_peers else ():
            free()
            model = build(count)
            for batch in options.batches:
                add(name, {count: model}, batch, few=16 if build is xlora_model else 32)
            model = None


if __name__ == "__main__":
    main()
