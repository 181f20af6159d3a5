"""`push_to_hub` and loading from the Hub, by the real client, against a Hub on the loopback address."""

import json
import os
import subprocess
import sys

import pytest
from environments import python_path
from helpers_models import build
from hub_server import Hub
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


def run(hub, home, code: str, *arguments: str, token: str | None = "hf_write") -> str:
    """The client reads `HF_ENDPOINT` when it is imported, hence a process of its own."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**keep, **hub.environment(home, token), "PYTHONPATH": python_path()},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
    return process.stdout


PUSH = """
import pathlib, torch
from huggingface_hub import HfApi
from helpers_models import PeftLoop, build
model = build(seed=5)
PeftLoop(model).peft.unload().push_to_hub("guild/foundation", private=True)
model.config.base_model_name_or_path = "guild/foundation"
model.push_to_hub("guild/full", private=True, tags=["mixture"])
model.push_to_hub("guild/full", revision="sharded", max_shard_size="20KB", commit_message="in parts")
model.push_to_hub("adapter", layout="adapter")
for layout in ("adapter", "full"):
    pathlib.Path(layout).mkdir()
    pathlib.Path(layout, "notes.txt").write_text("mine")
    arguments = {"repo_id": f"ada/saved_{layout}", "commit_message": "saved", "private": True}
    model.save_pretrained(layout, layout=layout, push_to_hub=True, **arguments)
HfApi().create_repo("ada/exported")
HfApi().upload_file(path_or_fileobj=b"of other weights", path_in_repo="SHA256SUMS", repo_id="ada/exported")
HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id="ada/exported")
model.push_to_hub("ada/exported", layout="adapter")
print(model(torch.arange(3, 9)[None], routing_strategy="router").logits.sum().item())
"""

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
arguments = {"revision": sys.argv[2]} if len(sys.argv) > 2 else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **arguments)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
print(model(torch.arange(3, 9)[None], routing_strategy="router").logits.sum().item())
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """What the pushed model computes, as printed."""
    return run(hub, tmp_path_factory.mktemp("pushing"), PUSH)


def test_both_layouts_are_pushed_whole(hub, pushed):
    full, adapter = hub.repos["guild/full"], hub.repos["ada/adapter"]
    assert full.private and not adapter.private
    common = {
        "config.json",
        "generation_config.json",
        "README.md",
        ".gitattributes",
        "modeling_dylora_moe.py",
    }
    experts = {
        f"experts/{name}/{file}"
        for name in build().config.expert_names
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert common | {"model.safetensors"} <= set(full.branches["main"].files)
    saved = hub.repos["ada/saved_adapter"]
    for repo in (adapter, saved):
        files = set(repo.branches["main"].files)
        assert common - {"README.md"} | experts | {"router.safetensors"} <= files
        assert not any(file.startswith("model") and file.endswith(".safetensors") for file in files)
        assert "notes.txt" not in files
    assert common - {"README.md"} | {"model.safetensors"} <= set(
        hub.repos["ada/saved_full"].branches["main"].files
    )
    assert "notes.txt" not in hub.repos["ada/saved_full"].branches["main"].files
    assert saved.private and saved.branches["main"].message == "saved"
    assert b"mixture" in full.branches["main"].files["README.md"]
    assert full.branches["sharded"].message == "in parts"
    exported = hub.repos["ada/exported"].branches["main"].files
    assert (
        "SHA256SUMS" not in exported and exported["LICENSE"] == b"mine" and "router.safetensors" in exported
    )
    shards = [file for file in full.branches["sharded"].files if file.startswith("model-")]
    assert len(shards) > 1 and "model.safetensors.index.json" in full.branches["sharded"].files


@pytest.mark.parametrize(
    "repo",
    [
        pytest.param(("guild/full",), marks=pytest.mark.slow),
        ("ada/adapter",),
        pytest.param(("guild/full", "sharded"), marks=pytest.mark.slow),
        pytest.param(("ada/saved_full",), marks=pytest.mark.slow),
    ],
)
def test_what_was_pushed_loads_from_the_hub_and_computes_the_same(hub, pushed, tmp_path, repo):
    assert run(hub, tmp_path, LOAD, *repo) == pushed


@pytest.mark.slow
def test_a_foundation_on_this_machine_alone_is_not_pushed(hub, tmp_path):
    code = """
import sys
from helpers_models import PeftLoop, build
model = build()
PeftLoop(model).peft.unload().save_pretrained("foundation")
model.config.base_model_name_or_path = "foundation"
for push in (
    lambda: model.save_pretrained("local", layout="adapter", push_to_hub=True, repo_id="ada/lost"),
    lambda: model.push_to_hub("ada/lost", layout="adapter"),
):
    try:
        push()
    except ValueError as error:
        assert "folder of this machine" in str(error), error
    else:
        raise AssertionError("was pushed")
"""
    run(hub, tmp_path, code)
    assert "ada/lost" not in hub.repos


def test_weights_arrive_bit_for_bit(hub, pushed, tmp_path):
    data = hub.repos["ada/adapter"].branches["main"].files
    (tmp_path / "router.safetensors").write_bytes(data["router.safetensors"])
    assert load_file(tmp_path / "router.safetensors")["gate.weight"].equal(build(seed=5).router.gate.weight)
    assert json.loads(data["config.json"])["base_model_name_or_path"] == "guild/foundation"
