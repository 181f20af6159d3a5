"""`mirror push` in the SDK's own offline mode, and `mirror pull` by the real SDK against a server on the
loopback address.

Each test runs a process of its own, as the SDK keeps settings and credentials for as long as a process lives.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import python_path
from helpers_checkpoints import VOCABULARY, change_json, save_tokenizer
from helpers_models import build
from wandb_server import API_KEY, Artifact, WandbServer, md5

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.sources import wandb_artifacts


# each line of stdout: what one call returned or how it failed, its traceback included
CALLS = """
import json, os, pathlib, sys, traceback
from dylora_moe.hub_export.sources.wandb_artifacts import download_artifact
from dylora_moe.hub_export.mirror import mirror_pull, mirror_push

class Exported:
    def to_dict(self):
        return self.__dict__

def export(source, output_dir, **options):
    import shutil
    shutil.copytree(sys.argv[2], output_dir)
    result = Exported()
    result.source, result.options = str(source), sorted(options)
    result.held = sorted(path.relative_to(source).as_posix() for path in pathlib.Path(source).rglob("*"))
    return result

calls = {"push": mirror_push, "download": lambda **given: str(download_artifact(**given))}
calls["pull"] = lambda **given: mirror_pull(export=export, **given)
for action in json.loads(sys.argv[1]):
    try:
        result = calls[action.pop("call")](**action)
        answer = {"result": result.to_dict() if hasattr(result, "to_dict") else result}
    except BaseException as error:
        answer = {"error": str(error), "kind": type(error).__name__, "exit_code": getattr(error, "exit_code", None)}
        answer["traceback"] = traceback.format_exc() + repr(error.__cause__)
    print("answer " + json.dumps(answer, default=str), flush=True)
