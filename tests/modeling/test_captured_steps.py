"""Captured decode steps, with the stand-in for CUDA graphs of `helpers_graphs`, against the default path."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
from helpers_graphs import (
    GREEDY,
    CapturedGraph,
    Stream,
    capture_on_a_cpu,
    default_and_fast,
    look_up_on_a_cpu,
)
from helpers_models import (
    LATENTS_ARE_CACHED,
    SIZES,
    STRATEGIES,
    build,
    build_on_latent_attention,
    left_padded,
    random_rows,
)
from helpers_slow import slow_but
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import FalconConfig, LogitsProcessorList, MixtralConfig


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    capture_on_a_cpu(monkeypatch, fast)


@pytest.mark.parametrize(
    "arguments", [{}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}], ids=str
)
@pytest.mark.parametrize("strategy", slow_but("router", "single:0", of=[*STRATEGIES, "single:0"]))
def test_captured_steps_give_the_tokens_of_the_default_path(strategy, arguments):
    model = build(seed=7)
    for seed in range(2):  # the second call replays what the first has captured, for other prompts
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        expected, found = default_and_fast(model, inputs, seed, routing_strategy=strategy, **arguments)
        assert found.tolist() == expected.tolist()
    assert CapturedGraph.replays >= 2 * 11


@pytest.mark.slow
def test_captured_steps_of_changing_strategies_sizes_and_weights(monkeypatch):
    monkeypatch.setattr(fast, "MAX_GRAPHS", 3)
    model = build(seed=7)
    for call in range(14):
        lengths = (5,) * (1 + call % 3) if call % 2 else (9, 4)
        inputs = left_padded(random_rows(lengths, seed=call))
        if call % 7 == 6:
            with torch.no_grad():
                next(iter(model.expert_layers().values())).lora_A.mul_(-1.5)
        expected, found = default_and_fast(model, inputs, routing_strategy=STRATEGIES[call % len(STRATEGIES)])
        assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_a_router_that_changes_its_mind_in_captured_steps(monkeypatch):
    model = build(seed=7)
    with torch.no_grad():
        model.router.gate.weight.mul_(100)
    inputs = left_padded(random_rows((9, 5), seed=2))
    expected, found = default_and_fast(model, inputs, max_new_tokens=60, repetition_penalty=2.0)
    assert found.tolist() == expected.tolist()
    (graph,) = model._decode_graphs.graphs.values()
    assert graph._speculative.graph and graph._again.graph and graph._whole.graph
    assert graph.hits < graph.speculated == fast.WINDOW


def patch_forward(model):
    mlp = model.foundation.model.layers[0].mlp
    mlp.forward = lambda hidden_states: type(mlp).forward(mlp, hidden_states) * -3


def patch_forward_again(model):
    model.foundation.model.layers[0].mlp.forward = lambda hidden_states: hidden_states


def swap_activation(model):
    model.foundation.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def swap_class(model):
    norm = model.foundation.model.norm
    norm.__class__ = type(
        "OtherRMSNorm", (type(norm),), {"forward": lambda self, hidden_states: -hidden_states}
    )


@pytest.mark.parametrize("strategy", slow_but("single:0", of=["router", "single:0"]))
def test_modules_that_are_patched_between_two_calls(strategy):
    model = build(seed=7)
    with torch.no_grad():  # so much that it shows
        for weight in model.foundation.model.layers[0].mlp.parameters():
            weight.mul_(10)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    seen = []
    for patch in (lambda model: None, swap_activation, patch_forward, patch_forward_again, swap_class):
        patch(model)
        expected, found = default_and_fast(model, inputs, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
        seen.append(found.tolist())
    assert all(one != other for one, other in itertools.pairwise(seen))


@contextmanager
def scaled_forward(model, monkeypatch, factor):
    mlp = model.foundation.model.layers[0].mlp
    mlp.forward = lambda hidden_states: type(mlp).forward(mlp, hidden_states) * factor
    yield
    del mlp.forward


@contextmanager
def scaled_activation(model, monkeypatch, factor):
    mlp = model.foundation.model.layers[0].mlp
    mlp.act_fn = None
    mlp.act_fn = torch.nn.LeakyReLU(factor)
    yield


@contextmanager
def scaled_forward_of_the_class(model, monkeypatch, factor):
    kind = type(model.foundation.model.layers[0].mlp)
    with monkeypatch.context() as patch:
        forward = kind.forward
        patch.setattr(kind, "forward", lambda mlp, hidden_states: forward(mlp, hidden_states) * factor)
        yield


SCALED = [scaled_forward, scaled_activation, scaled_forward_of_the_class]


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaled",
    slow_but(scaled_activation, of=SCALED),
    ids=lambda scaled: scaled.__name__,
)
def test_replacements_that_come_and_go_one_after_the_other(monkeypatch, scaled):
    """Each may lie where the last one lay, and is another nonetheless."""
    model = build(seed=7)
    with torch.no_grad():  # so much that it shows
        for weight in model.foundation.model.layers[0].parameters():
            weight.mul_(10)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    seen = [default_and_fast(model, inputs)[1].tolist()]
    for factor in (-3.0, 0.0, 5.0, -1.0, 2.0):
        with scaled(model, monkeypatch, factor):
            expected, found = default_and_fast(model, inputs)
        assert found.tolist() == expected.tolist()
        seen.append(found.tolist())
        if factor in (0.0, 2.0):  # what is gone is noticed, too
            expected, found = default_and_fast(model, inputs)
            assert found.tolist() == expected.tolist()
    assert len({str(tokens) for tokens in seen}) > 2
    for _ in range(2):
        default_and_fast(model, inputs)
    assert len(model._decode_graphs.graphs) == 1


@pytest.mark.parametrize("strategy", slow_but("router", of=["router", "uniform", "ensemble"]))
def test_a_default_dtype_that_is_another_at_the_first_call(strategy):
    model = build(seed=7)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    arguments = {"routing_strategy": strategy, "return_dict_in_generate": True, "output_logits": True}
    torch.set_default_dtype(torch.bfloat16)
    try:
        default_and_fast(model, inputs, routing_strategy=strategy)
    finally:
        torch.set_default_dtype(torch.float32)
    expected, found = default_and_fast(model, inputs, **arguments)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", slow_but("router", "single:0", of=[*STRATEGIES, "single:0"]))
def test_steps_that_no_graph_can_capture_go_the_default_way(strategy):
    """A mixture as the foundation, whose experts run one by one: the host asks which of them act."""
    config = MixtralConfig(**SIZES, num_local_experts=4)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    model = build(
        config, [{"name": name, "r": 2, "target_modules": names} for name in ("one", "two")], seed=7
    )
    model.foundation.set_experts_implementation("eager")
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    for arguments in ({"return_dict_in_generate": True}, {}, {"do_sample": True, "num_return_sequences": 2}):
        expected, found = default_and_fast(model, inputs, routing_strategy=strategy, **arguments)
        assert torch.equal(*(getattr(output, "sequences", output) for output in (expected, found)))
        if arguments.get("return_dict_in_generate"):
            for one, other in zip(expected.past_key_values.layers, found.past_key_values.layers, strict=True):
                assert (one.keys is None) == (other.keys is None)
                if one.keys is not None:
                    torch.testing.assert_close(other.keys, one.keys)
                    torch.testing.assert_close(other.values, one.values)
    store = model._decode_graphs
    assert CapturedGraph.replays == 0 and store.reason and not store.graphs and not store.memory
    model.foundation.set_experts_implementation("batched_mm")
    expected, found = default_and_fast(model, inputs, routing_strategy=strategy)
    assert found.tolist() == expected.tolist() and CapturedGraph.replays >= 11


@pytest.mark.parametrize("strategy", slow_but("router", "single:0", of=[*STRATEGIES, "single:0"]))
def test_a_later_step_that_no_graph_can_capture_goes_the_default_way(monkeypatch, strategy):
    """A foundation that takes another way in the middle of a text, shortly before its graphs are captured
    again."""
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    monkeypatch.setattr(fast, "FIRST_CAPACITY", 8)  # so that texts outgrow their caches
    config = MixtralConfig(**SIZES, num_local_experts=4)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    model = build(
        config, [{"name": name, "r": 2, "target_modules": names} for name in ("one", "two")], seed=7
    )
    inputs, asked = left_padded(random_rows((9, 5, 7), seed=2)), []

    def switch(input_ids, scores):
        asked.append(len(asked))
        if len(asked) == 3:
            model.foundation.set_experts_implementation("eager")
        return scores

    found = []
    for fast_decoding in (False, None):
        asked.clear()
        model.reset_round_robin()
        model.foundation.set_experts_implementation("batched_mm")
        processors = LogitsProcessorList([switch])
        arguments = {
            **GREEDY,
            "max_new_tokens": 40,
            "routing_strategy": strategy,
            "fast_decoding": fast_decoding,
        }
        found.append(model.generate(**inputs, **arguments, logits_processor=processors).tolist())
    assert found[0] == found[1]
    assert model._decode_graphs.reason and CapturedGraph.replays >= 2


@pytest.mark.parametrize("strategy", slow_but("router", "single:0", of=[*STRATEGIES, "single:0"]))
def test_a_foundation_that_reads_its_mask_goes_the_default_way(monkeypatch, strategy):
    """Falcon's ALiBi counts the tokens of a mask `[batch, sequence]`; steps in buffers give another."""
    warned = []
    monkeypatch.setattr(fast.logger, "warning_once", warned.append)
    config = FalconConfig(**SIZES, alibi=True, new_decoder_architecture=False, multi_query=False)
    names = [f"transformer.h.{layer}.self_attention.query_key_value" for layer in range(2)]
    model = build(
        config, [{"name": name, "r": 2, "target_modules": names} for name in ("one", "two")], seed=7
    )
    for arguments in ({}, {"do_sample": True, "num_return_sequences": 2}):
        inputs = left_padded(random_rows((9, 5, 7), seed=2))
        expected, found = default_and_fast(model, inputs, routing_strategy=strategy, **arguments)
        assert found.tolist() == expected.tolist()
    assert CapturedGraph.replays == 0 and model._decode_graphs.reason
    assert len(warned) == 1 and "it fails with ValueError" in warned[0]


