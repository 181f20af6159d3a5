"""A foundation that cannot be had: messages name it, and not the checkpoint, say why, and what to do."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from environments import python_path
from helpers_checkpoints import change_json, save_adapter, save_foundation, snapshot
from hub_server import Hub, Repo
from transformers.utils import find_adapter_config_file

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, inspect, merge, verify
from dylora_moe.modeling import DyloraMoeForCausalLM
from dylora_moe.modeling.loading_dylora_moe import NO_FOLDER


@pytest.fixture
def moved(foundation, tmp_path):
    """An adapter, its repo of layout `adapter`, and its foundation, which has moved to another folder
    since."""
    own = shutil.copytree(foundation, tmp_path / "before" / "foundation")
    adapter = save_adapter(tmp_path / "source", own, seed=2)
    repo = export(adapter, tmp_path / "repo", layout="adapter", verify=False).output_dir
    shutil.move(own, tmp_path / "after")
    return adapter, repo, tmp_path / "after"


def uses(adapter, repo, tmp_path):
    """What loads the foundation, and says `--base_model` when that fails."""
    return {
        "export": lambda: export(adapter, tmp_path / "full", verify=False),
        "export of a repo": lambda: export(repo, tmp_path / "full", verify=False),
        "benchmark": lambda: find_model(repo).load(dtype="float32", device="cpu"),
        "merge": lambda: merge(repo, expert=0, output_dir=tmp_path / "merged"),
        "verify": lambda: verify(repo, against=adapter),
    }


def test_one_that_moved(moved, tmp_path):
    adapter, repo, _ = moved
    for name, use in uses(adapter, repo, tmp_path).items():
        with pytest.raises(InputError, match=r"base model .*before/foundation .*--base_model") as caught:
            use()
        assert "there is no such folder" in str(caught.value) or "does not exist here" in str(caught.value), (
            name
        )
    with pytest.raises(
        ValueError, match=r"The base model '.*before/foundation'.* there is no such folder .*`base_model=`"
    ):
        DyloraMoeForCausalLM.from_pretrained(repo)
    (missing,) = inspect(repo).missing
    assert "before/foundation" in missing and "--base_model" in missing
    assert not (tmp_path / "merged").exists() and not (tmp_path / "full").exists()


def test_one_that_moved_is_named_anew(moved, tmp_path, monkeypatch, quick_check):
    adapter, repo, after = moved
    result = merge(repo, expert=0, output_dir=tmp_path / "merged", base_model=str(after))
    assert result.difference < 1e-4 and result.foundation == str(after)
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    find_model(repo, base_model=str(after)).load(dtype="float32", device="cpu")
    result = verify(repo, against=adapter, base_model=str(after))
    assert result.passed and result.findings[-1].what == "logits"


@pytest.mark.slow
def test_a_merge_that_needs_no_other_foundation(checked, foundation, tmp_path):
    with pytest.raises(InputError, match="holds its own base model, so that --base_model would do nothing"):
        merge(checked[0], expert=0, output_dir=tmp_path / "merged", base_model=str(foundation))


def test_one_on_the_hub_without_a_network(moved, tmp_path):
    adapter, repo, _ = moved
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/model")
    change_json(repo / "config.json", base_model_name_or_path="org/model")
    message = r"base model org/model .*is not in the Hub's cache, and HF_HUB_OFFLINE is set; .*--base_model"
    for name, use in uses(adapter, repo, tmp_path).items():
        if name != "verify":  # in layout `adapter`, which can do without
            with pytest.raises(InputError, match=message):
                use()
    with pytest.raises(
        ValueError, match=r"The base model 'org/model'.* HF_HUB_OFFLINE is set; .*`base_model=`"
    ):
        DyloraMoeForCausalLM.from_pretrained(repo)


ON_THE_HUB = """
import json, sys
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import export, inspect, merge
from dylora_moe.hub_export.sources.json_files import read_json
from dylora_moe.modeling import DyloraMoeForCausalLM

