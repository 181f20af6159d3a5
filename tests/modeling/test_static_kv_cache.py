"""The static KV cache of fast decoding: what it holds, how it grows, and when it goes."""

import gc
import weakref

import pytest
import torch
from helpers_graphs import BATCH, GREEDY, default_and_fast
from helpers_models import SIZES, STRATEGIES, build, left_padded, random_rows
from helpers_slow import slow_but
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling.cache_dylora_moe import CACHE


pytestmark = pytest.mark.usefixtures("fast_on_a_cpu")
SAMPLED = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}


def layers_of(cache) -> list:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def memory_of(model) -> list[StorageWeakRef]:
    """What says whether the KV caches that there are now are still there."""
    return [StorageWeakRef(memory.untyped_storage()) for memory in model._decode_graphs.memory.values()]


@pytest.fixture
def no_collection():
    """What goes, goes because nobody has it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_model_that_was_deleted_is_gone(no_collection):
    model = build(seed=7)
    model.generate(**BATCH, **GREEDY)
    memory, deleted = memory_of(model), weakref.ref(model)
    del model
    assert deleted() is None and all(one.expired() for one in memory)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("strategy", slow_but("router", "best", "ensemble", of=STRATEGIES))
def test_what_is_handed_back_is_what_the_default_path_returns(steps, monkeypatch, strategy, copies):
    """While it decodes, nothing is kept twice; and the next call does not write into what was handed back."""
    model, left = build(seed=7), []
    start = fast.Decoding._start

    def look(decoding, *args, **kwargs):
        start(decoding, *args, **kwargs)
        left.extend(layer.keys.numel() + layer.values.numel() for layer in layers_of(decoding.cache))

    monkeypatch.setattr(fast.Decoding, "_start", look)
    wanted = {"routing_strategy": strategy, "return_dict_in_generate": True, "num_return_sequences": copies}
    wanted |= {"do_sample": copies > 1, "output_router_logits": True}
    for new in (1, 3):  # of one new token the prompt's pass is all
        expected, found = default_and_fast(model, max_new_tokens=new, **wanted)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
        both = [layers_of(output[CACHE]) for output in (found, expected)]
        before = [(layer.keys.clone(), layer.values.clone()) for layer in both[0]]
        model.generate(**BATCH, **GREEDY, routing_strategy=strategy)  # in the same memory
        for layer, kept, default in zip(both[0], before, both[1], strict=True):
            assert torch.equal(layer.keys, kept[0]) and torch.equal(layer.values, kept[1])
            torch.testing.assert_close(layer.keys, default.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values, default.values, atol=1e-5, rtol=1e-5)
    assert left and not any(left)


@pytest.mark.parametrize("strategy", ["router", "round_robin", "best"])
def test_a_prompt_of_several_sequences_is_read_once(steps, monkeypatch, strategy):
    model, rows = build(seed=7), []
    take = fast.Decoding.take_prompts

    def look(decoding, *args):
        rows.append(len(layers_of(decoding.cache)[0].keys))
        return take(decoding, *args)

    monkeypatch.setattr(fast.Decoding, "take_prompts", look)
    model.generate(**BATCH, **{**GREEDY, **SAMPLED}, routing_strategy=strategy)
    assert rows == [6 if strategy == "round_robin" else 3] and steps  # whose rows have experts of their own


@pytest.fixture
def small_caches(monkeypatch):
    """Caches of 16 tokens, until a text is longer."""
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    monkeypatch.setattr(fast, "FIRST_CAPACITY", 16)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("strategy", ["router", "best", "single:1", "ensemble"])
def test_a_text_that_outgrows_its_cache(steps, monkeypatch, small_caches, strategy, speculative):
    monkeypatch.setattr(fast, "SPECULATION_PAYS", 0.0 if speculative else 2.0)
    model = build(seed=7)
    wanted = {"max_new_tokens": 40, "routing_strategy": strategy, "return_dict_in_generate": True}
    expected, found = default_and_fast(model, **wanted)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for layer, default in zip(layers_of(found[CACHE]), layers_of(expected[CACHE]), strict=True):
        torch.testing.assert_close(layer.keys, default.keys, atol=1e-4, rtol=1e-4)
    assert [graph.capacity for graph in dict.fromkeys(steps)] == [16, 32, 64]
    assert sum(graph.steps for graph in dict.fromkeys(steps)) == 39


def test_a_text_that_is_known_to_end_gets_no_larger_cache(steps, monkeypatch):
    monkeypatch.setattr(fast, "CAPACITY_STEP", 8)
    build(seed=7).generate(**BATCH, **{**GREEDY, "max_new_tokens": 20})
    assert {graph.capacity for graph in steps} == {32}  # 9 + 20, rounded up


SLIDING = {
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}


@pytest.mark.parametrize("lengths", [(9, 5, 7), (4, 2, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("kind", SLIDING)
def test_sliding_windows(steps, small_caches, kind, lengths):
    """Prompts that are longer and shorter than the window; and what is handed back can be continued."""
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(SLIDING[kind](), experts, seed=5)
    inputs = left_padded(random_rows(lengths, seed=3))
    for strategy in ("router", "single:1", "ensemble"):
        wanted = {"routing_strategy": strategy, "return_dict_in_generate": True, "max_new_tokens": 11}
        expected, found = default_and_fast(model, inputs, **wanted)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
        for layer, default in zip(layers_of(found[CACHE]), layers_of(expected[CACHE]), strict=True):
            assert type(layer) is type(default)
            torch.testing.assert_close(layer.keys, default.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, default.values, atol=1e-4, rtol=1e-4)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 11, dtype=torch.long)], dim=1)
        count = len(steps)
        again = {"input_ids": found.sequences, "attention_mask": mask, CACHE: found[CACHE]}
        arguments = {**GREEDY, "routing_strategy": strategy}
        continued = model.generate(**again, **{**arguments, "max_new_tokens": 3})
        longer = model.generate(**inputs, **{**arguments, "max_new_tokens": 14}, fast_decoding=False)
        assert continued.tolist() == longer.tolist() and len(steps) == count
    assert steps


def test_a_hundred_calls_keep_few_graphs_and_one_stretch_of_memory(steps):
    model = build(seed=7)
    sizes = set()
    for call in range(100):
        rows = random_rows((5,) * (1 + call % 11), seed=call)
        strategy = STRATEGIES[call % len(STRATEGIES)]
        model.generate(**left_padded(rows), routing_strategy=strategy, **{**GREEDY, "max_new_tokens": 2})
        store = model._decode_graphs
        sizes.add(sum(memory.numel() for memory in store.memory.values()))
    assert len(store.graphs) <= fast.MAX_GRAPHS
    assert max(sizes) == max(graph.layers[0][0].numel() * 2 * len(graph.layers) for graph in steps)
    assert len(store.told) == 1


@pytest.mark.parametrize("strategy", slow_but("router", of=["router", "best", "ensemble"]))
def test_smaller_caches_go_when_larger_ones_come(monkeypatch, small_caches, no_collection, strategy):
    model = build(seed=7)
    one = {name: rows[:1] for name, rows in BATCH.items()}
    model.generate(**one, **GREEDY, routing_strategy=strategy)
    smaller = memory_of(model)
    model.generate(**BATCH, **GREEDY, routing_strategy=strategy)
    assert smaller and all(memory.expired() for memory in smaller)
    memory, smaller, left = fast.GraphStore._memory, [], []

    def look(store, *args):
        smaller[:] = smaller or memory_of(model)
        larger = memory(store, *args)
        left.append(sum(not one.expired() for one in smaller))
        return larger

    grow = fast.GraphStore.grown

    def grown(store, *args):
        with monkeypatch.context() as patch:
            patch.setattr(fast.GraphStore, "_memory", look)
            return grow(store, *args)

    monkeypatch.setattr(fast.GraphStore, "grown", grown)
    model.generate(**BATCH, routing_strategy=strategy, **{**GREEDY, "max_new_tokens": 40})
    assert left == [4, 4, 4, 4] + [
        4,
        4,
        2,
        2,
    ]  # first there is room; keys and values of two layers: those of one layer go together


def test_forgetting_frees_graphs_and_memory(steps, no_collection):
    model = build(seed=7)
    model.forget_decoding_sessions()  # of which there are none
    expected, _ = default_and_fast(model)
    graph, memory = weakref.ref(steps[0]), memory_of(model)
    steps.clear()
    model.forget_decoding_sessions()
    assert graph() is None and memory and all(one.expired() for one in memory)
    assert model.generate(**BATCH, **GREEDY).tolist() == expected.tolist() and len(steps) == 11


def test_forgetting_while_it_decodes_waits_for_another_time(steps):
    class Streamer:
        def put(self, value):
            model.forget_decoding_sessions()

        def end(self):
            pass

    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    expected = model.generate(**one, **GREEDY, fast_decoding=False)
    assert model.generate(**one, **GREEDY, streamer=Streamer()).tolist() == expected.tolist()
    assert len(steps) == 11 and model._decode_graphs.graphs
