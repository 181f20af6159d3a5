"""Sources and foundations on the Hub, by the real client, against a Hub on the loopback address."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from environments import python_path
from helpers_checkpoints import (
    change_json,
    save_foundation,
    save_trainer_checkpoint,
    save_whole_model,
    snapshot,
)
from hub_server import Hub, Repo
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def hub(checkpoint, foundation, tmp_path_factory):
    """A foundation, and a run whose `main` is damaged and whose branch `good` holds it whole, in a
    sub-folder."""
    run = shutil.copytree(checkpoint, tmp_path_factory.mktemp("run") / "best_model")
    change_json(run / "config.json", base_model_name_or_path="guild/foundation")
    (run / "optimizer.pt").write_bytes(b"never needed")
    files = {f"best_model/{path}": data for path, data in snapshot(run).items()}
    with Hub() as hub:
        hub.repos["guild/foundation"] = Repo()
        hub.repos["guild/foundation"].commit("main", "whole", snapshot(foundation))
        hub.repos["guild/run"] = Repo(private=True)
        hub.repos["guild/run"].commit("main", "damaged", {**files, "best_model/config.json": b"{"})
        hub.repos["guild/run"].commit("good", "whole", files)
        yield hub


def command(hub, home, *arguments, token="hf_write"):
    return python(hub, home, "-m", "dylora_moe", *arguments, token=token)


def python(hub, home, *arguments, token="hf_write"):
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**keep, **hub.environment(home, token), "PYTHONPATH": python_path()},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkpoint_of_a_revision_is_inspected(hub, tmp_path):
    done = command(hub, tmp_path, "inspect", "guild/run", "--revision", "good", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "final checkpoint" and len(found["experts"]) == 3


@pytest.mark.slow
def test_a_source_on_the_hub_at_a_revision(hub, tmp_path):
    repo = tmp_path / "repo"
    done = command(hub, tmp_path, "export", "guild/run", "--revision", "good", "-o", repo, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["check"]["passed"] and result["check"]["compared_logits"]
    assert result["foundation"] == "guild/foundation" and "best_model" in result["notes"][0]
    assert not any("optimizer" in path for path in hub.downloads())

    # Here the foundation is in the cache; there only its config can be downloaded, and that is enough.
    light = command(hub, tmp_path, "export", repo, "--layout", "adapter", "-o", tmp_path / "light")
    assert light.returncode == 0 and "8 quantities" in light.stdout, light.stdout + light.stderr
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    arguments = [
        "export",
        "guild/run",
        "--revision",
        "good",
        "--layout",
        "adapter",
        "-o",
        tmp_path / "without",
    ]
    before = len(hub.downloads())
    without = command(hub, empty, *arguments)
    assert without.returncode == 0 and "not checked: logits" in without.stdout, (
        without.stdout + without.stderr
    )
    assert "model.safetensors" not in hub.downloads()[before:]
    assert snapshot(tmp_path / "light" / "experts") == snapshot(tmp_path / "without" / "experts")


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        pytest.param(["guild/run"], "hf_write", "config.json is not valid JSON", marks=pytest.mark.slow),
        (["guild/run", "--revision", "none"], "hf_write", "at revision none"),
        pytest.param(
            ["guild/run", "--revision", "good", "--subfolder", "last"],
            "hf_write",
            "last",
            marks=pytest.mark.slow,
        ),
        pytest.param(["guild/run"], None, "guild/run", marks=pytest.mark.slow),
        pytest.param(["guild/nothing"], "hf_write", "guild/nothing", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, tmp_path, arguments, token, message):
    done = command(hub, tmp_path, "export", *arguments, "-o", tmp_path / "repo", token=token)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and message in line and "Traceback" not in done.stderr
    assert not (tmp_path / "repo").exists() and "hf_write" not in done.stdout + done.stderr


@pytest.mark.slow
def test_every_format_is_read_from_the_hub(hub, foundation, checkpoint, adapters, checked, tmp_path):
    """Where its files are links into the client's own cache."""
    light = command(
        hub, tmp_path, "export", checkpoint, "--layout", "adapter", "-o", tmp_path / "light", "--no_verify"
    )
    assert light.returncode == 0, light.stderr
    folders = {
        "final checkpoint": checkpoint,
        "trainer checkpoint": save_trainer_checkpoint(tmp_path / "checkpoint-10", foundation),
        "whole-model state dict": save_whole_model(tmp_path / "whole", foundation, shards=2),
        "PEFT LoRA adapters": adapters[0].parent,
        "exported repo": checked[0],
        "exported repo, layout adapter": tmp_path / "light",
        "merged model": foundation,
    }
    ids = {f"guild/format-{number}": name for number, name in enumerate(folders)}
    for hub_id, name in ids.items():
        hub.repos[hub_id] = Repo()
        hub.repos[hub_id].commit("main", name, snapshot(folders[name]))
    code = (
        "import json, sys\nfrom dylora_moe.hub_export import inspect\n"
        "for source in sys.argv[1:]:\n    print(json.dumps(inspect(source).to_dict()))"
    )
    done = python(hub, tmp_path, "-c", code, *ids)
    assert done.returncode == 0, done.stderr
    for line, (hub_id, name) in zip(done.stdout.splitlines(), ids.items(), strict=True):
        found = json.loads(line)
        assert found["format"] == name.partition(",")[0] and f"guild--{hub_id[6:]}" in found["sources"][0]
        assert len(found["experts"]) == (0 if name == "merged model" else 3)


