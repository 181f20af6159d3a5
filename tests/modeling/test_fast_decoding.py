"""Fast decoding with plain calls in place of graphs, against the ordinary path; what graphs do is in
`test_gpu.py`."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers_graphs import BATCH, GREEDY, ordinary_and_fast
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
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GPT2Config,
    OPTConfig,
    Qwen2Config,
    StoppingCriteria,
)


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_buffers_dylora_moe as fast_buffers
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_sessions_dylora_moe as fast_sessions
from dylora_moe.modeling.cache_dylora_moe import CACHE


pytestmark = pytest.mark.usefixtures("fast_on_a_cpu")
SAMPLED = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}


@pytest.mark.parametrize("arguments", [{}, SAMPLED, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0", "single:2"])
def test_tokens_equal_those_of_the_ordinary_path(steps, strategy, arguments):
    model = build(seed=7)
    for seed in range(
        2
    ):  # the second call runs in the first one's buffers, with the layers' A in one product
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        ordinary, found = ordinary_and_fast(model, inputs, seed, routing_strategy=strategy, **arguments)
        assert found.tolist() == ordinary.tolist()
    assert len(steps) == 2 * (GREEDY["max_new_tokens"] - 1)
    assert len(set(map(id, steps))) == 1


@pytest.mark.parametrize("strategy", ["router", "best", "round_robin", "ensemble", "single:1"])
def test_rows_that_end_at_different_times(steps, strategy):
    model = build(seed=7)
    free, _ = ordinary_and_fast(model, routing_strategy=strategy)
    ends = sorted({row[9 + 3] for row in free.tolist()})
    ordinary, found = ordinary_and_fast(model, routing_strategy=strategy, eos_token_id=ends[:2])
    assert found.tolist() == ordinary.tolist()
    assert steps and ordinary.shape[1] <= free.shape[1]


class StopAt(StoppingCriteria):
    """A criterion of the caller's that reads the text so far, as EvalPlus's do."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 9:] == self.token).any(dim=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_strings(steps, strategy):
    model, tokenizer = build(seed=7), character_tokenizer()
    free, _ = ordinary_and_fast(model, routing_strategy=strategy)
    stops = [text_of(row[start : start + 2]) for row, start in zip(free.tolist(), (11, 14, 12), strict=True)]
    ordinary, found = ordinary_and_fast(
        model, routing_strategy=strategy, stop_strings=stops, tokenizer=tokenizer
    )
    assert found.tolist() == ordinary.tolist()
    assert found.shape[1] < free.shape[1] and len(steps) > GREEDY["max_new_tokens"]


def test_prompts_as_embeddings(steps):
    model = build(seed=7)
    embedded = {**BATCH, "inputs_embeds": model.get_input_embeddings()(BATCH["input_ids"])}
    for inputs in (embedded, {name: embedded[name] for name in ("inputs_embeds", "attention_mask")}):
        for strategy in ("router", "best", "single:1"):
            ordinary, found = ordinary_and_fast(model, inputs, routing_strategy=strategy)
            assert found.tolist() == ordinary.tolist()
    assert len(steps) == 6 * (GREEDY["max_new_tokens"] - 1)


