"""Two threads that run passes of different strategies through one model."""

import threading

import pytest
import torch
from helpers_models import build, random_rows


IDS = torch.tensor(random_rows((7, 7), seed=3))


def logits(model, strategy):
    with torch.no_grad():
        return model(IDS, routing_strategy=strategy).logits


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_of_two_threads_neither_mix_nor_leave_anything_behind(compiled):
    """The first pass begins, the second begins, the first ends, the second ends."""
    torch._dynamo.reset()
    strategies = ("single:1", "router")
    expected = {strategy: logits(build(), strategy) for strategy in ("base", *strategies)}
    model = build()
    bare = model.foundation.model.layers[0].forward
    second_began, first_ended = threading.Event(), threading.Event()

    def interleaved(*args, **kwargs):
        if threading.current_thread().name == strategies[0]:
            assert second_began.wait(60)
        else:
            second_began.set()
            assert first_ended.wait(60)
        return bare(*args, **kwargs)

    model.foundation.model.layers[0].forward = interleaved
    if compiled:
        model.foundation.model.layers[1].compile(backend="eager")
    found = {}

    def run(strategy):
        found[strategy] = logits(model, strategy)
        first_ended.set()

    threads = [threading.Thread(target=run, args=(strategy,), name=strategy) for strategy in strategies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for strategy in strategies:
        torch.testing.assert_close(found[strategy], expected[strategy])
    model.foundation.model.layers[0].forward = bare
    assert torch.equal(model.foundation(IDS).logits, expected["base"])
