"""Prompt lookup by fast decoding, with the base model's forward in place of kernels: tokens are those of greedy
decoding, whatever is drafted."""

import pytest
import torch
from helpers_graphs import GREEDY, Streamer, look_up_on_a_cpu
from helpers_models import STRATEGIES, build, character_tokenizer, left_padded, random_rows, text_of
from transformers import GPT2Config


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast


# With an end that no text meets, since transformers 5.10 looks nothing up without one.
WANTED = {**GREEDY, "max_new_tokens": 24, "eos_token_id": 10_000}
REPEATED = left_padded([random_rows((6,), seed=4)[0] * 3])


@pytest.fixture(autouse=True)
def lookups(monkeypatch, fast_on_a_cpu):
    look_up_on_a_cpu(monkeypatch, fast)


def greedy_and_looked_up(model, inputs=REPEATED, drafts: int = 4, **arguments) -> list[list[list[int]]]:
    """The tokens of greedy decoding on the default path, and those of prompt lookup."""
    found = []
    for more in ({"fast_decoding": False}, {"prompt_lookup_num_tokens": drafts}):
        model.reset_round_robin()
        found.append(model.generate(**inputs, **{**WANTED, **arguments, **more}).tolist())
    return found


def graph_of(steps: list):
    """The one decode graph of all steps."""
    (graph,) = dict.fromkeys(steps)
    return graph


@pytest.mark.parametrize("drafts", [1, 4, 40])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0"])
def test_tokens_are_those_of_greedy_decoding(steps, strategy, drafts):
    model, count = build(seed=7), 0
    for seed in range(4):
        inputs = left_padded([random_rows((6,), seed=seed)[0] * 2])
        greedy, found = greedy_and_looked_up(model, inputs, drafts, routing_strategy=strategy)
        assert found == greedy
    graph = graph_of(steps)
    assert graph.tokens == 1 + min(drafts, fast.MOST_DRAFTS)
    assert graph.speculated == graph.steps * (graph.tokens - 1) and graph.hits > 0
    count = 4 * (WANTED["max_new_tokens"] - 1)  # the prompt's pass gives the first token
    assert len(steps) < count <= graph.steps + graph.hits


def test_padding(steps):
    row = random_rows((6,), seed=4)[0] * 2
    inputs = {name: rows[:1] for name, rows in left_padded([row, [5] * 15]).items()}
    for strategy in ("router", "single:1"):
        greedy, found = greedy_and_looked_up(build(seed=7), inputs, routing_strategy=strategy)
        assert found == greedy
    assert steps


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_a_text_ends_where_it_should(steps, new):
    greedy, found = greedy_and_looked_up(build(seed=7), max_new_tokens=new)
    assert found == greedy and len(found[0]) == 18 + new


@pytest.mark.parametrize("place", [0, 3, 9])
def test_an_end_among_the_drafts(steps, place):
    model = build(seed=7)
    free, _ = greedy_and_looked_up(model)
    greedy, found = greedy_and_looked_up(model, eos_token_id=free[0][18 + place])
    assert found == greedy and len(found[0]) <= 18 + place + 1
    tokenizer, end = character_tokenizer(), text_of(free[0][18 + place : 20 + place])
    greedy, found = greedy_and_looked_up(model, stop_strings=[end], tokenizer=tokenizer)
    assert found == greedy and len(found[0]) < len(free[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": [45, 81, 73]},
    ],
    ids=str,
)
def test_logits_processors(steps, arguments):
    greedy, found = greedy_and_looked_up(build(seed=7), **arguments)
    assert found == greedy and steps


def test_streamers_get_every_token_once():
    model, streamer = build(seed=7), Streamer()
    (greedy,), (found,) = greedy_and_looked_up(model)
    model.generate(**REPEATED, **WANTED, prompt_lookup_num_tokens=4, streamer=streamer)
    assert streamer.seen == [*greedy, "end"] and found == greedy


def test_a_text_that_outgrows_its_cache(steps, monkeypatch):
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    monkeypatch.setattr(fast, "FIRST_CAPACITY", 16)
    for strategy in ("router", "best"):
        greedy, found = greedy_and_looked_up(build(seed=7), max_new_tokens=50, routing_strategy=strategy)
        assert found == greedy
    assert {graph.capacity for graph in steps} == {24, 48, 96}


@pytest.mark.parametrize("both", [True, False])
def test_prompts_as_embeddings(both):
    model = build(seed=7)
    inputs = {**REPEATED, "inputs_embeds": model.get_input_embeddings()(REPEATED["input_ids"])}
    if not both:
        del inputs["input_ids"]
    greedy, found = greedy_and_looked_up(model, inputs)
    assert found == greedy


@pytest.mark.parametrize(
    "arguments",
    [{"do_sample": True}, {"return_dict_in_generate": True}, {"output_scores": True}],
    ids=str,
)
def test_what_is_looked_up_on_the_default_path(steps, arguments):
    greedy, found = [
        build(seed=7).generate(**REPEATED, **{**WANTED, **arguments, **more})
        for more in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    lookups = [graph for graph in steps if graph.tokens > 1]
    assert bool(lookups) == ("output_scores" in arguments)  # which without a dict nobody gets
    if "return_dict_in_generate" in arguments:
        assert found.sequences.tolist() == greedy.sequences.tolist()


def test_drafts_stay_within_the_positions_that_there_are(steps, monkeypatch):
    """Those of a table of positions, which the last drafts of a text could lie beyond."""
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(GPT2Config(**sizes, n_positions=18 + 24), experts, seed=5)
    monkeypatch.setattr(fast.ForwardStep, "longest_text", 18 + 24)
    greedy, found = greedy_and_looked_up(model)
    assert found == greedy and not steps
    greedy, found = greedy_and_looked_up(model, max_new_tokens=9)
    assert found == greedy and steps


def test_a_call_that_breaks_off_spoils_no_other(steps, monkeypatch):
    model = build(seed=7)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(fast.ForwardStep, "router_logits", out_of_memory)
        model.generate(**REPEATED, **WANTED, prompt_lookup_num_tokens=4)
    assert not model._decode_graphs.graphs  # of those that there are, the graphs may be half captured
    greedy, found = greedy_and_looked_up(model)
    assert found == greedy


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("as a GPU says it")
