"""Tensors that are missing are not zeros, and those of no use are not passed over: every loader names them."""

import functools
import shutil

import pytest
import torch
from helpers_checkpoints import change_json, snapshot
from helpers_cli import run
from helpers_text import save_text_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe import hub_export
from dylora_moe.eval.sampling import loading
from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, inspect, make_variant, verify


pytestmark = pytest.mark.usefixtures("problems")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("text"), length=10)


@pytest.fixture(scope="module", params=["full", "adapter"])
def exported(tmp_path_factory, checkpoint, request):
    folder = tmp_path_factory.mktemp("repos") / request.param
    return export(checkpoint, folder, layout=request.param, verify=False).output_dir


@pytest.fixture
def repo(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / exported.name)


def errors_of(*arguments) -> tuple[int, str]:
    """Run a command; its exit code and what it says on stderr, as one line."""
    code, said = run(*arguments, errors_alone=True)
    return code, " ".join(said.split())


def change(repo, what, tensor=None) -> str:
    """Take the first tensor away whose name ends so, or add one; its name."""
    paths = [path for path in sorted(repo.rglob("*.safetensors")) if path.name != "router.safetensors"]
    if what.startswith("gate.") and repo.name == "adapter":
        paths = [repo / "router.safetensors"]
    tensors = load_file(paths[0])
    if tensor is None:
        name = next(name for name in sorted(tensors) if what in name)
        del tensors[name]
    else:
        name = what
        tensors[name] = tensor
    save_file(tensors, paths[0], {"format": "pt"})
    return name


MISSING = ("lora_B", "lora_A", "gate.weight", "gate.bias")


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_tensor_is_named_by_every_command(repo, tmp_path, what):
    name = change(repo, what)
    commands = [
        ("merge", repo, "--expert", "0", "-o", tmp_path / "out"),
        ("variant", repo, "--routing_strategy", "base", "-o", tmp_path / "out"),
        ("inspect", repo),
        ("export", repo, "-o", tmp_path / "out", "--no_verify"),
    ]
    if what == "lora_B" and repo.name == "full":
        commands.append(("benchmark", "--model", repo, "--limit", "2", "-o", tmp_path / "out"))
    for command in commands:
        code, said = errors_of(*command)
        assert code == 2 and name in said, (command, said)
        assert not list((tmp_path / "out").glob("*.safetensors"))
    for trust in (False, True):
        with pytest.raises(InputError, match="lacks"):
            loading.find_model(repo, trust_remote_code=trust).load(dtype="float32")
    assert not verify(repo).passed


def test_stock_loading_names_what_is_missing_or_unexpected(repo, caplog):
    """As a warning: a model may be loaded to be trained further."""
    change(repo, "gate.bias")
    extra = change(repo, "foundation.extra.lora_A", torch.ones(2))
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    assert "router.gate.bias" in caplog.text and extra in caplog.text


@pytest.mark.parametrize("name", ["foundation.model.layers.9.up.lora_A", "gate.scale"])
def test_a_tensor_that_the_config_does_not_speak_of_is_named(repo, tmp_path, name):
    change(repo, name, torch.ones(2))
    code, said = errors_of("merge", repo, "--expert", "0", "-o", tmp_path / "out")
    assert code == 2 and name in said and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        loading.find_model(repo).load(dtype="float32")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        make_variant(repo, routing_strategy="base", output_dir=tmp_path / "out")


def test_a_base_model_that_lacks_a_tensor_is_not_made_up(repo, checkpoint, tmp_path):
    place = repo
    if repo.name == "adapter":
        place = shutil.copytree(checkpoint.parent / "foundation", tmp_path / "foundation")
        change_json(repo / "config.json", base_model_name_or_path=str(place))
    name = change(place, "model.norm.weight")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        loading.find_model(repo).load(dtype="float32")
    code, said = errors_of("merge", repo, "--expert", "0", "-o", tmp_path / "out")
    assert code == 2 and name in said
    if repo.name == "full":
        assert any("model.norm.weight" in line for line in inspect(repo).missing)


def damage_weights(folder):
    for path in folder.rglob("*.safetensors"):
        save_file({name: 0 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


DAMAGES = {
    "other numbers": damage_weights,
    "no weights": lambda folder: next(folder.rglob("*.safetensors")).unlink(),
    "another config": lambda folder: change_json(folder / "config.json", router_mode="dense"),
    "more code": lambda folder: (folder / "more.py").write_text("import os"),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "no config": lambda folder: (folder / "config.json").write_text("{"),
}


def test_a_damaged_export_in_the_cache_is_made_again(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_export, "export", functools.partial(hub_export.export, verify=False))
    folder = loading.find_model(checkpoint).folder
    before = snapshot(folder)
    for damage in DAMAGES.values():
        damage(folder)
        with pytest.warns(DyloraMoeWarning, match=r"is damaged \(.* and is made again"):
            assert loading.find_model(checkpoint).folder == folder
        assert snapshot(folder) == before
    (folder / "README.md").write_text("mine")  # nothing is computed with it
    assert loading.find_model(checkpoint).folder == folder and (folder / "README.md").read_text() == "mine"