def test_what_makes_the_host_wait():
    """With tensors that only say that they are on a GPU."""
    aten, seen = torch.ops.aten, []
    with FakeTensorMode():
        here, there = torch.empty(4), torch.empty(4, device="cuda")
        index, mask = torch.zeros(2, dtype=torch.long), torch.zeros(4, dtype=torch.bool, device="cuda")
        waits = fast.host_waits
        for function, args, kwargs, expected in (
            (aten.copy_.default, (there, here), {}, True),
            (aten.copy_.default, (here, there), {}, True),
            (aten.copy_.default, (there, there), {}, False),
            (aten._to_copy.default, (there,), {"device": "cpu"}, True),
            (aten._to_copy.default, (here,), {"device": "cuda"}, True),
            (aten._to_copy.default, (there,), {"dtype": torch.half}, False),
            (aten._local_scalar_dense.default, (there,), {}, True),
            (aten.nonzero.default, (there,), {}, True),
            (aten.index.Tensor, (there, [mask]), {}, True),
            (aten.index.Tensor, (there, [mask.to(torch.uint8)]), {}, True),
            (aten._unsafe_index.Tensor, (there, [mask]), {}, True),
            (aten.index.Tensor, (there, [index]), {}, True),
            (aten.index.Tensor, (there, [None, torch.zeros(2, dtype=torch.long, device="cuda")]), {}, False),
            (
                aten.index_fill_.int_Scalar,
                (there, 0, torch.zeros(1, dtype=torch.long, device="cuda"), 0.0),
                {},
                False,
            ),
            (aten.lift_fresh.default, (there,), {}, True),
            (aten.lift_fresh.default, (here,), {}, False),
            (aten.add.Tensor, (there, torch.empty(())), {}, False),
            (aten.mm.default, (there, there), {}, False),
        ):
            seen.append((str(function), waits(function, args, kwargs), expected))
    assert [found for found in seen if found[1] != found[2]] == []


