"""Foundations of other architectures: strategies against a PEFT loop, with and without a cache, saved and
loaded."""

import pytest
import torch
import transformers
from helpers_models import (
    LATENTS_ARE_CACHED,
    STRATEGIES,
    PeftLoop,
    build,
    build_on_latent_attention,
    left_padded,
    random_rows,
    save_layouts,
)
from helpers_slow import slow_but
from peft import PeftModel

from dylora_moe.modeling import DyloraMoeForCausalLM, DyloraMoeModel
from dylora_moe.modeling.routing_strategies_dylora_moe import ROUTING_STRATEGIES, RoutingStrategy, register


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SLIDING = ["sliding_attention", "full_attention"]
LAYER = "model.layers.{}."

# Each with two kinds of linear layers that experts adapt.
FOUNDATIONS = {
    "llama with biases": (
        "LlamaConfig",
        {**GROUPED, "attention_bias": True, "mlp_bias": True},
        (LAYER + "self_attn.q_proj", LAYER + "mlp.gate_proj"),
    ),
    "qwen2": ("Qwen2Config", GROUPED, (LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj")),
    "qwen2 tied": (
        "Qwen2Config",
        {**GROUPED, "tie_word_embeddings": True},
        (LAYER + "self_attn.v_proj", LAYER + "mlp.up_proj"),
    ),
    "qwen3": (
        "Qwen3Config",
        {**GROUPED, "head_dim": 8},
        (LAYER + "self_attn.k_proj", LAYER + "mlp.down_proj"),
    ),
    "mistral, sliding window": (
        "MistralConfig",
        {**GROUPED, "sliding_window": 6},
        (LAYER + "self_attn.k_proj", LAYER + "mlp.down_proj"),
    ),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}, (LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj")),
    "gemma2, soft-capped": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
        (LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj"),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
        (LAYER + "self_attn.o_proj", LAYER + "mlp.gate_proj"),
    ),
    "phi": ("PhiConfig", SIZES, (LAYER + "self_attn.dense", LAYER + "mlp.fc1")),
    "phi3, fused projections": (
        "Phi3Config",
        {**GROUPED, "pad_token_id": 2},
        (LAYER + "self_attn.qkv_proj", LAYER + "mlp.gate_up_proj"),
    ),
    "starcoder2": ("Starcoder2Config", GROUPED, (LAYER + "self_attn.v_proj", LAYER + "mlp.c_fc")),
    "gpt2, Conv1D": ("GPT2Config", GPT2_SIZES, ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc")),
    "gpt neox": (
        "GPTNeoXConfig",
        SIZES,
        ("gpt_neox.layers.{}.attention.query_key_value", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    ),
    "opt": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        ("model.decoder.layers.{}.self_attn.v_proj", "model.decoder.layers.{}.fc1"),
    ),
    "gpt bigcode": (
        "GPTBigCodeConfig",
        GPT2_SIZES,
        ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_proj"),
    ),
    "cohere, scaled logits": (
        "CohereConfig",
        {**GROUPED, "logit_scale": 0.3},
        (LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj"),
    ),
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        (LAYER + "self_attn.q_proj", LAYER + "self_attn.o_proj"),
    ),
    "qwen2 moe": (
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        (LAYER + "self_attn.q_proj", LAYER + "self_attn.v_proj"),
    ),
}


# Tied, Conv1D, sliding, scaled and soft-capped, and one with experts of its own.
QUICK = ("qwen2 tied", "gpt2, Conv1D", "mistral, sliding window", "gemma2, soft-capped", "mixtral")


def mixture(name: str) -> DyloraMoeForCausalLM:
    config_name, fields, (first, second) = FOUNDATIONS[name]
    experts = [
        {"name": "one", "r": 4, "lora_alpha": 8, "target_modules": [first.format(i) for i in range(2)]},
        {"name": "two", "r": 3, "lora_alpha": 8, "target_modules": [first.format(0), second.format(1)]},
        {"name": "three", "r": 2, "lora_alpha": 4, "target_modules": [second.format(i) for i in range(2)]},
    ]
    return build(getattr(transformers, config_name)(**fields), experts)


@pytest.mark.parametrize("name", slow_but(*QUICK, of=FOUNDATIONS))
def test_foundation(name, tmp_path):
    model = mixture(name)
    loop = PeftLoop(model)
    rows = random_rows((9, 4))
    batch = left_padded(rows)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model.save_pretrained(tmp_path)
    loaded, information = DyloraMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    for strategy in ("router", "best", "single:1", "ensemble"):
        with torch.no_grad():
            logits = model(**batch, position_ids=positions, routing_strategy=strategy).logits
            again = loaded(**batch, position_ids=positions, routing_strategy=strategy).logits
        assert torch.equal(logits, again)
        for turn, row in enumerate(rows):
            expected = loop.logits(row, strategy, len(row), turn)
            torch.testing.assert_close(logits[turn, -len(row) :], expected, atol=1e-4, rtol=0)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "routing_strategy": "router"}
    cached = model.generate(**batch, **arguments)
    assert cached.tolist() == model.generate(**batch, use_cache=False, **arguments).tolist()
    assert cached.tolist() == model.generate(**batch, cache_implementation="static", **arguments).tolist()
    assert cached[0, 9:].tolist() == loop.greedy(rows[0], "router", 0, 5)


@pytest.mark.parametrize("name", slow_but(*QUICK, of=FOUNDATIONS))
def test_every_strategy_generates_and_experts_go_back_to_peft_and_to_plain_models(name, tmp_path):
    model = mixture(name)
    loop = PeftLoop(model)
    rows = random_rows((7, 4), seed=3)
    for strategy in STRATEGIES:
        model.reset_round_robin()
        arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        found = model.generate(**left_padded(rows), routing_strategy=strategy, **arguments)[:, 7:].tolist()
        assert found == [loop.greedy(row, strategy, turn, 3) for turn, row in enumerate(rows)], strategy
    folder = model.save_adapters(tmp_path)[1]
    ids = torch.tensor(rows[:1])
    peft = PeftModel.from_pretrained(PeftLoop(model).peft.unload(), str(folder)).eval()
    with torch.no_grad():
        expected = model(ids, routing_strategy="single:1").logits
        torch.testing.assert_close(model.merge_expert(1)(ids).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(peft(ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", slow_but(*QUICK, of=FOUNDATIONS))
def test_layout_adapter_and_a_subset(name, tmp_path):
    """The foundation's weights under the names of its own files, which mixtures of experts change on
    loading."""
    model = mixture(name)
    save_layouts(model, tmp_path)
    adapter = DyloraMoeForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor(random_rows((7, 7)))
    with torch.no_grad():
        for strategy in ("base", "router", "single:1"):
            expected = model(ids, routing_strategy=strategy).logits
            assert torch.equal(adapter(ids, routing_strategy=strategy).logits, expected), strategy
        for layout in ("full", "adapter"):
            part, information = DyloraMoeForCausalLM.from_pretrained(
                tmp_path / layout, experts=["two"], output_loading_info=True
            )
            assert not information["missing_keys"] and not information["unexpected_keys"]
            assert torch.equal(part(ids, routing_strategy="single:0").logits, expected)
    whole, tied = (
        [m.get_input_embeddings().weight, m.get_output_embeddings().weight] for m in (model, adapter)
    )
    assert (whole[0] is whole[1]) == (tied[0] is tied[1])


def longrope():
    """Phi-3 with other positions after 16 tokens: there it drops its cache, and starts anew with all
    tokens."""
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    base = transformers.Phi3Config(**GROUPED, **lengths, rope_scaling=factors)
    targets = [f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(2)]
    return build(base, [{"name": name, "r": 2, "target_modules": targets} for name in ("one", "two")])


def test_a_foundation_that_drops_its_cache_half_way():
    model = longrope()
    loop = PeftLoop(model)
    rows = random_rows((12, 12), seed=1)
    fields = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for strategy in STRATEGIES:
        expected = [loop.greedy(row, strategy, turn, 8) for turn, row in enumerate(rows)]
        for arguments in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            model.reset_round_robin()
            found = model.generate(torch.tensor(rows), routing_strategy=strategy, **fields, **arguments)
            assert found[:, 12:].tolist() == expected, (strategy, arguments)


def test_arguments_that_only_the_foundation_knows():
    model = mixture("gpt2, Conv1D")
    ids = torch.tensor(random_rows((6,)))
    fields = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    types = torch.full_like(ids, 9)
    found = model.generate(ids, token_type_ids=types, routing_strategy="single:1", **fields).logits[0]
    expected = model.merge_expert(1).generate(ids, token_type_ids=types, **fields).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model.generate(ids, routing_strategy="single:1", **fields).logits[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="tokn"):
        model.generate(ids, tokn=types, **fields)


def build_on_doge() -> DyloraMoeForCausalLM:
    """Experts on the layer that weighs all tokens seen so far anew, `[batch, tokens, values]`."""
    targets = [f"model.layers.{layer}.self_attn.dt_proj" for layer in range(2)]
    experts = [
        {"name": name, "r": 3, "lora_alpha": 6, "target_modules": targets} for name in ("one", "two", "three")
    ]
    model = build(transformers.DogeConfig(**GROUPED), experts)
    with torch.no_grad():
        for layer in model.foundation.model.layers:
            layer.self_attn.A.normal_()  # it is zero at first, which switches that off
    return model


@pytest.fixture
def by_token():
    """A strategy of somebody's own, under which a token's number says its expert."""

    @register
    class ByToken(RoutingStrategy):
        name = "by_token"

        def expert_weights(self, routed_pass):
            ids = routed_pass.inputs["input_ids"] % self.num_experts
            return torch.nn.functional.one_hot(ids, self.num_experts).float()

    yield "by_token"
    del ROUTING_STRATEGIES["by_token"]


@pytest.mark.parametrize("make", [build_on_latent_attention, build_on_doge])
def test_experts_on_a_layer_that_runs_over_all_past_tokens(make, by_token):
    """Right wherever all of a row's tokens have the same experts, and refused where the past ones had
    others."""
    model = make()
    loop = PeftLoop(model)
    rows = random_rows((7, 4), seed=1)
    batch = left_padded(rows)
    fields = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    if model.generate(**batch, routing_strategy="base", **fields)[:, 7:].tolist() != [
        loop.greedy(row, "base", 0, 5) for row in rows
    ]:
        pytest.skip(
            "the foundation itself computes something else with padding than without (Doge, transformers 5.17)"
        )
    over_past_tokens = make is build_on_doge or LATENTS_ARE_CACHED
    for strategy in (*STRATEGIES, "single:0"):
        expected = [loop.greedy(row, strategy, turn, 5) for turn, row in enumerate(rows)]
        for arguments in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            model.reset_round_robin()
            if strategy == "router" and arguments != {"use_cache": False} and over_past_tokens:
                with pytest.raises(ValueError, match="use_cache=False"):
                    model.generate(**batch, routing_strategy=strategy, **fields, **arguments)
                with pytest.raises(ValueError, match="use_cache=False"):  # one row's weights would fit
                    model.generate(batch["input_ids"][:1], routing_strategy=strategy, **fields, **arguments)
            else:
                found = model.generate(**batch, routing_strategy=strategy, **fields, **arguments)
                assert found[:, 7:].tolist() == expected, (strategy, arguments)
    if over_past_tokens:
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(**batch, routing_strategy=by_token, **fields)
    assert model.generate(**batch, routing_strategy=by_token, use_cache=False, **fields).shape == (2, 12)
    with torch.no_grad():  # a pass over a whole text is right with the cache that it fills
        found = model(torch.tensor(rows[:1]), routing_strategy="router").logits[0]
    torch.testing.assert_close(found, loop.logits(rows[0], "router", 7, 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "by_token"])
def test_experts_on_a_head_that_sees_some_tokens(by_token, tmp_path, strategy):
    targets = ["lm_head", "model.layers.1.self_attn.q_proj"]
    experts = [{"name": name, "r": 3, "lora_alpha": 6, "target_modules": targets} for name in ("one", "two")]
    model = build(transformers.Qwen2Config(**GROUPED), experts)
    batch = left_padded(random_rows((8, 5), seed=2))
    with torch.no_grad():
        whole = model(**batch, routing_strategy=strategy).logits
        for keep in (1, 3, torch.tensor([0, 4, 7])):
            kept = model(**batch, routing_strategy=strategy, logits_to_keep=keep).logits
            wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=0)
            assert (
                kept.is_contiguous() and kept.untyped_storage().nbytes() == kept.nbytes
            )  # the others are free again
        labels = batch["input_ids"][:, -3:]
        assert model(**batch, routing_strategy=strategy, logits_to_keep=3, labels=labels).loss > 0
        if strategy != "ensemble":  # which has no hidden states of its own
            model.save_pretrained(tmp_path)
            headless = DyloraMoeModel.from_pretrained(tmp_path)
            hidden = headless(**batch, routing_strategy=strategy, logits_to_keep=1).last_hidden_state
            torch.testing.assert_close(hidden, headless(**batch, routing_strategy=strategy).last_hidden_state)
    repeating = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    fields = {"max_new_tokens": 8, "do_sample": False, "routing_strategy": strategy}
    expected = model.generate(repeating, use_cache=False, **fields).tolist()
    for arguments in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": model.foundation}):
        model.reset_round_robin()
        if strategy == "round_robin":  # its turn comes with every call
            expected = model.generate(repeating, use_cache=False, **fields).tolist()
            model.reset_round_robin()
        found = model.generate(repeating, **fields, **arguments)[
            :, : len(expected[0])
        ]  # 5.10 looks up one too many
        assert found.tolist() == expected, arguments
