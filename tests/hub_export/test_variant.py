"""Variants: one set of weights on disk, several default strategies."""

import os

import pytest
import torch
from helpers_checkpoints import snapshot
from transformers import AutoTokenizer

from dylora_moe.hub_export import InputError, export, make_variant, verify
from dylora_moe.hub_export.sources.json_files import read_json
from dylora_moe.modeling import DyloraMoeForCausalLM


def test_a_variant_shares_the_weights_and_differs_in_the_strategy_alone(repo, tmp_path):
    result = make_variant(repo, routing_strategy="single:expert_2", output_dir=tmp_path / "variant")
    assert (result.routing_strategy, result.weights) == ("single:2", "hard links")
    assert os.path.samefile(repo / "model.safetensors", tmp_path / "variant" / "model.safetensors")
    original, variant = snapshot(repo), snapshot(tmp_path / "variant")
    assert {name for name in original if original[name] != variant[name]} == {
        "generation_config.json",
        "README.md",
    }
    assert original.keys() == variant.keys()
    fields = (
        read_json(repo / "generation_config.json"),
        read_json(tmp_path / "variant" / "generation_config.json"),
    )
    assert {**fields[0], "routing_strategy": "single:2"} == fields[1]


@pytest.mark.parametrize("mode", ["dense", "sparse", "auto"])
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_variant_of_another_router_mode_computes_by_it(checkpoint, tmp_path, layout, mode):
    repo = export(checkpoint, tmp_path / "mixture", layout=layout, verify=False).output_dir
    result = make_variant(repo, router_mode=mode, output_dir=tmp_path / "variant")
    assert (result.routing_strategy, result.router_mode) == ("router", mode)
    original, variant = snapshot(repo), snapshot(tmp_path / "variant")
    changed = {name for name in original if original[name] != variant[name]}
    # The repo's own mode is auto.
    assert changed - {"README.md"} == ({"config.json", "SHA256SUMS"} if mode != "auto" else set())
    fields = read_json(repo / "config.json"), read_json(tmp_path / "variant" / "config.json")
    assert {**fields[0], "router_mode": mode} == fields[1]
    card = (tmp_path / "variant" / "README.md").read_text()
    assert ("softmax over all experts" in card) == (mode != "sparse") and ("largest logit" in card) == (
        mode != "dense"
    )
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    weights = {}
    for training in (False, True):
        model = DyloraMoeForCausalLM.from_pretrained(tmp_path / "variant").train(training)
        logits = model(ids, output_router_logits=True).router_logits
        weights[training] = model.router.weights(logits, dense=model.routes_densely)
    is_dense = {training: bool((routed > 0).all()) for training, routed in weights.items()}
    assert is_dense == {False: mode == "dense", True: mode != "sparse"}


def test_verify_accepts_a_variant_of_another_mode_and_finds_what_was_wrong_before(checkpoint, tmp_path):
    repo = export(checkpoint, tmp_path / "mixture", verify=False).output_dir
    make_variant(repo, router_mode="dense", output_dir=tmp_path / "variant")
    assert verify(tmp_path / "variant").passed
    (repo / "config.json").write_text((repo / "config.json").read_text().replace("0.01", "0.02"))
    make_variant(repo, router_mode="dense", output_dir=tmp_path / "changed")
    found = verify(tmp_path / "changed")
    assert not found.passed and "config.json" in str(found.to_dict())


def test_a_variant_of_both_and_one_of_nothing(repo, tmp_path):
    result = make_variant(repo, routing_strategy="best", router_mode="dense", output_dir=tmp_path / "both")
    assert (result.routing_strategy, result.router_mode) == ("best", "dense")
    with pytest.raises(InputError, match="pass --routing_strategy, --router_mode or both"):
        make_variant(repo, output_dir=tmp_path / "nothing")
    with pytest.raises(InputError, match="'thick' is not known; choose auto, dense, sparse"):
        make_variant(repo, router_mode="thick", output_dir=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


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
    assert (
        "# my-variant\n" in card
        and "The default here is `best`" in card
        and "A note of the user's own." in card
    )
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