def test_criteria_streamers_and_scores(steps):
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    free, _ = ordinary_and_fast(model, one)
    stop = StopAt(int(free[0, 9 + 4]))
    ordinary, found = ordinary_and_fast(model, one, stopping_criteria=[stop])
    assert found.tolist() == ordinary.tolist() and found.shape[1] < free.shape[1]

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    model.generate(**one, **GREEDY, streamer=streamer)
    assert streamer.seen == [*free[0].tolist(), "end"]
    wanted = {"output_scores": True, "output_logits": True, "output_router_logits": True}
    ordinary, found = ordinary_and_fast(model, return_dict_in_generate=True, **wanted)
    assert len(steps) > 20
    for name in ("scores", "logits"):
        for one_step, other in zip(ordinary[name], found[name], strict=True):
            torch.testing.assert_close(other, one_step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.router_logits, ordinary.router_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_that_comes_back_can_be_continued(steps, strategy):
    model = build(seed=7)
    output = ordinary_and_fast(model, routing_strategy=strategy, return_dict_in_generate=True)[1]
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


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("strategy", ["router", "best", "single:1"])
def test_a_prompt_goes_straight_to_the_buffers(steps, monkeypatch, strategy, copies):
    """Nothing of it is kept twice, and what is handed back is nobody else's."""
    model, seen = build(seed=7), []
    start = fast.Decoding._start

    def look(decoding, *args, **kwargs):
        start(decoding, *args, **kwargs)
        memory = {
            stretch.untyped_storage().data_ptr() for stretch in decoding.store.buffers.stretches.values()
        }
        layers = [layer for layer in decoding.cache.layers if isinstance(layer, fast.DynamicLayer)]
        seen.extend(layer.keys.untyped_storage().data_ptr() in memory for layer in layers)

    monkeypatch.setattr(fast.Decoding, "_start", look)
    wanted = {"routing_strategy": strategy, "return_dict_in_generate": True, "num_return_sequences": copies}
    wanted["do_sample"] = copies > 1
    for new in (1, 3):  # of one new token the prompt's pass is all
        ordinary, found = ordinary_and_fast(model, max_new_tokens=new, **wanted)
        caches = [
            [layer.keys for layer in output[CACHE].layers if hasattr(layer, "dtype")]
            for output in (ordinary, found)
        ]
        before = [keys.clone() for keys in caches[1]]
        model.generate(**BATCH, **GREEDY, routing_strategy=strategy)  # in the same buffers
        for keys, kept, expected in zip(caches[1], before, caches[0], strict=True):
            assert torch.equal(keys, kept)
            torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
    assert seen and all(seen)


@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=str)
@pytest.mark.parametrize("strategy", slow_but("router", "best", of=STRATEGIES))
def test_prompts_that_run_a_few_at_a_time(steps, monkeypatch, strategy, arguments):
    model, passes = build(seed=7), []
    wanted = {"routing_strategy": strategy, "return_dict_in_generate": True, "output_router_logits": True}
    ordinary, _ = ordinary_and_fast(model, **wanted, **arguments)
    monkeypatch.setattr(fast, "PROMPT_TOKENS", 20)  # of 27
    take = fast.Decoding.take_prompts
    monkeypatch.setattr(fast.Decoding, "take_prompts", lambda *args: (passes.append(args[2]), take(*args))[1])
    found = ordinary_and_fast(model, **wanted, **arguments)[1]
    assert found.sequences.tolist() == ordinary.sequences.tolist()
    torch.testing.assert_close(found.router_logits, ordinary.router_logits, atol=1e-4, rtol=1e-4)
    alone = strategy == "round_robin" and arguments  # a prompt's rows have experts of their own
    assert passes == ([0, 2, 4] if alone else [0, 2 * arguments.get("num_return_sequences", 1)])
    before = [layer.keys for layer in ordinary[CACHE].layers if hasattr(layer, "dtype")]
    for keys, layer in zip(before, found[CACHE].layers, strict=False):
        torch.testing.assert_close(layer.keys, keys, atol=1e-4, rtol=1e-4)
    model.generate(
        **BATCH, **GREEDY, routing_strategy=strategy, fast_decoding=False
    )  # nothing is left behind


def test_a_text_that_outgrows_its_buffers(steps, monkeypatch):
    monkeypatch.setattr(fast_buffers, "BUCKET", 12)
    model = build(seed=7)
    for strategy in ("router", "best", "ensemble"):
        ordinary, found = ordinary_and_fast(model, routing_strategy=strategy, max_new_tokens=40)
        assert found.tolist() == ordinary.tolist()
    assert len({session.capacity for session in steps}) == 3


@pytest.mark.parametrize("agreeing", [True, False])
def test_guessing_is_given_up_where_it_loses_and_changes_no_token(steps, agreeing):
    model = build(seed=7)
    with torch.no_grad():
        if agreeing:
            model.router.gate.bias[1] = 1000.0
        else:  # another expert from token to token
            model.router.gate.weight.mul_(100)
    ordinary, found = ordinary_and_fast(model, max_new_tokens=60, repetition_penalty=2.0)
    assert found.tolist() == ordinary.tolist()
    session = steps[-1]
    if agreeing:
        assert session.guesses == 59 and session.hits == 58  # the first has nothing to go by
    else:
        assert session.hits < session.guesses == fast_sessions.WINDOW


def test_guessing_begins_by_itself_where_it_would_have_been_right(steps, monkeypatch):
    model = build(seed=7)
    with torch.no_grad():
        model.router.gate.bias[1] = 1000.0
    monkeypatch.setattr(fast_sessions, "GUESSING_PAYS", 0.8)  # more than is usual for three rows
    ordinary, found = ordinary_and_fast(model, max_new_tokens=60)
    assert found.tolist() == ordinary.tolist()
    assert steps[-1].hits == steps[-1].guesses == 59 - fast_sessions.WINDOW


