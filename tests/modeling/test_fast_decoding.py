"""Fast decoding by the base model's forward, with plain calls in place of graphs, against the default path.

The static KV cache is in `test_static_kv_cache.py`, the kernels in `test_decode_step.py`, captured steps in
`test_captured_steps.py`, graphs in `test_gpu.py`.
"""

import copy
import functools
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from helpers_families import OTHERS, build_other
from helpers_graphs import BATCH, GREEDY, Streamer, default_and_fast
from helpers_models import (
    SIZES,
    STRATEGIES,
    build,
    character_tokenizer,
    left_padded,
    llama_config,
    llama_experts,
    random_rows,
    text_of,
)
from helpers_slow import slow_but
from transformers import (
    BartConfig,
    GenerationMixin,
    GPT2Config,
    OPTConfig,
    Qwen2Config,
    StoppingCriteria,
)


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_step_dylora_moe as fast_step
from dylora_moe.modeling.cache_dylora_moe import CACHE


pytestmark = pytest.mark.usefixtures("fast_on_a_cpu")
SAMPLED = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}


@pytest.mark.parametrize("arguments", [{}, SAMPLED, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0", "single:2"])
def test_tokens_equal_those_of_the_default_path(steps, strategy, arguments):
    model = build(seed=7)
    for seed in range(2):  # the second call runs in the first one's cache
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        expected, found = default_and_fast(model, inputs, seed, routing_strategy=strategy, **arguments)
        assert found.tolist() == expected.tolist()
    assert len(steps) == 2 * (GREEDY["max_new_tokens"] - 1)
    assert len(set(map(id, steps))) == 1


@pytest.mark.parametrize("strategy", ["router", "best", "round_robin", "ensemble", "single:1"])
def test_rows_that_end_at_different_times(steps, strategy):
    model = build(seed=7)
    free, _ = default_and_fast(model, routing_strategy=strategy)
    ends = sorted({row[9 + 3] for row in free.tolist()})
    expected, found = default_and_fast(model, routing_strategy=strategy, eos_token_id=ends[:2])
    assert found.tolist() == expected.tolist()
    assert steps and expected.shape[1] <= free.shape[1]


class StopAt(StoppingCriteria):
    """A criterion of the caller's that reads the text so far, as EvalPlus's do."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 9:] == self.token).any(dim=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_strings(steps, strategy):
    model, tokenizer = build(seed=7), character_tokenizer()
    free, _ = default_and_fast(model, routing_strategy=strategy)
    stops = [text_of(row[start : start + 2]) for row, start in zip(free.tolist(), (11, 14, 12), strict=True)]
    expected, found = default_and_fast(
        model, routing_strategy=strategy, stop_strings=stops, tokenizer=tokenizer
    )
    assert found.tolist() == expected.tolist()
    assert found.shape[1] < free.shape[1] and len(steps) > GREEDY["max_new_tokens"]


def test_prompts_as_embeddings(steps):
    model = build(seed=7)
    embedded = {**BATCH, "inputs_embeds": model.get_input_embeddings()(BATCH["input_ids"])}
    for inputs in (embedded, {name: embedded[name] for name in ("inputs_embeds", "attention_mask")}):
        for strategy in ("router", "best", "single:1"):
            expected, found = default_and_fast(model, inputs, routing_strategy=strategy)
            assert found.tolist() == expected.tolist()
    assert len(steps) == 6 * (GREEDY["max_new_tokens"] - 1)


@pytest.mark.parametrize("strategy", slow_but("router", of=STRATEGIES))
def test_masks_and_positions_of_the_callers(steps, strategy):
    model, inputs = build(seed=7), {name: rows.clone() for name, rows in BATCH.items()}
    inputs["attention_mask"][0, 3] = 0  # a hidden token within a prompt is no padding
    for more in ({}, {"position_ids": torch.arange(9).expand(3, 9) + 3}):
        for copies in (1, 2):
            wanted = {"routing_strategy": strategy, "do_sample": copies > 1, "num_return_sequences": copies}
            expected, found = default_and_fast(model, {**inputs, **more}, **wanted)
            assert found.tolist() == expected.tolist()
    assert len(steps) == 4 * 11


def test_criteria_streamers_and_scores(steps):
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    free, _ = default_and_fast(model, one)
    stop = StopAt(int(free[0, 9 + 4]))
    expected, found = default_and_fast(model, one, stopping_criteria=[stop])
    assert found.tolist() == expected.tolist() and found.shape[1] < free.shape[1]

    streamer = Streamer()
    model.generate(**one, **GREEDY, streamer=streamer)
    assert streamer.seen == [*free[0].tolist(), "end"]
    wanted = {"output_scores": True, "output_logits": True, "output_router_logits": True}
    expected, found = default_and_fast(model, return_dict_in_generate=True, **wanted)
    assert len(steps) > 20
    for name in ("scores", "logits"):
        for one_step, other in zip(expected[name], found[name], strict=True):
            torch.testing.assert_close(other, one_step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.router_logits, expected.router_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_that_comes_back_can_be_continued(steps, strategy):
    model = build(seed=7)
    output = default_and_fast(model, routing_strategy=strategy, return_dict_in_generate=True)[1]
    again = {**BATCH, "input_ids": output.sequences}
    again["attention_mask"] = torch.cat([BATCH["attention_mask"], torch.ones(3, 12, dtype=torch.long)], dim=1)
    count = len(steps)
    model.reset_round_robin()
    arguments = {**GREEDY, "max_new_tokens": 3, "routing_strategy": strategy}
    continued = model.generate(**again, **{CACHE: output[CACHE]}, **arguments)
    assert len(steps) == count  # a cache that is handed in takes the default path
    model.reset_round_robin()
    longer = model.generate(**BATCH, **{**arguments, "max_new_tokens": 15}, fast_decoding=False)
    assert continued.tolist() == longer.tolist()


@pytest.mark.parametrize(
    "fields", [{"router_input": "experts_sum"}, {"router_mode": "dense"}, {"num_experts_per_tok": 2}]
)
def test_other_routers(steps, fields):
    expected, found = default_and_fast(build(seed=7, **fields), routing_strategy="router")
    assert found.tolist() == expected.tolist() and steps


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_other_foundations(steps, kind, attention):
    if kind == "gpt2":
        sizes = {
            "vocab_size": 97,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        base, names = GPT2Config(**sizes), ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    elif kind == "opt":
        base = OPTConfig(**{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32})
        names = [f"model.decoder.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    else:
        base = Qwen2Config(**SIZES)
        names = llama_experts()[0]["target_modules"]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(base, experts, seed=5)
    model.set_attn_implementation(attention)
    for strategy in ("router", "ensemble", "single:1"):
        expected, found = default_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert steps


@pytest.mark.parametrize("kind", OTHERS)
def test_base_models_that_the_kernels_do_not_know(steps, kind):
    model = build_other(kind)
    if kind == "qwen3-moe":
        model.foundation.set_experts_implementation("batched_mm")
    for strategy in ("router", "ensemble", "single:1"):
        expected, found = default_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert len(steps) == 3 * 11


@pytest.mark.parametrize("kind", [OPTConfig, BartConfig])
def test_speculation_where_a_head_calls_a_part_of_its_body(steps, monkeypatch, kind):
    monkeypatch.setattr(fast, "SPECULATION_PAYS", 0.0)
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    names = [f"model.decoder.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(kind(**{**SIZES, **sizes, "decoder_ffn_dim": 48}), experts, seed=5)
    expected, found = default_and_fast(model, routing_strategy="router")
    assert found.tolist() == expected.tolist()
    assert len(steps) == steps[0].speculated == 11


@pytest.mark.parametrize("strategy", slow_but("best", of=STRATEGIES))
@pytest.mark.parametrize("copies", [1, 2])
def test_layers_that_the_config_counts_and_the_base_model_lacks(steps, told, strategy, copies):
    config = BartConfig(
        **{**SIZES, "num_hidden_layers": 4, "decoder_layers": 2, "decoder_attention_heads": 4}
    )
    names = [f"model.decoder.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    wanted = {"routing_strategy": strategy, "do_sample": copies > 1, "num_return_sequences": copies}
    expected, found = default_and_fast(build(config, experts, seed=5), **wanted)
    assert found.tolist() == expected.tolist() and not steps
    assert "layers that the config counts" in told[-1]


def test_inputs_that_are_prepared_another_way(steps, monkeypatch):
    """The model is refused behind its prompt, and gets whatever the caller's own code made for it."""
    model = build(seed=7)
    expected = model.generate(**BATCH, **GREEDY, fast_decoding=False)
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_embeddings(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        return inputs

    monkeypatch.setitem(vars(model), "prepare_inputs_for_generation", prepare_embeddings)
    assert model.generate(**BATCH, **GREEDY).tolist() == expected.tolist() and not steps


@pytest.mark.parametrize("other", [SAMPLED, {"prompt_lookup_num_tokens": 2, "eos_token_id": 10_000}], ids=str)
def test_settings_that_transformers_changes_while_it_decodes(steps, monkeypatch, other):
    """On a GPU, how a base model computes its own experts; before a prompt the model is the same as behind it."""

    @contextmanager
    def optimize(model):
        before = model.foundation.config._experts_implementation
        model.foundation.set_experts_implementation("batched_mm")
        yield
        model.foundation.set_experts_implementation(before)

    monkeypatch.setattr(GenerationMixin, "_optimize_model_for_decode", optimize)
    made, make = [], fast.ForwardStep.__init__
    monkeypatch.setattr(fast.ForwardStep, "__init__", lambda *args: (made.append(args), make(*args))[1])
    model, one = build_other("qwen3-moe"), {name: rows[:1] for name, rows in BATCH.items()}
    for arguments in ({}, other, {}, other):
        model.generate(**one, **{**GREEDY, **arguments}, routing_strategy="single:1")
    assert len(made) == 1 and steps


def test_double_precision(steps):
    expected, found = default_and_fast(build(seed=7).double())
    assert found.tolist() == expected.tolist() and steps


@pytest.mark.parametrize("given", [1, [1], [1, 1], [0, 1, 9]], ids=str)
def test_wrong_experts_are_refused(given):
    with pytest.raises(ValueError, match="`expert_ids` is"):
        build(seed=7).generate(**BATCH, **GREEDY, routing_strategy="best", expert_ids=torch.tensor(given))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", slow_but("router", "best", of=STRATEGIES))
def test_experts_on_the_head(steps, strategy, tied):
    """It sees a prompt's last token alone, and the router has weights for all of them."""
    names = [*(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)), "lm_head"]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(llama_config(tie_word_embeddings=tied), experts, seed=7)
    for _ in range(2):
        expected, found = default_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert steps


def test_weights_that_change_between_calls(steps):
    model = build(seed=7)
    default_and_fast(model)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_A.data.mul_(-1.5)  # in place, which leaves no trace
    expected, found = default_and_fast(model)
    assert found.tolist() == expected.tolist()
    model.add_expert("fourth", target_modules=llama_experts()[0]["target_modules"], r=4)
    expected, found = default_and_fast(model, routing_strategy="uniform")
    assert found.tolist() == expected.tolist()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate(**BATCH, **GREEDY).tolist() == default_and_fast(model)[0].tolist()


# With an end that no text meets, since transformers 5.10 looks nothing up without one.
PROMPT_LOOKUP = {"prompt_lookup_num_tokens": 2, "eos_token_id": 10_000}


@pytest.mark.parametrize("inner", [{}, {"num_beams": 2}, PROMPT_LOOKUP], ids=str)
def test_a_streamer_that_generates_with_the_same_model(steps, inner):
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    outer = model.generate(**one, **GREEDY, fast_decoding=False)
    inner = {**GREEDY, **inner}
    expected = model.generate(**one, **inner, fast_decoding=False)

    class Streamer:
        def put(self, value):
            assert model.generate(**one, **inner).tolist() == expected.tolist()

        def end(self):
            pass

    assert model.generate(**one, **GREEDY, streamer=Streamer()).tolist() == outer.tolist()
    assert steps


def test_inside_inference_mode_and_then_outside(steps):
    model = build(seed=7)
    expected, _ = default_and_fast(model)
    with torch.inference_mode():
        assert model.generate(**BATCH, **GREEDY).tolist() == expected.tolist()
    assert model.generate(**BATCH, **GREEDY).tolist() == expected.tolist()
    model.train()(BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()


# Prompts


def test_a_prompt_is_the_default_path_s(steps, monkeypatch):
    """It is not kept waiting: what is looked at before a graph may run is looked at behind the first token."""
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    streamer = Streamer()
    survey, take = fast.Survey, fast.GraphStore.take
    monkeypatch.setattr(fast, "Survey", lambda model: (streamer.seen.append("look"), survey(model))[1])
    monkeypatch.setattr(fast.GraphStore, "take", lambda *args: (streamer.seen.append("take"), take(*args))[1])
    output = model.generate(**one, **{**GREEDY, "max_new_tokens": 3}, streamer=streamer)
    *prompt, first, second, third = output[0].tolist()
    layers = model.num_layers_per_stream
    assert streamer.seen == [*prompt, first, "look", *["take"] * layers, second, third, "end"]
    assert len(steps) == 2


def test_a_call_that_is_refused_keeps_no_other_from_decoding_fast(steps):
    """For the rest of it: another thread, with no autocast for instance, may decode, and memory is freed."""
    model, free = build(seed=7), []
    handle = model.register_forward_hook(lambda *args: None)

    class Look(Streamer):
        def put(self, value):
            store = vars(model).get("_decode_graphs")
            free.append(store is None or not store.lock.locked())

    model.generate(**{name: rows[:1] for name, rows in BATCH.items()}, **GREEDY, streamer=Look())
    assert not steps and free == [True, False, *[True] * 11]  # it has the lock until the first token
    handle.remove()
    model.generate(**BATCH, **GREEDY)
    assert steps and not model._decode_graphs.lock.locked()


@pytest.mark.parametrize("copies", [1, 2])
def test_a_hook_sees_every_row_of_a_prompt(steps, copies):
    model, rows = build(seed=7), []
    layer = next(iter(model.expert_layers().values()))
    wanted = {**GREEDY, "do_sample": True, "num_return_sequences": copies, "routing_strategy": "single:1"}
    handle = layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    torch.manual_seed(0)
    watched = model.generate(**BATCH, **wanted)
    assert set(rows) == {3 * copies} and not steps
    handle.remove()
    torch.manual_seed(0)
    assert model.generate(**BATCH, **wanted).tolist() == watched.tolist() and steps


# Speculative routing


@pytest.mark.parametrize("agreeing", [True, False])
def test_speculation_is_given_up_where_it_loses_and_changes_no_token(steps, agreeing):
    model = build(seed=7)
    with torch.no_grad():
        if agreeing:
            model.router.gate.bias[1] = 1000.0
        else:  # another expert from token to token
            model.router.gate.weight.mul_(100)
    two = {name: rows[:2] for name, rows in BATCH.items()}
    expected, found = default_and_fast(model, two, max_new_tokens=60, repetition_penalty=2.0)
    assert found.tolist() == expected.tolist()
    graph = steps[-1]
    if agreeing:
        assert graph.speculated == 59 and graph.hits == 58  # the first has nothing to go by
        assert graph.hit_rate == 1.0
    else:
        assert graph.hits < graph.speculated == fast.WINDOW and graph.hit_rate < fast.SPECULATION_PAYS


def test_speculation_begins_by_itself_where_it_would_have_been_right(steps, monkeypatch):
    model = build(seed=7)
    with torch.no_grad():
        model.router.gate.bias[1] = 1000.0
    monkeypatch.setattr(fast, "SPECULATION_PAYS", 0.8)  # more than is usual for three rows
    expected, found = default_and_fast(model, max_new_tokens=60)
    assert found.tolist() == expected.tolist()
    assert steps[-1].hits == steps[-1].speculated == 59 - fast.WINDOW


@pytest.mark.parametrize("fields", [{"router_mode": "dense"}, {"num_experts_per_tok": 2}], ids=str)
def test_routers_of_several_experts_do_not_speculate(steps, fields):
    expected, found = default_and_fast(build(seed=7, **fields), routing_strategy="router")
    assert found.tolist() == expected.tolist() and steps and not steps[-1].speculated


@pytest.mark.parametrize("router_input", ["base", "experts_sum"])
def test_a_few_rows_that_speculate(steps, monkeypatch, router_input):
    monkeypatch.setattr(fast, "SPECULATION_PAYS", 0.0)  # however often it misses
    model = build(seed=7, router_input=router_input)
    wanted = {"return_dict_in_generate": True, "output_router_logits": True, "max_new_tokens": 24}
    for count in (1, 3):
        inputs = {name: rows[:count] for name, rows in BATCH.items()}
        expected, found = default_and_fast(model, inputs, **wanted)
        assert found.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(found.router_logits, expected.router_logits, atol=1e-4, rtol=1e-4)
        assert 0 < steps[-1].hits < steps[-1].speculated == steps[-1].steps == 23


# What breaks off, and who else decodes


@pytest.mark.parametrize("where", ["prompt", "look", "start", "step"])
@pytest.mark.parametrize("strategy", slow_but("router", of=["uniform", "single:1", "router"]))
def test_a_call_that_breaks_off_spoils_no_other(steps, monkeypatch, strategy, where):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("as a GPU says it")

    model = build(seed=7)
    with monkeypatch.context() as patch:
        if where == "prompt":
            layer = model.foundation.get_submodule("model.layers.1.self_attn.v_proj.base_layer")
            patch.setitem(vars(layer), "forward", out_of_memory)
        elif where == "look":
            patch.setattr(fast.ForwardStep, "__init__", out_of_memory)
        elif where == "start":
            patch.setattr(fast.DecodeGraph, "place", out_of_memory)
        else:
            patch.setattr(fast_step.StaticLayer, "update", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(**BATCH, **GREEDY, routing_strategy=strategy)
    steps.clear()
    assert not model._decode_graphs.graphs  # of those that there are, the graphs may be half captured
    for _ in range(2):
        expected, found = default_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert len(steps) == 2 * (GREEDY["max_new_tokens"] - 1)


def test_a_call_that_is_interrupted_between_two_tokens(steps):
    model, calls = build(seed=7), []

    def interrupt(input_ids, scores, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(**BATCH, **GREEDY, stopping_criteria=[interrupt])
    assert len(steps) == 3
    expected, found = default_and_fast(model)
    assert found.tolist() == expected.tolist() and len(steps) == 3 + 11


def test_of_two_threads_one_decodes_fast_at_a_time(steps, told):
    model, found = build(seed=7), []
    expected, _ = default_and_fast(model)
    steps.clear()

    def other():
        model.reset_round_robin()
        found.append(model.generate(**BATCH, **GREEDY).tolist())

    class Streamer:
        def put(self, value):
            if len(steps) == 3:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        def end(self):
            pass

    one = {name: rows[:1] for name, rows in BATCH.items()}
    model.generate(**one, **GREEDY, streamer=Streamer())
    assert found == [expected.tolist()] and len(steps) == 11
    assert any("another thread decodes with this model" in text for text in told)
    assert model.generate(**BATCH, **GREEDY).tolist() == expected.tolist() and len(steps) == 22


# What is said


def test_a_reason_is_said_once_a_model(told):
    model = build(seed=7)
    for _ in range(2):
        model.generate(**BATCH, **GREEDY, fast_decoding=False)
        model.generate(**BATCH, **GREEDY)
        model.generate(**BATCH, **GREEDY, use_cache=False)
    said = [text for text in told if text.startswith("Decode steps")]
    assert len(said) == 3
    assert said[0] == "Decode steps take the default path: `fast_decoding` is off."
    reason = fast.why_not_kernels(model)
    assert said[1] == f"Decode steps are CUDA graphs of the base model's own forward ({reason})."
    assert said[2].startswith("Decode steps take the default path: no KV cache")
    build(seed=8).generate(**BATCH, **GREEDY)
    assert [text for text in told if text.startswith("Decode steps")] == [*said, said[1]]


def test_nothing_is_said_at_the_usual_level(messages):
    build(seed=7).generate(**BATCH, **GREEDY)
    assert not [text for text in messages if text.startswith("Decode steps")]
