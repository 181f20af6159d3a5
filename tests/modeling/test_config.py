"""The config: fields that are the foundation's, flags that act, names that are refused."""

import copy
import json

import pytest
import torch
from helpers_models import build, llama_config, random_rows
from transformers import (
    GPT2Config,
)

from dylora_moe.modeling import DyloraMoeConfig


IDS = torch.tensor(random_rows((6,)))
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_sizes_and_special_tokens_are_the_foundations(tmp_path):
    config = build().config
    for name, value in {
        **SIZES,
        "pad_token_id": 2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "use_cache": True,
    }.items():
        assert getattr(config, name) == value == getattr(config.base_config, name)
    assert config.max_position_embeddings == llama_config().max_position_embeddings
    config.pad_token_id = 5
    assert config.base_config.pad_token_id == 5
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (
        not set(fields) & {*SIZES, "pad_token_id", "use_cache"} and fields["base_config"]["pad_token_id"] == 5
    )
    again = DyloraMoeConfig.from_pretrained(tmp_path)
    assert again.pad_token_id == 5 and again.to_dict() == config.to_dict()
    gpt2 = DyloraMoeConfig(GPT2Config(n_embd=32, n_layer=3, n_head=4))
    assert (gpt2.hidden_size, gpt2.num_hidden_layers) == (32, 3)
    assert not hasattr(DyloraMoeConfig(), "vocab_size")


def test_a_dictionary_shows_the_foundations_config_as_that_of_the_text_model(tmp_path):
    """Where generic code looks for sizes; files and configs made from one have them in `base_config`
    alone."""
    config = build().config
    fields = config.to_dict()
    assert fields["text_config"] == fields["base_config"] and fields["text_config"]["hidden_size"] == 32
    fields["base_config"]["pad_token_id"] = 7
    again = DyloraMoeConfig(**fields)
    assert again.pad_token_id == 7 and "text_config" not in vars(again)
    for diff in (True, False):
        config.to_json_file(tmp_path / "config.json", use_diff=diff)
        assert ("text_config" in json.loads((tmp_path / "config.json").read_text())) is not diff
        read = DyloraMoeConfig.from_pretrained(tmp_path)
        assert read.to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()
    assert "text_config" not in DyloraMoeConfig().to_dict()


def test_flags_of_the_config_act():
    model = build()
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 3
    assert model(IDS, output_hidden_states=False).hidden_states is None
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(IDS).attentions) == 2


@pytest.mark.parametrize("names", [["0", "1"], ["a", "7"], ["1"]])
def test_names_that_read_as_numbers_are_refused(names):
    with pytest.raises(ValueError, match="digits alone"):
        DyloraMoeConfig(expert_configs=[{"name": name} for name in names])


def test_an_adapted_head_is_not_resized():
    model = build(llama_config(tie_word_embeddings=False), [{"name": "a", "target_modules": ["lm_head"]}])
    with pytest.raises(ValueError, match="adapt the head"):
        model.resize_token_embeddings(103)


def test_a_config_owns_its_fields():
    """Neither the caller's lists nor another config's change with it, nor the defaults."""
    entry = {"r": 4, "target_modules": ["a", "b"], "rank_pattern": {"a": 2}, "alpha_pattern": None}
    config = DyloraMoeConfig(expert_configs=[entry, {**entry, "name": "other"}])
    again = DyloraMoeConfig(expert_configs=config.expert_configs)
    for change in (config.expert_configs[0], entry):
        change["target_modules"].append("c")
        change["rank_pattern"]["b"] = 9
    config.expert_configs[0]["alpha_pattern"]["a"] = 7
    expected = {"a": ((2, 4.0),) * 2, "b": ((4, 2.0),) * 2}
    assert again.rank_layouts() == expected
    assert DyloraMoeConfig(expert_configs=[{"target_modules": ["a"]}]).rank_layouts() == {"a": ((8, 1.0),)}
    assert config.rank_layouts() == {
        "a": ((2, 3.5), (2, 4.0)),
        "b": ((9, 8 / 9), (4, 2.0)),
        "c": ((4, 2.0), (0, 0.0)),
    }


def test_files_have_target_parameters_only_where_an_expert_has_some(tmp_path):
    """Without that, versions that do not know the field read the repo as before."""
    parameter = "model.layers.0.mlp.experts.down_proj"
    experts = [{"name": "a", "target_modules": ["lm_head"]}, {"name": "b", "target_parameters": [parameter]}]
    config = DyloraMoeConfig(expert_configs=experts)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["expert_configs"]
    assert [entry.get("target_parameters") for entry in stored] == [None, [parameter]]
    assert config.expert_configs[0]["target_parameters"] == []
    assert DyloraMoeConfig.from_pretrained(tmp_path).expert_configs == config.expert_configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": 0}, "alpha"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": -1}}, "alpha"),
        ({"lora_dropout": 7}, "dropout"),
        ({"lora_dropout": "x"}, "dropout"),
        ({"lora_dropout": -(10**400)}, "dropout"),
        ({"lora_alpha": 10**400}, "alpha"),
        ({"lora_alpha": True}, "alpha"),
        ({"r": 10**400, "use_rslora": True}, "rank"),
        ({"r": True}, "rank"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"use_rslora": float("nan")}, "use_rslora"),
    ],
)
def test_nonsense_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(experts=[{"target_modules": ["model.layers.0.self_attn.q_proj"], **fields}])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("router_temperature", (0, -1.0, float("nan"), float("inf"), 10**400, True, "2")),
        ("num_experts_per_tok", (0, 4, 10**400, 1.5, True, "1", None, float("nan"))),
        ("router_aux_loss_coef", (10**400, float("nan"), float("inf"), "0.01", True, [0.01])),
    ],
)
def test_nonsense_numbers_of_the_router_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field) as caught:
            build(**{field: value})
        assert len(str(caught.value)) < 300


def test_no_config_field_is_named_like_an_argument_of_from_pretrained():
    """AutoConfig would swallow `experts=` before the model sees it."""
    assert "experts" not in DyloraMoeConfig().to_dict()
