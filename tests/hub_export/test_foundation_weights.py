"""A foundation's tensors left on disk: what is read of them is, bit for bit, what transformers loads.

Of architectures whose tensors transformers renames, stacks or cuts on loading, too; and those are never
loaded whole.
"""

import subprocess
import sys

import pytest
import torch
import transformers
from helpers_checkpoints import VOCABULARY, save_adapter, save_tokenizer, snapshot
from helpers_memory import rise_of_peak_memory
from helpers_reading import assert_same, read, read_error
from helpers_slow import slow_but
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping, core_model_loading
from transformers.core_model_loading import ConversionOps, WeightConverter

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, verify
from dylora_moe.hub_export.foundation.reference import load_foundation, load_foundation_config
from dylora_moe.hub_export.foundation.weights import foundation_weights, skeleton
from dylora_moe.hub_export.tensors.mixture import FoundationReference
from dylora_moe.hub_export.tensors.tensor_files import TensorFile
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TWELVE = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}  # fmt: skip
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}

# Named by what is done to its tensors. Twelve experts, since in order of the alphabet expert 10 follows
# expert 1.
ARCHITECTURES = {
    "nothing: llama": ("LlamaConfig", GROUPED),
    "renamed and stacked: mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 12}),
    "stacked: qwen2 moe": ("Qwen2MoeConfig", {**GROUPED, **TWELVE, "shared_expert_intermediate_size": 24}),
    "stacked: qwen3 moe": ("Qwen3MoeConfig", {**GROUPED, **TWELVE, "head_dim": 8}),
    "stacked: qwen3 next": (
        "Qwen3NextConfig",
        {**GROUPED, **TWELVE, **LINEAR, "shared_expert_intermediate_size": 24, "head_dim": 8},
    ),
    "stacked: olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 12}),
    "stacked: phimoe": ("PhimoeConfig", {**GROUPED, "num_local_experts": 12}),
    "stacked: deepseek v3": ("DeepseekV3Config", {**SIZES, **LATENT}),
    "stacked: jamba": ("JambaConfig", {**GROUPED, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "stacked: nemotron h": ("NemotronHConfig", {**GROUPED, **MAMBA, "n_routed_experts": 4, "head_dim": 8}),
    "renamed and stacked: ernie 4.5 moe": (
        "Ernie4_5_MoeConfig",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    ),
    "cut: hrm text": ("HrmTextConfig", GROUPED),
    "put side by side: olmo hybrid": ("OlmoHybridConfig", {**GROUPED, **LINEAR}),
    "renamed: granite moe": ("GraniteMoeConfig", {**GROUPED, "num_local_experts": 4}),
    "renamed: gpt neox": ("GPTNeoXConfig", SIZES),
}
STACKED = "model.layers.0.mlp.experts."
STORED = "model.layers.0.block_sparse_moe.experts."


def save_model(folder, name, max_shard_size="5GB", dtype=torch.float32, **fields):
    """A random model, in files as transformers writes them, every parameter with numbers of its own."""
    config_name, sizes = ARCHITECTURES[name]
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**{**sizes, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def lazily(folder):
    """(the tensors, where the foundation is)."""
    reference = FoundationReference(str(folder))
    return foundation_weights(reference, skeleton(load_foundation_config(reference))), reference


def assert_as_loaded(folder):
    """Every tensor is announced and read as transformers loads it, and none is left out but tied ones."""
    tensors, reference = lazily(folder)
    model = load_foundation(reference)
    expected = model.state_dict()
    assert set(expected) - set(tensors) <= set(model.all_tied_weights_keys)
    for name, tensor in tensors.items():
        content = tensor.read()
        assert (tensor.shape, tensor.dtype) == (tuple(content.shape), content.dtype), name
        assert content.dtype == expected[name].dtype and torch.equal(content, expected[name]), name
        for step in (1, 5) if tensor.shape else ():
            starts = range(0, tensor.shape[0], step)
            rows = [tensor.rows(start, min(start + step, tensor.shape[0])).read() for start in starts]
            assert torch.equal(torch.cat(rows), content), name
    return tensors


def change_file(path, change):
    """Change the tensors of one file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", slow_but("20KB", of=["5GB", "20KB"]))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_that_transformers_loads(name, max_shard_size, tmp_path, recwarn):
    folder = save_model(tmp_path / "base", name, max_shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert_as_loaded(folder)
    assert not [warning for warning in recwarn if "whole" in str(warning.message)]


def test_experts_of_a_pickled_file_and_in_bfloat16(tmp_path):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in assert_as_loaded(folder).values()} == {torch.bfloat16}
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert_as_loaded(folder)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_only_what_makes_up_a_tensor_is_read(tmp_path, monkeypatch, max_shard_size):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral", max_shard_size)
    keys, read = [], TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key: (keys.append(key), read(self, key))[1])
    tensors, _ = lazily(folder)
    assert keys == []
    tensors[f"{STACKED}down_proj"].read()
    assert keys == [f"{STORED}{expert}.w2.weight" for expert in range(12)]
    keys.clear()
    tensors[f"{STACKED}gate_up_proj"].read()
    assert sorted(keys) == sorted(
        f"{STORED}{expert}.{part}.weight" for expert in range(12) for part in ("w1", "w3")
    )
    keys.clear()
    tensors[f"{STACKED}gate_up_proj"].rows(3, 5).read()
    assert sorted(keys) == sorted(
        f"{STORED}{expert}.{part}.weight" for expert in (3, 4) for part in ("w1", "w3")
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("3.w2.weight", "down_proj as [11, 32, 48], its config says [12, 32, 48]"),
        ("3.w1.weight", "gate_up_proj cannot be made of 23 tensors"),
    ],
)
def test_a_missing_expert_is_told(tmp_path, part, message):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral")
    change_file(folder / "model.safetensors", lambda tensors: tensors.pop(f"{STORED}{part}"))
    with pytest.raises(InputError) as caught:
        lazily(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_layer_and_an_expert_of_another_shape_are_told(tmp_path):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral")
    file = folder / "model.safetensors"
    intact = file.read_bytes()

    def broken(change):
        file.write_bytes(intact)
        change_file(file, change)
        with pytest.raises(InputError) as caught:
            lazily(folder)
        return str(caught.value)

    def without_a_stack(tensors):
        for expert in range(12):
            del tensors[f"{STORED}{expert}.w2.weight"]

    assert f"no weights for {STACKED}down_proj" in broken(without_a_stack)
    assert "cannot be made of 12 tensors" in broken(
        lambda tensors: tensors.update({f"{STORED}7.w2.weight": torch.ones(32, 8)})
    )
    assert "no weights for model.norm.weight" in broken(lambda tensors: tensors.pop("model.norm.weight"))


def test_a_truncated_shard_ends_the_export_and_leaves_nothing(tmp_path):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral", "20KB")
    save_tokenizer(folder)
    adapter = save_adapter(tmp_path / "adapter", folder)
    shard = sorted(folder.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-8])
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        export(adapter, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_head_beside_the_embedding_that_it_is_tied_to(tmp_path):
    """Left out where it is equal; kept where it is not, as transformers does not tie it then; the only one of
    both is the embedding."""
    folder = save_model(tmp_path / "base", "nothing: llama", tie_word_embeddings=True)
    file, embedding = folder / "model.safetensors", "model.embed_tokens.weight"
    assert "lm_head.weight" not in assert_as_loaded(folder)
    change_file(file, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert "lm_head.weight" not in assert_as_loaded(folder)
    change_file(file, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    assert "lm_head.weight" in assert_as_loaded(folder)
    change_file(file, lambda tensors: tensors.pop(embedding))
    assert embedding in assert_as_loaded(folder)


def test_a_transformers_that_converts_otherwise_loads_whole_and_says_so(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral")
    reference = FoundationReference(str(folder))
    expected = load_foundation(reference).state_dict()
    monkeypatch.delattr(core_model_loading, "dot_natural_key")
    monkeypatch.setattr("dylora_moe.hub_export.foundation.weights.load_foundation", lambda reference: loaded)
    loaded = AutoModelForCausalLM.from_config(load_foundation_config(reference))
    loaded.load_state_dict(expected)
    with pytest.warns(
        DyloraMoeWarning, match="loaded whole, which takes as much memory as it is large.*dot_natural_key"
    ):
        tensors, _ = lazily(folder)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in tensors.items())


def test_what_transformers_makes_up_is_taken_from_the_loaded_model(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base", "nothing: llama")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head\."])
    change_file(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.warns(DyloraMoeWarning, match="loaded whole.*transformers makes up lm_head.weight"):
        tensors, reference = lazily(folder)
    assert set(tensors) == set(load_foundation(reference).state_dict())


class Normalise(ConversionOps):
    """An operation that no shape says the outcome of."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        ((tensor,),) = input_dict.values()
        return {target_patterns[0]: tensor / tensor.abs().max().item()}


def test_an_operation_that_looks_at_numbers(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base", "nothing: llama")
    plain = load_file(folder / "model.safetensors")
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # which fills the cache
    converter = WeightConverter("self_attn.q_proj", "self_attn.q_proj", operations=[Normalise()])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [converter])
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(assert_as_loaded(folder)[name].read(), plain[name])


def test_a_state_dict_with_the_names_of_an_older_transformers(tmp_path):
    """The training wrapper's, with a module for each of the foundation's own experts, as they were before
    version 5."""
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral")
    whole, inside = tmp_path / "whole", "foundation_model.base_model.model."
    whole.mkdir()
    torch.manual_seed(1)
    adapted = PeftModel(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=3, target_modules=["o_proj"]), "expert_0"
    )
    tensors = {
        f"foundation_model.{key}": torch.randn_like(value)
        for key, value in adapted.state_dict().items()
        if ".lora_" in key
    }
    for key, value in load_file(folder / "model.safetensors").items():
        tensors[inside + key.replace("o_proj.", "o_proj.base_layer.")] = value
    gate = {"router.gate.weight": torch.randn(1, 32), "router.gate.bias": torch.randn(1)}
    save_file({**tensors, **gate}, whole / "model.safetensors")
    config = load_foundation_config(FoundationReference(str(folder)))
    config._dylora_num_experts, config._dylora_lora_alpha = 1, 12
    config.save_pretrained(whole)
    mixture = read(whole)
    expected = load_foundation(FoundationReference(str(folder))).state_dict()
    assert set(mixture.foundation_weights) == set(expected)
    assert all(
        torch.equal(tensor.read(), expected[name]) for name, tensor in mixture.foundation_weights.items()
    )
    assert_same(mixture)
    change_file(whole / "model.safetensors", lambda tensors: tensors.pop(f"{inside}{STORED}3.w2.weight"))
    assert "down_proj of its base model is [11, 32, 48], its config says [12, 32, 48]" in read_error(whole)


@pytest.mark.slow
def test_a_repo_that_was_saved_under_the_names_of_files(tmp_path):
    """As a model that was put together in Python is saved: with a module for each of the foundation's own
    experts."""
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral", head_dim=8)
    targets = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    config = DyloraMoeConfig(
        expert_configs=[{"name": "one", "r": 2, "lora_alpha": 4, "target_modules": targets}],
        router_input=None,
        base_model_name_or_path=str(folder),
    )
    model = DyloraMoeForCausalLM.from_foundation(AutoModelForCausalLM.from_pretrained(folder), config)
    repo = tmp_path / "repo"
    model.save_pretrained(repo)
    save_tokenizer(repo)
    (repo / "README.md").write_text("# A mixture\n")
    assert f"foundation.{STORED}3.w2.weight" in load_file(repo / "model.safetensors")
    assert verify(repo).passed
    export(repo, tmp_path / "adapter", layout="adapter", verify=False)  # compares it with the named one
    assert export(repo, tmp_path / "full").check.passed
    stacked = load_file(tmp_path / "full" / "model.safetensors")[f"foundation.{STACKED}down_proj"]
    assert torch.equal(stacked, model.state_dict()[f"foundation.{STACKED}down_proj"])


@pytest.mark.slow
def test_memory_stays_bounded_for_a_mixture_of_experts(tmp_path):
    """800 MB in shards of 50 MB, most of it in stacks of 75 MB."""
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 7, "num_local_experts": 8}
    folder = save_model(tmp_path / "base", "renamed and stacked: mixtral", "50MB", **sizes)
    save_tokenizer(folder)
    adapter = save_adapter(tmp_path / "adapter", folder)
    rise = rise_of_peak_memory(adapter, folder, tmp_path / "out", "full", "mixtral")
    stored = [path.stat().st_size for path in folder.glob("*.safetensors")]
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert sum(stored) > 790e6 and len(stored) > 10 and largest < 101e6
    assert rise < 2 * largest + 500e6


PICKLES = """
import sys
from pathlib import Path
from dylora_moe.hub_export.tensors.tensor_files import TensorFile

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

files = [TensorFile(Path(path)) for path in sys.argv[1:]]
before = peak()
total = sum(float(file.read(key).sum()) for file in files for key in file.keys())
print(total, peak() - before)
"""


def test_pickled_files_do_not_stay_in_memory_as_they_are_read(tmp_path):
    """Two files of 200 MB: pages that were read of a mapped file take memory until it is let go."""
    paths = [tmp_path / f"pytorch_model-{number}.bin" for number in range(2)]
    for path in paths:
        torch.save({f"{number}": torch.ones(2_500_000) for number in range(20)}, path)
    command = [sys.executable, "-c", PICKLES, *map(str, paths)]
    total, rise = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(total) == 2 * 20 * 2_500_000
    assert int(rise) < 200e6
