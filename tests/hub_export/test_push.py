"""`push` by the real client against a Hub on the loopback address, and loading what was pushed.

The client reads `HF_ENDPOINT` when it is imported, hence processes of their own; each does several pushes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import python_path
from helpers_checkpoints import change_json, save_tokenizer
from helpers_models import build
from hub_server import TOKENS, Hub

from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.modeling import saving_dylora_moe


CARD = "---\nbase_model: guild/foundation\nlibrary_name: transformers\n---\n\n# A mixture\n"
SECRETS = [*TOKENS, "hf_nobody", "hf_broken"]

# each line of stdout: what one push returned or how it failed, its traceback included
PUSH = """
import json, os, sys, traceback
from dylora_moe.hub_export.hub_push import push
for action in json.loads(sys.argv[1]):
    if action.pop("forget", False):
        os.environ.pop("HF_TOKEN", None)
    told = []
    try:
        answer = {"result": push(**action, progress=told.append).to_dict()}
    except BaseException as error:
        answer = {"error": str(error), "kind": type(error).__name__, "exit_code": getattr(error, "exit_code", None)}
        answer["traceback"] = traceback.format_exc() + repr(error.__cause__)
    print(json.dumps({**answer, "told": told}))
"""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for repo, revision in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    print(model(torch.arange(3, 9)[None], routing_strategy="router").logits.sum().item())
"""


def python(hub, home, code: str, *arguments: str, token: str | None = "hf_write", **variables: str) -> str:
    home.mkdir(exist_ok=True)
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**keep, **hub.environment(home, token), "PYTHONPATH": python_path(), **variables}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
    assert not any(secret in process.stdout + process.stderr for secret in SECRETS)
    return process.stdout


def push(hub, home, actions: list[dict], **options) -> list[dict]:
    """The answers of several pushes from one process."""
    text = json.dumps([{**action, "repo": str(action["repo"])} for action in actions])
    # a token must not be in the output, so it is not among the arguments that an error might quote, either
    return [json.loads(line) for line in python(hub, home, PUSH, text, **options).splitlines()]


