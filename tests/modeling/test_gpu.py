"""What only a GPU can show: the same tokens as on a CPU, offloaded and compiled caches, flash attention,
graphs."""

import gc
import importlib
import threading
import warnings
from contextlib import suppress

import pytest
import torch
from helpers_families import (
    OTHERS,
    VARIANTS,
    build_family,
    build_other,
    experts_on_linear_layers,
    family_config,
)
from helpers_families import SIZES as SMALL_SIZES
from helpers_graphs import default_and_fast
from helpers_models import (
    SIZES,
    STRATEGIES,
    VOCABULARY,
    PeftLoop,
    build,
    character_tokenizer,
    left_padded,
    llama_config,
    random_rows,
    text_of,
)
from transformers import AutoModelForCausalLM, Cache, FalconConfig, MixtralConfig, utils

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BATCH = left_padded(random_rows((9, 5, 7), seed=2))
SMALL_VOCABULARY = SMALL_SIZES["vocab_size"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def fast_decoding_is_on(monkeypatch):
    with suppress(ImportError):  # the optional file was taken out
        monkeypatch.setattr(
            importlib.import_module("dylora_moe.modeling.fast_decoding_dylora_moe"), "ON_BY_ITSELF", True
        )


@pytest.fixture
def offloading_in_order(monkeypatch):
    """Before 5.20, transformers may fetch a layer's keys and values while they are still being offloaded."""
    prefetch = Cache.prefetch

    def prefetch_what_is_there(cache, *arguments, **keywords):
        torch.cuda.synchronize()
        prefetch(cache, *arguments, **keywords)

    monkeypatch.setattr(Cache, "prefetch", prefetch_what_is_there)


@pytest.fixture(scope="module")
def pair():
    """The same model on the CPU and on the GPU."""
    return build(seed=7), build(seed=7).to("cuda")


def on_gpu(model, strategy, **arguments):
    """The prompts stay on the CPU, as some tools leave them: `generate` moves them."""
    model.reset_round_robin()
    return model.generate(**BATCH, routing_strategy=strategy, **{**GREEDY, **arguments}).tolist()


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_equal_those_of_the_cpu(pair, strategy, arguments):
    cpu, gpu = pair
    assert on_gpu(gpu, strategy, **arguments) == on_gpu(cpu, strategy, **arguments)


@pytest.mark.parametrize("cache", ["offloaded", "static", "offloaded_static"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_caches(pair, strategy, cache, offloading_in_order):
    cpu, gpu = pair
    found = on_gpu(gpu, strategy, cache_implementation=cache, disable_compile=True)
    assert found == on_gpu(cpu, strategy)


@pytest.mark.parametrize("strategy", ["router", "best", "single:1"])
def test_a_static_cache_compiles_by_itself(pair, strategy):
    cpu, gpu = pair
    assert on_gpu(gpu, strategy, cache_implementation="static") == on_gpu(cpu, strategy)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_automatic_device_map_in_bfloat16(tmp_path, layout):
    model = build()
    if layout == "adapter":
        PeftLoop(model).peft.unload().save_pretrained(tmp_path / "foundation")
        model.config.base_model_name_or_path = str(tmp_path / "foundation")
    model.save_pretrained(tmp_path / "repo", layout=layout)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo", trust_remote_code=True, device_map="auto", dtype=torch.bfloat16
    )
    assert loaded.device.type == "cuda" and loaded.router.gate.weight.dtype == torch.float32
    assert torch.equal(loaded.router.gate.weight.cpu(), model.router.gate.weight)
    loaded.generate(**BATCH, routing_strategy="router", **GREEDY)


@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_layers_on_two_devices(tmp_path, layout, second):
    """A hand-written map: each device gets the experts of its layers, and the routing weights come to
    them."""
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = build(seed=7)
    PeftLoop(model).peft.unload().save_pretrained(tmp_path / "foundation")
    model.config.base_model_name_or_path = str(tmp_path / "foundation")
    model.save_pretrained(tmp_path / "repo", layout=layout)
    # Every part by its name: with a "" for the rest, accelerate's hooks undo the map, on any model.
    first = ("foundation.model.embed_tokens", "foundation.model.rotary_emb", "foundation.model.layers.0")
    last = ("foundation.model.layers.1", "foundation.model.norm", "foundation.lm_head", "router")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo",
        trust_remote_code=True,
        device_map={**dict.fromkeys(first, "cuda:0"), **dict.fromkeys(last, second)},
    )
    devices = {str(layer.lora_A.device) for layer in loaded.expert_layers().values()}
    assert devices == {"cuda:0", second} if second != "cpu" else len(devices) == 2
    for strategy in STRATEGIES:
        assert on_gpu(loaded, strategy) == on_gpu(model, strategy), strategy


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_flash_attention(tmp_path, strategy, version):
    if not getattr(utils, f"is_flash_attn_{version}_available", lambda: False)():
        pytest.skip(f"needs flash-attn {version}")
    model = build(llama_config(hidden_size=256))
    model.save_pretrained(tmp_path)
    both = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            trust_remote_code=True,
            device_map="cuda",
            dtype=torch.bfloat16,
            attn_implementation=name,
        )
        for name in (f"flash_attention_{version}", "eager")
    ]
    batch = {name: tensor.to("cuda") for name, tensor in BATCH.items()}
    with torch.no_grad():
        flash, eager = (loaded(**batch, routing_strategy=strategy).logits.float() for loaded in both)
        decoded = [loaded.generate(**batch, routing_strategy=strategy, **GREEDY) for loaded in both]
    assert decoded[0].shape == decoded[1].shape
    real = batch["attention_mask"].bool()
    assert (flash - eager)[real].abs().mean() < 0.1 * eager[real].abs().mean()


