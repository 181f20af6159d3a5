"""Every strategy under every way to generate and every cache, against a naive recomputation."""

import threading

import pytest
import torch
from helpers_models import (
    PAD,
    STRATEGIES,
    PeftLoop,
    build,
    character_tokenizer,
    left_padded,
    random_rows,
    text_of,
)
from helpers_slow import slow_but
from transformers import DynamicCache, GenerationConfig, StaticCache, TextStreamer


PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]  # repeats itself, so that prompt lookup finds candidates
NEW = 6
PLAIN = {"eos_token_id": 1, "pad_token_id": 2, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def mixture():
    return build(seed=7)


@pytest.fixture(scope="module")
def loop(mixture):
    return PeftLoop(mixture)


@pytest.fixture(scope="module")
def expected(loop):
    """Greedy tokens and beams of each strategy from a PEFT loop: one row, no cache."""
    return {strategy: loop.greedy(PROMPT, strategy, 0, NEW) for strategy in STRATEGIES}


def assistant():
    return build(seed=11, router_input=None).foundation.eval()


MODES = {
    "greedy": lambda: {},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "assisted": lambda: {"assistant_model": assistant()},
    "one beam of sampling": lambda: {"do_sample": True, "top_k": 1},
    "chunked prefill": lambda: {"prefill_chunk_size": 4},
}
CACHES = {
    "none": lambda model: {"use_cache": False},
    "dynamic": lambda model: {},
    "handed over": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "static": lambda model: {"cache_implementation": "static"},
    "static of the user's": lambda model: {
        "past_key_values": StaticCache(config=model.config, max_cache_len=40)
    },
}
# What transformers itself does not offer, for any model.
NOT_OFFERED = {
    ("prompt lookup", "none"),
    ("assisted", "none"),
    ("chunked prefill", "none"),
    ("prompt lookup", "static"),
    ("assisted", "static"),
    ("prompt lookup", "static of the user's"),
    ("assisted", "static of the user's"),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_mode_and_cache(mixture, expected, strategy, mode, cache):
    if (mode, cache) in NOT_OFFERED:
        pytest.skip(f"transformers has no {mode} with cache: {cache}")
    mixture.reset_round_robin()
    arguments = {**PLAIN, "do_sample": False, **MODES[mode](), **CACHES[cache](mixture)}
    found = mixture.generate(torch.tensor([PROMPT]), routing_strategy=strategy, **arguments)
    assert found[0, len(PROMPT) :][:NEW].tolist() == expected[strategy]


@pytest.fixture(scope="module")
def arrow():
    """A model with a router of every layer, and what it decodes greedily and with beams."""
    model = build(seed=7, router_kind="arrow", num_experts_per_tok=2, router_temperature=0.5)
    model.update_prototypes()
    loop = PeftLoop(model)
    strategies = ("router", "best")
    greedy = {strategy: loop.greedy(PROMPT, strategy, 0, NEW) for strategy in strategies}
    return model, greedy, {strategy: naive_beams(loop, strategy, 3) for strategy in strategies}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", [*MODES, "beams"])
@pytest.mark.parametrize("strategy", ["router", "best"])
def test_a_router_of_every_layer_in_every_mode_and_cache(arrow, strategy, mode, cache):
    if (mode, cache) in NOT_OFFERED:
        pytest.skip(f"transformers has no {mode} with cache: {cache}")
    model, greedy, beams = arrow
    arguments = {**PLAIN, "do_sample": False, **CACHES[cache](model)}
    if mode == "beams":
        arguments |= {"num_beams": 3, "eos_token_id": None}
    else:
        arguments |= MODES[mode]()
    found = model.generate(torch.tensor([PROMPT]), routing_strategy=strategy, **arguments)
    expected = beams[strategy] if mode == "beams" else greedy[strategy]
    assert found[0, len(PROMPT) :][:NEW].tolist() == expected


def naive_beams(loop, strategy: str, num_beams: int) -> list[int]:
    """Beam search by hand over the PEFT loop, without end tokens: the best sequence's new tokens."""
    beams = [([], 0.0)]
    for _ in range(NEW):
        grown = []
        for tokens, score in beams:
            logits = loop.logits(PROMPT + tokens, strategy, len(PROMPT), 0)[-1].log_softmax(dim=-1)
            values, choices = logits.topk(num_beams)
            grown += [(tokens + [int(t)], score + float(v)) for v, t in zip(values, choices, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    return beams[0][0]


@pytest.mark.parametrize("cache", slow_but("dynamic", "none", of=CACHES))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_beam_search(mixture, loop, strategy, cache):
    mixture.reset_round_robin()
    arguments = {**PLAIN, "eos_token_id": None, "do_sample": False, "num_beams": 3, **CACHES[cache](mixture)}
    found = mixture.generate(torch.tensor([PROMPT]), routing_strategy=strategy, **arguments)
    assert found[0, len(PROMPT) :].tolist() == naive_beams(loop, strategy, 3)


@pytest.mark.parametrize(
    "sampling", [{"num_return_sequences": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_draws_the_same_with_and_without_a_cache(mixture, strategy, sampling):
    draws = []
    for use_cache in (True, False):
        mixture.reset_round_robin()
        torch.manual_seed(3)
        arguments = {**PLAIN, "do_sample": True, "use_cache": use_cache, **sampling}
        draws.append(
            mixture.generate(**left_padded([PROMPT, PROMPT[:4]]), routing_strategy=strategy, **arguments)
        )
    assert draws[0].shape[0] == 2 * sampling["num_return_sequences"]
    assert torch.equal(*draws)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_embeds_equal_input_ids(mixture, expected, strategy):
    mixture.reset_round_robin()
    embeddings = mixture.get_input_embeddings()(torch.tensor([PROMPT]))
    found = mixture.generate(inputs_embeds=embeddings, routing_strategy=strategy, do_sample=False, **PLAIN)
    assert found[0].tolist() == expected[strategy]


class Words:
    """One word a token, as much of a tokenizer as streaming needs."""

    def decode(self, ids, **kwargs) -> str:
        return " ".join(f"t{int(token)}" for token in ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streaming(mixture, expected, strategy, capsys):
    mixture.reset_round_robin()
    streamer = TextStreamer(Words(), skip_prompt=True)
    mixture.generate(
        torch.tensor([PROMPT]), routing_strategy=strategy, streamer=streamer, do_sample=False, **PLAIN
    )
    assert capsys.readouterr().out.split() == [f"t{token}" for token in expected[strategy]]


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.mark.parametrize("mode", ["greedy", "one beam of sampling", "prompt lookup"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_strings_end_each_row_where_its_own_text_has_one(mixture, loop, tokenizer, strategy, mode):
    rows = [PROMPT, PROMPT[:4]] if mode != "prompt lookup" else [PROMPT]
    alone = [loop.greedy(row, strategy, index, 8) for index, row in enumerate(rows)]
    stop = text_of(alone[0][2:4])
    ends = [text_of(tokens).find(stop) for tokens in alone]
    ends = [end + len(stop) if end >= 0 else len(tokens) for end, tokens in zip(ends, alone, strict=True)]
    mixture.reset_round_robin()
    arguments = {**PLAIN, "max_new_tokens": 8, "do_sample": False, **MODES[mode]()}
    batch = left_padded(rows)
    found = mixture.generate(
        **batch, routing_strategy=strategy, stop_strings=[stop, "never"], tokenizer=tokenizer, **arguments
    )
    assert ends[0] <= 4
    for row, tokens, end in zip(found[:, batch["input_ids"].shape[1] :].tolist(), alone, ends, strict=True):
        assert row[:end] == tokens[:end]
        assert set(row[end:]) <= {PAD}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_to_keep(mixture, strategy):
    batch = left_padded(random_rows((8, 5)))
    whole = mixture(**batch, routing_strategy=strategy).logits
    for keep in (1, 3, torch.tensor([0, 4, 7])):
        kept = mixture(**batch, routing_strategy=strategy, logits_to_keep=keep).logits
        wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"assistant_model": True},
    ],
)
def test_the_routing_of_every_generated_token(mixture, loop, arguments):
    if "assistant_model" in arguments:
        arguments = {"assistant_model": assistant()}
    output = mixture.generate(
        torch.tensor([PROMPT]),
        routing_strategy="router",
        output_router_logits=True,
        return_dict_in_generate=True,
        **{**PLAIN, "do_sample": False, **arguments},
    )
    assert output.router_logits.shape[0] == output.sequences.shape[0]
    for sequence, logits in zip(output.sequences.tolist(), output.router_logits, strict=True):
        assert len(logits) >= len(sequence) - len(PROMPT)
        expected = loop.router_logits(sequence[:-1])[len(PROMPT) - 1 :]
        torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=0)


def test_the_routing_of_padded_rows_that_end_at_different_times(mixture, loop):
    rows = random_rows((10, 4))
    end = loop.greedy(rows[1], "router", 0, 3)[-1]
    assert end not in loop.greedy(rows[0], "router", 0, NEW)
    arguments = {"output_router_logits": True, "return_dict_in_generate": True, "do_sample": False}
    output = mixture.generate(**left_padded(rows), **{**PLAIN, "eos_token_id": end}, **arguments)
    for row, sequence, logits in zip(rows, output.sequences.tolist(), output.router_logits, strict=True):
        new = sequence[len(rows[0]) :]
        new = new[: new.index(end) + 1] if end in new else new
        assert len(new) == (3 if row is rows[1] else NEW)
        expected = loop.router_logits(row + new[:-1])[len(row) - 1 :]
        torch.testing.assert_close(logits[: len(new)], expected, atol=1e-4, rtol=0)


def test_routing_is_asked_for_by_an_argument_else_a_handed_config_else_the_models_else_its_config():
    model, ids = build(), torch.tensor([PROMPT])
    fields = {**PLAIN, "do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 2}

    def recorded(handed=None, **arguments) -> bool:
        handed = GenerationConfig(**fields, **handed) if handed is not None else None
        output = model.generate(ids, handed, **(fields if handed is None else {}), **arguments)
        return output.get("router_logits") is not None

    yes, no = {"output_router_logits": True}, {"output_router_logits": False}
    assert (recorded(), recorded(yes), recorded(yes, **no), recorded(no, **yes)) == (False, True, False, True)
    model.generation_config.output_router_logits = True
    assert (recorded(), recorded({}), recorded(no), recorded(**no)) == (True, True, False, False)
    model.generation_config.output_router_logits = None
    model.config.output_router_logits = True
    assert (recorded(), recorded(no), recorded(**no)) == (True, False, False)


@pytest.mark.parametrize("filled_by", ["best", "round_robin"])
def test_an_emptied_cache_chooses_experts_anew(filled_by):
    model = build(seed=11)
    fields = {**PLAIN, "do_sample": False, "eos_token_id": None, "routing_strategy": "best"}
    for seed in range(4):
        first, second = (torch.tensor(random_rows((7,), seed=number)) for number in (seed, seed + 50))
        caches = []
        for _ in range(2):
            caches.append(model(first, routing_strategy=filled_by).past_key_values)
            caches[-1].crop(-caches[-1].get_seq_length())
        logits = model(second, past_key_values=caches[0], routing_strategy="best").logits
        assert torch.equal(logits, model(second, routing_strategy="best").logits)
        found = model.generate(second, past_key_values=caches[1], **fields)
        assert found.tolist() == model.generate(second, **fields).tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_that_is_multiplied_already(mixture, strategy):
    ids = torch.tensor([PROMPT])
    cache = mixture(ids, routing_strategy=strategy).past_key_values
    cache.batch_repeat_interleave(3)
    longer = torch.cat([ids, ids[:, :2]], dim=1)
    arguments = {
        **PLAIN,
        "num_beams": 3,
        "num_return_sequences": 3,
        "do_sample": False,
        "routing_strategy": strategy,
    }
    mixture.reset_round_robin()
    found = mixture.generate(longer, past_key_values=cache, **arguments)
    if strategy == "best":  # which the shorter prompt chose
        arguments["routing_strategy"] = f"single:{int(cache.layers[-1].expert_ids[0])}"
    mixture.reset_round_robin()
    assert found.tolist() == mixture.generate(longer, **arguments).tolist()


def test_what_cannot_be_generated_is_refused_in_one_line(mixture):
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match="assistant_early_exit"):
        mixture.generate(ids, assistant_early_exit=1, **PLAIN)
    for call in (mixture, mixture.generate):
        with pytest.raises(ValueError, match="expert_ids"):
            call(ids, routing_strategy="single:0", expert_ids=torch.tensor([1]))
    for arguments in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant()}):
        with pytest.raises(ValueError, match="batch"):  # transformers' own, for any model
            mixture.generate(**left_padded([PROMPT, PROMPT[:4]]), **PLAIN, **arguments)


def test_no_routing_where_no_router_is_read(mixture):
    arguments = {"output_router_logits": True, "return_dict_in_generate": True, "do_sample": False, **PLAIN}
    for strategy in ("best", "single:0", "ensemble"):
        output = mixture.generate(torch.tensor([PROMPT]), routing_strategy=strategy, **arguments)
        assert output.router_logits is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hidden_states_and_attentions(mixture, strategy):
    mixture.set_attn_implementation("eager")
    try:
        batch = left_padded(random_rows((6, 4)))
        output = mixture(
            **batch, routing_strategy=strategy, output_hidden_states=True, output_attentions=True
        )
    finally:
        mixture.set_attn_implementation("sdpa")
    rows = 2 * (mixture.config.num_experts if strategy == "ensemble" else 1)
    assert [tuple(state.shape) for state in output.hidden_states] == [(rows, 6, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(rows, 4, 6, 6)] * 2


def test_paged_caches_are_refused_in_one_line(mixture):
    for call in (
        lambda: mixture.generate(torch.tensor([PROMPT]), cache_implementation="paged", max_new_tokens=2),
        lambda: mixture.generate_batch([PROMPT], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="cannot route"):
            call()


def test_threads_do_not_see_each_others_experts(mixture, expected):
    found = {}

    def work(strategy):
        for _ in range(5):
            tokens = mixture.generate(
                torch.tensor([PROMPT]), routing_strategy=strategy, do_sample=False, **PLAIN
            )
            found.setdefault(strategy, []).append(tokens[0, len(PROMPT) :].tolist())

    strategies = ("router", "single:1", "base", "uniform")
    threads = [threading.Thread(target=work, args=(strategy,)) for strategy in strategies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for strategy in strategies:
        assert found[strategy] == [expected[strategy]] * 5


def test_guidance_uses_the_calls_strategy():
    model = build()
    ids = torch.tensor(random_rows((7,), seed=3))
    arguments = {"guidance_scale": 2.0, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    called = model.generate(ids, routing_strategy="single:1", **arguments)
    model.generation_config.routing_strategy = "single:1"
    assert called.tolist() == model.generate(ids, **arguments).tolist()
