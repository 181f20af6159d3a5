"""Sources and foundations on the Hub, by the real client, against a Hub on the loopback address."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from environments import python_path
from helpers_checkpoints import change_json, snapshot
from hub_server import Hub, Repo


@pytest.fixture(scope="module")
def hub(checkpoint, foundation, tmp_path_factory):
    """A foundation, and a run whose `main` is damaged and whose branch `good` holds it whole, in a sub-folder."""
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
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "dylora_moe", *map(str, arguments)],
        env={**keep, **hub.environment(home, token), "PYTHONPATH": python_path()},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_source_on_the_hub_at_a_revision(hub, tmp_path):
    repo = tmp_path / "repo"
    done = command(hub, tmp_path, "export", "guild/run", "--revision", "good", "-o", repo, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["check"]["passed"] and result["check"]["compared_logits"]
    assert result["foundation"] == "guild/foundation" and "best_model" in result["notes"][0]
    assert not any("optimizer" in path for path in hub.downloads())

    # Here the foundation is in the cache, and so at hand; there only its config can be had, and that is enough.
    light = command(hub, tmp_path, "export", repo, "--layout", "adapter", "-o", tmp_path / "light")
    assert light.returncode == 0 and "8 quantities" in light.stdout, light.stdout + light.stderr
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    arguments = ["export", "guild/run", "--revision", "good", "--layout", "adapter", "-o", tmp_path / "without"]
    before = len(hub.downloads())
    without = command(hub, empty, *arguments)
    assert without.returncode == 0 and "not checked: logits" in without.stdout, without.stdout + without.stderr
    assert "model.safetensors" not in hub.downloads()[before:]
    assert snapshot(tmp_path / "light" / "experts") == snapshot(tmp_path / "without" / "experts")


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["guild/run"], "hf_write", "config.json is not valid JSON"),
        (["guild/run", "--revision", "none"], "hf_write", "at revision none"),
        (["guild/run", "--revision", "good", "--subfolder", "last"], "hf_write", "last"),
        (["guild/run"], None, "guild/run"),
        (["guild/nothing"], "hf_write", "guild/nothing"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, tmp_path, arguments, token, message):
    done = command(hub, tmp_path, "export", *arguments, "-o", tmp_path / "repo", token=token)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and message in line and "Traceback" not in done.stderr
    assert not (tmp_path / "repo").exists() and "hf_write" not in done.stdout + done.stderr
