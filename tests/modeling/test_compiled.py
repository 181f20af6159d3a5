"""`torch.compile` with one graph, and static caches: few recompilations over many tokens."""

import pytest
import torch
from helpers_models import build, random_rows


@pytest.fixture(scope="module", autouse=True)
def skip_where_the_foundation_alone_cannot_be_compiled():
    """torch 2.7 cannot trace transformers' own Llama in one graph."""
    torch._dynamo.reset()
    foundation = torch.compile(build().foundation, fullgraph=True, backend="eager")
    try:
        foundation(torch.tensor(random_rows((7, 7))))
    except torch._dynamo.exc.Unsupported:
        pytest.skip(f"torch {torch.__version__} cannot compile this transformers' models in one graph")


@pytest.fixture
def recompilations():
    """How often a compiled function was compiled again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames = []

    def backend(module, inputs):
        frames.append(len(inputs))
        return module.forward

    yield backend, lambda: max(len(frames) - 1, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("strategy", ["router", "best", "single:1"])
def test_one_graph_and_few_recompilations_over_fifty_tokens(recompilations, strategy):
    backend, count = recompilations
    model = build()
    ids = torch.tensor(random_rows((6, 6)))
    arguments = {"routing_strategy": strategy, "do_sample": False, "eos_token_id": None, "max_new_tokens": 50}
    expected = model.generate(ids, **arguments)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    found = model.generate(ids, cache_implementation="static", disable_compile=True, **arguments)
    assert found.tolist() == expected.tolist()
    assert count() <= 2


@pytest.mark.parametrize("strategy", ["router", "best", "single:1", "uniform", "ensemble"])
def test_a_compiled_forward_equals_an_eager_one(recompilations, strategy):
    backend, _ = recompilations
    model = build()
    ids = torch.tensor(random_rows((7, 7)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(ids, routing_strategy=strategy).logits
        torch.testing.assert_close(found, model(ids, routing_strategy=strategy).logits)