"""


def run(home: Path, environment: dict[str, str], actions: list[dict], repo: Path | None = None) -> list[dict]:
    home.mkdir(exist_ok=True)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
    environment = {**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment}
    process = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(actions, default=str), str(repo)],
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
    assert API_KEY not in process.stdout + process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("answer ")]
    return [json.loads(line.removeprefix("answer ")) for line in lines]


def error_line(answer: dict, kind: str = "InputError") -> str:
    assert answer.get("kind") == kind, answer
    assert answer["exit_code"] == {"InputError": 2, "FailureError": 1}[kind] and "\n" not in answer["error"]
    assert answer["traceback"].endswith("None")
    return answer["error"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repos") / "mixture"
    model = build(seed=5)
    model.config.base_model_name_or_path = "guild/foundation"
    model.save_pretrained(folder, layout="adapter")
    save_tokenizer(folder)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "mine.yaml").write_text(
        "- dataset: {id: org/set, task_id: set}\n  value: 1\n"
    )
    assert model.config.base_config.vocab_size == VOCABULARY
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


TRAINING = {"best_model/config.json": b"{}", "best_model/router.pt": b"r", "checkpoint-5/config.json": b"{}"}


@pytest.fixture(scope="session")
def sdk():
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")


@pytest.fixture
def server(repo, sdk):
    with WandbServer() as server:
        files = content(repo)
        server.artifacts["guild/moe/mixture:v0"] = Artifact({**files, ".env": b"x", "notes/a.txt": b"x"})
        server.artifacts["guild/moe/deep:v0"] = Artifact(
            {f"repo/{path}": data for path, data in files.items()}
        )
        server.artifacts["guild/moe/training:v0"] = Artifact(TRAINING)
        yield server


def test_push_offline_stages_the_repos_files_and_says_what_they_are(repo, sdk, tmp_path):
    folder = shutil.copytree(repo, tmp_path / "mixture")
    (folder / ".env").write_text("secret")
    home = tmp_path / "home"
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(home),
        "WANDB_DATA_DIR": f"{home}/data",
        "HOME": str(home),
    }
    environment["WANDB_CACHE_DIR"] = f"{home}/cache"
    calls = [
        ("guild/moe/mixture", folder),
        ("guild/moe/mixture:v1", folder),
        ("mixture", folder),
        ("a/b/c", home),
    ]
    actions = [{"call": "push", "artifact": name, "repo": source} for name, source in calls]
    pushed, *refused = run(home, environment, actions)
    result = pushed["result"]
    files = content(repo)
    assert result["offline"] and result["files"] == sorted(files)
    staged = [path.read_bytes() for path in (home / "data" / "artifacts" / "staging").iterdir()]
    assert sorted(staged) == sorted(files.values())
    record = next(Path(result["run_folder"]).glob("*.wandb")).read_bytes()
    assert all(name.encode() in record for name in files) and b".env" not in record
    metadata = result["metadata"]
    assert metadata["layout"] == "adapter" and metadata["experts"] == ["first", "second", "third"]
    assert metadata["foundation"] == "guild/foundation" and metadata["format"] == "exported repo"
    assert set(metadata["sha256"]) == {name for name in files if name.endswith(".safetensors")}
    assert any(".env" in note for note in result["notes"]) and any(
        "wandb sync" in note for note in result["notes"]
    )
    assert not (Path(result["run_folder"]) / "files" / "requirements.txt").exists()
    for answer, expected in zip(
        refused, ["names a version", "entity/project/name", "not an exported repo"], strict=True
    ):
        assert expected in error_line(answer)


def test_pull_gives_the_repo_or_exports_what_training_left(server, repo, tmp_path):
    pull = {"call": "pull", "artifact": "guild/moe/mixture:v0", "output_dir": tmp_path / "mixture"}
    deep = {
        **pull,
        "artifact": "wandb:guild/moe/deep:v0",
        "output_dir": tmp_path / "deep",
        "subfolder": "repo",
    }
    training = {**pull, "artifact": "guild/moe/training:latest", "output_dir": tmp_path / "training"}
    actions = [
        pull,
        pull,
        {**pull, "overwrite": True},
        {**pull, "overwrite": True, "routing_strategy": "base"},
        deep,
        {**deep, "subfolder": "../repo", "output_dir": tmp_path / "no"},
        {**training, "lora_alpha": 8, "subfolder": "best_model"},
        {**training, "output_dir": tmp_path / "no", "subfolder": "gone"},
        {"call": "download", "artifact": "wandb:guild/moe/training:v0"},
    ]
    first, again, over, useless, deeper, leaving, exported, gone, cached = run(
        tmp_path / "home", server.environment(tmp_path / "home"), actions, repo
    )
    assert content(tmp_path / "mixture") == content(tmp_path / "deep") == content(repo)
    assert first["result"]["files"] == sorted(content(repo)) and first["result"]["export"] is None
    assert ".env, notes/" in first["result"]["notes"][0] and "result" in over and "result" in deeper
    assert "--overwrite" in error_line(again) and "routing_strategy would do nothing" in error_line(useless)
    assert "--subfolder" in error_line(leaving) and "holds no folder gone" in error_line(gone)
    export = exported["result"]["export"]
    assert export["options"] == ["lora_alpha", "overwrite", "progress", "subfolder"]
    assert set(TRAINING) < set(export["held"]) and exported["result"]["files"] == sorted(content(repo))
    folder = Path(cached["result"])
    assert folder.name == "training" and content(folder) == TRAINING
    assert str(folder) == export["source"] and exported["result"]["artifact"] == "guild/moe/training:v0"
    assert server.fetched.count("best_model/router.pt") == 1
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*"))


def test_a_hostile_or_damaged_artifact_leaves_nothing(server, repo, tmp_path):
    files, one = content(repo), {"digest": md5(b"q"), "size": 1}
    hostile = {
        "leaves": ({"../evil.txt": one}, "'../evil.txt'"),
        "absolute": ({"/tmp/evil.txt": one}, "'/tmp/evil.txt'"),
        "backslash": ({"..\\evil.txt": one}, "evil.txt"),
        "dotted": ({"experts/../../evil.txt": one}, "evil.txt"),
        "own_file": ({"hosts": {**one, "ref": "file:///etc/hosts"}}, "as a reference to file:///etc/hosts"),
        "address": ({"x": {**one, "ref": "http://127.0.0.1:9/x"}}, "as a reference to http://127.0.0.1:9/x"),
    }
    for name, (entries, _) in hostile.items():
        server.artifacts[f"guild/moe/{name}:v0"] = Artifact(files, entries=entries)
    server.artifacts["guild/moe/changed:v0"] = Artifact(
        files, served={"config.json": b"x" * len(files["config.json"])}
    )
    server.artifacts["guild/moe/empty:v0"] = Artifact({})
    server.artifacts["guild/moe/lost:v0"] = Artifact(
        {**files, "router.safetensors": b"r"}, lost=("router.safetensors",)
    )
    pull = {"call": "pull", "output_dir": tmp_path / "out"}
    actions = [
        {**pull, "artifact": f"guild/moe/{name}:v0"} for name in [*hostile, "empty", "changed", "lost"]
    ]
    *refused, empty, changed, lost = run(
        tmp_path / "home", server.environment(tmp_path / "home"), actions, repo
    )
    for answer, (_, expected) in zip(refused, hostile.values(), strict=True):
        assert expected in error_line(answer)
    assert "holds no files" in error_line(empty)
    told = error_line(changed, "FailureError")
    assert "differs from what the manifest promises" in told and "config.json" in told
    assert "404" in error_line(lost, "FailureError") and "for_its_bearer" not in lost["traceback"]
    assert {path.name for path in tmp_path.iterdir()} == {"home"} and not Path("/tmp/evil.txt").exists()


@pytest.mark.slow
def test_names_keys_and_servers_that_are_wrong_are_one_line(server, repo, tmp_path):
    home = tmp_path / "home"
    pull = {"call": "pull", "output_dir": tmp_path / "out"}
    cases = {
        "mixture:v0": "entity/project/name:version",
        "guild/moe/mixture": "names no version",
        "guild/../mixture:v0": "is not an artifact's name",
        "guild/moe/mixture:v 0/x": "entity/project/name:version",
        "guild/moe/none:v0": "W&B has no artifact guild/moe/none:v0",
        "guild/other/mixture:v0": "W&B has no artifact guild/other/mixture:v0",
    }
    for answer, expected in zip(
        run(home, server.environment(home), [{**pull, "artifact": name} for name in cases]),
        cases.values(),
        strict=True,
    ):
        assert expected in error_line(answer)
    action = {**pull, "artifact": "guild/moe/mixture:v0"}
    push = {"call": "push", "repo": repo, "artifact": "guild/moe/mixture"}
    keys = {"c" * 40: "does not accept this API key", "short": "40+ characters"}
    actions = [action, push, *({**action, "token": key} for key in keys)]
    no_key, disabled, *wrong = run(
        home, {**server.environment(home, None), "WANDB_MODE": "disabled"}, actions
    )
    assert "no W&B API key on this machine" in error_line(no_key)
    assert "WANDB_MODE is disabled" in error_line(disabled)
    for answer, (key, expected) in zip(wrong, keys.items(), strict=True):
        assert expected in error_line(answer) and key not in answer["traceback"]
    nowhere = {**server.environment(home), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "2"}
    for answer in run(home, nowhere, [action, push]):
        assert "W&B does not answer" in error_line(answer, "FailureError")
    server.status = 403
    (answer,) = run(home, server.environment(home), [action])
    assert "403" in error_line(answer)


REDIRECTING = {
    "server": "base_url = http://127.0.0.1:9",
    "proxy": "mode = online\nhttps_proxy = http://127.0.0.1:9",
    "headers": 'x_extra_http_headers = {"a": "b"}',
    "inherited": "mode = online\n[DEFAULT]\nbase_url = http://127.0.0.1:9",
    "twice": "mode = online\nmode = offline",  # which only the SDK might read
}


@pytest.mark.parametrize("case", REDIRECTING)
@pytest.mark.parametrize("place", ["wandb", ".wandb"])
def test_settings_of_the_working_folder_may_not_send_the_key_elsewhere(
    sdk, tmp_path, monkeypatch, case, place
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / place).mkdir()
    (tmp_path / place / "settings").write_text(f"[default]\n{REDIRECTING[case]}\n")
    with pytest.raises(
        InputError, match=f"{place}/settings (sets (base_url|https_proxy|x_extra)|cannot be read)"
    ):
        wandb_artifacts.sdk()


def test_settings_that_wandbs_own_commands_write_are_taken(sdk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    for content in (
        "",
        "[default]\nentity = guild\nproject = moe\nmode = offline\n",
        "[default]\nbase_url = https://api.wandb.ai\n",  # as older releases of the SDK wrote it
        "[other]\nbase_url = http://127.0.0.1:9\n",  # which the SDK does not read
    ):
        (tmp_path / "wandb" / "settings").write_text(content)
        assert wandb_artifacts.sdk().__name__ == "wandb"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8")  # which goes before the file's
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    wandb_artifacts.sdk()


@pytest.mark.slow
def test_no_key_goes_to_a_server_that_the_working_folder_names(server, tmp_path):
    """Without the check the artifact is fetched from there, by the key of the environment."""
    home = tmp_path / "home"
    (home / "wandb").mkdir(parents=True)
    (home / "wandb" / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
    environment = {
        name: value for name, value in server.environment(home).items() if name != "WANDB_BASE_URL"
    }
    download = {"call": "download", "artifact": "guild/moe/training:v0"}
    (answer,) = run(home, environment, [download])
    assert "wandb/settings sets base_url" in error_line(answer) and server.fetched == []


def test_the_absence_of_the_sdk_says_what_to_install(repo, tmp_path):
    code = """
