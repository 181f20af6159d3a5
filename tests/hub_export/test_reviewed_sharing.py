"""What a second look at exports found: numbers that could change unseen, files and edits that could be
lost."""

import json
import shutil
import warnings

import pytest
import torch
import yaml
from helpers_checkpoints import (
    change_json,
    save_adapter,
    save_adapters,
    save_final_checkpoint,
    save_foundation,
    save_whole_model,
    snapshot,
)
from huggingface_hub import ModelCard

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, make_variant, merge, verify
from dylora_moe.hub_export.repo.model_card import BEGIN, END, restate


def findings(result):
    return {finding.what: finding.passed for finding in result.findings}


def test_a_trained_foundation_is_remembered_by_the_repo(tmp_path):
    foundation = save_foundation(tmp_path / "foundation", tie_word_embeddings=True)
    source = save_whole_model(tmp_path / "run" / "model", foundation, head="trained")
    change_json(source / "config.json", base_model_name_or_path="nobody/small-llama")
    export(source, tmp_path / "full", tokenizer=str(foundation), verify=False)
    with pytest.raises(InputError, match="training changed the source's own foundation"):
        export(tmp_path / "full", tmp_path / "light", layout="adapter", verify=False)
    export(tmp_path / "full", tmp_path / "again", verify=False)
    for repo in ("full", "again"):
        limits = (tmp_path / repo / "README.md").read_text().split("## Limits")[1]
        assert "was trained" in limits and "differ" in limits


@pytest.mark.slow
def test_adapters_of_another_foundation_are_not_appended(tmp_path, checked):
    other = save_foundation(tmp_path / "other")
    adapter = save_adapter(tmp_path / "adapter", other)
    with pytest.raises(InputError, match=r"was trained on .*other"):
        export([checked[0], adapter], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DyloraMoeWarning)
        result = export(
            [checked[0], adapter], tmp_path / "out", base_model=str(other)
        )  # bit for bit the same
    assert result.check.passed and result.foundation == str(other)


def test_merging_says_what_rounding_costs(tmp_path):
    foundation = save_foundation(tmp_path / "foundation", dtype=torch.bfloat16)
    export(save_adapter(tmp_path / "adapter", foundation), tmp_path / "repo", verify=False)
    rounded = merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "rounded")
    exact = merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "exact", dtype="float32")
    assert rounded.difference < 1e-4 < rounded.rounding and exact.rounding < 1e-4


@pytest.mark.parametrize(
    "name", ["my_results.json", "my_script.py", "experts/notes.txt", "notes/a.txt", ".env"]
)
def test_overwriting_loses_nobodys_files(repo, checkpoint, name):
    (repo / name).parent.mkdir(exist_ok=True)
    (repo / name).write_text("mine")
    before = snapshot(repo)
    with pytest.raises(InputError, match=name.partition("/")[0]):
        export(checkpoint, repo, overwrite=True, verify=False)
    assert snapshot(repo) == before


