"""Which blocks are fastest for the products of a decode step? For the table `BLOCKS` of `fast_step_dylora_moe`.

    python tests/performance/blocks.py --json blocks.json

Captures whole steps of a foundation of Qwen2.5-Coder-1.5B's shape (256 tokens in the KV cache) and tries the
blocks of one kind of product after the other, keeping what is faster. Rows are a batch's; with `slots`, that
many experts act. Milliseconds are medians of 9 replays. An hour cold, minutes with compiled kernels cached.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator

import torch
from workbench import report, routed

from dylora_moe.modeling import fast_step_dylora_moe as fast_step
from dylora_moe.modeling.fast_step_dylora_moe import Blocks, KernelStep, Pass, PassExperts


CASES = ((1, 0), (1, 1), (2, 1), (4, 4), (8, 0), (32, 0), (32, 4), (64, 0))  # rows, slots
KINDS = ("pair", "long", "middle", "small", "head")


def candidates(rows: int) -> Iterator[Blocks]:
    if rows <= fast_step.FEW_ROWS:
        for columns, inputs, warps in itertools.product((2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8)):
            if 2048 <= columns * inputs <= 8192:
                yield Blocks(columns, inputs, warps)
        return
    for columns, inputs, warps, stages in itertools.product((16, 32, 64), (64, 128, 256), (4, 8), (3, 4, 5)):
        if stages * 2 * inputs * (columns + max(16, rows)) < 200_000:
            yield Blocks(columns, inputs, warps, stages)


def pass_of(model, step: KernelStep, rows: int, slots: int, capacity: int = 384, length: int = 256) -> Pass:
    """A pass of one stream, with random keys and values."""
    device, config = model.device, model.config.get_text_config()
    experts = None
    if slots:
        experts = PassExperts(rows, model.config.num_experts, slots, 1, device, step.layouts)
        chosen = torch.arange(rows, device=device) % slots
        experts.set(torch.eye(model.config.num_experts, device=device)[chosen])
    shape = (rows, config.num_key_value_heads, capacity, config.hidden_size // config.num_attention_heads)
    layers = [
        (torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device).bfloat16())
        for _ in step.layers
    ]
    return Pass(
        input_ids=torch.zeros(rows, 1, dtype=torch.long, device=device),
        length=torch.tensor([length], device=device),
        offsets=torch.zeros(rows, dtype=torch.long, device=device),
        visible=torch.ones(rows, capacity, dtype=torch.uint8, device=device),
        layers=layers,
        experts=experts,
        counters=step.counters(rows),
        dependent_launch=True,
    )


def milliseconds(step: KernelStep, run: Pass) -> float:
    step.logits(run)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.logits(run)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    with report("Blocks of a decode step", parser) as (_, rows_of_table):
        model = routed(4)
        step = KernelStep(model)
        looked_up = fast_step.blocks
        for rows, slots in CASES:
            run = pass_of(model, step, rows, slots)
            chosen: dict[str, Blocks] = {}

            def blocks(product, rows, all_ranks, chosen=chosen):
                return chosen.get(fast_step.kind_of(product)) or looked_up(product, rows, all_ranks)

            fast_step.blocks = blocks
            best = milliseconds(step, run)
            row = {"rows": rows, "slots": slots, "table's": best}
            for kind in KINDS:
                for candidate in candidates(rows):
                    before = chosen.get(kind)
                    chosen[kind] = candidate
                    took = milliseconds(step, run)
                    if took < best:
                        best = took
                    elif before is None:
                        del chosen[kind]
                    else:
                        chosen[kind] = before
                row[kind] = str(chosen.get(kind, ""))
            rows_of_table.append({**row, "best": best})
            print(rows_of_table[-1], flush=True)


if __name__ == "__main__":
    main()