import sys, types, typer
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
sys.meta_path.insert(0, Absent())
from dylora_moe.cli_sharing import add_commands
from dylora_moe.hub_export.errors import InputError
app = typer.Typer()
add_commands(app)
for left_by_runs in (False, True):
    if left_by_runs:  # a folder wandb/ in the working directory is importable as an empty package
        sys.modules["wandb"] = types.ModuleType("wandb")
    for arguments in (["mirror", "push", sys.argv[1], "a/b/c"], ["mirror", "pull", "a/b/c:v0", "-o", "out"]):
        try:
            app(arguments, standalone_mode=False)
        except InputError as error:
            print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(repo)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.count("pip install 'dylora-moe[wandb]'") == 4, process.stderr[-3000:]


def test_a_pulled_repo_may_not_replace_another_folder(server, repo, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    damaged = shutil.copytree(repo, tmp_path / "damaged")
    change_json(damaged / "config.json", model_type="llama")
    server.artifacts["guild/moe/other:v0"] = Artifact(content(damaged))
    pull = {
        "call": "pull",
        "artifact": "guild/moe/mixture:v0",
        "output_dir": tmp_path / "mine",
        "overwrite": True,
    }
    other = {**pull, "artifact": "guild/moe/other:v0", "output_dir": tmp_path / "out"}
    refused, wrong = run(tmp_path / "home", server.environment(tmp_path / "home"), [pull, other], repo)
    assert "is not empty" in error_line(refused) and content(tmp_path / "mine") == {"thesis.txt": b"mine"}
    assert "is not an exported repo" in error_line(wrong) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_training_artifact_is_exported_on_the_way(server, checkpoint, foundation, tmp_path):
    """By the command, with nothing injected; the choice among several checkpoints is told."""
    files = {f"best_model/{path}": data for path, data in content(checkpoint).items()}
    server.artifacts["guild/moe/run:v0"] = Artifact({**files, "checkpoint-5/config.json": b"{}"})
    home = tmp_path / "home"
    home.mkdir()

    def command(*arguments):
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
        process = subprocess.run(
            [sys.executable, "-m", "dylora_moe", *arguments, "--base_model", str(foundation)],
            env={**keep, **server.environment(home), "HF_HUB_OFFLINE": "1"},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process

    pulled = command("mirror", "pull", "guild/moe/run:v0", "-o", str(tmp_path / "repo"))
    assert "best_model" in pulled.stdout + pulled.stderr
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert [expert["name"] for expert in config["expert_configs"]] == ["expert_0", "expert_1", "expert_2"]
    assert (tmp_path / "repo" / "model.safetensors").is_file()

    found = json.loads(command("inspect", "wandb:guild/moe/run:v0", "--json").stdout)
    assert (
        found["format"] == "final checkpoint" and "best_model" in found["notes"][0] and not found["missing"]
    )
