"""How much memory does a routed model take on a GPU, on top of its weights and the keys and values?

    python tests/performance/memory.py --json memory.json

GiB: the weights, the keys and values of all streams at the last token, and the peak of a whole `generate`
(prompt of 256 tokens, 128 new ones), ordinary and fast; and what is taken after every 200 of 1,000 calls of four
strategies, two batch sizes and eight lengths, of a model of four layers (the first 100 grow the buffers).
PEFT's ways to serve several adapters run in the same process, X-LoRA, which keeps no keys and values, for the
last 16 tokens of as long a text.
"""

import argparse
import gc

import torch
from workbench import PEERS, foundation, free, generate, report, routed, xlora_model


PROMPT, NEW, GIB = 256, 128, 2**30


def peak(model, batch: int, new: int = NEW, **arguments) -> float:
    """With the recording of graphs, whose intermediates count then and in no later call."""
    generate(model, batch, PROMPT, 2, **arguments)
    if hasattr(model, "forget_decoding_sessions"):
        model.forget_decoding_sessions()
    free()
    torch.cuda.reset_peak_memory_stats()
    generate(model, batch, PROMPT + NEW - new, new, **arguments)
    return torch.cuda.max_memory_allocated() / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--no_peers", action="store_true")
    with report("Memory, GiB", parser) as (options, rows):
        bytes_per_token = 28 * 2 * 2 * 128 * 2

        def add(model, name: str, batch: int, streams: int, new: int = NEW, **arguments) -> None:
            weights = sum(tensor.nbytes for tensor in model.parameters()) / GIB
            caches = streams * batch * (PROMPT + NEW) * bytes_per_token / GIB
            row = {"batch": batch, "model": name, "weights": weights, "caches": caches}
            ordinary = {**arguments, "fast_decoding": False} if arguments else {}
            for way, given in (("ordinary", ordinary), ("fast", arguments)):
                if way == "fast" and not arguments:
                    continue
                try:
                    row[way] = peak(model, batch, new, **given)
                    row[f"{way}, over"] = row[way] / (weights + caches) - 1
                except torch.OutOfMemoryError:
                    row[way] = "out of memory"
            rows.append(row)
            print(row, flush=True)

        bare = foundation()
        for batch in options.batches:
            add(bare, "bare foundation", batch, 1)
        bare = routed(0)
        for batch in options.batches:
            add(bare, "bare foundation, graphs", batch, 1, routing_strategy="base")
        del bare
        for name, (build, count) in PEERS.items() if not options.no_peers else ():
            free()
            model, streams, new = build(count), *((0, 16) if build is xlora_model else (1, NEW))
            for batch in options.batches:
                add(model, name, batch, streams, new)
            del model
        free()
        model = routed(options.experts)
        for batch in options.batches:
            for strategy, streams in (
                ("base", 1),
                ("single:0", 1),
                ("best", 1),
                ("router", 2),
                ("ensemble", options.experts),
            ):
                add(model, strategy, batch, streams, routing_strategy=strategy)
        del model
        free()
        model = routed(4, layers=4)
        for call in range(options.calls):
            # 16 graphs in all, of which eight are kept: some are dropped and recorded anew all the time.
            strategy = ("router", "best", "single:0", "ensemble")[call // 25 % 4]
            generate(model, 1 + call % 2, 16 + 29 * (call // 2 % 8), 4, routing_strategy=strategy)
            if (call + 1) % (options.calls // 5) == 0:
                torch.cuda.synchronize()
                gc.collect()
                free_on_gpu, total = torch.cuda.mem_get_info()
                taken = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
                for kind, count in {**taken, "taken of the GPU": total - free_on_gpu}.items():
                    rows.append({"model": f"{kind} after {call + 1} calls", "fast": count / GIB})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
