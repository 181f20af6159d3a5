"""Caches of every kind under every strategy, against decoding without one."""

import copy
import warnings

import pytest
import torch
from helpers_models import STRATEGIES, build, left_padded, random_rows
from transformers import (
    DynamicCache,
    MistralConfig,
    StaticCache,
)

from dylora_moe.modeling.cache_dylora_moe import CACHE


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="module")
def mixture():
    return build(seed=7)


@pytest.fixture(scope="module")
def sliding():
    base = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        pad_token_id=2,
    )
    return build(base, seed=7)


def without_cache(model, batch, strategy, **arguments):
    model.reset_round_robin()
    try:
        arguments = {**GREEDY, **arguments}
        return model.generate(**batch, routing_strategy=strategy, use_cache=False, **arguments).tolist()
    finally:
        model.reset_round_robin()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["mixture", "sliding"])
def test_prompt_lookup_rolls_every_stream_back(kind, strategy, request):
    model = request.getfixturevalue(kind)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    ends = {**GREEDY, "eos_token_id": 1}  # transformers 5.10 cannot look prompts up without one
    expected = without_cache(model, batch, strategy, max_new_tokens=8, eos_token_id=1)
    found = model.generate(
        **batch, routing_strategy=strategy, prompt_lookup_num_tokens=3, max_new_tokens=8, **ends
    )
    assert found[:, :18].tolist() == expected  # transformers 5.10 may go past `max_new_tokens`, on any model


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["mixture", "sliding"])
@pytest.mark.parametrize(
    "arguments", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"num_beams": 3}]
)
def test_other_ways_to_decode_left_padded_batches(kind, strategy, arguments, request):
    model = request.getfixturevalue(kind)
    batch = left_padded(random_rows((9, 4, 7), seed=3))
    beams = {"num_beams": arguments["num_beams"]} if "num_beams" in arguments else {}
    expected = without_cache(model, batch, strategy, max_new_tokens=6, **beams)
    found = model.generate(**batch, routing_strategy=strategy, max_new_tokens=6, **GREEDY, **arguments)
    assert found.tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", ["empty", "configured", "static"])
def test_a_cache_of_the_users_own_and_continuing_it(mixture, strategy, make):
    caches = {
        "empty": lambda: DynamicCache(),
        "configured": lambda: DynamicCache(config=mixture.config),
        "static": lambda: StaticCache(config=mixture.config, max_cache_len=32),
    }
    cache = caches[make]()
    batch = {"input_ids": torch.tensor(random_rows((6, 6), seed=4))}
    arguments = {"routing_strategy": strategy, "past_key_values": cache, **GREEDY}
    mixture.reset_round_robin()
    first = mixture.generate(**batch, max_new_tokens=4, **arguments)
    second = mixture.generate(first, max_new_tokens=4, **arguments)
    assert second.tolist() == without_cache(mixture, batch, strategy, max_new_tokens=8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_step_by_step_equals_one_forward(mixture, strategy):
    batch = left_padded(random_rows((7, 5), seed=5))
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    first = {name: tensor[:, :4] for name, tensor in batch.items()}
    output = mixture(**first, routing_strategy=strategy, use_cache=True)
    logits = [output.logits]
    for position in range(4, 7):
        output = mixture(
            input_ids=batch["input_ids"][:, position : position + 1],
            attention_mask=batch["attention_mask"][:, : position + 1],
            position_ids=batch["position_ids"][:, position : position + 1],
            routing_strategy=strategy,
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits)
    kept = output.past_key_values.layers[-1].expert_ids if strategy == "best" else None
    whole = mixture(**batch, routing_strategy=strategy, expert_ids=kept)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole.logits[real], atol=1e-4, rtol=0)


def test_a_cache_filled_under_another_strategy_is_refused(mixture):
    ids = torch.tensor(random_rows((6,)))
    for strategy, other in (
        ("single:0", "single:1"),
        ("router", "base"),
        ("base", "router"),
        ("best", "round_robin"),
    ):
        cache = mixture(ids, routing_strategy=strategy).past_key_values
        with pytest.raises(ValueError, match="cannot be continued"):
            mixture(ids[:, :1], routing_strategy=other, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_goes_by_either_name_and_nothing_warns(mixture, strategy):
    """transformers 5.24 calls it `cache`, and older ones `past_key_values`."""
    ids = torch.tensor(random_rows((6, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = mixture(ids[:, :5], routing_strategy=strategy)
        mixture.generate(ids, routing_strategy=strategy, max_new_tokens=2, **GREEDY)
    cache = start[CACHE]
    copies = copy.deepcopy(cache), copy.deepcopy(cache)
    logits = [
        mixture(ids[:, 5:], routing_strategy=strategy, **{name: value}).logits
        for name, value in zip(("cache", "past_key_values"), copies, strict=True)
    ]
    assert torch.equal(*logits) and [copied.get_seq_length() for copied in copies] == [6, 6]
    with pytest.raises(ValueError, match="two names"):
        mixture(ids[:, 5:], routing_strategy=strategy, cache=cache, past_key_values=cache)


def test_each_rows_expert_stays_with_the_row_of_a_cache(mixture):
    rows = random_rows((6,) * 6, seed=4)
    output = mixture(torch.tensor(rows), routing_strategy="best")
    cache = output.past_key_values
    ids = cache.layers[-1].expert_ids.clone()
    assert len(ids.unique()) > 1
    cache.batch_select_indices(torch.tensor([4, 1, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[-1].expert_ids.tolist() == ids[[4, 4, 1, 1, 0, 0]].tolist()
    mixture(torch.full((6, 1), 5), routing_strategy="best", past_key_values=cache)
    cache.reset()
    assert cache.layers[-1].expert_ids is None


def test_a_batch_size_that_changes_between_calls(mixture):
    for lengths in ((5,), (4, 7, 3), (6, 6)):
        batch = left_padded(random_rows(lengths))
        for strategy in STRATEGIES:
            expected = without_cache(mixture, batch, strategy, max_new_tokens=3)
            assert (
                mixture.generate(**batch, routing_strategy=strategy, max_new_tokens=3, **GREEDY).tolist()
                == expected
            )
