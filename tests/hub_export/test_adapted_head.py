"""LoRA on a head, tied to the embeddings or not, and what PEFT saves beside it: the head's own weight."""

import warnings

import pytest
import torch
from helpers_checkpoints import change_json, save_adapter, save_foundation
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import InputError, export, inspect, verify
from dylora_moe.hub_export.merging import merge
from dylora_moe.modeling import DyloraMoeForCausalLM


HEAD = "base_model.model.lm_head.base_layer.weight"
ROWS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_foundation(tmp_path_factory.mktemp("tied") / "small-llama", tie_word_embeddings=True)


@pytest.fixture
def adapter(tied, tmp_path):
    adapter = save_adapter(
        tmp_path / "head", tied, target_modules=["lm_head", "q_proj"], rank_pattern={"lm_head": 2}
    )
    assert HEAD in load_file(adapter / "adapter_model.safetensors")
    return adapter


def change_tensors(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def peft_logits(foundation, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(foundation), adapter)
    with torch.no_grad():
        return model(ROWS).logits, model.generate(ROWS, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_the_repo_computes_what_peft_does(quick_check, adapter, tied, tmp_path, layout):
    assert inspect(adapter).missing == []
    result = export(adapter, tmp_path / "out", layout=layout)
    assert result.check.passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    logits, tokens = peft_logits(tied, adapter)
    with torch.no_grad():
        assert torch.allclose(model(ROWS).logits, logits, atol=1e-4)
        assert torch.equal(model.generate(ROWS, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_an_exported_repo_is_exported_again_and_verified(quick_check, adapter, tmp_path, layout):
    repo = export(adapter, tmp_path / "out", layout=layout, verify=False).output_dir
    again = export(repo, tmp_path / "again", layout="full" if layout == "adapter" else "adapter")
    assert again.check.passed
    assert verify(again.output_dir, against=adapter).passed


def test_inspect_says_what_an_expert_on_a_tied_head_is(adapter, adapters):
    notes = "\n".join(inspect(adapter).notes)
    assert "lm_head is tied to the embeddings and adapted by head" in notes
    assert not inspect(adapters).notes  # they adapt heads of no foundation, or one that is not tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_that_was_loaded_in_another_dtype_is_the_same_head(quick_check, adapter, tmp_path, dtype):
    change_tensors(adapter, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(dtype)}))
    assert export(adapter, tmp_path / "out").check.passed


def test_an_untied_head_is_saved_along_as_well(quick_check, foundation, tmp_path):
    adapter = save_adapter(tmp_path / "head", foundation, target_modules=["lm_head"])
    assert HEAD in load_file(adapter / "adapter_model.safetensors")
    assert export(adapter, tmp_path / "out").check.passed


def test_embeddings_that_are_saved_along(quick_check, adapter, tied, tmp_path):
    embeddings = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(
        adapter, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": embeddings})
    )
    assert export(adapter, tmp_path / "out").check.passed


TRAINED = {
    "a trained head": (HEAD, lambda head: head + 0.1, "whose own is another"),
    "one number": (HEAD, lambda head: torch.cat([head[:-1], head[-1:] * 1.01]), "whose own is another"),
    "a longer vocabulary": (HEAD, lambda head: torch.cat([head, head[:3]]), "whose own is another"),
    "a layer": (
        "base_model.model.model.layers.7.mlp.up_proj.weight",
        lambda head: head.clone(),
        "does not have it",
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_whole_weight_that_is_not_the_foundations_is_refused_by_name(adapter, tmp_path, name):
    key, change, expected = TRAINED[name]
    change_tensors(adapter, lambda tensors: tensors.update({key: change(tensors[HEAD]).contiguous()}))
    layer = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for attempt in (
        lambda: export(adapter, tmp_path / "out", verify=False),
        lambda: export(adapter, tmp_path / "out"),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        assert expected in str(caught.value) and layer in str(caught.value)
    assert any(expected in missing for missing in inspect(adapter).missing)


def test_a_whole_weight_that_cannot_be_compared_is_refused(adapter, tmp_path):
    change_json(adapter / "adapter_config.json", base_model_name_or_path="somebody/elsewhere")
    with pytest.raises(InputError, match=r"lm_head\.weight.* cannot be compared"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(adapter, tmp_path / "out", layout="adapter", verify=False)


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"], "ensure_weight_tying": True}],
)
def test_lora_on_the_embeddings_is_refused_by_name(tied, tmp_path, fields):
    """PEFT's `ensure_weight_tying` puts that of the head on them as well."""
    with pytest.raises(InputError, match="LoRA on an embedding"):
        export(save_adapter(tmp_path / "embeddings", tied, **fields), tmp_path / "out", verify=False)


def test_the_expert_merged_is_an_untied_model(adapter, tied, tmp_path):
    repo = export(adapter, tmp_path / "out", verify=False).output_dir
    merge(repo, expert="head", output_dir=tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not model.config.tie_word_embeddings
    assert torch.equal(
        model.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight,
    )
    with torch.no_grad():
        assert torch.allclose(model(ROWS).logits, peft_logits(tied, adapter)[0], atol=1e-4)


def test_what_cannot_be_built_is_refused_in_planning(adapters, tmp_path, monkeypatch):
    """With or without the check at the end."""

    def refuse(*arguments, **fields):
        raise ValueError("this layer cannot be adapted")

    monkeypatch.setattr(DyloraMoeForCausalLM, "_wrap_modules", refuse)
    with pytest.raises(InputError, match="this layer cannot be adapted"):
        export(adapters, tmp_path / "out", verify=False)