def error_line(answer: dict, kind: str) -> str:
    assert answer.get("kind") == kind, answer
    assert answer["exit_code"] == {"InputError": 2, "FailureError": 1}[kind] and "\n" not in answer["error"]
    return answer["error"]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def model():
    return build(seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    """Exported repos: layout full; in shards with another tokenizer; layout adapter; two of local
    foundations."""
    root = tmp_path_factory.mktemp("repos")
    model.config.base_model_name_or_path = "guild/foundation"
    model.save_pretrained(root / "full")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    model.save_pretrained(root / "adapter", layout="adapter")
    for name in ("full", "shards", "adapter"):
        save_tokenizer(root / name)
        (root / name / "README.md").write_text(CARD)
    (root / "shards" / "vocab.json").write_text("{}")
    for name, where, path in (
        ("local_full", "full/config.json", "/home/me/foundation"),
        ("local_adapter", "adapter/config.json", "../foundation"),
        ("local_expert", "adapter/experts/second/adapter_config.json", "foundation"),
    ):
        layout, file = where.split("/", 1)
        shutil.copytree(root / layout, root / name)
        change_json(root / name / file, base_model_name_or_path=path)
    return root


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(hub, folders, tmp_path_factory):
    """Created, then updated twice, on branches, and into a private repo; the answers in order."""
    actions = [
        {"repo": folders / "shards", "hub_id": "guild/mixture"},
        {"repo": folders / "shards", "hub_id": "guild/mixture", "revision": "sharded"},
        {"repo": folders / "adapter", "hub_id": "guild/mixture", "revision": "small"},
        {"repo": folders / "full", "hub_id": "guild/mixture"},
        {"repo": folders / "full", "hub_id": "hidden", "private": True},
        {"repo": folders / "full", "hub_id": "ada/hidden"},
    ]
    answers = push(hub, tmp_path_factory.mktemp("pushing") / "home", actions)
    assert all("result" in answer for answer in answers), answers
    return [answer["result"] for answer in answers]


def test_a_push_holds_the_repos_files_and_nothing_of_the_export_before(hub, folders, pushed):
    repo = hub.repos["guild/mixture"]
    created, _, small, updated = pushed[:4]
    assert not repo.private and created["deleted"] == [] and created["url"] == f"{hub.endpoint}/guild/mixture"
    for branch, folder in (("main", "full"), ("sharded", "shards"), ("small", "adapter")):
        files = repo.branches[branch].files
        assert set(files) == names(folders / folder) | {".gitattributes"}
        assert all(files[name] == (folders / folder / name).read_bytes() for name in names(folders / folder))
    shards = {name for name in names(folders / "shards") if name.startswith("model-")}
    assert len(shards) > 1
    assert set(updated["deleted"]) == shards | {"model.safetensors.index.json", "vocab.json"}
    assert shards <= set(small["deleted"]) and "experts/first/adapter_model.safetensors" in small["uploaded"]
    assert updated["commit"] == repo.branches["main"].sha and small["revision"] == "small"
    assert small["url"].endswith("/tree/small")


@pytest.mark.parametrize("left_out", ["fast_*.py", "fast_kernels_*.py"])
def test_a_repo_of_a_package_without_optional_files_is_sent_whole(folders, tmp_path, monkeypatch, left_out):
    package, repo = tmp_path / "package", tmp_path / "repo"
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(saving_dylora_moe.__file__).parent, package, ignore=compiled)
    for file in package.glob(left_out):
        file.unlink()
    shutil.copytree(folders / "full", repo, ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.setattr(saving_dylora_moe, "__file__", str(package / "saving_dylora_moe.py"))
    saving_dylora_moe.save_code(repo)
    files = repo_files(repo)
    assert set(files.files) == names(repo) and not files.left_out
    empty = {name for name in names(repo) if name.endswith(".py") and not (repo / name).stat().st_size}
    assert empty and empty.isdisjoint(names(package))
    assert {name for name in names(repo) if name.endswith(".py")} == names(package) | empty


def test_layout_full_says_that_the_foundation_and_its_licence_go_along(pushed):
    assert any("guild/foundation" in note and "licence" in note for note in pushed[0]["notes"])
    assert not any("licence" in note for note in pushed[2]["notes"])
    assert any("guild/foundation is not on the Hub" in note for note in pushed[2]["notes"])


def test_private_is_created_private_and_stays_so(hub, pushed):
    assert hub.repos["ada/hidden"].private
    assert pushed[4]["private"] and pushed[5]["private"] and "stays so" in " ".join(pushed[5]["notes"])


def test_what_is_no_part_of_a_repo_stays_here_and_what_people_put_on_the_hub_stays_there(
    hub, folders, tmp_path
):
    folder = shutil.copytree(folders / "adapter", tmp_path / "mixture")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    for name in (
        ".env",
        "credentials.json",
        "notes.py",
        "old.safetensors",
        ".cache/token",
        "__pycache__/a.pyc",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "experts" / "first" / "optimizer.pt").write_text("secret")
    (folder / "LICENSE").symlink_to(outside / "secret.txt")
    (folder / "experts" / "more").symlink_to(outside)
    linked = shutil.copytree(folders / "full", tmp_path / "linked")
    results = [
        f".eval_results/{name}.yaml" for name in ("dylora-moe_mbpp_base", "dylora-moe_gone", "mine", "theirs")
    ]
    (folder / ".eval_results").mkdir()
    for name in results[0::2]:
        (folder / name).write_text("- dataset: {id: org/set, task_id: set}\n  value: 0.5\n")
    (folder / ".eval_results" / "notes.txt").write_text("secret")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(folders / "full" / "model.safetensors")
    repo = hub.repos.setdefault("guild/kept", type(hub.repos["guild/mixture"])())
    by_hand = dict.fromkeys(
        (
            ".gitattributes",
            "LICENSE",
            "results/humaneval.json",
            "notes.py",
            "demo.gif",
            "adapter_config.json",
        ),
        b"x",
    )
    by_hand[results[3]] = b"x"
    old = dict.fromkeys(
        (results[1], "experts/gone/adapter_model.safetensors", "old_dylora_moe.py", "model.safetensors"), b"x"
    )
    repo.commit("main", "before", {**by_hand, **old})
    actions = [
        {"repo": folder, "hub_id": "guild/kept", "private": True},
        {"repo": linked, "hub_id": "guild/linked"},
    ]
    answer, refused = push(hub, tmp_path / "home", actions)
    files = hub.repos["guild/kept"].branches["main"].files
    assert set(files) == names(folders / "adapter") | set(by_hand) | set(results[0::2])
    assert files[results[0]] == (folder / results[0]).read_bytes() and files[results[3]] == b"x"
    assert not any(b"secret" in data for data in files.values())
    assert set(answer["result"]["deleted"]) == set(old)
    told = [note for note in answer["result"]["notes"] if "loaders open such files" in note]
    assert len(told) == 1 and told[0].startswith("adapter_config.json on the Hub")
    note = next(note for note in answer["told"] if "not part of the repo" in note)
    left_here = [
        ".cache/",
        ".env",
        ".eval_results/notes.txt",
        "LICENSE",
        "__pycache__/",
        "credentials.json",
        "experts/first/optimizer.pt",
    ]
    assert all(name in note for name in left_here), note
    assert repo.private and any("was public until now" in note for note in answer["result"]["notes"])
    assert (
        "model.safetensors is a link" in error_line(refused, "InputError") and "guild/linked" not in hub.repos
    )


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub, folders, pushed, tmp_path):
    (tmp_path / "home" / "foundation").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    incomplete = shutil.copytree(folders / "shards", tmp_path / "incomplete")
    next(incomplete.glob("model-*2-of*")).unlink()
    hub.repos["guild/llama"] = type(hub.repos["guild/mixture"])()
    hub.repos["guild/llama"].commit("main", "llama", {"config.json": b'{"model_type": "llama"}'})
    hub.repos["guild/mixture"].tags["v1"] = hub.repos["guild/mixture"].branches["main"]
    full = folders / "full"
    card, results = (shutil.copytree(full, tmp_path / name) for name in ("card", "results"))
    (results / ".eval_results").mkdir()
    (results / ".eval_results" / "mine.yaml").write_text("- dataset: {id: org/set}\n  value: 1\n")
    (card / "README.md").write_text("---\ntags: [\n---\n\n# A mixture\n")
    cases = [
        ({"repo": card, "hub_id": "guild/x"}, "README.md: the metadata"),
        ({"repo": results, "hub_id": "guild/x"}, "mine.yaml is no list of results"),
        ({"repo": full, "hub_id": "guild/mixture", "revision": "v1"}, "is a tag of guild/mixture"),
        (
            {"repo": folders / "local_full", "hub_id": "guild/x"},
            "If it is not there yet: hf upload org/name /home/me/foundation",
        ),
        ({"repo": folders / "local_adapter", "hub_id": "guild/x"}, "--base_model"),
        (
            {"repo": folders / "local_expert", "hub_id": "guild/x"},
            "second/adapter_config.json: base_model_name_or_path",
        ),
        ({"repo": tmp_path / "empty", "hub_id": "guild/x"}, "is not an exported repo"),
        ({"repo": tmp_path / "nothing", "hub_id": "guild/x"}, "does not exist"),
        ({"repo": incomplete, "hub_id": "guild/x"}, "is not a complete repo: model-0000"),
        ({"repo": full, "hub_id": "guild/../x"}, "is not a Hub id"),
        ({"repo": full, "hub_id": "https://hub/guild/x"}, "is not a Hub id"),
        ({"repo": full, "hub_id": "guild/mixture", "revision": "a..b"}, "is not a branch's name"),
        ({"repo": full, "hub_id": "guild/mixture", "revision": "0" * 40}, "is a commit"),
        ({"repo": full, "hub_id": "guild/llama"}, "already holds another model"),
    ]
    before = hub.repos["guild/mixture"].branches["main"].sha
    for (_, expected), answer in zip(
        cases, push(hub, tmp_path / "home", [case[0] for case in cases]), strict=True
    ):
        assert expected in error_line(answer, "InputError")
    assert "guild/x" not in hub.repos and hub.repos["guild/mixture"].branches["main"].sha == before


