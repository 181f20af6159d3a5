"""Links, special files, and paths that files name: nothing outside a source's own folder is read."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers_checkpoints import (
    change_json,
    save_adapter,
    save_final_checkpoint,
    save_whole_model,
    snapshot,
    write_json,
)
from helpers_cli import refused, run

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import export
from dylora_moe.hub_export.errors import InputError


LEAVING = (
    "../outside.safetensors",
    "/etc/passwd",
    "sub/../../outside.safetensors",
    "..",
    "",
    "\0",
    "a\\..\\b",
)


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("what", ["whole", "repo", "foundation"])
def test_an_index_names_files_of_its_folder_alone(foundation, checked, tmp_path, what, name):
    source = base = tmp_path / "source"
    if what == "repo":
        shutil.copytree(checked[0], source)
    elif what == "whole":
        save_whole_model(source, foundation, num_experts=1)
    else:
        base = shutil.copytree(foundation, tmp_path / "foundation")
        save_final_checkpoint(source, base, num_experts=1)
    shutil.move(base / "model.safetensors", tmp_path / "outside.safetensors")
    write_json(base / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": name}})
    run("inspect", source)
    refused(tmp_path, source, expected="model.safetensors.index.json names the shard")


@pytest.mark.parametrize(
    "file",
    [
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/x.jinja",
    ],
)  # fmt: skip
def test_links_out_of_a_repo_are_not_followed(checked, tmp_path, file):
    """Not even a chat template, which could be any text of this machine and would go to the Hub with the next
    push."""
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    (repo / file).parent.mkdir(exist_ok=True)
    outside = tmp_path / "secret"
    if (repo / file).exists():
        shutil.move(repo / file, outside)
    else:
        outside.write_text("secret")
    (repo / file).symlink_to(outside)
    refused(tmp_path, repo, expected="leads out of")


@pytest.mark.parametrize(
    "file", ["peft_adapters", "peft_adapters/expert_0.pt", "dylo_moe_state", "config.json"]
)
def test_links_out_of_a_checkpoint_are_not_followed(checkpoint, tmp_path, file):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    shutil.move(source / file, tmp_path / "outside")
    (source / file).symlink_to(tmp_path / "outside")
    refused(tmp_path, source, expected="leads out of")


def link_out(path: Path, target: Path) -> None:
    """Put a link to a file elsewhere in a file's place; the file moves there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.move(path, target)
    else:
        target.write_text("secret")
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("variant", "NOTICE"),
        ("variant", "chat_template.jinja"),
        ("merge", "chat_template.jinja"),
        ("merge", "tokenizer_config.json"),
        ("merge", "model.safetensors"),
        ("verify", "model.safetensors"),
    ],
)
def test_no_command_publishes_what_a_link_leads_to(checked, tmp_path, command, file):
    """A NOTICE that is a link to /proc/self/environ would go to the Hub with the next push."""
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    link_out(repo / file, tmp_path / "secret")
    out = tmp_path / "out"
    arguments = {
        "variant": ["variant", repo, "-o", out, "--routing_strategy", "single:0"],
        "merge": ["merge", repo, "--expert", "0", "-o", out],
        "verify": ["verify", repo],
    }[command]
    before = snapshot(tmp_path)
    code, said = run(*arguments)
    assert code == (1 if command == "verify" else 2) and "leads out of" in said and "Traceback" not in said, (
        said
    )
    assert snapshot(tmp_path) == before