def test_an_ensembles_step_is_one_batch(monkeypatch):
    model = build(seed=7)
    body, rows = type(model.foundation_body), []
    forward = body.forward

    def counted(self, *args, **kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            rows.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(body, "forward", counted)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    model.generate(**inputs, **GREEDY, routing_strategy="ensemble")
    assert rows and set(rows) == {3 * model.config.num_experts} and CapturedGraph.replays == 11


@pytest.mark.slow
def test_a_shallow_copy_outlives_its_model():
    model = build(seed=7)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    expected, _ = default_and_fast(model, inputs)
    shallow = copy.copy(model)
    del model
    assert shallow.generate(**inputs, **GREEDY).tolist() == expected.tolist()


def test_a_capture_that_fails_leaves_the_thread_on_its_stream_of_before(monkeypatch):
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
    assert at[0] is before and not model._decode_graphs.graphs
    expected, found = default_and_fast(model, inputs, routing_strategy="uniform")
    assert found.tolist() == expected.tolist() and CapturedGraph.replays == 11


@pytest.mark.parametrize("strategy", slow_but("router", "single:0", of=[*STRATEGIES, "single:0"]))
def test_experts_on_a_layer_that_runs_over_all_past_tokens(strategy):
    model = build_on_latent_attention()
    for lengths in ((7,), (7, 4)):
        inputs = left_padded(random_rows(lengths, seed=1))
        if strategy == "router" and LATENTS_ARE_CACHED:
            with pytest.raises(ValueError, match="use_cache=False"):
                model.generate(**inputs, **GREEDY, routing_strategy=strategy)
        else:
            expected, found = default_and_fast(model, inputs, routing_strategy=strategy)
            assert found.tolist() == expected.tolist()
            # Where latents are cached, a step runs the experts over all past tokens, under weights of one.
            assert (CapturedGraph.replays == 0) == (LATENTS_ARE_CACHED and strategy != "base")


@pytest.mark.parametrize("strategy", slow_but("base", of=[*STRATEGIES, "single:0"]))
def test_captured_steps_of_prompt_lookup_keep_what_the_cache_has(monkeypatch, strategy):
    """A step of several tokens is captured before the first of them is known: what that writes must lie behind
    the prompt."""
    look_up_on_a_cpu(monkeypatch, fast)
    model = build(seed=7)
    for seed in range(3):
        inputs = left_padded([random_rows((6,), seed=seed)[0] * 2])
        wanted = {**GREEDY, "eos_token_id": 10_000, "max_new_tokens": 24, "routing_strategy": strategy}
        model.reset_round_robin()
        expected = model.generate(**inputs, **wanted, fast_decoding=False)
        model.reset_round_robin()
        model.forget_decoding_sessions()  # captured again
        assert model.generate(**inputs, **wanted, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    assert CapturedGraph.replays > 0


@pytest.mark.parametrize("new", slow_but(1, 4, of=[1, 2, 4, 9]))
def test_captured_steps_of_prompt_lookup_have_room_for_drafts(monkeypatch, new):
    """Where the text ends before the last drafts would."""
    look_up_on_a_cpu(monkeypatch, fast)
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    model = build(seed=7)
    inputs = left_padded([random_rows((6,), seed=1)[0] * 2])
    wanted = {**GREEDY, "eos_token_id": 10_000, "max_new_tokens": new, "routing_strategy": "base"}
    expected = model.generate(**inputs, **wanted, fast_decoding=False)
    assert model.generate(**inputs, **wanted, prompt_lookup_num_tokens=7).tolist() == expected.tolist()
    (graph,) = model._decode_graphs.graphs.values()
    assert graph.capacity >= 12 + 8 and (CapturedGraph.replays > 0) == (new > 1)
