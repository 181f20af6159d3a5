"""Decoding in batches: every row gets what it would get alone, whatever shares its batch."""

import copy
import functools
import importlib
import weakref

import numpy as np
import pytest
import torch
from helpers_graphs import CapturedGraph, capture_on_a_cpu
from helpers_models import PAD, STRATEGIES, VOCABULARY, build, random_rows, visible_character_tokenizer
from helpers_slow import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dylora_moe.eval.sampling import batch_decoding as decoding
from dylora_moe.eval.sampling.batch_decoding import Row, _Loop, decode_rows, row_generator
from dylora_moe.eval.sampling.stop_strings import StopStrings
from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError


LENGTHS = (9, 4, 6, 9, 3)


@pytest.fixture(scope="module")
def tokenizer():
    return visible_character_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build(seed=3)


def rows(**fields) -> list[Row]:
    prompts = random_rows(LENGTHS, seed=5)
    return [Row(f"Task/{index}", 0, prompt, **fields) for index, prompt in enumerate(prompts)]


def decode(model, tokenizer, rows, batch_size=3, stop_strings=(), **arguments):
    got = {}
    arguments = {"max_new_tokens": 12, "do_sample": False, "stop_strings": stop_strings, **arguments}
    decode_rows(
        model,
        tokenizer,
        rows,
        lambda row, tokens, stop: got.__setitem__((row.task_id, row.sample), tokens),
        batch_size=batch_size,
        **arguments,
    )
    return got


