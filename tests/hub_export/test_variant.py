"""Variants: one set of weights on disk, several default strategies."""

import os

import pytest
import torch
from helpers_checkpoints import snapshot
from transformers import AutoTokenizer

from dylora_moe.hub_export import InputError, export, make_variant
from dylora_moe.hub_export.tensor_files import read_json
from dylora_moe.modeling import DyloraMoeForCausalLM


def test_a_variant_shares_the_weights_and_differs_in_the_strategy_alone(repo, tmp_path):
    result = make_variant(repo, routing_strategy="single:expert_2", output_dir=tmp_path / "variant")
    assert (result.routing_strategy, result.weights) == ("single:2", "hard links")
    assert os.path.samefile(repo / "model.safetensors", tmp_path / "variant" / "model.safetensors")
    original, variant = snapshot(repo), snapshot(tmp_path / "variant")
    assert {name for name in original if original[name] != variant[name]} == {"generation_config.json", "README.md"}
    assert original.keys() == variant.keys()
    fields = read_json(repo / "generation_config.json"), read_json(tmp_path / "variant" / "generation_config.json")
    assert {**fields[0], "routing_strategy": "single:2"} == fields[1]


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_variant_holds_the_repos_files_and_no_others(request, tmp_path, layout):
    if layout == "full":
        repo = request.getfixturevalue("repo")
    else:
        repo = tmp_path / "mixture"
        export(request.getfixturevalue("checkpoint"), repo, layout="adapter", verify=False)
    templates = repo / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (repo / "spm.model").write_bytes(b"pieces")
    (repo / "LICENSE").write_text("as it pleases")
    files = snapshot(repo)
    (repo / ".env").write_text("HF_TOKEN=secret")
    (repo / "notes.txt").write_text("not for anybody")
    (repo / "experts").mkdir(exist_ok=True)
    (repo / "experts" / "mine").mkdir()
    (repo / "experts" / "mine" / "optimizer.pt").write_bytes(b"state")
    make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant")
    assert snapshot(tmp_path / "variant").keys() == files.keys()
    templates = AutoTokenizer.from_pretrained(tmp_path / "variant").chat_template
    assert templates["tool_use"] == "{{ tools }}"


def test_a_link_to_another_folder_is_not_copied(repo, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("HF_TOKEN=secret")
    (repo / "README.md").unlink()
    (repo / "README.md").symlink_to(secret)
    with pytest.raises(InputError, match=r"README.md leads out of"):
        make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_repo_in_the_hubs_cache_has_variants(repo, tmp_path):
    """There every file is a link to one that is named after its content."""
    cached, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for path in repo.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (cached / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    make_variant(cached, routing_strategy="base", output_dir=tmp_path / "variant")
    assert snapshot(tmp_path / "variant").keys() == snapshot(cached).keys()
    assert not any(path.is_symlink() for path in (tmp_path / "variant").iterdir())


def test_the_card_of_a_variant_speaks_of_the_variant(repo, tmp_path):
    with open(repo / "README.md", "a") as card:
        card.write("\nA note of the user's own.\n")
    make_variant(repo, routing_strategy="best", output_dir=tmp_path / "my-variant")
    card = (tmp_path / "my-variant" / "README.md").read_text()
    assert "# my-variant\n" in card and "The default here is `best`" in card and "A note of the user's own." in card
    assert (
        'from_pretrained("my-variant"' in card
        and "--model my-variant " in card
        and f"--model {repo.name} " not in card
    )


def test_a_variant_computes_its_strategy(repo, tmp_path):
    make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = DyloraMoeForCausalLM.from_pretrained(repo)(ids, routing_strategy="base").logits
        found = DyloraMoeForCausalLM.from_pretrained(tmp_path / "variant")(ids).logits
    assert torch.equal(expected, found)


@pytest.mark.parametrize("strategy", ["fastest", "single:7", "single:nobody"])
def test_unknown_strategies_list_the_valid_ones(repo, tmp_path, strategy):
    with pytest.raises(InputError, match=r"Valid: router, best, .* Experts: 0 \(expert_0\)"):
        make_variant(repo, routing_strategy=strategy, output_dir=tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def refuse(*arguments, **keywords):
    raise OSError("not here")


def test_without_hard_links_there_are_relative_links_or_copies(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    linked = make_variant(repo, routing_strategy="base", output_dir=tmp_path / "linked")
    assert linked.weights == "symbolic links"
    link = tmp_path / "linked" / "model.safetensors"
    assert os.readlink(link) == "../mixture/model.safetensors" and link.exists()
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.warns(UserWarning, match="were copied"):
        copied = make_variant(repo, routing_strategy="base", output_dir=tmp_path / "copied")
    assert copied.weights == "copies"


def test_a_variant_of_a_variant_and_overwriting_one(repo, tmp_path):
    make_variant(repo, routing_strategy="base", output_dir=tmp_path / "a")
    make_variant(tmp_path / "a", routing_strategy="best", output_dir=tmp_path / "b")
    with pytest.raises(InputError, match="--overwrite"):
        make_variant(repo, routing_strategy="uniform", output_dir=tmp_path / "b")
    make_variant(repo, routing_strategy="uniform", output_dir=tmp_path / "b", overwrite=True)
    assert read_json(tmp_path / "b" / "generation_config.json")["routing_strategy"] == "uniform"
    assert os.path.samefile(repo / "model.safetensors", tmp_path / "b" / "model.safetensors")


def test_what_is_no_repo_and_outputs_that_would_hurt_the_repo(repo, checkpoint, tmp_path):
    with pytest.raises(InputError, match="not an exported repo"):
        make_variant(checkpoint, routing_strategy="base", output_dir=tmp_path / "variant")
    with pytest.raises(InputError, match="does not exist"):
        make_variant(tmp_path / "nothing", routing_strategy="base", output_dir=tmp_path / "variant")
    for output in (repo, repo.parent):
        with pytest.raises(InputError, match=r"the repo itself|would be replaced"):
            make_variant(repo, routing_strategy="base", output_dir=output, overwrite=True)
