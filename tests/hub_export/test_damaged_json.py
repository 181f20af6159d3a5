"""Every JSON file that cannot be read is named, whichever command reads it."""

import re
import shutil

import pytest
from helpers_checkpoints import save_adapter

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, inspect, make_variant, merge, verify
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.modeling import DyloraMoeForCausalLM


DAMAGES = {
    "no JSON": "{",
    "no object": "[3]",
    "a wrong field": '{"watermarking_config": 3, "num_beams": "many"}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_generation_config_of_a_repo(repo, checkpoint, tmp_path, layout, damage):
    """transformers takes a damaged one for none, and so the default strategy for the repo's own."""
    if layout == "adapter":
        repo = export(checkpoint, tmp_path / "light", layout=layout, verify=False).output_dir
    path = repo / "generation_config.json"
    path.write_text(DAMAGES[damage])
    uses = {
        "load": lambda: DyloraMoeForCausalLM.from_pretrained(repo),
        "benchmark": lambda: find_model(repo).load(dtype="float32", device="cpu"),
        "merge": lambda: merge(repo, expert=0, output_dir=tmp_path / "merged"),
        "export": lambda: export(repo, tmp_path / "again", verify=False),
    }
    if damage != "a wrong field":
        uses["strategies"] = lambda: find_model(repo).strategies(None)
        uses["variant"] = lambda: make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant")
    for name, use in uses.items():
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            use()
        assert name == "load" or isinstance(caught.value, InputError), name
    if damage != "a wrong field":
        assert any(
            str(path) in finding.detail for finding in verify(repo).findings if finding.passed is False
        )
    assert not any((tmp_path / name).exists() for name in ("merged", "again", "variant"))


@pytest.mark.parametrize("damage", ["no JSON", "no object"])
def test_config_of_a_repo(repo, tmp_path, damage):
    path = repo / "config.json"
    path.write_text(DAMAGES[damage])
    words = "is not valid JSON" if damage == "no JSON" else "expected an object"
    for use in (
        lambda: inspect([repo]),
        lambda: verify(repo),
        lambda: make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant"),
        lambda: merge(repo, expert=0, output_dir=tmp_path / "merged"),
        lambda: repo_files(repo),
    ):
        with pytest.raises(InputError, match=f"{re.escape(str(path))} .*{words}"):
            use()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_of_a_foundation(foundation, tmp_path, file, damage):
    if file == "config.json" and damage == "a wrong field":
        pytest.skip("such a config is as good as any")
    own = shutil.copytree(foundation, tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "adapter", own, seed=2)
    (own / file).write_text(DAMAGES[damage])
    with pytest.raises(InputError, match=re.escape(str(own / file))):
        export(adapter, tmp_path / "repo", verify=False)
    if file != "model.safetensors.index.json":
        with pytest.raises(InputError, match=re.escape(str(own / file))):
            find_model(own).load(dtype="float32", device="cpu")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_tokenizer(foundation, tmp_path, file):
    own = shutil.copytree(foundation, tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "adapter", own, seed=2)
    (own / file).write_text("{")
    with pytest.raises(InputError, match=re.escape(f"{own / file} is not valid JSON")):
        export(adapter, tmp_path / "repo", verify=False)


def test_a_generation_config_beside_the_foundation_of_a_light_repo(foundation, tmp_path):
    own = shutil.copytree(foundation, tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "adapter", own, seed=2)
    repo = export(adapter, tmp_path / "repo", layout="adapter", verify=False).output_dir
    (own / "generation_config.json").write_text("[1]")
    with pytest.raises(
        InputError, match=rf"{re.escape(str(own / 'generation_config.json'))} holds a JSON list"
    ):
        find_model(repo).load(dtype="float32", device="cpu")
