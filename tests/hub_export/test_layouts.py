"""Both layouts: their files, conversion to each other, a base model that is missing, and readers."""

import json
import shutil

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    random_gate,
    save_adapter,
    save_foundation,
    save_tokenizer,
    save_whole_model,
    snapshot,
    whole_model_tensors,
)
from helpers_memory import rise_of_peak_memory
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, inspect, make_variant


@pytest.fixture(scope="module")
def light(tmp_path_factory, checkpoint):
    """The checkpoint in layout `adapter`, with its whole check: (repo, result)."""
    repo = tmp_path_factory.mktemp("layouts") / "light"
    return repo, export(checkpoint, repo, layout="adapter")


def weights(folder):
    return {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same_weights(one, other):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys(), name
        for key in left[name]:
            assert left[name][key].dtype == right[name][key].dtype, key
            assert torch.equal(left[name][key], right[name][key]), key


def test_layout_adapter_holds_experts_and_gate_alone(light, foundation):
    repo, result = light
    assert result.check.passed and result.check.compared_logits and result.check.num_tensors == 3 * 6 * 2 + 2
    files = {path.relative_to(repo).as_posix() for path in repo.rglob("*.safetensors")}
    assert files == {
        "router.safetensors",
        *(f"experts/expert_{i}/adapter_model.safetensors" for i in range(3)),
    }
    config = json.loads((repo / "config.json").read_text())
    assert config["weights_layout"] == "adapter" and config["base_model_name_or_path"] == str(foundation)
    assert "is not part of this repo" in (repo / "README.md").read_text()


def test_expert_folders_load_with_peft_as_they_stand(light, foundation):
    repo, _ = light
    ids = torch.arange(3, 11)[None]
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    for index in range(3):
        plain = AutoModelForCausalLM.from_pretrained(foundation)
        adapter = PeftModel.from_pretrained(plain, str(repo), subfolder=f"experts/expert_{index}")
        with torch.no_grad():
            expected = adapter(ids).logits
            torch.testing.assert_close(
                model(ids, routing_strategy=f"single:{index}").logits, expected, atol=1e-4, rtol=0
            )


def test_one_layout_to_the_other_and_back_is_bit_exact(tmp_path, light, checked):
    export(checked[0], tmp_path / "light", layout="adapter", verify=False)
    assert_same_weights(light[0], tmp_path / "light")
    export(tmp_path / "light", tmp_path / "full", verify=False)
    assert_same_weights(checked[0], tmp_path / "full")
    for name in ("config.json", "generation_config.json"):
        for left, right in ((light[0], tmp_path / "light"), (checked[0], tmp_path / "full")):
            assert json.loads((left / name).read_text()) == json.loads((right / name).read_text())


def test_a_checked_conversion(quick_check, tmp_path, light):
    result = export(light[0], tmp_path / "full", routing_strategy="uniform")
    assert result.check.passed and result.check.compared_logits and result.routing_strategy == "uniform"


@pytest.mark.slow
def test_several_dtypes_and_gpt2s_transposed_layers(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    shutil.copytree(
        save_foundation(tmp_path / "words"),
        tmp_path / "tokenizer",
        ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation*"),
    )
    for name, dtype in (("exact", torch.float32), ("rounded", torch.bfloat16)):
        save_adapter(
            tmp_path / name,
            tmp_path / "gpt2",
            dtype=dtype,
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
        )
    sources = [tmp_path / "exact", tmp_path / "rounded"]
    for layout in ("full", "adapter"):
        result = export(sources, tmp_path / layout, layout=layout, tokenizer=str(tmp_path / "tokenizer"))
        assert result.check.passed and result.check.compared_logits
    assert json.loads((tmp_path / "adapter" / "experts" / "exact" / "adapter_config.json").read_text())[
        "fan_in_fan_out"
    ]
    export(tmp_path / "adapter", tmp_path / "back", verify=False)
    assert_same_weights(tmp_path / "full", tmp_path / "back")


def test_without_the_foundation_at_hand(quick_check, tmp_path, checkpoint, foundation):
    """Tensors are compared, logits are not, and it is said; loading finds what was missing."""
    away = shutil.copytree(checkpoint, tmp_path / "away")
    change_json(away / "config.json", base_model_name_or_path="nobody/small-llama")
    with pytest.warns(DyloraMoeWarning, match="not available"):
        result = export(away, tmp_path / "light", layout="adapter")
    assert result.check.passed and result.check.num_tensors == 38 and not result.check.compared_logits
    assert json.loads((tmp_path / "light" / "config.json").read_text())["base_config"] is None
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "light", trust_remote_code=True, base_model=str(foundation)
    )
    export(checkpoint, tmp_path / "at_hand", layout="adapter", verify=False)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "at_hand", trust_remote_code=True)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    with pytest.raises(InputError, match="nobody/small-llama"):
        export(away, tmp_path / "full")
    again = export(tmp_path / "light", tmp_path / "full", base_model=str(foundation))
    assert again.check.passed and again.check.compared_logits


