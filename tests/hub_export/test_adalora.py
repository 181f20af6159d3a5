"""AdaLoRA adapters: the fold into a plain low-rank sum is PEFT's own computation; QLoRA adapters are
plain."""

import json

import pytest
import torch
from helpers_checkpoints import (
    VOCABULARY,
    adalora_model,
    change_json,
    low_rank_sums,
    save_adalora_adapter,
    save_adapter,
)
from helpers_reading import assert_same, read, read_error
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dylora_moe.hub_export.checking.check_source import reference


KEY = "base_model.model.model.layers.0.self_attn.v_proj"


@pytest.fixture
def adapter(foundation, tmp_path):
    return save_adalora_adapter(tmp_path / "adaptive", foundation)


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_pruned_layers_equal_peft(adapter, foundation):
    expert = read(adapter).experts[0]
    ranks = {layer.rank for layer in expert.layers.values()}
    assert len(ranks) > 1 and 0 not in ranks
    assert len(expert.layers) < 6  # PEFT's allocator pruned a layer away
    assert not expert.use_rslora
    assert_same(read(adapter), foundation)


def test_the_scale_is_peft_s_to_the_last_digit_of_float32(adapter, foundation):
    """Layer by layer against PEFT's own sum of a loaded adapter, whatever rank the layer ended with."""
    expert = read(adapter).experts[0]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(foundation), adapter)
    for module, found in low_rank_sums(expert).items():
        expected = model.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-7)
        layer = expert.layers[module]
        assert layer.lora_alpha / layer.rank == pytest.approx(5 / (6 + 1e-5), rel=1e-15)


def test_the_logits_are_those_of_training(foundation, tmp_path):
    model = adalora_model(foundation, seed=4)
    rows = torch.randint(0, VOCABULARY, (2, 8))
    with torch.no_grad():
        expected = model(rows).logits
    model.save_pretrained(tmp_path / "adaptive")
    plain = LlamaForCausalLM.from_pretrained(foundation)
    with torch.no_grad():
        for module, found in low_rank_sums(read(tmp_path / "adaptive").experts[0]).items():
            plain.get_submodule(module).weight += found.float()
        torch.testing.assert_close(plain(rows).logits, expected, atol=1e-4, rtol=0)


def test_an_adapter_saved_before_any_pruning(foundation, tmp_path):
    adapter = save_adalora_adapter(tmp_path / "early", foundation, steps=1, tinit=5)
    assert not json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    expert = read(adapter).experts[0]
    assert len(expert.layers) == 6 and {layer.rank for layer in expert.layers.values()} == {6}
    assert_same(read(adapter), foundation)


def test_half_precision_is_folded_in_float32(adapter, foundation):
    change_tensors(adapter, lambda tensors: tensors.update({key: tensors[key].bfloat16() for key in tensors}))
    expert = read(adapter).experts[0]
    module = KEY.removeprefix("base_model.model.")
    matrix_a, matrix_b = expert.read(module)
    stored = load_file(adapter / "adapter_model.safetensors")
    product = stored[f"{KEY}.lora_A"].float() * stored[f"{KEY}.lora_E"].float()
    assert torch.equal(matrix_a, product) and not torch.equal(matrix_a, product.bfloat16().float())
    assert torch.equal(matrix_b, stored[f"{KEY}.lora_B"].float())
    assert expert.layers[module].dtype == matrix_a.dtype == matrix_b.dtype == torch.float32
    assert_same(read(adapter), foundation)


def test_lora_and_adalora_together(adapter, foundation, tmp_path):
    plain = save_adapter(tmp_path / "plain", foundation, seed=1)
    second = save_adalora_adapter(tmp_path / "second", foundation, seed=9, lora_alpha=3)
    both = read(adapter, second)
    assert [expert.name for expert in both.experts] == ["adaptive", "second"]
    assert_same(both, foundation)
    assert_same(read(adapter, plain, second), foundation)


