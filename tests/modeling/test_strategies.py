"""Every strategy's logits and tokens, against a plain PEFT loop over the adapters."""

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, random_rows


LENGTHS = (9, 4, 7, 6)


@pytest.fixture(scope="module", params=["base", "experts_sum"])
def mixture(request):
    model = build(router_input=request.param)
    return model, PeftLoop(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_equal_those_of_a_peft_loop(mixture, strategy):
    model, loop = mixture
    rows = random_rows(LENGTHS)
    with torch.no_grad():
        logits = model(**left_padded(rows), routing_strategy=strategy).logits
    for turn, row in enumerate(rows):
        expected = loop.logits(row, strategy, len(row), turn)
        torch.testing.assert_close(logits[turn, -len(row) :], expected, atol=1e-4, rtol=0)


def test_strategies_differ(mixture):
    """Or the comparisons above would show little."""
    model, _ = mixture
    batch = left_padded(random_rows((9, 4)))
    with torch.no_grad():
        logits = {
            s: model(**batch, routing_strategy=s).logits[:, -1]
            for s in (*STRATEGIES, "single:0")
            if s != "best"
        }
    for one in logits:
        for other in logits:
            if one < other and {one, other} != {"best", "round_robin"}:
                assert (logits[one] - logits[other]).abs().max() > 1e-2, (one, other)


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_router_modes(mode, num_experts_per_tok):
    model = build(router_mode=mode, num_experts_per_tok=num_experts_per_tok, router_temperature=1.7)
    loop = PeftLoop(model)
    rows = random_rows(LENGTHS, seed=3)
    output = model(**left_padded(rows), routing_strategy="router", output_router_logits=True)
    for turn, row in enumerate(rows):
        expected = loop.logits(row, "router", len(row), turn, dense=mode == "dense")
        torch.testing.assert_close(output.logits[turn, -len(row) :], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            output.router_logits[turn, -len(row) :], loop.router_logits(row), atol=1e-4, rtol=0
        )


def test_router_mode_auto_is_dense_while_training_or_while_an_expert_is_immature():
    model = build()
    assert not model.routes_densely
    assert model.train().routes_densely
    model.eval().config.expert_configs[1]["mature"] = False
    assert model.routes_densely


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_routing_is_causal(strategy):
    """The logits at a position do not change with the tokens after it."""
    model = build()
    row = random_rows((8,))[0]
    expert_ids = torch.tensor([1]) if strategy == "best" else None
    whole = model(torch.tensor([row]), routing_strategy=strategy, expert_ids=expert_ids).logits[:, :5]
    start = model(torch.tensor([row[:5]]), routing_strategy=strategy, expert_ids=expert_ids).logits
    torch.testing.assert_close(whole, start, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_generation_equals_a_peft_loop(mixture, strategy, use_cache):
    """With and without the cache, batched under left padding: the tokens of each row alone, recomputed by
    PEFT."""
    model, loop = mixture
    rows = random_rows(LENGTHS, seed=1)
    model.reset_round_robin()
    generated = model.generate(
        **left_padded(rows),
        routing_strategy=strategy,
        use_cache=use_cache,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    for turn, row in enumerate(rows):
        assert generated[turn, max(LENGTHS) :].tolist() == loop.greedy(row, strategy, turn, 10), (
            strategy,
            turn,
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_equals_its_rows_one_by_one(strategy):
    model = build(seed=5)
    rows = random_rows((3, 11, 6), seed=2)
    arguments = {"routing_strategy": strategy, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(**left_padded(rows), **arguments)[:, 11:]
    model.reset_round_robin()
    for row, tokens in zip(rows, together, strict=True):
        alone = model.generate(**left_padded([row]), **arguments)[:, len(row) :]
        assert alone[0].tolist() == tokens.tolist()


def test_the_rows_of_best_are_chosen_from_the_prompt_alone():
    model = build(seed=1)
    loop = PeftLoop(model)
    rows = random_rows((9, 9, 9, 9, 9, 9), seed=4)
    choices = [loop.best(row) for row in rows]
    assert len(set(choices)) > 1
    output = model(torch.tensor(rows), routing_strategy="best")
    for row, choice, logits in zip(rows, choices, output.logits, strict=True):
        expected = model(torch.tensor([row]), routing_strategy=f"single:{choice}").logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_single_computes_on_its_rows_alone():
    """Bit-equal whatever other experts exist."""
    model = build()
    alone = build(experts=[model.config.expert_configs[1]], router_input=None)
    alone.foundation.load_state_dict({**alone.foundation.state_dict(), **_frozen(model)})
    alone.set_expert_weights(0, model.expert_weights("second"))
    batch = left_padded(random_rows(LENGTHS))
    assert torch.equal(
        model(**batch, routing_strategy="single:second").logits,
        alone(**batch, routing_strategy="single:0").logits,
    )


def _frozen(model):
    """The foundation's own weights, under the names they have in a model where other modules are adapted."""
    state = {
        k.replace(".base_layer.", "."): v
        for k, v in model.foundation.state_dict().items()
        if ".lora_" not in k
    }
    wrapped = model.config.expert_configs[1]["target_modules"]
    return {
        next((f"{name}.base_layer.weight" for name in wrapped if key == f"{name}.weight"), key): value
        for key, value in state.items()
    }


def test_round_robin_goes_on_from_call_to_call():
    model = build()
    loop = PeftLoop(model)
    rows = random_rows((6, 6), seed=8)
    arguments = {
        "routing_strategy": "round_robin",
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
    }
    model.generate(torch.tensor(rows), **arguments)
    second = model.generate(torch.tensor(rows), **arguments)[:, 6:]
    assert [tokens.tolist() for tokens in second] == [
        loop.greedy(row, "round_robin", turn, 6) for turn, row in enumerate(rows, 2)
    ]
    model.reset_round_robin()
    third = model.generate(torch.tensor(rows), **arguments)[:, 6:]
    assert third[0].tolist() == loop.greedy(rows[0], "round_robin", 0, 6)


def test_round_robin_cycles_over_return_sequences_and_beams_share_an_expert():
    model = build()
    ids = torch.tensor(random_rows((5,), seed=9))
    model.generate(
        ids, routing_strategy="round_robin", do_sample=True, num_return_sequences=4, max_new_tokens=2
    )
    assert model._next_round_robin == 4
    model.reset_round_robin()
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    round_robin = model.generate(ids, routing_strategy="round_robin", **beams)
    assert model._next_round_robin == 1
    assert round_robin.tolist() == model.generate(ids, routing_strategy="single:0", **beams).tolist()


def test_a_bare_forward_moves_no_turn():
    model = build()
    model(torch.tensor(random_rows((5, 5))), routing_strategy="round_robin")
    assert model._next_round_robin == 0


def test_expert_ids_are_checked():
    model = build()
    ids = torch.tensor(random_rows((7, 7), seed=3))
    for strategy in ("best", "round_robin"):
        for wrong in ([7, 0], [-1, 0], [0]):
            with pytest.raises(ValueError, match="expert_ids"):
                model(ids, routing_strategy=strategy, expert_ids=torch.tensor(wrong))
        cache = model(ids, routing_strategy=strategy, expert_ids=torch.tensor([0, 1])).past_key_values
        with pytest.raises(ValueError, match="keeps its expert"):
            model(
                ids[:, :1], routing_strategy=strategy, expert_ids=torch.tensor([2, 1]), past_key_values=cache
            )