def test_tokens_that_may_not_and_no_token_are_one_line_without_the_token(hub, folders, pushed, tmp_path):
    full = folders / "full"
    cases = [
        (
            {"repo": full, "hub_id": "guild/mixture", "token": "hf_read"},
            "may not write to guild/mixture (403",
        ),
        ({"repo": full, "hub_id": "guild/new", "token": "hf_read"}, "may not write to guild/new (403"),
        (
            {"repo": full, "hub_id": "guild/mixture", "token": "hf_other"},
            "may not write to guild/mixture (403",
        ),
        ({"repo": full, "hub_id": "ada/hidden", "token": "hf_other"}, "may not write to ada/hidden (403"),
        ({"repo": full, "hub_id": "guild/mixture", "token": "hf_nobody"}, "does not accept this token"),
        (
            {"repo": full, "hub_id": "guild/mixture", "token": "hf_broken\r\nX: y"},
            "characters that no token has",
        ),
        ({"repo": full, "hub_id": "guild/mixture", "forget": True}, "no Hub token on this machine"),
    ]
    for (_, expected), answer in zip(
        cases, push(hub, tmp_path / "home", [case[0] for case in cases]), strict=True
    ):
        assert expected in error_line(answer, "InputError"), answer
        assert answer["traceback"].endswith("None")