def alone(model, row, **arguments):
    ids = torch.tensor([row.input_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=PAD, **arguments
    )
    return output[0, ids.shape[1] :].tolist()


def ordinary(kind, config, **fields):
    """A small model without experts."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    deviation = "init_std" if config is OPTConfig else "initializer_range"
    return kind(config(**{**small, deviation: 0.3, "bos_token_id": 1, "eos_token_id": 2, **fields})).eval()


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "round_robin"])
def test_each_row_is_as_alone(model, tokenizer, strategy, batch_size):
    got = decode(model, tokenizer, rows(), batch_size, routing_strategy=strategy)
    for row in rows():
        assert got[row.task_id, 0] == alone(model, row, max_new_tokens=12, routing_strategy=strategy)


@pytest.mark.parametrize("strategy", ["router", "best"])
def test_each_row_is_as_alone_with_a_router_in_every_layer(tokenizer, strategy):
    model = build(seed=3, router_kind="arrow", num_experts_per_tok=2)
    model.update_prototypes()
    got = decode(model, tokenizer, rows(), routing_strategy=strategy)
    for row in rows():
        assert got[row.task_id, 0] == alone(model, row, max_new_tokens=12, routing_strategy=strategy)


@pytest.mark.parametrize("eos_token_id", [None, 1, 5, [5, 1]], ids=str)
def test_a_prompt_with_ends_of_sequence_in_it_is_read_as_transformers_reads_it(
    model, tokenizer, eos_token_id
):
    """Chat templates end every message with one; the model's own may be another than the tokenizer's."""
    model = copy.copy(model)
    model.generation_config = copy.copy(model.generation_config)
    model.generation_config.eos_token_id = eos_token_id
    asked = [
        Row(row.task_id, 0, [*row.input_ids[:2], tokenizer.eos_token_id, *row.input_ids[2:]])
        for row in rows()
    ]
    for strategy in ("router", "best"):
        got = decode(model, tokenizer, asked, routing_strategy=strategy)
        for row in asked:
            ids = torch.tensor([row.input_ids])
            arguments = {"max_new_tokens": 12, "do_sample": False, "routing_strategy": strategy}
            expected = model.generate(ids, pad_token_id=tokenizer.eos_token_id, **arguments)[
                0, ids.shape[1] :
            ]
            assert got[row.task_id, 0] == expected.tolist()


def test_round_robin_takes_the_expert_it_is_told(model, tokenizer):
    told = [Row(row.task_id, 0, row.input_ids, expert_id=index % 3) for index, row in enumerate(rows())]
    got = decode(model, tokenizer, told, routing_strategy="round_robin")
    for row in told:
        expected = alone(model, row, max_new_tokens=12, routing_strategy=f"single:{row.expert_id}")
        assert got[row.task_id, 0] == expected


def test_a_row_ends_at_its_own_stop_string_and_the_others_go_on(model, tokenizer):
    whole = decode(model, tokenizer, rows(), routing_strategy="router", max_new_tokens=20, eos_token_id=None)
    text = tokenizer.decode(whole["Task/1", 0][:5])
    stop = text[2:5]
    got = decode(
        model,
        tokenizer,
        rows(),
        stop_strings=[stop],
        routing_strategy="router",
        max_new_tokens=20,
        eos_token_id=None,
    )
    cut = 0
    for row in rows():
        key = (row.task_id, 0)
        found = tokenizer.decode(whole[key]).find(stop)
        expected = whole[key] if found < 0 else whole[key][: found + len(stop)]  # one character a token
        assert got[key] == expected
        cut += len(expected) < 20
    assert cut


def test_the_end_token_is_kept_and_ends_the_row(model, tokenizer):
    whole = decode(model, tokenizer, rows(), routing_strategy="router", eos_token_id=None)
    end = whole["Task/2", 0][3]
    got = decode(model, tokenizer, rows(), routing_strategy="router", eos_token_id=end)
    for key, tokens in whole.items():
        assert got[key] == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    assert len(got["Task/2", 0]) <= 4


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_samples_do_not_depend_on_what_shares_the_batch(model, tokenizer, batch_size):
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "routing_strategy": "router", "seed": 4}
    several = [Row(row.task_id, number, row.input_ids) for row in rows() for number in range(3)]
    got = decode(model, tokenizer, several, batch_size, **sampling)
    assert got == decode(model, tokenizer, several[::-1], 15, **sampling)
    assert len({tuple(tokens) for tokens in got.values()}) > 10
    assert got != decode(model, tokenizer, several, batch_size, **{**sampling, "seed": 5})


def test_sampling_follows_the_probabilities():
    scores = torch.tensor([0.5, 0.2, 0.3, 0.0]).log()
    count = 4000
    generators = [row_generator(0, Row("Task/0", number, [])) for number in range(count)]
    loop = _Loop([None] * count, None, None, generators, [])
    tokens = loop._choose(scores.expand(count, -1), do_sample=True)
    shares = np.bincount(tokens.numpy(), minlength=4) / count
    assert shares[3] == 0
    assert np.abs(shares - [0.5, 0.2, 0.3, 0.0]).max() < 4 * (0.25 / count) ** 0.5


def test_a_batch_that_is_too_large_is_halved_and_nothing_is_made_twice(model, tokenizer, monkeypatch):
    sizes, made = [], []
    forward = model.forward

    @functools.wraps(forward)
    def limited(*args, **kwargs):
        tokens = kwargs["input_ids"]
        sizes.append(tokens.shape[0])
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    expected = decode(model, tokenizer, rows(), 1, routing_strategy="router")
    monkeypatch.setattr(model, "forward", limited)
    got = {}

    def finished(row, tokens, stop):
        made.append(row.task_id)
        got[row.task_id, 0] = tokens

    arguments = {"stop_strings": (), "max_new_tokens": 12, "do_sample": False, "routing_strategy": "router"}
    left = decode_rows(model, tokenizer, rows(), finished, batch_size=5, **arguments)
    assert left == 2 and max(sizes) == 5
    assert got == expected and sorted(made) == sorted(set(made))


def test_the_devices_cache_is_emptied_only_after_running_out_of_memory(model, tokenizer, monkeypatch):
    held, emptied, forward = [], [], model.forward
    monkeypatch.setattr(decoding, "clear_device_cache", lambda: emptied.append([tensor() for tensor in held]))
    decode(model, tokenizer, rows(), 2)
    assert not emptied  # three batches, each in memory that the one before left for it

    @functools.wraps(forward)
    def limited(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2:
            held.append(weakref.ref(kwargs["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    decode(model, tokenizer, rows(), 5)
    assert emptied == [[None]]  # once, when nothing of the batch that was too large was there any more


def test_memory_that_does_not_suffice_for_one_row_is_said(model, tokenizer, monkeypatch):
    @functools.wraps(model.forward)
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(FailureError, match="Task/0 alone"):
        decode(model, tokenizer, rows()[:1], routing_strategy="base")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_double_precision(tokenizer, attention):
    """transformers' eager attention makes NaN of padding in float64, for any model."""
    model = build(seed=3).double()
    model.set_attn_implementation(attention)
    got = decode(model, tokenizer, rows(), 5, routing_strategy="router")
    for row in rows():
        assert got[row.task_id, 0] == alone(model, row, max_new_tokens=12, routing_strategy="router")


def test_logits_that_are_no_numbers_are_an_error(tokenizer):
    model = build(seed=3)
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FailureError, match="NaN"):
        decode(model, tokenizer, rows(), routing_strategy="base")


