"""The folder of a Space, what is refused before a page is served, and the order in which that is looked at."""

import ast
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from environments import python_path
from helpers_checkpoints import snapshot
from helpers_cli import run
from hub_server import Hub

from dylora_moe.eval.explore import serving, space
from dylora_moe.eval.explore.space import COPIED, write_space
from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.repo_config import load_config


ROOT = Path(__file__).parents[2]
HUB_ID = "guild/a-mixture"
UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("guild/a-mixture")
HfApi().upload_folder(repo_id="guild/a-mixture", folder_path=sys.argv[1])
"""


@pytest.fixture
def on_hub(repo, monkeypatch):
    """The config of a repo on the Hub is that of the repo here."""
    monkeypatch.setattr(space, "_config_on_hub", lambda hub_id, revision: load_config(repo))


@pytest.fixture
def folder(on_hub, tmp_path):
    write_space(HUB_ID, tmp_path / "space", revision="abc", dtype="float32")
    return tmp_path / "space"


def error_of(*arguments) -> str:
    code, said = run(*arguments, errors_alone=True)
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 2, said
    return line


def test_the_card_has_the_fields_that_the_hub_reads(folder):
    text = (folder / "README.md").read_text()
    fields = yaml.safe_load(text.split("---")[1])
    required = (ROOT / "constraints.txt").read_text()
    assert fields["sdk"] == "gradio" and f"gradio=={fields['sdk_version']}\n" in required
    assert fields["app_file"] == "app.py" and (folder / "app.py").is_file()
    assert fields["models"][0] == HUB_ID and fields["title"] == "a-mixture" and HUB_ID in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set((folder / "requirements.txt").read_text().split()) <= set(project["dependencies"])


def test_the_page_is_copied_as_it_is_and_imports_what_a_space_installs(folder):
    for file in COPIED:
        assert (folder / "page" / file).read_bytes() == (ROOT / "eval" / file).read_bytes()
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "gradio", "page"}
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    assert found <= allowed, found - allowed


def test_the_app_asks_for_the_repo_at_the_revision(folder, monkeypatch):
    pytest.importorskip("gradio", reason="the page is optional")
    for name in [name for name in sys.modules if name.split(".")[0] in ("page", "dylora_moe")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dylora_moe", None)
    monkeypatch.syspath_prepend(folder)
    asked = []
    app = importlib.import_module("page.explore.space_app")
    monkeypatch.setattr(app, "serve", lambda *arguments, **named: asked.append((arguments, named)))
    exec((folder / "app.py").read_text(), {})
    for name in [name for name in sys.modules if name.split(".")[0] == "page"]:
        del sys.modules[name]
    assert asked == [((HUB_ID,), {"revision": "abc", "dtype": "float32"})]


def test_a_space_loads_a_repo_with_the_repos_own_code(repo):
    pytest.importorskip("gradio", reason="the page is optional")
    from dylora_moe.eval.explore.space_app import load_from_hub

    model, tokenizer = load_from_hub(str(repo), None, None)
    assert type(model).__module__.startswith("transformers_modules.")
    assert model.dtype == torch.float32 and not model.training and tokenizer("a")["input_ids"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["REPO"], "is a folder, and a Space loads a repo from the Hub: `dylora-moe push"),
        (["no-organisation"], "no-organisation is no Hub id"),
        (["wandb:a/b/c:v0"], "is no Hub id"),
        ([HUB_ID, "--port", "7860"], "--port is for a page on this machine"),
        ([HUB_ID, "--share"], "--share is for a page on this machine"),
        ([HUB_ID, "--device_map", "auto"], "--device_map is for a page on this machine"),
        ([HUB_ID, "--dtype", "float8"], "--dtype is 'float8'"),
    ],
)
def test_a_space_that_cannot_be_is_refused_and_nothing_is_written(arguments, said, repo, tmp_path, on_hub):
    arguments = [str(repo) if argument == "REPO" else argument for argument in arguments]
    assert said in error_of("explore", *arguments, "--space", tmp_path / "out")
    assert snapshot(tmp_path) == {}


def test_a_space_replaces_no_folder_that_holds_something(tmp_path, on_hub):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in error_of("explore", HUB_ID, "--space", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named_before_the_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = error_of("explore", tmp_path)
    assert "needs gradio, which is not installed" in line and "pip install 'dylora-moe[explore]'" in line


def test_what_cannot_be_served_is_said_before_the_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "check_packages", lambda *names: None)
    assert "between 1 and 65535" in error_of("explore", tmp_path, "--port", "70000")
    assert "which is no device" in error_of("explore", tmp_path, "--device_map", "moon")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = error_of("explore", tmp_path, "--port", taken.getsockname()[1])
    assert "cannot be used: Address already in use" in line


def test_an_ordinary_model_has_no_page(repo):
    pytest.importorskip("gradio", reason="the page is optional")
    with pytest.raises(InputError, match="an ordinary model without experts"):
        serving.serve_page(repo.parent / "foundation")


def test_the_help_imports_neither_torch_nor_gradio():
    code = (
        "import sys\nfrom dylora_moe import cli\ntry:\n    cli.main(['explore', '--help'])\n"
        "except SystemExit:\n    sys.exit(str({'torch', 'transformers', 'gradio'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stderr.strip() == "set()" and "--space" in process.stdout


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(repo):
    pytest.importorskip("gradio", reason="the page is optional")
    command = [sys.executable, "-m", "dylora_moe", "explore", str(repo), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(3)]
    address = json.loads("".join(lines))["address"]
    with urllib.request.urlopen(address) as page:
        assert "gradio" in page.read().decode()
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=30)
    assert process.returncode == 0 and said == "" and "Traceback" not in complained


@pytest.mark.slow
def test_a_space_shows_a_repo_of_the_hub_without_this_package(repo, tmp_path):
    """`app.py` in a process of its own, as the Hub starts it, and the real client on both sides."""
    pytest.importorskip("gradio", reason="the page is optional")
    with Hub() as hub:
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**keep, **hub.environment(tmp_path / "home", "hf_write"), "PYTHONPATH": python_path()}
        explore = ("-m", "dylora_moe", "explore")
        commands = (
            ["-c", UPLOAD, repo],
            [*explore, "guild/a-mixture", "--space", tmp_path / "space"],
            [*explore, "guild/none-there", "--space", tmp_path / "other"],
        )
        codes = [
            subprocess.run(
                [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=False
            ).returncode
            for command in commands
        ]
        assert codes == [0, 0, 2] and not (tmp_path / "other").exists()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = "import runpy, sys; sys.modules['dylora_moe'] = None; sys.path.insert(0, ''); runpy.run_path('app.py')"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path / "space",
            env={**environment, "PYTHONPATH": "", "GRADIO_SERVER_PORT": str(port)},
        )
        try:
            assert "guild/a-mixture" in _page_at(f"http://127.0.0.1:{port}", process)
        finally:
            process.kill()
            process.wait()


def _page_at(address: str, process: subprocess.Popen) -> str:
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as page:
            return page.read().decode()
        time.sleep(0.2)
    raise AssertionError("the Space serves no page")
