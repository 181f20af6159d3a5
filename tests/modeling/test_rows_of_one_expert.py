"""Fast decoding of batches in which one expert serves every row, and of experts that share graphs: against
the ordinary path, with plain calls in place of graphs and with the stand-in of `helpers_graphs`."""

import pytest
import torch
from helpers_graphs import GREEDY, RecordedGraph, ordinary_and_fast, record_on_a_cpu
from helpers_models import PAD, build, left_padded, random_rows
from helpers_slow import slow_but
from transformers import OPTConfig


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_buffers_dylora_moe as fast_buffers
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_sessions_dylora_moe as fast_sessions
from dylora_moe.modeling import routing_strategies_dylora_moe as routing_strategies
from dylora_moe.modeling.cache_dylora_moe import CACHE, row_experts
from dylora_moe.modeling.fast_products_dylora_moe import SharedProducts


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
ONE = {name: rows[:1] for name, rows in BATCH.items()}


@pytest.fixture(autouse=True, params=slow_but("called", of=["called", "recorded"]))
def how(monkeypatch, request):
    """A step is called as it is, or recorded and replayed."""
    monkeypatch.setattr(fast, "DEVICES", ("cpu",))
    monkeypatch.setattr(fast, "ON_BY_ITSELF", True)
    if request.param == "recorded":
        record_on_a_cpu(monkeypatch, fast)
    return request.param


@pytest.fixture
def sessions(monkeypatch):
    """The session and the strategy of every step that was decoded fast."""
    seen = []
    step = fast.Session.step
    monkeypatch.setattr(
        fast.Session,
        "step",
        lambda session: (seen.append((session, str(session.strategy))), step(session))[1],
    )
    return seen


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
def test_a_batch_of_one_expert_is_decoded_as_by_that_expert_alone(sessions, strategy):
    model = build(seed=7)  # three experts of three shapes
    for ids in ((1, 1, 1), (0, 0, 0), (0, 1, 0), (2, 2, 2), (1, 1, 1)):
        sessions.clear()
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy, **given(*ids))
        assert found.tolist() == ordinary.tolist()
        alone = ordinary_and_fast(model, BATCH, routing_strategy=f"single:{ids[0]}", fast_decoding=False)[0]
        assert (found.tolist() == alone.tolist()) == (len(set(ids)) == 1)
        assert {name for _, name in sessions} == {f"single:{ids[0]}" if len(set(ids)) == 1 else strategy}


@pytest.mark.parametrize(
    "arguments", [{}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}], ids=str
)
def test_the_experts_that_the_strategies_choose_themselves(sessions, arguments):
    model = build(seed=7)
    for seed in range(6):
        inputs = left_padded(random_rows((7,), seed=seed))
        ordinary, found = ordinary_and_fast(model, inputs, seed, routing_strategy="best", **arguments)
        assert found.tolist() == ordinary.tolist()
    assert {name.partition(":")[0] for _, name in sessions} == {"single"} and len(
        {name for _, name in sessions}
    ) > 1
    sessions.clear()
    model.reset_round_robin()
    turns = [model.generate(**ONE, **GREEDY, routing_strategy="round_robin").tolist() for _ in range(4)]
    model.reset_round_robin()
    for turn in turns:
        assert (
            model.generate(**ONE, **GREEDY, routing_strategy="round_robin", fast_decoding=False).tolist()
            == turn
        )
    assert [name for _, name in sessions[::11]] == ["single:0", "single:1", "single:2", "single:0"]


@pytest.mark.parametrize("strategy", ["single", "best"])
def test_experts_of_one_shape_take_turns_in_one_graph(sessions, how, strategy):
    model = build(experts=alike_experts(9), seed=7)  # more than graphs are kept
    seen = set()
    for seed, expert in enumerate([*range(9), 3, 0]):
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        arguments = {"routing_strategy": f"single:{expert}"}
        if strategy == "best":
            arguments = {"routing_strategy": "best", **given(expert, expert, expert)}
        ordinary, found = ordinary_and_fast(model, inputs, **arguments)
        assert found.tolist() == ordinary.tolist()
        seen.add(str(found[:, 9:].tolist()))
    assert len(seen) == 11 and len({id(session) for session, _ in sessions}) == 1
    assert len(model._decoding_sessions.sessions) == 1
    assert how == "called" or RecordedGraph.replays == 11 * 11