adapter, repo, *names = sys.argv[1:]
said = {}
for name in names:
    hub_id, _, revision = name.partition("@")
    config = {**read_json(__import__("pathlib").Path(repo, "config.json"))}
    config.update(base_model_name_or_path=hub_id, base_model_revision=revision or None)
    open(f"{repo}/config.json", "w").write(json.dumps(config))
    for use in (
        lambda: export(adapter, "full", base_model=hub_id, base_revision=revision or None, verify=False),
        lambda: merge(repo, expert=0, output_dir="merged"),
        lambda: find_model(repo).load(dtype="float32", device="cpu"),
        lambda: DyloraMoeForCausalLM.from_pretrained(repo),
    ):
        try:
            use()
        except ValueError as error:
            said.setdefault(name, []).append(str(error))
print(json.dumps(said))
"""


@pytest.mark.parametrize("token", [None, pytest.param("hf_other", marks=pytest.mark.slow)])
def test_one_on_the_hub_that_may_not_be_had(moved, tmp_path, token):
    adapter, repo, after = moved
    expected = {
        "guild/gated": "it is gated on the Hub: accept its licence at",
        "guild/private": "if it is private, log in with `hf auth login`",
        "guild/open@v7": "the Hub's repo of that name has no such revision",
    }
    with Hub() as hub:
        for name in ("gated", "private", "open"):
            hub.repos[f"guild/{name}"] = Repo(gated=name == "gated", private=name == "private")
            hub.repos[f"guild/{name}"].commit("main", "whole", snapshot(after))
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(adapter), str(repo), *expected],
            env={**keep, **hub.environment(tmp_path, token), "PYTHONPATH": python_path()},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    for name, messages in json.loads(done.stdout.splitlines()[-1]).items():
        assert len(messages) == 4, (name, messages)
        for message, hint in zip(messages, ["--base_model"] * 3 + ["`base_model=`"], strict=True):
            assert name.partition("@")[0] in message and expected[name] in message and hint in message, (
                message
            )


def test_an_adapter_that_lies_in_the_foundations_folder(foundation, tmp_path, quick_check):
    """transformers would apply it, where PEFT is installed. It is no part of the foundation's own weights."""
    own = shutil.copytree(foundation, tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "source", own, seed=2)
    left = save_adapter(tmp_path / "left", foundation, seed=5)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(left / name, own / name)
    if find_adapter_config_file(str(own), subfolder=NO_FOLDER) is not None:
        with pytest.raises(
            InputError, match=r"holds an adapter too, which this transformers does not leave out"
        ):
            export(adapter, tmp_path / "refused", layout="adapter")
        return
    clean = export(adapter, tmp_path / "clean", base_model=str(foundation), verify=False).output_dir
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = DyloraMoeForCausalLM.from_pretrained(clean)(ids).logits
    for layout in ("full", "adapter"):
        with pytest.warns(
            UserWarning, match=r"foundation holds an adapter too \(adapter_config\.json\), which is left out"
        ):
            result = export(adapter, tmp_path / layout, layout=layout)
        assert result.check.passed and result.check.compared_logits
        with torch.no_grad():
            found = DyloraMoeForCausalLM.from_pretrained(tmp_path / layout)(ids).logits
        assert torch.equal(found, expected)


def test_a_foundation_that_needs_code_of_its_own_asks_nothing(tmp_path, monkeypatch, foundation):
    """transformers would ask on a terminal whether to run it."""
    own = save_foundation(tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "source", own, seed=2)
    repo = export(adapter, tmp_path / "repo", layout="adapter", verify=False).output_dir
    change_json(own / "config.json", model_type="strange", auto_map={"AutoConfig": "eve/code--config.Config"})
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("a question was asked"))
    for use in (
        lambda: find_model(repo).load(dtype="float32", device="cpu"),
        lambda: export(adapter, tmp_path / "full", verify=False),
    ):
        with pytest.raises(
            InputError, match=r"base model .* cannot be loaded: model_type 'strange' needs code of its own"
        ):
            use()