@pytest.mark.slow
def test_a_foundation_at_a_revision(hub, checkpoint, foundation, tmp_path):
    """Its config and weights are of that revision, in the repo and when it is loaded; nothing else of it is
    fetched."""
    other = save_foundation(tmp_path / "other", intermediate_size=64)
    extra = {"consolidated.safetensors": b"x", "original/model.safetensors": b"x", "pytorch_model.bin": b"x"}
    hub.repos["guild/branched"] = Repo()
    hub.repos["guild/branched"].commit("main", "another model", snapshot(other))
    card = b"---\nlicense: other\nlicense_name: gentle\n---\n"
    hub.repos["guild/branched"].commit("v1", "the one", {**snapshot(foundation), **extra, "README.md": card})
    named = ["--base_model", "guild/branched"]
    wrong = command(hub, tmp_path, "export", checkpoint, *named, "-o", tmp_path / "wrong")
    assert wrong.returncode == 2 and "this layer has 64 inputs" in wrong.stderr, wrong.stderr
    before = len(hub.downloads())
    for layout in ("full", "adapter"):
        arguments = [*named, "--base-revision", "v1", "--layout", layout, "-o", tmp_path / layout]
        done = command(
            hub, tmp_path, "export", checkpoint, *arguments, *(["--no_verify"] if layout == "full" else [])
        )
        assert done.returncode == 0, done.stderr
        assert ("8 quantities equal the source's" in done.stdout) == (layout == "adapter")
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("guild/branched", "v1")
        written = (tmp_path / layout / "README.md").read_text()
        assert "base_model: guild/branched\n" in written and "license_name: gentle\n" in written
    assert not set(extra) & set(hub.downloads()[before:])
    expert = json.loads((tmp_path / "adapter" / "experts" / "expert_0" / "adapter_config.json").read_text())
    assert (expert["base_model_name_or_path"], expert["revision"]) == ("guild/branched", "v1")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    norm = load_file(foundation / "model.safetensors")["model.norm.weight"]
    assert (weights["foundation.model.norm.weight"] == norm).all()


def test_a_token_that_can_be_none_is_told_without_it(hub, tmp_path):
    done = command(hub, tmp_path, "inspect", "guild/run", token="hf_s\u00e9cret")
    assert done.returncode == 2 and "characters that no token has" in done.stderr, done.stderr
    assert "cret" not in done.stdout + done.stderr
