"""Recorded decode steps, with the stand-in for CUDA graphs of `helpers_graphs`, against the ordinary path."""

import copy
import itertools

import pytest
import torch
from helpers_graphs import GREEDY, RecordedGraph, ordinary_and_fast, record_on_a_cpu
from helpers_models import STRATEGIES, build, left_padded, random_rows


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_sessions_dylora_moe as fast_sessions


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    record_on_a_cpu(monkeypatch, fast)


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0"])
def test_recorded_steps_give_the_tokens_of_the_ordinary_path(strategy, arguments):
    model = build(seed=7)
    for seed in range(2):  # the second call replays what the first has recorded, for other prompts
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        ordinary, found = ordinary_and_fast(model, inputs, seed, routing_strategy=strategy, **arguments)
        assert found.tolist() == ordinary.tolist()
    assert RecordedGraph.replays >= 2 * 11


def test_recorded_steps_of_changing_strategies_sizes_and_weights(monkeypatch):
    monkeypatch.setattr(fast_sessions, "MAX_SESSIONS", 3)
    model = build(seed=7)
    for call in range(24):
        lengths = (5,) * (1 + call % 3) if call % 2 else (9, 4)
        inputs = left_padded(random_rows(lengths, seed=call))
        if call % 7 == 6:
            with torch.no_grad():
                next(iter(model.expert_layers().values())).lora_A.mul_(-1.5)
        ordinary, found = ordinary_and_fast(model, inputs, routing_strategy=STRATEGIES[call % len(STRATEGIES)])
        assert found.tolist() == ordinary.tolist()


def test_a_router_that_changes_its_mind_in_recorded_steps():
    model = build(seed=7)
    with torch.no_grad():
        model.router.gate.weight.mul_(100)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    ordinary, found = ordinary_and_fast(model, inputs, max_new_tokens=60, repetition_penalty=2.0)
    assert found.tolist() == ordinary.tolist()
    session = next(iter(model._decoding_sessions.sessions.values()))
    assert session._guessed.graph and session._again.graph and session._whole.graph


def patch_forward(model):
    mlp = model.foundation.model.layers[0].mlp
    mlp.forward = lambda hidden_states: type(mlp).forward(mlp, hidden_states) * -3


def patch_forward_again(model):
    model.foundation.model.layers[0].mlp.forward = lambda hidden_states: hidden_states


def swap_activation(model):
    model.foundation.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def swap_class(model):
    norm = model.foundation.model.norm
    norm.__class__ = type("OtherRMSNorm", (type(norm),), {"forward": lambda self, hidden_states: -hidden_states})


@pytest.mark.parametrize("strategy", ["router", "single:0"])
def test_modules_that_somebody_patches_between_two_calls(strategy):
    model = build(seed=7)
    with torch.no_grad():  # so much that it shows
        for weight in model.foundation.model.layers[0].mlp.parameters():
            weight.mul_(10)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    seen = []
    for patch in (lambda model: None, swap_activation, patch_forward, patch_forward_again, swap_class):
        patch(model)
        ordinary, found = ordinary_and_fast(model, inputs, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
        seen.append(found.tolist())
    assert all(one != other for one, other in itertools.pairwise(seen))


def test_a_shallow_copy_outlives_its_model():
    model = build(seed=7)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    expected, _ = ordinary_and_fast(model, inputs)
    shallow = copy.copy(model)
    del model
    assert shallow.generate(**inputs, **GREEDY).tolist() == expected.tolist()
