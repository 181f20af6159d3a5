"""How far is a decode step from the bytes that it must read, and where does its time go?

    python tests/performance/floor.py --json floor.json

Milliseconds of a captured step (the median of 50 replays; under `router` both that of a speculative pass and
that of two passes), the floor, which is its bytes at the rate of a copy on this GPU, GB/s of the bytes, and
how many kernels of each kind there are. Kernels overlap (dependent launch), so their times are not added up.
Bytes are the foundation's weights once a pass, the experts that act, and keys and values.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from workbench import RANK, generate, report, routed


STRATEGIES = ("base", "single:0", "best", "uniform", "router", "ensemble")
KINDS = {"products": "product_kernel", "ranks": "ranks_kernel", "attention": "attention_kernel"}


def copy_rate(device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), 20)
    return 2 * source.nbytes / took * 1000


def replay(decode_graph, captured, tokens: int) -> None:
    """One step after so many tokens, again and again: the KV cache would be full after some."""
    decode_graph.length.fill_(tokens)
    captured.graph.replay()


def milliseconds(function: Callable, repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bytes_of(model, strategy: str, passes: int, streams: int, batch: int, tokens: int) -> int:
    """What a step reads at least, at `tokens` tokens a row."""
    stacks = sum(stack.nbytes for name, stack in model.named_parameters() if ".lora_" in name)
    foundation = sum(weight.nbytes for weight in model.parameters()) - stacks
    count = model.config.num_experts
    acting = {"base": 0, "single:0": 1, "best": min(batch, count), "router": min(batch, count)}.get(
        strategy, count
    )
    config = model.config.get_text_config()
    keys_and_values = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads * 2
    cached = streams * batch * tokens * config.num_hidden_layers * keys_and_values
    return passes * foundation + stacks * acting // max(count, 1) + cached


def kinds_of(function: Callable, steps: int = 5) -> dict[str, float]:
    """Kernels of one call, all and of each kind."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    found = {"kernels": len(kernels) / steps}
    return found | {kind: sum(part in name for name in kernels) / steps for kind, part in KINDS.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    with report(f"A step and its floor, rank {RANK}", parser) as (options, rows):
        model = routed(options.experts)
        rate = copy_rate(model.device)
        for batch in options.batches:
            for strategy in STRATEGIES:
                generate(model, batch, options.prompt, 24, routing_strategy=strategy)
                graph = next(reversed(model._decode_graphs.graphs.values()))
                steps = {"": (graph._whole, 2 if strategy == "router" else 1)}
                if strategy == "router" and graph._speculative.graph is not None:
                    steps = {", speculative": (graph._speculative, 1), ", two passes": steps[""]}
                for name, (captured, passes) in steps.items():
                    graph.length.fill_(options.prompt)
                    if captured.graph is None:
                        captured(graph)
                    least = bytes_of(
                        model, strategy, passes, 2 if strategy == "router" else 1, batch, options.prompt
                    )
                    row = {"batch": batch, "strategy": strategy + name, "floor": 1000 * least / rate}
                    step = partial(replay, graph, captured, options.prompt)
                    row["step"] = milliseconds(step)
                    row["GB/s"] = least / row["step"] / 1e6
                    rows.append({**row, **kinds_of(step)})
                    print(rows[-1], flush=True)
                model.forget_decoding_sessions()
        rows.append({"strategy": "TB/s of a copy", "step": rate / 1e12})


if __name__ == "__main__":
    main()
