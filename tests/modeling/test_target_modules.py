"""What `target_modules` means: the modules that PEFT finds for it, by whole names as soon as there is a model."""

import copy
import json

import pytest
import torch
from helpers_families import SIZES, family_config
from helpers_models import build, llama_config, random_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import models as families

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.repo_config import load_config
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


# By a config's name: what else it needs than `SIZES`, and targets in each form.
FAMILIES: dict[str, tuple[dict, list]] = {
    "Llama": ({}, [["q_proj", "mlp.down_proj"], r".*\.1\.self_attn\.[qv]_proj", ["v_proj", "lm_head"]]),
    "GPT2": ({}, [["c_attn", "mlp.c_proj"], ["c_proj"], r"transformer\.h\.\d\.attn\..*_(attn|proj)"]),
    "OPT": ({"ffn_dim": 40, "word_embed_proj_dim": 24}, [["fc1", "out_proj"], r".*\.fc\d"]),
    "GPTNeoX": ({}, [["query_key_value", "dense"], r".*dense(_4h_to_h)?"]),
    "Phi3": ({}, [["qkv_proj", "gate_up_proj"], ".*(o_proj|down_proj)"]),
    "Gemma3Text": ({"head_dim": 16, "tie_word_embeddings": True}, [{"q_proj"}, ".*[kv]_proj"]),
    "Qwen3Moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
        [["q_proj", "layers.1.self_attn.o_proj"], r".*self_attn\..*_proj"],
    ),
}


def config_of(family: str) -> PreTrainedConfig:
    if family == "GPT2":
        return family_config("gpt2", num_hidden_layers=2)
    return getattr(families, f"{family}Config")(**{**SIZES, "num_hidden_layers": 2, **FAMILIES[family][0]})


def found_by_peft(config: PreTrainedConfig, targets) -> list[str]:
    """In the order of the model's modules."""
    with torch.device("meta"):
        foundation = AutoModelForCausalLM.from_config(config)
        names = [name for name, _ in foundation.named_modules()]
        adapted = get_peft_model(foundation, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    return sorted(adapted.targeted_module_names, key=names.index)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_that_peft_finds(family):
    base = config_of(family)
    for targets in (*FAMILIES[family][1], "all-linear", "All-Linear"):
        expected = found_by_peft(base, targets)
        config = DyloraMoeConfig(base, [{"target_modules": targets}], router_input=None)
        foundation = AutoModelForCausalLM.from_config(base)
        model = DyloraMoeForCausalLM.from_foundation(foundation, copy.deepcopy(config))
        model.add_expert("all", target_modules="all-linear")
        model.add_expert("again", target_modules=targets)  # on layers that experts wrap by now
        with torch.device("meta"):
            made = DyloraMoeForCausalLM(config)
        assert expected and list(made.expert_layers()) == expected
        entries = [made.config.expert_configs[0], *model.config.expert_configs[::2]]
        assert [entry["target_modules"] for entry in entries] == [expected] * 3


def test_whole_names_stay_as_they_are():
    """In their order, and without other modules that end so."""
    model = build()
    names = [
        f"model.layers.{layer}.{name}" for layer in (1, 0) for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    entry = {"target_modules": names, "rank_pattern": {names[0]: 2, "up_proj": 3}}
    found = build(experts=[entry]).config.expert_configs[0]
    assert found["target_modules"] == names and found["rank_pattern"] == entry["rank_pattern"]
    head = torch.nn.Linear(32, 32)
    foundation = AutoModelForCausalLM.from_config(llama_config())
    foundation.model.lm_head = head
    config = DyloraMoeConfig(expert_configs=[{"target_modules": ["lm_head", "q_proj"]}])
    model = DyloraMoeForCausalLM.from_foundation(foundation, config)
    assert model.foundation.model.lm_head is head
    assert model.config.expert_configs[0]["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]


def test_ends_in_the_patterns_become_whole_names_too():
    entry = {
        "r": 8,
        "target_modules": ["self_attn.q_proj", "mlp.up_proj"],
        "rank_pattern": {"0.self_attn.q_proj": 3, "q_proj": 5},
        "alpha_pattern": {"up_proj": 2},
    }
    queries, ups = ([f"model.layers.{i}.{name}" for i in range(2)] for name in entry["target_modules"])
    model = build(experts=[entry])
    found = model.config.expert_configs[0]
    assert found["rank_pattern"] == {queries[0]: 3, queries[1]: 5}
    assert found["alpha_pattern"] == dict.fromkeys(ups, 2)
    config = LoraConfig(**{**entry, "lora_alpha": 8})
    peft = get_peft_model(AutoModelForCausalLM.from_config(llama_config()), config).base_model.model
    for name, layer in model.expert_layers().items():
        other = peft.get_submodule(name)
        assert layer.layout == ((other.r["default"], other.scaling["default"]),)
    with pytest.raises(ValueError, match=r"'v_proj' in its `alpha_pattern`"):
        build(experts=[{**entry, "alpha_pattern": {"v_proj": 2}}])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.q_proj"])
def test_a_config_alone_keeps_them_and_a_model_saves_whole_names(targets, tmp_path):
    config = DyloraMoeConfig(llama_config(), [{"target_modules": targets}])
    config.save_pretrained(tmp_path)
    for again in (DyloraMoeConfig(**config.to_dict()), DyloraMoeConfig.from_pretrained(tmp_path)):
        assert again.expert_configs == config.expert_configs
        assert again.expert_configs[0]["target_modules"] == targets
    model = DyloraMoeForCausalLM(config).eval()
    names = model.config.expert_configs[0]["target_modules"]
    assert isinstance(names, list) and all(name.startswith("model.layers.") for name in names)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["expert_configs"][0]
    assert stored["target_modules"] == names
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    rows = torch.tensor(random_rows((6,)))
    assert torch.equal(again(rows).logits, model(rows).logits)
    assert again.config.expert_configs == model.config.expert_configs


def test_what_needs_whole_names_refuses_a_string(tmp_path):
    """A file's regular expression, which may run for ever, is not run either."""
    experts = [{"name": "a", "target_modules": "(.*)*x"}]
    DyloraMoeConfig(llama_config(), experts).save_pretrained(tmp_path)
    config = DyloraMoeConfig.from_pretrained(tmp_path)
    refused = r"Expert 'a' has `target_modules` '\(\.\*\)\*x', and whole names are needed"
    for needs in (config.rank_layouts, config.adapted_places, config.stack_modules, config.wrapped_modules):
        with pytest.raises(ValueError, match=refused):
            needs()
    for options in ({}, {"experts": ["a"]}):
        with pytest.raises(ValueError, match=refused):
            DyloraMoeForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(InputError, match=refused):
        load_config(tmp_path)


LINEAR_LAYERS = r"end in q_proj, k_proj, v_proj, .*'model\.layers\.0\.self_attn\.q_proj'"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], rf"'q_porj', which a LlamaForCausalLM does not have.*{LINEAR_LAYERS}"),
        (["v_proj", "proj"], "'proj', which a LlamaForCausalLM does not have"),
        (["model.layers.9.self_attn.q_proj"], rf"does not have.*{LINEAR_LAYERS}"),
        (["mlp"], r"'model\.layers\.0\.mlp' by 'mlp'\. .* this one is a LlamaMLP\. Leave it out"),
        (["model.norm"], r"names 'model\.norm'\. .* this one is a LlamaRMSNorm"),
        (".*", r"names 'model' by '\.\*'\. .* this one is a LlamaModel"),
        ("q_proj", rf"text 'q_proj'.* no module .* go into a list.*{LINEAR_LAYERS}"),
        ("", "text ''.* no module"),
        ([], "Expert 'expert_1' adapts nothing: give it `target_modules`"),
        (None, "Expert 'expert_1' adapts nothing"),
        ("q_proj(", r"text 'q_proj\(', which is no regular expression \(missing"),
    ],
)
def test_targets_that_mean_nothing_or_no_linear_layer_are_named(targets, message):
    config = DyloraMoeConfig(expert_configs=[{"target_modules": ["v_proj"]}, {"target_modules": targets}])
    foundation = AutoModelForCausalLM.from_config(llama_config())
    before = [name for name, _ in foundation.named_modules()]
    with pytest.raises(ValueError, match=message):
        DyloraMoeForCausalLM.from_foundation(foundation, config)
    assert config.expert_configs[0]["target_modules"] == ["v_proj"]
    assert [name for name, _ in foundation.named_modules()] == before