@pytest.mark.slow
def test_experts_of_one_shape_while_other_strategies_and_training_come_between(sessions):
    model = build(experts=alike_experts(), seed=7)
    strategies = ["single:0", "ensemble", "single:2", "uniform", "best", "single:1", "round_robin", "router"]
    for call in range(2 * len(strategies)):
        if call % 5 == 4:
            with torch.no_grad():
                for layer in model.expert_layers().values():
                    layer.lora_A.data.mul_(-1.2)
                    layer.lora_B.data.mul_(-0.9)
        inputs = BATCH if call % 3 else ONE
        ordinary, found = ordinary_and_fast(
            model, inputs, routing_strategy=strategies[call % len(strategies)]
        )
        assert found.tolist() == ordinary.tolist()
    model.add_expert("fifth", target_modules=alike_experts(1)[0]["target_modules"], r=4, lora_alpha=12)
    for strategy in ("single:4", "single:0"):
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()


def test_many_unlike_experts_do_not_take_each_others_places(sessions, monkeypatch):
    """Each would need a graph of its own: there are so many as fit, and one for all others."""
    experts = [
        {**expert, "r": 2 + index, "rank_pattern": {}} for index, expert in enumerate(alike_experts(5))
    ]
    monkeypatch.setattr(fast_sessions, "MAX_SESSIONS", 3)
    model, made = build(experts=experts, seed=7), []
    build_session = fast_sessions.Session.__init__
    monkeypatch.setattr(
        fast_sessions.Session,
        "__init__",
        lambda self, *args: (made.append(args[1]), build_session(self, *args))[1],
    )
    for call in range(15):
        expert = call % 5
        ordinary, found = ordinary_and_fast(model, ONE, routing_strategy="best", **given(expert))
        assert found.tolist() == ordinary.tolist()
    assert len(made) == 4  # three experts' own, and one in the place of the first
    assert {name for _, name in sessions[-55:]} == {"single:1", "single:2", "best"}
    products = model._decoding_sessions.products
    assert {key[1] for key in products.copies} <= {None, 1, 2, 4}  # and no copies that nobody reads


def test_a_call_that_breaks_off_while_experts_are_copied(monkeypatch):
    model = build(experts=alike_experts(2), seed=7)
    split = torch.Tensor.split

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model.generate(**BATCH, **{**GREEDY, "max_new_tokens": 1}, routing_strategy="single:0")
    for name in ("split", "view_as", "view"):  # after the copy was made, and before it is known
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.Tensor, name, interrupted)
            model.generate(**BATCH, **GREEDY, routing_strategy="single:1")
    assert torch.Tensor.split is split
    for expert in (1, 0):
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=f"single:{expert}")
        assert found.tolist() == ordinary.tolist()


def test_an_ensemble_after_one_expert_makes_no_further_copies():
    model = build(experts=alike_experts(), seed=7)
    for strategy in ("ensemble", "single:0", "single:1", "ensemble", "single:2", "ensemble", "single:3"):
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    copies = model._decoding_sessions.products.copies
    one = sum(copy.numel() for key, copy in copies.items() if key[1] is not None)
    assert one == sum(a.numel() + b.numel() for a, b in model.expert_weights(0).values())


def test_a_strategy_of_somebody_elses_that_chooses_one_expert_a_row(sessions, monkeypatch):
    """Its weights are its own affair."""
    monkeypatch.setattr(routing_strategies, "ROUTING_STRATEGIES", dict(routing_strategies.ROUTING_STRATEGIES))

    @routing_strategies.register
    class HalfStrategy(routing_strategies.RoundRobinStrategy):
        name = "half"

        def expert_weights(self, routed_pass):
            return super().expert_weights(routed_pass) / 2

    model = build(seed=7)
    ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy="half", **given(1, 1, 1))
    assert found.tolist() == ordinary.tolist() and not sessions


def test_experts_that_differ_in_their_scale_alone_share_no_graph(sessions):
    experts = [
        {**expert, "lora_alpha": alpha} for expert, alpha in zip(alike_experts(3), (4, 12, 4), strict=True)
    ]
    model = build(experts=experts, seed=7)
    for expert in (0, 1, 2, 0):
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=f"single:{expert}")
        assert found.tolist() == ordinary.tolist()
    assert len({id(session) for session, _ in sessions}) == 2


@pytest.mark.parametrize("kind", ["float64 foundation", "some float64 experts", "opt"])
def test_layers_whose_updates_are_of_another_dtype_or_form(sessions, kind):
    """None of them reads its stacks by itself, where a graph would go on reading the first expert's rows."""
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
            ordinary, found = ordinary_and_fast(model, BATCH, **arguments)
            assert found.tolist() == ordinary.tolist()
    assert len({id(session) for session, _ in sessions}) == 1


