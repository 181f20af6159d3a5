"""PEFT adapters as experts: what is read, checked against PEFT itself, and what is refused."""

import shutil
import warnings

import pytest
import torch
from helpers_checkpoints import change_json, layer_shapes, save_adapter, save_foundation, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export
from dylora_moe.hub_export.readers.peft_fields import NamePatterns
from dylora_moe.hub_export.sources.json_files import read_json
from dylora_moe.hub_export.tensors.tensor_files import TensorFile


@pytest.fixture
def adapter(adapters, tmp_path):
    """A copy of one adapter, to be changed."""
    return shutil.copytree(adapters[0], tmp_path / "plain")


def export_error(sources, tmp_path, **options) -> str:
    with pytest.raises(InputError) as caught:
        export(sources, tmp_path / "out", verify=False, **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_three_adapters_of_unequal_ranks_and_targets_equal_peft(quick_check, adapters, tmp_path):
    """Patterns, rsLoRA, a regular expression and all-linear; the reference is PEFT's own loading."""
    result = export(adapters, tmp_path / "out")
    assert result.check.passed
    assert result.experts == ["plain", "stabilised", "everywhere"]
    assert (result.router, result.routing_strategy) == (False, "uniform")
    config = read_json(tmp_path / "out" / "config.json")
    plain, stabilised, everywhere = config["expert_configs"]
    assert plain["rank_pattern"]["model.layers.1.mlp.down_proj"] == 6
    assert plain["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 3}
    assert stabilised["use_rslora"]
    assert len(stabilised["target_modules"]) == 7 and len(everywhere["target_modules"]) == 14
    assert config["router_input"] is None


def test_one_adapter_becomes_the_default_strategy(adapters, tmp_path):
    assert export(adapters[1], tmp_path / "out", verify=False).routing_strategy == "single:0"


def test_a_folder_of_adapters_is_as_good_as_its_parts(adapters, tmp_path):
    result = export(adapters[0].parent, tmp_path / "out", verify=False)
    assert result.experts == ["everywhere", "plain", "stabilised"]


def test_float32_adapters_on_a_bfloat16_foundation_stay_exact(quick_check, tmp_path):
    foundation = save_foundation(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "fine", foundation, seed=4)
    result = export(adapter, tmp_path / "out")
    assert result.check.passed
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    assert file.dtype("foundation.model.layers.0.self_attn.q_proj.lora_A") == torch.float32
    assert file.dtype("foundation.model.layers.0.self_attn.q_proj.base_layer.weight") == torch.bfloat16
    again = export(tmp_path / "out", tmp_path / "again", verify=False)
    copied = TensorFile(again.output_dir / "model.safetensors")
    for key in file.keys():  # noqa: SIM118
        assert file.dtype(key) == copied.dtype(key)
        assert torch.equal(file.read(key), copied.read(key))


def test_an_explicit_dtype_converts_and_is_checked(quick_check, adapters, tmp_path):
    result = export(adapters[:2], tmp_path / "out", dtype="bfloat16")
    assert result.check.passed
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    assert {file.dtype(key) for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_transposed_layers_of_gpt2(quick_check, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    adapted = PeftModel(model, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "gpt2")
    adapted.save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out").check.passed


def test_bin_files_are_read(quick_check, adapter, tmp_path):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert export(adapter, tmp_path / "out").check.passed


def test_a_name_clash_names_both_folders(adapter, adapters, tmp_path):
    message = export_error([adapters[0], adapter], tmp_path)
    assert str(adapters[0]) in message and str(adapter) in message and "--expert_names" in message
    result = export([adapters[0], adapter], tmp_path / "out", verify=False, expert_names=["one", "two"])
    assert result.experts == ["one", "two"]


def test_different_foundations_are_named(adapter, adapters, foundation, tmp_path):
    change_json(adapter / "adapter_config.json", base_model_name_or_path="somebody/else")
    sources = [adapters[1], adapter]
    message = export_error(sources, tmp_path)
    assert "somebody/else" in message and str(foundation) in message and "--base_model" in message
    assert export(sources, tmp_path / "out", verify=False, base_model=str(foundation)).experts


FIELDS = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all"},
    "a bias on lora_B": {"lora_bias": True},
    "ADALORA": {"peft_type": "ADALORA"},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "trained token embeddings": {"trainable_token_indices": [1]},
    "some_new_trick": {"some_new_trick": {"strength": 2}},
    "lora_alpha is None": {"lora_alpha": None},
    "r is 'many'": {"r": "many"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_more_than_a_low_rank_sum_is_refused_by_name(adapter, tmp_path, name):
    change_json(adapter / "adapter_config.json", **FIELDS[name])
    message = export_error(adapter, tmp_path)
    assert name in message and "adapter_config.json" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA on an embedding"),
    ],
)
def test_adapters_that_peft_itself_saved_are_refused_by_name(foundation, tmp_path, fields, expected):
    assert expected in export_error(save_adapter(tmp_path / "special", foundation, **fields), tmp_path)


def change_tensors(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {
    "embedding": (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)}), "an embedding"),
    "convolution": (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 3, 2, 2)}), "a convolution"),
    "whole weight": (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(9, 4)}), "a whole weight"),
    "one matrix": (lambda t: t.pop(f"{KEY}.lora_B.weight"), "not both matrices"),
    "rank": (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(5, 32)}), "of one rank"),
    "rank and config": (
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(5, 32), f"{KEY}.lora_B.weight": torch.zeros(32, 5)}),
        "has rank 5",
    ),
    "integers": (
        lambda t: t.update({key: value.to(torch.int8) for key, value in t.items()}),
        "not as floats",
    ),
    "empty": (lambda t: t.clear(), "no LoRA matrices"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(adapter, tmp_path, name):
    change, expected = TENSORS[name]
    change_tensors(adapter, change)
    assert expected in export_error(adapter, tmp_path)


def test_an_adapter_of_other_shapes_names_the_layer_and_both_shapes(tmp_path, foundation):
    wide = save_foundation(tmp_path / "wide", hidden_size=64)
    adapter = save_adapter(tmp_path / "wide-adapter", wide)
    message = export_error(adapter, tmp_path, base_model=str(foundation))
    for part in ("model.layers.0.self_attn.q_proj", "64 inputs", "32 inputs", "[4, 64]", "--base_model"):
        assert part in message


def test_an_unknown_layer_is_named(adapter, tmp_path):
    change_tensors(
        adapter,
        lambda t: t.update(
            {
                f"base_model.model.transformer.h.0.attn.lora_{m}.weight": torch.zeros(*s)
                for m, s in (("A", (4, 32)), ("B", (32, 4)))
            }
        ),
    )
    message = export_error(adapter, tmp_path)
    assert "transformer.h.0.attn" in message and "does not have" in message


def test_adapters_have_no_router_to_set(adapter, tmp_path):
    assert "--router_mode needs a router" in export_error(adapter, tmp_path, router_mode="dense")
    assert "needs a router" in export_error(adapter, tmp_path, routing_strategy="best")
    assert "--lora_alpha" in export_error(adapter, tmp_path, lora_alpha=4)


def test_several_experts_without_a_router_say_how_to_get_one(adapters, tmp_path):
    with pytest.warns(DyloraMoeWarning) as said:
        export(adapters[:2], tmp_path / "two", verify=False)
    (message,) = [str(entry.message) for entry in said if "no router" in str(entry.message)]
    assert all(way in message for way in ("fit-router", "--router arrow", "--router_prompts"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no router")
        export(adapters[0], tmp_path / "one", verify=False)
        export(adapters[:2], tmp_path / "wanted", router_input="none", verify=False)


def test_other_adapters_inside_are_told(adapter, adapters, tmp_path):
    shutil.copytree(adapters[1], adapter / "second")
    with pytest.warns(UserWarning, match="further adapters in second"):
        export(adapter, tmp_path / "out", verify=False)


MODULES = sorted(layer_shapes()) + ["model.layers.11.self_attn.q_proj", "lm_head"]
PATTERNS = st.lists(
    st.sampled_from(["q_proj", r"layers\.1\..*", ".*", "proj", "model.layers.1.self_attn.q_proj", "1.self_attn.q_proj", "lm_head"]),
    unique=True,
)  # fmt: skip


@given(PATTERNS, st.sampled_from(MODULES))
def test_patterns_match_as_in_peft(keys, module):
    pattern = {key: index for index, key in enumerate(keys)}
    assert NamePatterns(pattern, "").find(module, "otherwise") == pattern.get(
        get_pattern_key(keys, module), "otherwise"
    )


FOUNDATIONS = {
    "tied head": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "soft caps": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8}),
    "mixture of experts": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
}


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_foundations_of_other_kinds(quick_check, tmp_path, name):
    model_class, config_class, fields = FOUNDATIONS[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )
    model_class(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = model_class.from_pretrained(tmp_path / "base")
    adapted = PeftModel(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"]))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    result = export(tmp_path / "adapter", tmp_path / "out")
    assert result.check.passed
    again = export(tmp_path / "out", tmp_path / "again")
    assert again.check.largest_difference == 0
