"""`torch.compile` with one graph, and static caches: few recompilations over many tokens."""

import pytest
import torch
from helpers_models import STRATEGIES, build, random_rows
from helpers_slow import slow_but


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


@pytest.mark.parametrize("strategy", slow_but("router", of=["router", "best", "single:1"]))
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


@pytest.mark.parametrize(
    "strategy", slow_but("single:1", of=["router", "best", "single:1", "uniform", "ensemble"])
)
def test_a_compiled_forward_equals_an_eager_one(recompilations, strategy):
    backend, _ = recompilations
    model = build()
    ids = torch.tensor(random_rows((7, 7)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(ids, routing_strategy=strategy).logits
        torch.testing.assert_close(found, model(ids, routing_strategy=strategy).logits)


@pytest.mark.slow
def test_a_compiled_forward_without_a_strategy_takes_the_models(recompilations):
    backend, _ = recompilations
    model = build()
    ids = torch.tensor(random_rows((7, 7)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids, routing_strategy="router").logits)
        model.generation_config.routing_strategy = "single:1"
        torch.testing.assert_close(compiled(ids).logits, model(ids, routing_strategy="single:1").logits)


@pytest.mark.slow
def test_compiled_guidance_uses_the_calls_strategy(recompilations):
    backend, _ = recompilations
    model = build()
    ids = torch.tensor(random_rows((7,)))
    arguments = {
        "guidance_scale": 2.0,
        "max_new_tokens": 1,
        "do_sample": False,
        "routing_strategy": "single:1",
    }
    arguments.update(output_scores=True, return_dict_in_generate=True)
    expected = model.generate(ids, **arguments).scores[0]
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    torch.testing.assert_close(model.generate(ids, **arguments).scores[0], expected)


@pytest.mark.slow
def test_compiled_training_has_the_same_gradients(recompilations):
    backend, _ = recompilations
    ids = torch.tensor(random_rows((7, 7)))
    gradients = []
    for compiled in (False, True):
        model = build().train()
        call = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        call(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def logits(model, strategy):
    with torch.no_grad():
        return model(torch.tensor(random_rows((7, 7), seed=3)), routing_strategy=strategy).logits


@pytest.mark.parametrize("strategy", slow_but("router", of=STRATEGIES))
def test_layers_compiled_one_by_one_apply_the_experts(strategy):
    torch._dynamo.reset()
    expected = logits(build(), strategy)
    model = build()
    for layer in model.foundation.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(logits(model, strategy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single:1", "router", "uniform"])
def test_graph_breaks_and_uncompiled_layers_apply_the_experts(strategy):
    expected = logits(build(), strategy)
    for disturb in ("break", "disable"):
        torch._dynamo.reset()
        model = build()
        layer = model.foundation.model.layers[1]
        forward = layer.forward
        if disturb == "disable":
            layer.forward = torch.compiler.disable(forward)
        else:

            def broken(*args, forward=forward, **kwargs):
                torch._dynamo.graph_break()
                return forward(*args, **kwargs)

            layer.forward = broken
        torch.testing.assert_close(logits(torch.compile(model, backend="eager"), strategy), expected)
