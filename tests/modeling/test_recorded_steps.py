"""Recorded decode steps, with the stand-in for CUDA graphs of `helpers_graphs`, against the ordinary path."""

import pytest
import torch
from helpers_graphs import RecordedGraph, ordinary_and_fast, record_on_a_cpu
from helpers_models import STRATEGIES, build, left_padded, random_rows


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast


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
    monkeypatch.setattr(fast, "MAX_SESSIONS", 3)
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