@pytest.mark.parametrize("targets", ["all-linear", ["other_proj"], "other_proj"])
def test_a_base_model_without_linear_layers_is_said(targets):
    foundation = AutoModelForCausalLM.from_config(llama_config())
    for name, module in list(foundation.named_modules()):
        if isinstance(module, torch.nn.Linear):
            foundation.set_submodule(name, torch.nn.Identity())
    config = DyloraMoeConfig(expert_configs=[{"target_modules": targets}])
    with pytest.raises(ValueError, match=r"has no linear layers \(nn\.Linear, Conv1D\)"):
        DyloraMoeForCausalLM.from_foundation(foundation, config)


def test_layers_inside_wrapped_ones_are_no_targets():
    """Neither an expert layer's frozen one nor an adapter's on top of it."""
    model = build()
    queries = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    get_peft_model(model, LoraConfig(target_modules=model.peft_target_modules(queries)))
    model.add_expert("new", r".*\.q_proj.*", r=2)
    model.add_expert("every", "all-linear", r=2)
    assert model.config.expert_configs[3]["target_modules"] == queries
    names = model.config.expert_configs[4]["target_modules"]
    assert len(names) == 14 and set(queries) < set(names)
    with pytest.raises(ValueError, match="'base_layer', which a LlamaForCausalLM does not have"):
        model.add_expert("inside", ["base_layer"])


def test_an_adapter_around_a_layer_is_named():
    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(llama_config()), LoraConfig(target_modules=["q_proj"])
    )
    config = DyloraMoeConfig(expert_configs=[{"name": "a", "target_modules": "all-linear"}])
    with pytest.raises(
        ValueError, match="q_proj' by 'all-linear', and an adapter of PEFT is around that layer"
    ):
        DyloraMoeForCausalLM.from_foundation(adapted.base_model.model, config)