def test_an_adapter_of_several_kinds_rounded_as_an_export_rounds_it(adapter, foundation, tmp_path):
    """The check of an export in another dtype: the product of A and E is one tensor there, and is rounded as
    one."""
    plain = save_adapter(tmp_path / "plain", foundation, seed=1)
    mixture = read(adapter, plain)
    folders = mixture.folders
    rows = torch.randint(0, VOCABULARY, (1, 6))
    arguments = (str(foundation), None, None, {}, torch.bfloat16)
    results = reference(mixture.format, folders, *arguments).quantities(rows)
    model = LlamaForCausalLM.from_pretrained(foundation)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expert = mixture.experts[0]
    with torch.no_grad():
        for module, layer in expert.layers.items():
            matrix_a, matrix_b = (matrix.bfloat16().float() for matrix in expert.read(module))
            model.get_submodule(module).weight += layer.lora_alpha / layer.rank * matrix_b @ matrix_a
        torch.testing.assert_close(results["single:0"], model(rows).logits, atol=1e-4, rtol=0)
    alone = reference(mixture.format, folders[:1], *arguments).quantities(rows)
    torch.testing.assert_close(alone["single:0"], results["single:0"], atol=1e-4, rtol=0)


CONFIGS = {
    "no init_r": ({"init_r": None}, ["ADALORA", "init_r is None"]),
    "init_r is text": ({"init_r": "6"}, ["init_r is '6'"]),
    "negative alpha": ({"lora_alpha": -1}, ["lora_alpha is -1", "positive"]),
    "alpha is infinite": ({"lora_alpha": float("inf")}, ["lora_alpha", "finite"]),
    "other init_r": ({"init_r": 5}, ["rank_pattern", "init_r (5)"]),
    "pattern is a list": ({"rank_pattern": [1]}, ["rank_pattern is a list"]),
    "pattern of numbers": (
        {"rank_pattern": {"model.layers.0.self_attn.v_proj.lora_E": 3}},
        ["rank_pattern of"],
    ),
    "no pattern": ({"rank_pattern": None}, ["adapter_config.json says 6", "do not belong together"]),
    "pattern of an unknown layer": (
        {"rank_pattern": {"model.layers.7.mlp.up_proj.lora_E": [True] * 6}},
        ["model.layers.7.mlp.up_proj"],
    ),
    "a whole module": ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
    "biases": ({"bias": "all"}, ["biases"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_is_one_line_that_names_it(adapter, name):
    fields, expected = CONFIGS[name]
    change_json(adapter / "adapter_config.json", **fields)
    message = read_error(adapter)
    for part in expected:
        assert part in message


TENSORS = {
    "no diagonal": (lambda tensors: tensors.pop(f"{KEY}.lora_E"), "no lora_E"),
    "diagonal of other shape": (
        lambda tensors: tensors.update({f"{KEY}.lora_E": torch.zeros(2, 2)}),
        "[rank, 1]",
    ),
    "integers": (
        lambda tensors: tensors.update({f"{KEY}.lora_E": tensors[f"{KEY}.lora_E"].int()}),
        "not as floats",
    ),
    "rank number": (lambda tensors: tensors.update({f"{KEY}.ranknum": torch.ones(1)}), "ranknum"),
    "LoRA's own names": (
        lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(1, 32)}),
        "unknown name",
    ),
    "everything pruned": (lambda tensors: tensors.clear(), "saved empty"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(adapter, name):
    change, expected = TENSORS[name]
    change_tensors(adapter, change)
    assert expected in read_error(adapter)


def test_a_layer_that_lost_ranks_that_the_config_keeps(adapter):
    def cut(tensors):
        tensors[f"{KEY}.lora_A"] = tensors[f"{KEY}.lora_A"][:1].contiguous()
        tensors[f"{KEY}.lora_E"] = tensors[f"{KEY}.lora_E"][:1].contiguous()
        tensors[f"{KEY}.lora_B"] = tensors[f"{KEY}.lora_B"][:, :1].contiguous()

    change_tensors(adapter, cut)
    assert "has rank 1" in read_error(adapter)


def test_adapters_of_a_quantised_foundation_are_plain(foundation, tmp_path):
    """What QLoRA runs write into the config on top: initialisation and quantisation settings, none of which
    count."""
    adapter = save_adapter(tmp_path / "quantised", foundation, seed=2)
    change_json(
        adapter / "adapter_config.json",
        loftq_config={},
        runtime_config={"ephemeral_gpu_offload": False},
        qalora_group_size=16,
        use_qalora=False,
        auto_mapping=None,
        target_modules=["q_proj", "v_proj"],
    )
    assert_same(read(adapter), foundation)


@pytest.mark.parametrize(
    ("fields", "expected"), [({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "only LORA and ADALORA")]
)
def test_other_kinds_stay_refused_by_name(foundation, tmp_path, fields, expected):
    adapter = save_adapter(tmp_path / "special", foundation)
    change_json(adapter / "adapter_config.json", **fields)
    assert expected in read_error(adapter)
