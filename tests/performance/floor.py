"""How far is a decode step from the bytes that it must read, and where does its time go?

    python tests/performance/floor.py --json floor.json

Milliseconds of a recorded step (the median of 50 replays; under `router` both that of a right guess and that
of two passes), the floor, which is its bytes at the rate of a copy on this GPU, and what a profiler sees in
the step: how many kernels, how long they run, by kind, and the time between them. Bytes are the foundation's
weights once a pass, the experts that act, and keys and values.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from workbench import RANK, generate, report, routed


STRATEGIES = ("base", "single:0", "best", "uniform", "router", "ensemble")
KINDS = {  # in a kernel's name
    "products": "gemm|gemv|cutlass|nvjet|splitk|cublas|dot_kernel|reduce_1Block|_multiply_kernel|_add_kernel",
    "attention": "attend|attention|flash|fmha|softmax|rotate|index_copy",
    "norms": "norm",
}


def copy_rate(device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), 20)
    return 2 * source.nbytes / took * 1000


def replay(session, stepper, tokens: int) -> None:
    """One step after so many tokens, again and again: the buffers would be full after some."""
    session.index.fill_(tokens)
    stepper.graph.replay()


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
    return passes * foundation + stacks * acting // count + cached


def kinds_of(function: Callable, steps: int = 5) -> dict[str, float]:
    """Kernels of one call, and milliseconds of all and of each kind."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    found = {"kernels": len(kernels) / steps, "in kernels": 0.0, **dict.fromkeys(KINDS, 0.0), "others": 0.0}
    for kernel in kernels:
        took = kernel.device_time / 1000 / steps
        kind = next((kind for kind, names in KINDS.items() if re.search(names, kernel.name, re.I)), "others")
        found[kind] += took
        found["in kernels"] += took
    return found


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
                session = next(reversed(model._decoding_sessions.sessions.values()))
                steppers = {"": (session._whole, 2 if strategy == "router" else 1)}
                if session._guessed is not None and session._guessed.graph is not None:
                    steppers = {", right guess": (session._guessed, 1), ", two passes": steppers[""]}
                for name, (stepper, passes) in steppers.items():
                    session.index.fill_(options.prompt)
                    if stepper.graph is None:
                        stepper(session)
                    least = bytes_of(
                        model, strategy, passes, session.strategy.num_streams, batch, options.prompt
                    )
                    row = {"batch": batch, "strategy": strategy + name, "floor": 1000 * least / rate}
                    step = partial(replay, session, stepper, options.prompt)
                    row["step"], found = milliseconds(step), kinds_of(step)
                    rows.append({**row, **found, "between": row["step"] - found["in kernels"]})
                    print(rows[-1], flush=True)
                model.forget_decoding_sessions()
        rows.append({"strategy": "TB/s of a copy", "step": rate / 1e12})


if __name__ == "__main__":
    main()
