"""Fast decoding of rows with experts of their own, which share a graph: against the default path, with plain
calls in place of graphs and with the stand-in of `helpers_graphs`."""

import pytest
import torch
from helpers_graphs import GREEDY, CapturedGraph, capture_on_a_cpu, decode_fast_on_a_cpu, default_and_fast
from helpers_models import PAD, build, left_padded, random_rows
from helpers_slow import slow_but
from transformers import OPTConfig


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import routing_strategies_dylora_moe as routing_strategies
from dylora_moe.modeling.cache_dylora_moe import CACHE, row_experts


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
ONE = {name: rows[:1] for name, rows in BATCH.items()}


@pytest.fixture(autouse=True, params=slow_but("called", of=["called", "captured"]))
def how(monkeypatch, request):
    """A step is called as it is, or captured and replayed."""
    if request.param == "captured":
        capture_on_a_cpu(monkeypatch, fast)
    else:
        decode_fast_on_a_cpu(monkeypatch, fast)
    return request.param


def alike_experts(count: int = 4) -> list[dict]:
    """Experts of one shape, on layers that share their input and layers that do not."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts]
    return [
        {
            "name": f"number {index}",
            "r": 4,
            "lora_alpha": 12,
            "target_modules": names,
            "rank_pattern": {names[0]: 7},
        }
        for index in range(count)
    ]


def given(*expert_ids: int) -> dict:
    return {"expert_ids": torch.tensor(expert_ids)}


@pytest.mark.parametrize("strategy", ["best", "round_robin"])
def test_a_batch_of_one_expert_is_decoded_as_by_that_expert_alone(steps, strategy):
    model = build(seed=7)  # three experts of three shapes
    for ids in ((1, 1, 1), (0, 0, 0), (0, 1, 0), (2, 2, 2), (2, 1, 0), (1, 1, 1)):
        expected, found = default_and_fast(model, BATCH, routing_strategy=strategy, **given(*ids))
        assert found.tolist() == expected.tolist()
        alone = default_and_fast(model, BATCH, routing_strategy=f"single:{ids[0]}", fast_decoding=False)[0]
        assert (found.tolist() == alone.tolist()) == (len(set(ids)) == 1)
    assert len(steps) == 6 * 11 and len(dict.fromkeys(steps)) == 1


@pytest.mark.parametrize(
    "arguments", [{}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}], ids=str
)
def test_the_experts_that_the_strategies_choose_themselves(steps, arguments):
    model = build(seed=7)
    for seed in range(6):
        inputs = left_padded(random_rows((7,), seed=seed))
        expected, found = default_and_fast(model, inputs, seed, routing_strategy="best", **arguments)
        assert found.tolist() == expected.tolist()
    assert len(steps) == 6 * 11
    wanted = {**GREEDY, "routing_strategy": "round_robin"}
    model.reset_round_robin()
    turns = [model.generate(**ONE, **wanted).tolist() for _ in range(4)]
    model.reset_round_robin()
    for turn in turns:
        assert model.generate(**ONE, **wanted, fast_decoding=False).tolist() == turn
    assert turns[0] == turns[3] and turns[0] != turns[1] != turns[2]


@pytest.mark.parametrize("strategy", ["single", "best"])
@pytest.mark.parametrize("shapes", ["equal", "unequal"])
def test_experts_take_turns_in_one_graph(steps, how, strategy, shapes):
    """However many there are, and whatever their ranks and scales: a graph reads places, factors and weights."""
    experts = alike_experts(9)  # more than graphs are kept
    if shapes == "unequal":
        experts = [
            {**one, "r": 2 + i, "rank_pattern": {}, "lora_alpha": 4 + i} for i, one in enumerate(experts)
        ]
    model, seen = build(experts=experts, seed=7), set()
    for seed, expert in enumerate([*range(9), 3, 0]):
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        arguments = {"routing_strategy": f"single:{expert}"}
        if strategy == "best":
            arguments = {"routing_strategy": "best", **given(expert, expert, (expert + seed % 2) % 9)}
        expected, found = default_and_fast(model, inputs, **arguments)
        assert found.tolist() == expected.tolist()
        seen.add(str(found[:, 9:].tolist()))
    assert len(seen) == 11 and len(dict.fromkeys(steps)) == len(model._decode_graphs.graphs) == 1
    assert how == "called" or CapturedGraph.replays == 11 * 11


def test_a_text_of_one_expert_that_outgrows_its_cache(steps, monkeypatch):
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    monkeypatch.setattr(fast, "FIRST_CAPACITY", 16)
    model = build(experts=alike_experts(), seed=7)
    for expert in (2, 0):
        expected, found = default_and_fast(
            model, BATCH, routing_strategy="best", max_new_tokens=40, **given(expert, expert, expert)
        )
        assert found.tolist() == expected.tolist()
    assert {graph.capacity for graph in steps} == {16, 32, 64}


def test_one_expert_in_all(steps):
    model = build(experts=alike_experts(1), seed=7)
    for strategy in ("best", "round_robin", "single:0"):
        expected, found = default_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert len(dict.fromkeys(steps)) == 1


@pytest.mark.slow
def test_experts_of_one_shape_while_other_strategies_and_training_come_between(steps):
    model = build(experts=alike_experts(), seed=7)
    strategies = ["single:0", "ensemble", "single:2", "uniform", "best", "single:1", "round_robin", "router"]
    for call in range(2 * len(strategies)):
        if call % 5 == 4:
            with torch.no_grad():
                for layer in model.expert_layers().values():
                    layer.lora_A.data.mul_(-1.2)
                    layer.lora_B.data.mul_(-0.9)
        inputs = BATCH if call % 3 else ONE
        expected, found = default_and_fast(model, inputs, routing_strategy=strategies[call % len(strategies)])
        assert found.tolist() == expected.tolist()
    model.add_expert("fifth", target_modules=alike_experts(1)[0]["target_modules"], r=4, lora_alpha=12)
    for strategy in ("single:4", "single:0"):
        expected, found = default_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()


def test_a_strategy_of_somebody_elses_that_chooses_one_expert_a_row(steps, monkeypatch):
    """Its weights are its own affair."""
    monkeypatch.setattr(routing_strategies, "ROUTING_STRATEGIES", dict(routing_strategies.ROUTING_STRATEGIES))

    @routing_strategies.register
    class HalfStrategy(routing_strategies.RoundRobinStrategy):
        name = "half"

        def expert_weights(self, routed_pass):
            return super().expert_weights(routed_pass) / 2

    model = build(seed=7)
    expected, found = default_and_fast(model, BATCH, routing_strategy="half", **given(1, 1, 1))
    assert found.tolist() == expected.tolist() and not steps


@pytest.mark.parametrize("kind", ["float64 foundation", "some float64 experts", "opt"])
def test_layers_whose_updates_are_of_another_dtype_or_form(steps, kind):
    base, experts = None, alike_experts(3)
    if kind == "opt":
        sizes = {
            "vocab_size": 97,
            "hidden_size": 32,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
        }
        base = OPTConfig(**sizes, num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=PAD)
        names = [
            f"model.decoder.layers.{layer}.{name}"
            for layer in range(2)
            for name in ("self_attn.q_proj", "fc1")
        ]
        experts = [{"name": f"number {index}", "r": 4, "target_modules": names} for index in range(3)]
    model = build(base, experts, seed=7)
    if kind == "float64 foundation":
        model.double()
        for layer in model.expert_layers().values():
            for stack in (layer.lora_A, layer.lora_B):
                stack.data = stack.data.float()
    elif kind == "some float64 experts":
        for name, layer in model.expert_layers().items():
            for stack in (layer.lora_A, layer.lora_B):
                stack.data = stack.data.double() if name.endswith(("k_proj", "down_proj")) else stack.data
    for expert in (0, 2, 1, 0):
        for arguments in (
            {"routing_strategy": f"single:{expert}"},
            {"routing_strategy": "best", **given(*[expert] * 3)},
        ):
            expected, found = default_and_fast(model, BATCH, **arguments)
            assert found.tolist() == expected.tolist()
    assert len(dict.fromkeys(steps)) == 2  # of one expert, and of three rows with theirs


@pytest.mark.parametrize("strategy", ["best", "round_robin"])
def test_what_comes_back_knows_the_strategy_that_was_asked_for(steps, strategy):
    model = build(seed=7)
    wanted = {"return_dict_in_generate": True, "output_router_logits": True, "output_logits": True}
    expected, found = default_and_fast(model, BATCH, routing_strategy=strategy, **wanted, **given(1, 1, 1))
    assert len(steps) == 11
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.router_logits is expected.router_logits is None
    for cache in (expected[CACHE], found[CACHE]):
        assert cache.routing_strategy == strategy and row_experts(cache).expert_ids.tolist() == [1, 1, 1]
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    again = {
        "input_ids": found.sequences,
        "attention_mask": torch.cat([BATCH["attention_mask"], torch.ones(3, 12, dtype=torch.long)], dim=1),
    }
    arguments = {**GREEDY, "max_new_tokens": 3, "routing_strategy": strategy}
    continued = model.generate(**again, **arguments, **{CACHE: found[CACHE]})
    longer = model.generate(
        **BATCH, **{**arguments, "max_new_tokens": 15}, **given(1, 1, 1), fast_decoding=False
    )
    assert continued.tolist() == longer.tolist()


@pytest.mark.parametrize("ids", [(9, 9, 9), (-1, -1, -1), (1, 1), (1, 1, 1, 1)], ids=str)
def test_wrong_experts_are_refused_as_ever(ids):
    with pytest.raises(ValueError, match="`expert_ids` is"):
        build(seed=7).generate(**BATCH, **GREEDY, routing_strategy="best", **given(*ids))