# Fast decoding


def rows_on_gpu(
    seed: int, count: int = 25, longest: int = 39, vocabulary: int = VOCABULARY
) -> dict[str, torch.Tensor]:
    lengths = torch.randint(3, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = left_padded(random_rows(tuple(lengths), seed, vocabulary))
    return {name: part.to("cuda") for name, part in rows.items()}


def assert_captured(model, step: str = "KernelStep") -> None:
    """Make sure that the last call decoded by graphs, of kernels or (`ForwardStep`) of the base model's forward."""
    store = model._decode_graphs
    assert store.reason is None and type(store.step).__name__ == step
    captured = [
        (graph._whole, getattr(graph, "_speculative", graph._whole)) for graph in store.graphs.values()
    ]
    assert captured and all(whole.graph or speculative.graph for whole, speculative in captured)


def compare_prompts(
    model,
    strategy: str,
    counts: tuple[int, ...] = (25, 25, 25, 25),
    longest: int = 39,
    new: int = 16,
    vocabulary: int = VOCABULARY,
):
    """Batches of so many prompts. A row may go another way only where the two best logits lie within 1e-4 (of the
    best, where that is more than 1); where that is shows as a warning."""
    wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": new}
    ties = []
    for seed, count in enumerate(counts):
        rows = rows_on_gpu(seed, count, longest, vocabulary)
        expected, found = default_and_fast(model, rows, routing_strategy=strategy, **wanted)
        length = found.sequences.shape[1] - new
        for row, (one, other) in enumerate(zip(found.sequences, expected.sequences, strict=True)):
            different = (one != other).nonzero().flatten().tolist()
            if different:
                step = different[0] - length
                best = expected.logits[step][row].topk(2).values.tolist()
                ties.append(f"prompt {row} of batch {seed}, new token {step}: the best logits are {best}")
                assert best[0] - best[1] < 1e-4 * max(1.0, abs(best[0])), ties[-1]
    assert_captured(model)
    assert len(ties) <= 2, ties
    for tie in ties:
        warnings.warn(f"{strategy}: {tie}", stacklevel=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_give_the_tokens_of_the_default_path(strategy, attention):
    model = build(llama_config(hidden_size=64, intermediate_size=96), seed=7).to("cuda")
    model.set_attn_implementation(attention)
    compare_prompts(model, strategy)


@pytest.fixture(scope="module")
def large():
    """In float32, of the shape of Qwen2.5-Coder-1.5B but for the vocabulary, four experts on all linear
    layers."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    }
    modules = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [
        f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
    ]
    targets = [f"model.layers.{layer}.{module}" for layer in range(28) for module in modules]
    experts = [{"name": f"e{i}", "r": 16, "lora_alpha": 32, "target_modules": targets} for i in range(4)]
    with torch.device("cuda"):
        foundation = AutoModelForCausalLM.from_config(
            llama_config(vocab_size=4000, num_key_value_heads=2, **sizes)
        )
    config = DyloraMoeConfig(base_config=foundation.config, expert_configs=experts)
    model = DyloraMoeForCausalLM.from_foundation(foundation, config).to("cuda", torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()  # or hidden states of all tokens are alike
        for layer in model.expert_layers().values():
            layer.lora_A.normal_(std=0.02)
            layer.lora_B.normal_(std=0.02)
        model.router.gate.weight.normal_()
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_of_a_large_model_give_the_tokens_of_the_default_path(large, strategy):
    compare_prompts(large, strategy)


@pytest.mark.parametrize("kind", ["large", "small"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_of_a_few_rows_give_the_tokens_of_the_default_path(large, strategy, kind):
    """Up to two without matrix instructions; the experts of the small model are of unequal ranks."""
    model = (
        large
        if kind == "large"
        else build(llama_config(hidden_size=64, intermediate_size=96), seed=7).to("cuda")
    )
    compare_prompts(model, strategy, counts=(1, 2, 3, 4) * (2 if kind == "large" else 10))


@pytest.mark.parametrize("kind", ["large", "small"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_of_long_texts_give_the_tokens_of_the_default_path(large, monkeypatch, strategy, kind):
    """The benchmarks' length, whose attention goes in parts, and texts that outgrow their cache once."""
    if kind == "large":
        return compare_prompts(large, strategy, counts=(1, 3), longest=256, new=128)
    fast = pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe")
    monkeypatch.setattr(fast, "FIRST_CAPACITY", 384)
    fields = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}
    model = build(llama_config(**fields), seed=7).to("cuda")
    compare_prompts(model, strategy, counts=(1, 4, 9), longest=300, new=300)


@pytest.mark.parametrize("shape", ["small", "large"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_of_every_family_give_the_tokens_of_the_default_path(variant, shape):
    """A hundred prompts under the router, and a few under strategies with other streams."""
    if shape == "large":
        return compare_prompts(build_large(variant), "router")
    model = build_family(variant, hidden_size=96, intermediate_size=144).to("cuda")
    compare_prompts(model, "router", vocabulary=SMALL_VOCABULARY)
    for strategy in ("ensemble", "best", "base"):
        compare_prompts(model, strategy, counts=(1, 2, 4, 9), vocabulary=SMALL_VOCABULARY)


@pytest.mark.parametrize("strategy", ["base", "single:1", "best", "uniform", "round_robin", "ensemble"])
def test_graphs_of_a_model_with_a_router_in_every_layer(strategy):
    model = build(llama_config(hidden_size=64, intermediate_size=96), seed=7, router_kind="arrow")
    model.update_prototypes()
    compare_prompts(model.to("cuda"), strategy, counts=(1, 2, 4, 9))


def test_a_router_in_every_layer_takes_the_default_path():
    model = build(llama_config(hidden_size=64, intermediate_size=96), seed=7, router_kind="arrow")
    model.update_prototypes()
    expected, found = default_and_fast(model.to("cuda"), routing_strategy="router")
    assert found.tolist() == expected.tolist()
    assert "Decode steps take the default path: a router of every layer (arrow)." in model._decode_graphs.told


def build_large(variant: str) -> DyloraMoeForCausalLM:
    """Of the shape of Qwen2.5-Coder-1.5B but for the vocabulary, three experts on all linear layers, in float32."""
    torch.manual_seed(0)
    fields = {"vocab_size": 4000, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    fields |= {"num_attention_heads": 12, "num_key_value_heads": 12 if variant == "stablelm" else 2}
    own = VARIANTS[variant][1]
    if "head_dim" in own:
        fields["head_dim"] = 128
    if "layer_types" in own:
        fields["layer_types"] = own["layer_types"] * 14
    if "sliding_window" in own:
        fields["sliding_window"] = 24
    config = family_config(variant, **fields)
    with torch.device("cuda"):
        foundation = AutoModelForCausalLM.from_config(config)
    experts = experts_on_linear_layers(config)
    config = DyloraMoeConfig(base_config=foundation.config, expert_configs=experts)
    model = DyloraMoeForCausalLM.from_foundation(foundation, config).to("cuda", torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()  # or hidden states of all tokens lie close together
        for layer in model.expert_layers().values():
            layer.lora_A.normal_(std=0.02)
            layer.lora_B.normal_(std=0.02)
        model.router.gate.weight.normal_()
    return model.eval()


@pytest.mark.parametrize("strategy", ["base", "single:1", "best", "router", "ensemble"])
@pytest.mark.parametrize("kind", ["large", "small"])
def test_prompt_lookup_gives_the_tokens_of_greedy_decoding(large, kind, strategy):
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    model = large if kind == "large" else build(llama_config(hidden_size=64, intermediate_size=96)).to("cuda")
    hits = 0
    for seed in range(5):
        rows = rows_on_gpu(seed, 1)
        rows = {name: part.repeat(1, 3) for name, part in rows.items()}
        wanted = {
            "max_new_tokens": 48,
            "do_sample": False,
            "eos_token_id": 10_000,
            "routing_strategy": strategy,
        }
        expected = model.generate(**rows, **wanted, fast_decoding=False)
        found = model.generate(**rows, **wanted, prompt_lookup_num_tokens=5)
        assert found.tolist() == expected.tolist()
        hits += sum(graph.hits for graph in model._decode_graphs.graphs.values() if graph.tokens > 1)
    assert_captured(model)
    assert hits


@pytest.mark.parametrize("strategy", ["router", "best", "ensemble"])
@pytest.mark.parametrize("kind", OTHERS)
def test_graphs_of_base_models_outside_the_table(kind, strategy):
    """By their own forward over a static cache."""
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    model = build_other(kind).to("cuda")
    for seed in range(2):
        expected, found = default_and_fast(model, rows_on_gpu(seed, 3), seed, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert_captured(model, "ForwardStep")


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
@pytest.mark.parametrize("strategy", ["router", "best", "uniform", "ensemble"])
def test_a_foundation_of_experts(strategy, way):
    """Where its experts run one by one the host asks which of them act, which no graph can capture."""
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    config = MixtralConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4})
    model = build(config, experts, seed=7).to("cuda")
    model.foundation.set_experts_implementation(way)
    for seed, arguments in enumerate(({}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}) * 2):
        expected, found = default_and_fast(
            model, rows_on_gpu(seed, 3), seed, routing_strategy=strategy, max_new_tokens=16, **arguments
        )
        assert found.tolist() == expected.tolist()
    if way == "eager":
        assert model._decode_graphs.reason and not model._decode_graphs.graphs
    else:
        assert_captured(model, "ForwardStep")


def test_a_foundation_that_makes_numbers_of_the_host_an_index():
    """Falcon's queries, keys and values: `[..., [-2], :]`."""
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    config = FalconConfig(
        **{**SIZES, "hidden_size": 64, "multi_query": True, "new_decoder_architecture": False}
    )
    names = [f"transformer.h.{layer}.mlp.dense_h_to_4h" for layer in range(2)]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(config, experts, seed=7).to("cuda")
    for seed in range(2):
        expected, found = default_and_fast(model, rows_on_gpu(seed, 3), seed, do_sample=True, top_k=20)
        assert found.tolist() == expected.tolist()
    assert model._decode_graphs.reason


@pytest.mark.parametrize("strategy", ["best", "round_robin", "single"])
def test_graphs_of_one_expert_give_the_tokens_of_the_default_path(large, strategy):
    """Four experts take turns in what was captured for the first."""
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    large.forget_decoding_sessions()
    for expert in (2, 0, 3, 1, 2):
        arguments = {"routing_strategy": f"single:{expert}"}
        if strategy != "single":
            arguments = {"routing_strategy": strategy, "expert_ids": torch.full((2,), expert, device="cuda")}
        expected, found = default_and_fast(large, rows_on_gpu(5, 2), max_new_tokens=16, **arguments)
        assert found.tolist() == expected.tolist()
    (graph,) = large._decode_graphs.graphs.values()
    assert graph.steps == 5 * 15
    assert_captured(large)


def test_graphs_that_speculate_give_the_tokens_of_the_default_path(large, monkeypatch):
    fast = pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe")
    monkeypatch.setattr(fast, "SPECULATION_PAYS", 0.0)
    for model in (large, build(llama_config(hidden_size=64, intermediate_size=96), seed=7).to("cuda")):
        compare_prompts(model, "router")
        graphs = list(model._decode_graphs.graphs.values())
        assert all(graph._speculative.graph and graph.speculated for graph in graphs)
        assert any(graph._again.graph for graph in graphs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_draw_the_same_samples(strategy):
    model = build(seed=7).to("cuda")
    arguments = {"do_sample": True, "num_return_sequences": 2, "top_k": 20, "routing_strategy": strategy}
    for seed in range(3):
        expected, found = default_and_fast(model, rows_on_gpu(seed, 3), seed, **arguments)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_end_at_stop_strings(strategy):
    model, tokenizer = build(seed=7).to("cuda"), character_tokenizer()
    batch = rows_on_gpu(2, 3)
    free, _ = default_and_fast(model, batch, routing_strategy=strategy)
    start = batch["input_ids"].shape[1] + 2
    stops = [text_of(row[start + 2 * index :][:2]) for index, row in enumerate(free.tolist())]
    model.forget_decoding_sessions()
    arguments = {"routing_strategy": strategy, "stop_strings": stops, "tokenizer": tokenizer}
    expected, found = default_and_fast(model, batch, **arguments)
    assert found.tolist() == expected.tolist() and found.shape[1] < free.shape[1]
    assert len(model._decode_graphs.graphs) == 1
    assert_captured(model)


@pytest.mark.parametrize("count", [25, 2, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_in_bfloat16_are_as_close_to_float32(strategy, count):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    exact = build(llama_config(**sizes), seed=7).to("cuda")
    model = build(llama_config(**sizes), seed=7).to("cuda", torch.bfloat16)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    wanted |= {"routing_strategy": strategy, "suppress_tokens": list(range(1, 97))}  # the same token for all
    errors = []
    for seed in range(75 // count):
        batch = rows_on_gpu(seed, count)
        truth = default_and_fast(exact, batch, **wanted)[0].logits[1]
        outputs = default_and_fast(model, batch, **wanted)
        errors.append([(output.logits[1] - truth).pow(2).mean().item() for output in outputs])
    expected, graphs = torch.tensor(errors).mean(dim=0).sqrt().tolist()
    assert graphs < 1.15 * expected


def test_graphs_over_many_calls_take_no_more_memory():
    model = build(seed=7).to("cuda")
    used = []
    for call in range(120):
        batch = rows_on_gpu(call % 7, 1 + call % 3)
        model.generate(**batch, **GREEDY, routing_strategy=STRATEGIES[call % len(STRATEGIES)])
        if call % 40 == 39:
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] * 1.05


def test_graphs_of_a_model_whose_weights_change_or_move():
    model = build(seed=7).to("cuda")
    for change in (
        lambda: [layer.lora_A.data.mul_(-1.5) for layer in model.expert_layers().values()],
        lambda: model.add_expert("fourth", target_modules=["model.layers.0.self_attn.q_proj"], r=4),
        lambda: model.to("cpu").to("cuda"),
    ):
        change()
        expected, found = default_and_fast(model, rows_on_gpu(1, 3), routing_strategy="uniform")
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_on_another_gpu_than_the_current_one(strategy):
    """Streams, and Triton's kernels, go to the current GPU if nothing says otherwise."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = build(seed=7)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        model.to(device)
        batch = {name: rows.to(device) for name, rows in rows_on_gpu(1, 3).items()}
        expected, found = default_and_fast(model, batch, routing_strategy=strategy)
        assert found.device == torch.device(device) and found.tolist() == expected.tolist()
        assert [graph.steps for graph in model._decode_graphs.graphs.values()] == [11]  # fast indeed
        assert torch.cuda.current_device() == 0


def test_models_one_after_the_other_leave_nothing_behind():
    """A stream to capture on would, for good, were it not used again."""
    pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe")
    used = []
    for seed in range(5):
        model = build(seed=seed).to("cuda")
        model.generate(**rows_on_gpu(1, 3), **GREEDY, routing_strategy="uniform")
        assert_captured(model)
        del model
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[4] == used[0]


def test_threads_that_decode_at_once_with_graphs():
    model, found = build(seed=7).to("cuda"), {}
    expected = {
        name: default_and_fast(model, rows_on_gpu(1, 3), **GREEDY, routing_strategy=name)[0]
        for name in STRATEGIES[:4]
    }

    def work(strategy):
        for _ in range(4):
            tokens = model.generate(**rows_on_gpu(1, 3), **GREEDY, routing_strategy=strategy)
            found.setdefault(strategy, []).append(tokens.tolist())

    threads = [threading.Thread(target=work, args=(strategy,)) for strategy in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for strategy, tokens in expected.items():
        assert found[strategy] == [tokens.tolist()] * 4