@pytest.mark.parametrize(
    ("variables", "kind", "expected"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "FailureError", "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "InputError", "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network_is_one_line(hub, folders, tmp_path, variables, kind, expected):
    (answer,) = push(
        hub, tmp_path / "home", [{"repo": folders / "full", "hub_id": "guild/mixture"}], **variables
    )
    assert expected in error_line(answer, kind)


def test_the_command(hub, folders, pushed, tmp_path):
    code = """
import sys, typer
from dylora_moe.cli_common import CONTEXT_SETTINGS
from dylora_moe.cli_sharing import add_commands
app = typer.Typer(context_settings=CONTEXT_SETTINGS)
app.callback()(lambda: None)
add_commands(app)
app(["push", sys.argv[1], "guild/by_command", "--private"], standalone_mode=False)
"""
    printed = python(hub, tmp_path / "home", code, str(folders / "full"))
    files = len(names(folders / "full"))
    assert f"guild/by_command: {files} files sent" in printed and "note: layout full" in printed
    assert hub.repos["guild/by_command"].private


@pytest.mark.slow
def test_what_was_pushed_loads_from_an_empty_a_damaged_and_an_offline_cache(
    hub, folders, pushed, model, tmp_path
):
    import torch

    expected = model(torch.arange(3, 9)[None], routing_strategy="router").logits.sum().item()
    wanted = json.dumps(
        [["guild/mixture", None], ["guild/mixture", "sharded"], ["guild/mixture", pushed[3]["commit"]]]
    )

    def load(**variables):
        printed = python(hub, tmp_path / "home", LOAD, wanted, **variables)
        assert [float(line) for line in printed.splitlines()] == [pytest.approx(expected, abs=1e-3)] * 3

    load()
    cache = tmp_path / "home" / "hub" / "models--guild--mixture"
    files = sorted(cache.glob("snapshots/*/*"))
    shards = [path for path in files if path.name.startswith("model-")]
    blob = shards[0].resolve()
    half = blob.read_bytes()[: blob.stat().st_size // 2]
    blob.unlink()  # its link points to nothing now, and half of it is there, as after an interruption
    blob.with_name(f"{blob.name}.incomplete").write_bytes(half)
    shards[1].unlink()  # the blob is there, its link is not
    next(path for path in files if path.name == "experts_dylora_moe.py").unlink()
    hub.requests.clear()
    load()
    assert shards[0].name in hub.downloads() and not any(
        name == "model.safetensors" for name in hub.downloads()
    )
    hub.requests.clear()
    load(HF_HUB_OFFLINE="1")
    assert hub.requests == []