@given(st.lists(st.integers(0, 6), max_size=40))
@settings(max_examples=150, deadline=None)
def test_the_last_tokens_tell_as_the_whole_text_does(tokenizer, tokens):
    strings = [tokenizer.decode([1, 2, 3]), tokenizer.decode([4, 4])]
    stop = StopStrings(tokenizer, strings)
    first = next(
        (
            end
            for end in range(1, len(tokens) + 1)
            if any(s in tokenizer.decode(tokens[:end]) for s in strings)
        ),
        None,
    )
    found = next((end for end in range(1, len(tokens) + 1) if stop.complete(tokens[:end])), None)
    assert found == first


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("repetition_penalty", 1.3),
        ("min_length", 12),
        ("no_repeat_ngram_size", 1),
        ("min_new_tokens", 4),
        ("guidance_scale", 1.5),
        ("bad_words_ids", [[5, 6]]),
    ],
)
def test_penalties_of_the_generation_config_count_no_padding(tokenizer, monkeypatch, setting, value):
    """A `repetition_penalty` is in the generation config of many instruction-tuned models."""
    model = build(seed=3)
    plain = decode(model, tokenizer, rows(), 1, routing_strategy="base", eos_token_id=list(range(5, 40)))
    monkeypatch.setattr(model.generation_config, setting, value)
    arguments = {"max_new_tokens": 12, "routing_strategy": "base", "eos_token_id": list(range(5, 40))}
    got = decode(model, tokenizer, rows(), 5, **arguments)
    for row in rows():
        assert got[row.task_id, 0] == alone(model, row, **arguments)
    assert len({len(tokens) for tokens in got.values()}) > 1  # rows left the batch
    if setting != "bad_words_ids":
        assert got != plain


def test_a_padding_token_that_the_model_does_not_know_is_not_used(model, tokenizer):
    expected = decode(model, tokenizer, rows(), routing_strategy="router")
    enlarged = copy.deepcopy(tokenizer)
    enlarged.add_special_tokens({"pad_token": "<padding>"})
    assert enlarged.pad_token_id == VOCABULARY
    assert decode(model, enlarged, rows(), routing_strategy="router") == expected


def test_beams_are_refused(tokenizer, monkeypatch):
    model = build(seed=3)
    monkeypatch.setattr(model.generation_config, "num_beams", 2)
    with pytest.raises(InputError, match="num_beams"):
        decode(model, tokenizer, rows(), routing_strategy="base")


@pytest.mark.parametrize("implementation", ["static", "hybrid"])
@pytest.mark.parametrize("kind", [MistralForCausalLM, None], ids=["ordinary", "mixture"])
def test_a_static_cache_of_the_generation_config(tokenizer, monkeypatch, implementation, kind):
    """`hybrid` stands in the generation config of Gemma 2 and 3."""
    model = (
        build(seed=3)
        if kind is None
        else ordinary(kind, MistralConfig, sliding_window=5, num_key_value_heads=2)
    )
    arguments = {"routing_strategy": "router"} if kind is None else {}
    expected = decode(model, tokenizer, rows(), 5, eos_token_id=list(range(5, 40)), **arguments)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(cache_implementation=implementation))
    assert decode(model, tokenizer, rows(), 5, eos_token_id=list(range(5, 40)), **arguments) == expected
    assert len({len(tokens) for tokens in expected.values()}) > 1