def test_merge_reads_files_of_the_repo_alone(foundation, adapters, tmp_path):
    """By an index, or by the name of an expert, which is a folder's."""
    for layout in ("full", "adapter"):
        export(adapters, tmp_path / layout, layout=layout, verify=False)
    shutil.move(tmp_path / "full/model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    write_json(tmp_path / "full/model.safetensors.index.json", index)
    experts = json.loads((tmp_path / "adapter/config.json").read_text())["expert_configs"]
    change_json(
        tmp_path / "adapter/config.json", expert_configs=[{**experts[0], "name": "../../x"}, *experts[1:]]
    )
    for layout, expected in (("full", "names no shards of the form"), ("adapter", "name")):
        code, said = run("merge", tmp_path / layout, "--expert", "0", "-o", tmp_path / "out")
        assert code == 2 and expected in said and "Traceback" not in said, said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_links_out_of_a_foundation_that_comes_with_its_adapter_are_not_followed(
    foundation, tmp_path, monkeypatch, file
):
    """A foundation of this machine may consist of links to another disk; one that is downloaded may not."""
    source = save_adapter(tmp_path / "adapter", foundation)
    shutil.copytree(foundation, source / "foundation")
    change_json(source / "adapter_config.json", base_model_name_or_path="foundation")
    link_out(source / "foundation" / file, tmp_path / "secret")
    refused(tmp_path, source, "--layout", "full", expected="leads out of")
    (tmp_path / "download").mkdir()
    shutil.copytree(source / "foundation", tmp_path / "download/foundation", symlinks=True)
    shutil.copytree(source, tmp_path / "download/adapters/of/python", symlinks=True)
    inner = tmp_path / "download/adapters/of/python"
    shutil.rmtree(inner / "foundation")
    change_json(inner / "adapter_config.json", base_model_name_or_path="../../../foundation")
    refused(tmp_path, inner, "--layout", "full", expected="leads out of")
    monkeypatch.chdir(tmp_path / "download")  # from where the download's own folder has this name, too
    change_json(inner / "adapter_config.json", base_model_name_or_path="foundation")
    remedy = "--tokenizer" if file == "chat_template.jinja" else "--base_model"
    said = refused(tmp_path, inner, "--layout", "full", expected="leads out of")
    assert f"with {remedy}" in said
    if file != "chat_template.jinja":  # a text that would be published
        own = tmp_path / "own"
        (source / "foundation").rename(own)
        (own / file).unlink()
        (own / file).symlink_to(tmp_path / "secret")
        code, said = run("export", source, "--base_model", own, "-o", tmp_path / "out", "--no_verify")
        assert code == 0, said


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("command", ["export", "verify", "merge", "variant"])
def test_a_fifo_is_no_file(checked, tmp_path, command, file):
    """Reading one waits until a writer comes."""
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    (repo / file).unlink()
    os.mkfifo(repo / file)
    out = tmp_path / "out"
    options = {
        "export": ["-o", out],
        "merge": ["--expert", "0", "-o", out],
        "variant": ["-o", out, "--routing_strategy", "single:0"],
    }
    code, said = run(command, repo, *options.get(command, []))
    assert code in (1, 2) and "is no plain file" in said and "Traceback" not in said, said
    assert not out.exists()
    with pytest.raises(InputError, match="is no plain file"):  # what a benchmark loads
        find_model(repo).load(dtype="float32")


def test_a_run_chooses_checkpoints_of_its_own_folder_alone(checkpoint, tmp_path):
    outside = shutil.copytree(checkpoint, tmp_path / "outside" / "checkpoint-7")
    source = tmp_path / "run"
    shutil.copytree(checkpoint, source / "checkpoint-1")
    for name in (
        "../outside/checkpoint-7",
        str(outside),
        "..",
        "/",
        "checkpoint-1/../../outside/checkpoint-7",
    ):
        write_json(source / "trainer_state.json", {"best_model_checkpoint": name})
        code, said = run("inspect", source)
        assert code == 0 and "reading checkpoint-1:" in said, said
        refused(tmp_path, source, "--subfolder", name, expected="leads out of")
    (source / "best_model").symlink_to(outside)
    refused(tmp_path, source, expected="leads out of")


@pytest.mark.parametrize("name", ["../x", "/x", "..", ".hidden", "a/b", "a\\b", "", "a\0b", "-o"])
def test_experts_names_are_names(checked, adapters, tmp_path, name):
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    config = json.loads((repo / "config.json").read_text())
    config["expert_configs"][1]["name"] = name
    write_json(repo / "config.json", config)
    for layout in ("full", "adapter"):
        refused(tmp_path, repo, "--layout", layout)
    with pytest.raises(InputError, match="name"):
        export(adapters[0], tmp_path / "out", expert_names=[name], verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_not_utf_8_is_said_to_be_so(checked, tmp_path):
    """It was called damaged, or a traceback, where safetensors or JSON met it."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copytree(checked[0], folder)
    for command in (["inspect"], ["verify"], ["merge", "--expert", "expert_0", "-o", tmp_path / "out"]):
        code, said = run(command[0], folder, *command[1:])
        assert code == 2 and "\\udcff is not UTF-8" in said, said
    code, said = run("export", checked[0], "-o", f"{folder}-out")
    assert code == 2 and "\\udcff-out is not UTF-8" in said, said