@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=str)
@pytest.mark.parametrize("strategy", slow_but("router", "best", of=STRATEGIES))
def test_padding_that_no_prompt_of_a_pass_needs_is_left_out(steps, monkeypatch, strategy, arguments):
    model, passes = build(seed=7), []
    inputs = left_padded(random_rows((19, 18, 7, 9, 2, 1), seed=2))
    inputs["attention_mask"][0, 3] = 0  # a hidden token within a prompt is none
    monkeypatch.setattr(fast, "PROMPT_TOKENS", 27)
    take = fast.Decoding.take_prompts
    monkeypatch.setattr(
        fast.Decoding, "take_prompts", lambda *args: (passes.append(args[2:]), take(*args))[1]
    )
    ordinary, found = ordinary_and_fast(model, inputs, routing_strategy=strategy, **arguments)
    assert found.tolist() == ordinary.tolist() and steps
    copies = arguments.get("num_return_sequences", 1) if strategy != "round_robin" else 1
    if copies == arguments.get("num_return_sequences", 1):
        assert passes == [(first * copies, copies, cut) for first, cut in ((0, 0), (1, 1), (2, 10), (5, 18))]
    for more in ({}, {"position_ids": torch.arange(19).expand(6, 19) + 3}, {"output_router_logits": True}):
        ordinary, found = ordinary_and_fast(model, {**inputs, **more}, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()


@pytest.mark.parametrize(
    "fields", [{"router_input": "experts_sum"}, {"router_mode": "dense"}, {"num_experts_per_tok": 2}]
)
def test_other_routers(steps, fields):
    ordinary, found = ordinary_and_fast(build(seed=7, **fields), routing_strategy="router")
    assert found.tolist() == ordinary.tolist() and steps


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
        ordinary, found = ordinary_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    assert steps


def test_double_precision(steps):
    ordinary, found = ordinary_and_fast(build(seed=7).double())
    assert found.tolist() == ordinary.tolist() and steps


@pytest.mark.parametrize("given", [1, [1], [1, 1], [0, 1, 9]], ids=str)
def test_wrong_experts_are_refused_however_many_prompts_run_at_a_time(monkeypatch, given):
    monkeypatch.setattr(fast, "PROMPT_TOKENS", 1)
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
        ordinary, found = ordinary_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    assert steps


def test_weights_that_change_between_calls(steps):
    model = build(seed=7)
    ordinary_and_fast(model)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_A.data.mul_(-1.5)  # in place, which leaves no trace
    ordinary, found = ordinary_and_fast(model)
    assert found.tolist() == ordinary.tolist()
    model.add_expert("fourth", target_modules=llama_experts()[0]["target_modules"], r=4)
    ordinary, found = ordinary_and_fast(model, routing_strategy="uniform")
    assert found.tolist() == ordinary.tolist()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate(**BATCH, **GREEDY).tolist() == ordinary_and_fast(model)[0].tolist()


@pytest.mark.parametrize("tokens, passes", [(9, []), (18, [2]), (27, [3]), (2048, [3])])
def test_an_ensemble_reads_a_prompt_with_as_many_experts_at_once_as_may_run_together(
    steps, monkeypatch, tokens, passes
):
    monkeypatch.setattr(fast, "PROMPT_TOKENS", tokens)
    seen = []
    made = fast_buffers.PromptLayers.__init__
    monkeypatch.setattr(
        fast.PromptLayers, "__init__", lambda self, layers: (seen.append(len(layers)), made(self, layers))[1]
    )
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    wanted = {"routing_strategy": "ensemble", "return_dict_in_generate": True, "output_logits": True}
    for inputs, arguments in ((one, {}), (one, SAMPLED), (BATCH, SAMPLED)):
        seen.clear()
        ordinary, found = ordinary_and_fast(model, inputs, **wanted, **arguments)
        assert found.sequences.tolist() == ordinary.sequences.tolist()
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(ordinary.logits), atol=1e-3, rtol=1e-3
        )
        for one_layer, other in zip(found[CACHE].layers, ordinary[CACHE].layers, strict=True):
            torch.testing.assert_close(
                one_layer.keys, other.keys[:, :, : one_layer.keys.shape[2]], atol=1e-3, rtol=1e-3
            )
        if inputs is one:
            assert seen == [count for count in passes for _ in range(2)]  # layers
    assert len(steps) == 3 * (GREEDY["max_new_tokens"] - 1)


