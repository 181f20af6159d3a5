"""Names of adapted layers that are not the foundation's: those that PEFT converts, and those that nothing
reads."""

import shutil

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    save_adapter,
    save_final_checkpoint,
    save_tokenizer,
    save_whole_model,
    write_json,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, MixtralConfig

from dylora_moe.hub_export import InputError, export, inspect


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROWS = torch.arange(3, 15)[None]


def save_model(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms stay as they are
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    config = Gemma3Config(
        text_config={**SIZES, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return save_model(tmp_path_factory.mktemp("gemma3") / "base", config)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("mixtral") / "base", MixtralConfig(**SIZES, num_local_experts=4)
    )


def write_adapter(folder, foundation, layers, target_modules):
    """An adapter of rank 4 on layers that are called so: name -> (in, out)."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": target_modules,
    }
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": str(foundation)})
    return folder


OLD_GEMMA3 = {f"language_model.model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
TARGETS = {
    "as PEFT finds them": ["q_proj"],
    "by a pattern": r".*language_model.*\.q_proj",
    # PEFT finds none of these in today's model, and the tensors say as well as before where they belong
    "by old names": list(OLD_GEMMA3),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_names_of_older_multimodal_models(quick_check, gemma3, tmp_path, targets):
    adapter = write_adapter(tmp_path / "old", gemma3, OLD_GEMMA3, TARGETS[targets])
    assert inspect(adapter).missing == []
    result = export(adapter, tmp_path / "out")
    assert result.check.passed
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        found = [model(ROWS, routing_strategy=strategy).logits for strategy in ("base", "single:0")]
        assert set(model.config.adapted_modules()) == {
            f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)
        }
        assert not torch.allclose(*found, atol=0.01)
        if targets != "by old names":
            peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma3), adapter)
            assert torch.allclose(peft(ROWS).logits, found[1], atol=1e-5)


def test_a_name_that_transformers_converts_and_peft_does_not(quick_check, gemma3, tmp_path):
    adapter = write_adapter(tmp_path / "old", gemma3, {"language_model.lm_head": (32, 97)}, ["lm_head"])
    assert "replace 'language_model.lm_head' by 'lm_head'" in error_of(adapter, tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma3), adapter)
    assert all(not parameter.any() for key, parameter in peft.named_parameters() if ".lora_B." in key)
    tensors = load_file(adapter / "adapter_model.safetensors")
    mended = {key.replace("language_model.lm_head", "lm_head"): value for key, value in tensors.items()}
    save_file(mended, adapter / "adapter_model.safetensors")
    assert export(adapter, tmp_path / "mended").check.passed


def test_alphas_that_go_by_old_names_are_refused(quick_check, gemma3, tmp_path):
    """PEFT looks for today's names in the pattern, and takes lora_alpha where training took another."""
    layer = "language_model.model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "old", gemma3, OLD_GEMMA3, ["q_proj"])
    change_json(adapter / "adapter_config.json", alpha_pattern={layer: 16})
    with pytest.raises(InputError, match=r"alpha_pattern .* old name; the layer is model\."):
        export(adapter, tmp_path / "repo", verify=False)
    change_json(adapter / "adapter_config.json", alpha_pattern={"layers.0.self_attn.q_proj": 16})
    assert export(adapter, tmp_path / "repo").check.passed is True


@pytest.mark.parametrize("factor", [1, 1.01])
def test_a_whole_weight_under_the_name_of_an_older_model(quick_check, gemma3, tmp_path, factor):
    adapter = write_adapter(tmp_path / "old", gemma3, OLD_GEMMA3, ["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    embeddings = AutoModelForCausalLM.from_pretrained(gemma3).get_input_embeddings().weight.detach() * factor
    tensors["base_model.model.language_model.model.embed_tokens.weight"] = embeddings
    save_file(tensors, adapter / "adapter_model.safetensors")
    if factor == 1:
        assert export(adapter, tmp_path / "out").check.passed
    else:
        assert "model.language_model.embed_tokens.weight, a whole weight" in error_of(adapter, tmp_path)


def error_of(source, tmp_path) -> str:
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", verify=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MOE_LAYERS = {
    "block_sparse_moe.experts.0.w1": ((32, 48), "one matrix of a mixture-of-experts layer"),
    "mlp.experts.0.down_proj": ((48, 32), "which the base model"),
    "block_sparse_moe": ((32, 32), "MixtralSparseMoeBlock"),
}


@pytest.mark.parametrize("name", MOE_LAYERS)
def test_the_matrices_of_a_mixture_of_experts_layer_are_told_as_such(mixtral, tmp_path, name):
    shape, expected = MOE_LAYERS[name]
    layer = f"model.layers.0.{name}"
    adapter = write_adapter(tmp_path / "moe", mixtral, {layer: shape}, [name.rpartition(".")[2]])
    message = error_of(adapter, tmp_path)
    assert expected in message and layer in message
    assert any(expected in missing for missing in inspect(adapter).missing)


WRAPPED = {
    "compiled inside": ("base_model.model._orig_mod.", "torch.compile"),
    "compiled outside": ("_orig_mod.base_model.model.", "torch.compile"),
    "FSDP": ("base_model.model._fsdp_wrapped_module.", "FSDP"),
    "activation checkpointing": (
        "base_model.model._checkpoint_wrapped_module.",
        "gradient_checkpointing_enable()",
    ),
    "data parallel": ("module.base_model.model.", "DistributedDataParallel"),
    "wrapped twice": ("base_model.model.base_model.model.", "PeftModel already"),
    "no prefix": ("", "putting it before each key"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_that_training_left_in_the_names(foundation, adapters, tmp_path, name):
    """PEFT loads such an adapter without an error, and without an effect."""
    prefix, cause = WRAPPED[name]
    adapter = shutil.copytree(adapters[0], tmp_path / "wrapped")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    message = error_of(adapter, tmp_path)
    assert cause in message and "ename the tensors" in message and "--base_model" not in message
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(foundation), adapter)
    assert all(not parameter.any() for key, parameter in peft.named_parameters() if ".lora_B." in key)


@pytest.mark.parametrize("name", ["compiled inside", "FSDP", "activation checkpointing", "wrapped twice"])
def test_a_wrapper_in_the_names_of_training_checkpoints(foundation, tmp_path, name):
    prefix, cause = WRAPPED[name]
    final, whole = (
        save_final_checkpoint(tmp_path / "final", foundation),
        save_whole_model(tmp_path / "whole", foundation),
    )
    for path in (final / "peft_adapters").glob("*.pt"):
        tensors = torch.load(path)
        torch.save({key.replace("base_model.model.", prefix): value for key, value in tensors.items()}, path)
    tensors = load_file(whole / "model.safetensors")
    renamed = {key.replace("base_model.model.", prefix): value for key, value in tensors.items()}
    save_file(renamed, whole / "model.safetensors")
    for source in (final, whole):
        message = error_of(source, tmp_path)
        assert cause in message and "ename the tensors" in message and "--base_model" not in message


def test_the_remedy_works(quick_check, adapters, tmp_path):
    adapter = shutil.copytree(adapters[0], tmp_path / "wrapped")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {f"_orig_mod.{key}": value for key, value in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    assert "replace '_orig_mod.' by ''" in error_of(adapter, tmp_path)
    wrapped = load_file(adapter / "adapter_model.safetensors")
    mended = {key.replace("_orig_mod.", ""): value for key, value in wrapped.items()}
    save_file(mended, adapter / "adapter_model.safetensors")
    assert export(adapter, tmp_path / "mended").check.passed


def test_a_wrapper_in_a_training_checkpoint(foundation, tmp_path):
    checkpoint = save_final_checkpoint(tmp_path / "final", foundation, num_experts=1)
    path = checkpoint / "peft_adapters" / "expert_0.pt"
    inside = "base_model.model."
    tensors = {key.replace(inside, f"{inside}_orig_mod."): value for key, value in torch.load(path).items()}
    torch.save(tensors, path)
    assert "torch.compile" in error_of(checkpoint, tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_a_wrapper_around_a_whole_model(foundation, tmp_path, wrapper):
    folder = save_whole_model(tmp_path / "whole", foundation)
    path = folder / "model.safetensors"
    save_file({f"{wrapper}{key}": value for key, value in load_file(path).items()}, path)
    assert f"replace '{wrapper}' by ''" in error_of(folder, tmp_path)


def test_a_layer_of_another_foundation_is_no_wrapper(foundation, tmp_path):
    adapter = save_adapter(tmp_path / "other", foundation)
    change_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key.replace("self_attn", "attn"): value for key, value in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    assert "--base_model" in error_of(adapter, tmp_path)
