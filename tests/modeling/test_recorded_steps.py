"""Recorded decode steps, with the stand-in for CUDA graphs of `helpers_graphs`, against the ordinary path."""

import copy
import gc
import itertools
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from helpers_graphs import GREEDY, RecordedGraph, Stream, ordinary_and_fast, record_on_a_cpu
from helpers_models import LATENTS_ARE_CACHED, STRATEGIES, build, build_on_latent_attention, left_padded, random_rows


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_sessions_dylora_moe as fast_sessions
from dylora_moe.modeling.fast_sessions_dylora_moe import GraphPool


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
    for call in range(14):
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


def test_streams_to_record_on_go_from_a_model_that_is_gone_to_the_next(monkeypatch):
    """Never from one that lives: two models may run at once, and a stream's workspace with them."""
    current = [0]
    made = itertools.count()
    monkeypatch.setattr(fast_sessions, "IDLE_STREAMS", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: next(made))
    first, second = GraphPool(), GraphPool()
    assert (first.stream, second.stream) == (0, 1)
    del first
    current[0] = 1
    elsewhere = GraphPool()
    assert elsewhere.stream == 2
    current[0] = 0
    third, fourth = GraphPool(), GraphPool()
    assert (third.stream, fourth.stream) == (0, 3)
    assert third.handle is not fourth.handle


def test_a_model_whose_graphs_were_all_dropped_records_on_its_stream_in_a_new_pool(monkeypatch):
    handles = itertools.count()
    monkeypatch.setattr(fast_sessions, "GraphPool", GraphPool)
    monkeypatch.setattr(fast_sessions, "IDLE_STREAMS", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    model, seen = build(seed=7), []
    for _ in range(3):
        model.generate(**left_padded(random_rows((9, 5), seed=1)), **GREEDY, routing_strategy="uniform")
        pool = model._decoding_sessions.pool
        seen.append((pool.handle, pool.stream))
        del pool
        model.forget_decoding_sessions()
    assert seen == [(0, seen[0][1]), (1, seen[0][1]), (2, seen[0][1])]
    del model
    gc.collect()
    assert fast_sessions.IDLE_STREAMS[0] == [seen[0][1]]


def test_a_recording_that_fails_leaves_the_thread_on_its_stream_of_before(monkeypatch):
    """`torch.cuda.graph` does not, where ending the capture fails, too."""
    at = [Stream()]
    before = at[0]

    @contextmanager
    def on(stream):
        previous, at[0] = at[0], stream
        yield
        at[0] = previous  # not reached if something was raised

    @contextmanager
    def on_and_back(stream):
        previous, at[0] = at[0], stream
        try:
            yield
        finally:
            at[0] = previous

    @contextmanager
    def graph_that_fails_once(graph, pool, stream, capture_error_mode):
        with on(stream), graph:
            if not failed:
                failed.append(True)
                raise torch.OutOfMemoryError("of the test")
            yield

    failed = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: at[0])
    monkeypatch.setattr(torch.cuda, "stream", on_and_back)
    monkeypatch.setattr(torch.cuda, "graph", graph_that_fails_once)
    model = build(seed=7)
    inputs = left_padded(random_rows((9, 5), seed=1))
    with pytest.raises(torch.OutOfMemoryError, match="of the test"):
        model.generate(**inputs, **GREEDY, routing_strategy="uniform")
    assert at[0] is before and not model._decoding_sessions.sessions
    ordinary, found = ordinary_and_fast(model, inputs, routing_strategy="uniform")
    assert found.tolist() == ordinary.tolist() and RecordedGraph.replays == 11


@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0"])
def test_experts_on_a_layer_that_runs_over_all_past_tokens(strategy):
    model = build_on_latent_attention()
    for lengths in ((7,), (7, 4)):
        inputs = left_padded(random_rows(lengths, seed=1))
        if strategy == "router" and LATENTS_ARE_CACHED:
            with pytest.raises(ValueError, match="use_cache=False"):
                model.generate(**inputs, **GREEDY, routing_strategy=strategy)
        else:
            ordinary, found = ordinary_and_fast(model, inputs, routing_strategy=strategy)
            assert found.tolist() == ordinary.tolist()
            assert RecordedGraph.replays >= 11