def test_another_foundation_does_not_stand_in_for_the_sources_own(tmp_path, checked):
    other = save_foundation(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    for layout in ("adapter", "full"):
        with pytest.raises(
            InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not that of the base model"
        ):
            export(checked[0], tmp_path / "out", layout=layout, base_model=str(other))


def test_variants_and_inspection_of_layout_adapter(tmp_path, light):
    variant = make_variant(light[0], routing_strategy="single:expert_2", output_dir=tmp_path / "variant")
    assert variant.weights == "hard links"
    assert weights(tmp_path / "variant").keys() == weights(light[0]).keys()
    found = inspect(tmp_path / "variant")
    assert found.format == "exported repo" and found.routing_strategy == "single:2" and not found.missing
    assert [expert.name for expert in found.experts] == ["expert_0", "expert_1", "expert_2"]


HOSTILE = """
import pathlib
pathlib.Path(%r).write_text("hostile")
"""


@pytest.mark.slow
def test_a_repos_own_code_is_never_run(tmp_path, checked):
    """Neither by inspect nor by export and its check; the new repo has this package's code."""
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    for path in repo.glob("*.py"):
        path.write_text(HOSTILE % str(tmp_path / "ran") + path.read_text())
    inspect(repo)
    for layout in ("full", "adapter"):
        assert export(repo, tmp_path / layout, layout=layout).check.passed
        for path in (tmp_path / layout).glob("*.py"):
            assert "hostile" not in path.read_text()
    assert not (tmp_path / "ran").exists()


def test_links_out_of_a_repo_are_not_followed(tmp_path, light):
    repo = shutil.copytree(light[0], tmp_path / "repo")
    outside = tmp_path / "outside.safetensors"
    weights_file = repo / "experts" / "expert_1" / "adapter_model.safetensors"
    weights_file.rename(outside)
    weights_file.symlink_to(outside)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="leads out of"):
        export(repo, tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_memory_stays_bounded_whatever_the_foundations_size(tmp_path, layout):
    """A foundation of 800 MB and two experts of 60 MB each. The bounds are those that `docs/exported-repo.md`
    states."""
    foundation = save_foundation(
        tmp_path / "foundation",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        max_shard_size="100MB",
    )
    adapters = [
        save_adapter(
            tmp_path / name, foundation, seed=seed, r=128, target_modules=["q_proj", "o_proj", "down_proj"]
        )
        for seed, name in enumerate(("one", "two"))
    ]
    source = tmp_path / "adapters"
    source.mkdir()
    for adapter in adapters:
        adapter.rename(source / adapter.name)
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    rise = rise_of_peak_memory(source, foundation, tmp_path / "out", layout, "llama")
    total = sum(path.stat().st_size for path in foundation.glob("*.safetensors"))
    assert total > 650e6 and size > 100e6
    assert rise < (2 * 100e6 + 500e6 if layout == "full" else 1.2 * size + 200e6)


@pytest.mark.slow
def test_memory_stays_bounded_whatever_the_embeddings_size(tmp_path):
    """A state dict of 620 MB, half of it the head, which is compared with the embedding, and both with the
    named foundation; of all that, layout `adapter` keeps a few kB."""
    foundation = save_foundation(tmp_path / "foundation", 512, vocab_size=150_000, tie_word_embeddings=True)
    source = save_whole_model(tmp_path / "whole", foundation, num_experts=1, file="pytorch_model.bin")
    tensors = whole_model_tensors(foundation, num_experts=1, rank=4, head="equal")
    gate = {f"router.gate.{name}": value for name, value in random_gate(1, 512).items()}
    torch.save({**tensors, **gate}, source / "pytorch_model.bin")
    save_tokenizer(source)
    rise = rise_of_peak_memory(source, foundation, tmp_path / "out", "adapter", "llama")
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "experts").rglob("*.safetensors"))
    assert (source / "pytorch_model.bin").stat().st_size > 600e6 and size < 1e6
    assert rise < 1.2 * size + 200e6


def test_a_foundation_that_training_changed_stays_in_the_repo(tmp_path, monkeypatch):
    """Known to differ: refused even where the named one is missing. A relative name becomes absolute."""
    foundation = save_foundation(tmp_path / "run" / "foundation", tie_word_embeddings=True)
    changed = save_whole_model(tmp_path / "run" / "changed", foundation, head="trained")
    plain = save_whole_model(tmp_path / "run" / "plain", foundation)
    tokenizer = str(foundation)
    for source in (changed, plain):
        change_json(source / "config.json", base_model_name_or_path="nobody/small-llama")
    with pytest.raises(InputError, match="training changed the source's own base model"):
        export(changed, tmp_path / "light", tokenizer=tokenizer, layout="adapter")
    with pytest.warns(DyloraMoeWarning, match="could not be compared with nobody/small-llama"):
        result = export(plain, tmp_path / "light", tokenizer=tokenizer, layout="adapter")
    assert not result.check.compared_logits
    change_json(plain / "config.json", base_model_name_or_path="foundation")
    monkeypatch.chdir(tmp_path / "run")
    for layout in ("full", "adapter"):
        export(plain, tmp_path / layout, tokenizer=tokenizer, layout=layout, verify=False)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert config["base_model_name_or_path"] == str(foundation)


def test_generation_settings_survive_both_layouts(tmp_path, repo):
    change_json(repo / "generation_config.json", temperature=0.25, do_sample=True, max_new_tokens=77)
    mine = json.loads((repo / "generation_config.json").read_text())
    export(repo, tmp_path / "light", layout="adapter", verify=False)
    export(tmp_path / "light", tmp_path / "full", verify=False)
    for folder in ("light", "full"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text()) == mine