@pytest.mark.parametrize("tokens", [9, 2048])
def test_an_ensemble_after_weights_changed(steps, monkeypatch, tokens):
    """Where its prompts run expert by expert, as the calls of `single` before did, and where not."""
    monkeypatch.setattr(fast, "PROMPT_TOKENS", tokens)
    model = build(seed=7)
    for _ in range(2):
        ordinary_and_fast(model, routing_strategy="single:0")
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_A.data.mul_(-1.5)
    wanted = {"routing_strategy": "ensemble", "return_dict_in_generate": True, "output_logits": True}
    ordinary, found = ordinary_and_fast(model, **wanted)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(ordinary.logits), atol=1e-3, rtol=1e-3)


def attention_experts() -> list[dict]:
    """Experts on three layers that read the same tensor."""
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]
    return [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]


@pytest.mark.parametrize("where", ["prompt", "stacks", "step"])
@pytest.mark.parametrize("strategy", slow_but("router", of=["uniform", "single:1", "router"]))
def test_a_call_that_breaks_off_spoils_no_other(steps, monkeypatch, strategy, where):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("as a GPU says it")

    model = build(experts=attention_experts(), seed=7)
    with monkeypatch.context() as patch:
        if where == "prompt":  # between layers that read the same tensor
            layer = model.foundation.get_submodule("model.layers.1.self_attn.v_proj.base_layer")
            patch.setitem(vars(layer), "forward", out_of_memory)
        elif where == "stacks":
            patch.setattr(fast_sessions.SharedProducts, "read_stacks", out_of_memory)
        else:
            patch.setattr(fast_buffers.BufferLayer, "update", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(**BATCH, **GREEDY, routing_strategy=strategy)
    steps.clear()
    assert not model._decoding_sessions.sessions  # of those that there are, the graphs may be half recorded
    for _ in range(2):
        ordinary, found = ordinary_and_fast(model, routing_strategy=strategy)
        assert found.tolist() == ordinary.tolist()
    assert len(steps) == 2 * (GREEDY["max_new_tokens"] - 1)


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


def test_a_hundred_calls_keep_few_sessions_and_one_stretch_of_memory(steps):
    model = build(seed=7)
    sizes = set()
    for call in range(100):
        rows = random_rows((5,) * (1 + call % 11), seed=call)
        strategy = STRATEGIES[call % len(STRATEGIES)]
        model.generate(**left_padded(rows), routing_strategy=strategy, **{**GREEDY, "max_new_tokens": 2})
        store = model._decoding_sessions
        sizes.add(sum(stretch.numel() for stretch in store.buffers.stretches.values()))
    assert len(store.sessions) <= fast_sessions.MAX_SESSIONS
    assert max(sizes) == max(key.layers[0][0].numel() * 2 * len(key.layers) for key in steps)


@pytest.fixture
def no_collection():
    """What goes, goes because nobody has it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def memory_of(model) -> list[StorageWeakRef]:
    """What says whether the buffers that there are now are still there."""
    stretches = model._decoding_sessions.buffers.stretches.values()
    return [StorageWeakRef(stretch.untyped_storage()) for stretch in stretches]


@pytest.mark.parametrize("strategy", slow_but("router", of=["router", "best", "ensemble"]))
def test_smaller_buffers_go_when_larger_ones_come(monkeypatch, no_collection, strategy):
    model = build(seed=7)
    one = {name: rows[:1] for name, rows in BATCH.items()}
    model.generate(**one, **GREEDY, routing_strategy=strategy)
    smaller = memory_of(model)
    model.generate(**BATCH, **GREEDY, routing_strategy=strategy)
    assert all(memory.expired() for memory in smaller)
    copy_one, smaller, left = fast_sessions.Buffers._grown, [], []

    def look(buffers, *args):
        smaller[:] = smaller or memory_of(model)
        larger = copy_one(buffers, *args)
        left.append(sum(not memory.expired() for memory in smaller))
        return larger

    monkeypatch.setattr(fast_sessions.Buffers, "_grown", look)
    model.generate(**BATCH, routing_strategy=strategy, **{**GREEDY, "max_new_tokens": 260})
    assert left == [4, 4, 2, 2]  # keys and values of two layers: those of one layer go together


def test_a_model_that_was_deleted_is_gone(no_collection):
    model = build(seed=7)
    model.generate(**BATCH, **GREEDY)
    memory, deleted = memory_of(model), weakref.ref(model)
    del model
    assert deleted() is None and all(one.expired() for one in memory)


def test_inside_inference_mode_and_then_outside(steps):
    model = build(seed=7)
    ordinary, _ = ordinary_and_fast(model)
    with torch.inference_mode():
        assert model.generate(**BATCH, **GREEDY).tolist() == ordinary.tolist()
    assert model.generate(**BATCH, **GREEDY).tolist() == ordinary.tolist()
    model.train()(BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()