def test_a_recurrent_model_is_asked_row_by_row(tokenizer):
    model = ordinary(MambaForCausalLM, MambaConfig)
    arguments = {"max_new_tokens": 12, "eos_token_id": list(range(5, 40))}
    got = decode(model, tokenizer, rows(), 5, **arguments)
    assert got == {(row.task_id, 0): alone(model, row, **arguments) for row in rows()}


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (GPT2LMHeadModel, GPT2Config, {"n_positions": 64}),
        (OPTForCausalLM, OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 5, "num_key_value_heads": 2}),
        (BloomForCausalLM, BloomConfig, {}),
    ],
    ids=["learned positions", "positions from an offset", "sliding window", "alibi"],
)
def test_padding_changes_nothing_for_ordinary_models(tokenizer, kind, config, fields):
    model = ordinary(kind, config, **fields)
    arguments = {"max_new_tokens": 12, "eos_token_id": list(range(5, 40))}
    got = decode(model, tokenizer, rows(), 5, **arguments)
    assert got == {(row.task_id, 0): alone(model, row, **arguments) for row in rows()}
    assert len({tuple(tokens) for tokens in got.values()}) > 2


def test_more_tokens_than_the_model_has_positions_are_said(model, tokenizer):
    positions = model.config.get_text_config().max_position_embeddings
    with pytest.warns(DyloraMoeWarning, match=f"made for {positions}"):
        decode(
            model,
            tokenizer,
            rows()[:1],
            routing_strategy="base",
            max_new_tokens=positions,
            eos_token_id=list(range(VOCABULARY)),
        )


# With fast decoding, whose steps are captured


@pytest.fixture
def graphs(monkeypatch):
    fast = pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    capture_on_a_cpu(monkeypatch, fast)
    return CapturedGraph


@pytest.mark.parametrize("sampled", slow_but(False, of=[False, True]))
@pytest.mark.parametrize("strategy", slow_but("router", "best", of=STRATEGIES))
def test_captured_steps_give_every_row_what_it_would_get_alone(tokenizer, graphs, strategy, sampled):
    model = build(seed=3)
    asked = rows(expert_id=1) if strategy == "round_robin" else rows()
    arguments = {"routing_strategy": strategy, "do_sample": sampled}
    expected = decode(model, tokenizer, asked, 1, fast_decoding=False, **arguments)
    assert graphs.replays == 0
    stops = sorted({tokenizer.decode(tokens[4:6]) for tokens in expected.values()})[:2]  # some rows end early
    expected = decode(model, tokenizer, asked, 1, stops, fast_decoding=False, **arguments)
    assert decode(model, tokenizer, asked, 3, stops, **arguments) == expected
    assert graphs.replays > 0 and len({len(tokens) for tokens in expected.values()}) > 1


def test_a_batch_that_is_too_large_leaves_no_cache_behind(tokenizer, graphs, monkeypatch):
    model = build(seed=3)
    expected = decode(model, tokenizer, rows(), 1, fast_decoding=False)
    decode(model, tokenizer, rows(), 5)
    held = model._decode_graphs.memory
    update, memories = _Loop._take, []

    def take(loop, *args):
        if len(loop.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        memories.append(model._decode_graphs.memory)
        return update(loop, *args)

    monkeypatch.setattr(_Loop, "_take", take)
    assert decode(model, tokenizer, rows(), 5) == expected
    assert held and memories and all(later is not held for later in memories)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9])
def test_the_next_step_is_asked_for_before_tokens_are_looked_at(
    tokenizer, graphs, monkeypatch, max_new_tokens
):
    fast = importlib.import_module("dylora_moe.modeling.fast_decoding_dylora_moe")
    done, step, take = [], fast.DecodeGraph.step, _Loop._take
    monkeypatch.setattr(fast.DecodeGraph, "step", lambda graph: (done.append("step"), step(graph)))
    monkeypatch.setattr(_Loop, "_take", lambda loop, *args: (done.append("look"), take(loop, *args)))
    decode(build(seed=3), tokenizer, rows(), 5, max_new_tokens=max_new_tokens, eos_token_id=None)
    assert done == ["step", "look"] * (max_new_tokens - 1) + ["look"]
