"""Checkpoints that `find_model` exports to a cache: what makes another export of them, and another run."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers_checkpoints import change_json, snapshot
from hub_server import Hub, Repo
from safetensors.torch import load_file, save_file

from dylora_moe.eval import run_codegen
from dylora_moe.eval.sampling import loading, model_identity
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems", "export_cache")

SMALL = {"dtype": "float32", "max_new_tokens": 24, "limit": 4}


def test_a_cached_export_is_made_anew_when_its_foundation_changed(bare, own_cache):
    foundation = bare.parent / "foundation"
    first = loading.find_model(bare)
    (foundation / "README.md").write_text("what a model is does not change with what is said of it\n")
    assert loading.find_model(bare).folder == first.folder
    seen = [first]
    template = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
    (foundation / "chat_template.jinja").write_text(template)
    seen.append(loading.find_model(bare))
    assert first.load_tokenizer().chat_template != template == seen[-1].load_tokenizer().chat_template
    change_json(foundation / "config.json", rms_norm_eps=0.125)
    seen.append(loading.find_model(bare))
    assert seen[-1].config.base_config.rms_norm_eps == 0.125
    change_json(foundation / "generation_config.json", repetition_penalty=1.5)
    seen.append(loading.find_model(bare))
    assert json.loads((seen[-1].folder / "generation_config.json").read_text())["repetition_penalty"] == 1.5
    weights = foundation / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    seen.append(loading.find_model(bare))
    assert len({found.folder for found in seen}) == len(seen)
    assert loading.find_model(bare).folder == seen[-1].folder


def test_a_routers_state_beside_the_checkpoint_is_part_of_its_cached_export(bare, own_cache):
    before = loading.find_model(bare).folder
    state = torch.load(bare / "dylo_moe_state" / "router.pt", weights_only=True)
    (bare.parent / "dylo_moe_state").mkdir()
    torch.save({**state, "temperature": 5.0}, bare.parent / "dylo_moe_state" / "router.pt")
    assert loading.find_model(bare).folder != before


def test_a_foundation_on_the_hub_counts_by_its_commit(monkeypatch, tmp_path):
    commits = iter(["a" * 40, "b" * 40])
    asked = []

    def hf_hub_download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(tmp_path / "models--guild--moe" / "snapshots" / next(commits) / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    found = [model_identity.foundation_hashes("guild/moe", revision) for revision in (None, "main", "c" * 40)]
    assert found == [{"foundation": f"guild/moe@{letter * 40}"} for letter in "abc"]
    assert asked == [("guild/moe", "config.json", None), ("guild/moe", "config.json", "main")]

    def not_at_hand(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_at_hand)
    assert model_identity.foundation_hashes("guild/moe", "v1") == {"foundation": "guild/moe@v1"}


@pytest.mark.slow
def test_a_foundation_that_moved_on_on_the_hub_makes_another_export_and_another_model(bare, tmp_path):
    change_json(bare / "config.json", base_model_name_or_path="guild/foundation")
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    script = (
        "import json, sys; from dylora_moe.eval.sampling.loading import find_model; found = find_model(sys.argv[1]); "
        "print(json.dumps([str(found.folder), found.sha256, found.config.base_config.rms_norm_eps, found.files['foundation']]))"
    )

    def find(**environment):
        ran = subprocess.run(
            [sys.executable, "-c", script, str(bare)],
            env={**keep, **environment, "DYLORA_MOE_CACHE": str(tmp_path / "exports")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout.splitlines()[-1])

    files = snapshot(bare.parent / "foundation")
    with Hub() as hub:
        hub.repos["guild/foundation"] = Repo()
        first = hub.repos["guild/foundation"].commit("main", "first", files)
        environment = hub.environment(tmp_path, "hf_write")
        before = find(**environment)
        config = json.dumps({**json.loads(files["config.json"]), "rms_norm_eps": 0.125}).encode()
        second = hub.repos["guild/foundation"].commit("main", "second", {**files, "config.json": config})
        after = find(**environment)
        offline = find(**environment, HF_HUB_OFFLINE="1")
    assert before[3] == f"guild/foundation@{first.sha}" and after[2:] == [
        0.125,
        f"guild/foundation@{second.sha}",
    ]
    assert before[0] != after[0] and before[1] != after[1] and offline == after


def test_the_same_foundation_elsewhere_is_the_same_run_and_another_is_named(checkpoint, own_cache, tmp_path):
    foundations = [tmp_path / name for name in ("here", "there")]
    for foundation in foundations:
        shutil.copytree(checkpoint.parent / "foundation", foundation)
    options = {"model": checkpoint, "root": tmp_path / "out", **SMALL}
    first = run_codegen(base_model=str(foundations[0]), **options)
    made = Path(first).stat().st_mtime_ns
    assert run_codegen(base_model=str(foundations[1]), **options) == first
    assert Path(first).stat().st_mtime_ns == made and len(read_runs(tmp_path / "out")) == 1
    weights = load_file(foundations[1] / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, foundations[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="another run") as error:
        run_codegen(base_model=str(foundations[1]), **options)
    assert f'base_model: "{foundations[0]}", "{foundations[1]}"' in str(error.value)
    assert re.search(r"the model's foundation/model\.safetensors: \w{12}, \w{12}\)", str(error.value))
    assert "model_sha256" not in str(error.value)


def test_transformers_does_not_warn_of_model_types_that_it_does_not_know(checkpoint, own_cache, tmp_path):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        run_codegen(model=checkpoint, root=tmp_path, **SMALL)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [message for message in messages if "to instantiate a model of type" in message]