def test_a_layer_that_joins_the_readers_of_a_tensor_too_late(sessions, monkeypatch):
    """As one that a prompt's pass did not call. What was copied without it stays, and it gets copies of its
    own."""
    model = build(experts=alike_experts(3), seed=7)
    add_update = SharedProducts.add_update
    late = model.expert_layers()["model.layers.0.self_attn.v_proj"]

    def without(products, layer, hidden_states, *args):
        return (layer is not late or hidden_states.shape[1] == 1) and add_update(
            products, layer, hidden_states, *args
        )

    monkeypatch.setattr(SharedProducts, "add_update", without)
    strategies = ["single:0", "uniform", "single:2", "single:1", "uniform", "single:0"]
    for strategy in strategies[:2]:  # the others are copied before a step is seen
        model.generate(**BATCH, **{**GREEDY, "max_new_tokens": 1}, routing_strategy=strategy)
    for strategy in strategies:
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    assert len({id(session) for session, _ in sessions}) == 2


def test_the_prompt_of_one_expert_takes_its_products_alone(monkeypatch):
    model, taken = build(experts=alike_experts(), seed=7), []
    multiply = SharedProducts._multiply
    monkeypatch.setattr(
        SharedProducts,
        "_multiply",
        lambda self, key, single: (taken.append(single), multiply(self, key, single))[1],
    )
    wanted = {"routing_strategy": "best", "max_new_tokens": 1}
    expected, found = ordinary_and_fast(model, BATCH, **wanted, **given(2, 2, 2))
    assert found.tolist() == expected.tolist() and set(taken) == {2}
    taken.clear()
    expected, found = ordinary_and_fast(model, BATCH, **wanted, **given(2, 1, 2))
    assert found.tolist() == expected.tolist() and set(taken) == {None}


@pytest.mark.parametrize("strategy", ["best", "round_robin"])
def test_what_comes_back_knows_the_strategy_that_was_asked_for(sessions, strategy):
    model = build(seed=7)
    wanted = {"return_dict_in_generate": True, "output_router_logits": True, "output_logits": True}
    ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy, **wanted, **given(1, 1, 1))
    assert {name for _, name in sessions} == {"single:1"}
    assert found.sequences.tolist() == ordinary.sequences.tolist()
    assert found.router_logits is ordinary.router_logits is None
    for cache in (ordinary[CACHE], found[CACHE]):
        assert cache.routing_strategy == strategy and row_experts(cache).expert_ids.tolist() == [1, 1, 1]
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(ordinary.logits), atol=1e-4, rtol=1e-4)
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


def test_a_text_of_one_expert_that_outgrows_its_buffers(sessions, monkeypatch):
    monkeypatch.setattr(fast_buffers, "BUCKET", 12)
    model = build(experts=alike_experts(), seed=7)
    for expert in (2, 0):
        ordinary, found = ordinary_and_fast(
            model, BATCH, routing_strategy="best", max_new_tokens=40, **given(expert, expert, expert)
        )
        assert found.tolist() == ordinary.tolist()
    assert len({session.capacity for session, _ in sessions}) == 3
    assert {name for _, name in sessions} == {"single:2", "single:0"}


def test_one_expert_in_all(sessions):
    model = build(experts=alike_experts(1), seed=7)
    for strategy in ("best", "round_robin", "single:0"):
        ordinary, found = ordinary_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    assert {name for _, name in sessions} == {"single:0"} and len(model._decoding_sessions.sessions) == 1


@pytest.mark.parametrize("ids", [(9, 9, 9), (-1, -1, -1), (1, 1), (1, 1, 1, 1)], ids=str)
def test_wrong_experts_are_refused_as_ever(ids):
    with pytest.raises(ValueError, match="`expert_ids` is"):
        build(seed=7).generate(**BATCH, **GREEDY, routing_strategy="best", **given(*ids))


def test_copies_for_one_expert_do_not_grow_with_the_number_of_experts():
    sizes = []
    for count in (2, 12):
        model = build(experts=alike_experts(count), seed=7)
        for expert in range(count):
            model.generate(**ONE, **GREEDY, routing_strategy=f"single:{expert}")
        products = model._decoding_sessions.products
        one = sum(a.numel() + b.numel() for a, b in model.expert_weights(0).values())
        sizes.append(sum(copies.numel() for copies in products.copies.values()))
        assert sizes[-1] == one
    assert sizes[0] == sizes[1] and len(model._decoding_sessions.sessions) < fast_sessions.MAX_SESSIONS