def test_overwriting_keeps_a_licence_and_takes_old_weights_away(repo, checkpoint):
    (repo / "LICENSE").write_text("mine")
    export(checkpoint, repo, overwrite=True, verify=False, max_shard_size="20KB")
    shards = list(repo.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (repo / "model.safetensors").exists()
    shutil.copyfile(
        shards[0], repo / "model-00099-of-00099.safetensors"
    )  # as an interrupted copy might leave one
    export(checkpoint, repo, overwrite=True, verify=False)
    assert (repo / "LICENSE").read_text() == "mine" and not list(repo.glob("model-*"))


def test_generation_settings_survive_both_layouts(tmp_path, repo):
    change_json(repo / "generation_config.json", temperature=0.25, do_sample=True, max_new_tokens=77)
    mine = json.loads((repo / "generation_config.json").read_text())
    export(repo, tmp_path / "light", layout="adapter", verify=False)
    export(tmp_path / "light", tmp_path / "full", verify=False)
    for folder in ("light", "full"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text()) == mine


def test_metadata_that_a_person_wrote_is_told_from_what_was_generated(tmp_path):
    places = {}
    for name, licence in (("gemma", "gemma"), ("plain", None)):
        foundation = save_foundation(tmp_path / name / "foundation")
        if licence is not None:
            (foundation / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        places[name] = save_adapters(tmp_path / name, foundation)
    repo = tmp_path / "repo"
    export(places["gemma"], repo, verify=False)
    assert ModelCard.load(repo / "README.md").data.license == "gemma"
    export(places["plain"], repo, overwrite=True, verify=False)
    assert ModelCard.load(repo / "README.md").data.license is None

    front, _, body = (repo / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    fields = {
        **yaml.safe_load(front),
        "base_model": "org/real",
        "license": "mit",
        "pipeline_tag": "text2text-generation",
    }
    (repo / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n{body}")
    export(places["gemma"], repo, overwrite=True, verify=False)
    data = ModelCard.load(repo / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == ("org/real", "mit", "text2text-generation")

    export(places["gemma"], tmp_path / "again", verify=False)
    (tmp_path / "gemma" / "foundation" / "README.md").unlink()
    export(tmp_path / "again", tmp_path / "later", verify=False)
    assert ModelCard.load(tmp_path / "later" / "README.md").data.license == "gemma"


def test_marks_in_the_wrong_order_make_a_card_somebodys_own(repo, checkpoint):
    (repo / "README.md").write_text(f"{END}\nmine\n{BEGIN}\n")
    export(checkpoint, repo, overwrite=True, verify=False)
    assert "mine" in (repo / "README.md").read_text()


@pytest.mark.slow
def test_verifying_with_the_options_of_the_export(tmp_path, checkpoint, adapters):
    chosen = {"dtype": "bfloat16", "router_mode": "dense", "router_temperature": 0.5}
    export(checkpoint, tmp_path / "chosen", verify=False, **chosen)
    assert verify(tmp_path / "chosen", against=checkpoint, **chosen).passed
    assert not verify(tmp_path / "chosen", against=checkpoint).passed
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("plain: a\nstabilised: b\neverywhere: c\n")
    result = export(adapters, tmp_path / "prompted", router_prompts=prompts, verify=False)
    assert result.routing_strategy == "router"
    assert verify(tmp_path / "prompted", against=adapters, router_prompts=prompts).passed
    export(adapters, tmp_path / "plain", verify=False)
    again = export(tmp_path / "plain", tmp_path / "routed", router_prompts=prompts, verify=False)
    assert again.routing_strategy == "router"


def test_what_export_warns_of_is_no_error_to_verify(tmp_path):
    source = save_final_checkpoint(tmp_path / "final", "nobody/small-llama", tokenizer=False)
    with pytest.warns(DyloraMoeWarning, match="no tokenizer"):
        export(source, tmp_path / "light", layout="adapter")
    result = verify(tmp_path / "light")
    assert result.passed and findings(result)["tokenizer"] is None


def test_a_list_of_checksums_must_be_whole(repo):
    (repo / "SHA256SUMS").write_text("")
    assert findings(verify(repo))["checksums"] is False


def test_results_of_a_strategy_that_the_repo_cannot_do(tmp_path, checkpoint):
    entry = {"HumanEval/0": [{"base_status": "pass", "plus_status": "pass"}]}
    (tmp_path / "results.json").write_text(json.dumps({"eval": entry}))
    with pytest.raises(InputError, match="nonsense"):
        export(checkpoint, tmp_path / "out", results=[f"nonsense={tmp_path / 'results.json'}"], verify=False)


def test_names(tmp_path, checkpoint, checked):
    with pytest.raises(InputError, match="two experts are named"):
        export(checkpoint, tmp_path / "out", expert_names=["a", "b", "A"])
    spaced = export(checkpoint, tmp_path / "my mix", verify=False).output_dir
    assert "--model 'my mix' --dataset" in (spaced / "README.md").read_text()
    make_variant(spaced, routing_strategy="base", output_dir=tmp_path / "other one")
    assert "--model 'other one' --dataset" in (tmp_path / "other one" / "README.md").read_text()
    assert "--model org/name --dataset" in restate((spaced / "README.md").read_text(), "org/name")
    copy = shutil.copytree(checked[0], tmp_path / "copy")
    for write in (lambda: export(copy, copy / "in"), lambda: merge(copy, expert=0, output_dir=copy / "in")):
        with pytest.raises(InputError, match="lies in the repo"):
            write()
