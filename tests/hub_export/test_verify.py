"""`verify` passes what is whole, and names what is not; `merge` gives an ordinary model."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from environments import make_environment, run_python
from helpers_checkpoints import (
    change_json,
    save_adapter,
    save_final_checkpoint,
    save_foundation,
)
from helpers_slow import slow_but
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, merge, verify
from dylora_moe.modeling import DyloraMoeForCausalLM


def findings(result):
    return {finding.what: (finding.passed, finding.detail) for finding in result.findings}


@pytest.mark.parametrize("layout", slow_but("full", of=["full", "adapter"]))
def test_a_whole_repo_passes(tmp_path, checkpoint, checked, layout):
    repo = checked[0] if layout == "full" else tmp_path / "repo"
    if layout == "adapter":
        export(checkpoint, repo, layout=layout, verify=False)
    result = verify(repo, against=checkpoint)
    assert result.passed
    found = findings(result)
    assert list(found) == [
        "files",
        "safetensors",
        "checksums",
        "code",
        "tokenizer",
        "tokenizer of the source",
        "tensors",
        "logits",
    ]
    assert all(passed for passed, _ in found.values())
    assert "strategy router" in found["files"][1] and "8 quantities" in found["logits"][1]


def change_weights(repo, name, change):
    path = next(repo.rglob(name))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def set_nan(tensors):
    tensors["foundation.model.norm.weight"][3] = float("nan")


def write(name, text):
    return lambda repo: (repo / name).write_text(text)


def append(name, text):
    return lambda repo: (repo / name).write_text((repo / name).read_text() + text)


DAMAGES = {
    "no generation config": (
        lambda repo: (repo / "generation_config.json").unlink(),
        "files",
        "generation_config.json",
    ),
    "no weights": (lambda repo: (repo / "model.safetensors").unlink(), "files", "model.safetensors"),
    "no such strategy": (
        write("generation_config.json", '{"routing_strategy": "single:7"}'),
        "files",
        "single:7",
    ),
    "a file of code is missing": (
        lambda repo: (repo / "cache_dylora_moe.py").unlink(),
        "code",
        "cache_dylora_moe.py",
    ),
    "code was changed": (append("routing_dylora_moe.py", "import os\n"), "code", "+import os"),
    "the package's file was changed": (write("__init__.py", "import os\n"), "code", "+import os"),
    "code was added": (write("more.py", "import os\n"), "code", "more.py is no file of this package's"),
    "code elsewhere": (
        lambda repo: change_json(repo / "config.json", auto_map={"AutoConfig": "eve/evil--config.Config"}),
        "code",
        "takes code from eve/evil",
    ),
    "not a number": (
        lambda repo: change_weights(repo, "model.safetensors", set_nan),
        "safetensors",
        "model.norm.weight",
    ),
    "a tensor is missing": (
        lambda repo: change_weights(
            repo, "model.safetensors", lambda t: t.pop("foundation.model.norm.weight")
        ),
        "safetensors",
        "model.norm.weight of the base model is missing",
    ),
    "a gate of another size": (
        lambda repo: change_weights(
            repo, "model.safetensors", lambda t: t.update({"router.gate.weight": torch.zeros(2, 32)})
        ),
        "headers",
        "router.gate.weight is [2, 32]",
    ),
    "weights were exchanged": (
        lambda repo: change_weights(repo, "model.safetensors", lambda t: t["router.gate.bias"].add_(1)),
        "checksums",
        "model.safetensors is not what was exported",
    ),
    "cut off": (
        lambda repo: (repo / "model.safetensors").write_bytes(
            (repo / "model.safetensors").read_bytes()[:-100]
        ),
        "headers",
        "not a whole safetensors file",
    ),
    "a line of no checksum": (write("SHA256SUMS", "0123  /etc/passwd\n"), "checksums", "is not a checksum"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_wrong_is_named(repo, case):
    damage, what, message = DAMAGES[case]
    damage(repo)
    result = verify(repo)
    passed, detail = findings(result)[what]
    assert not result.passed and passed is False and message in detail


def test_a_repo_of_another_version_is_whole_with_its_own_code(repo):
    """Its code differs from this package's. What counts as missing is what its own code imports."""
    cache = "cache_dylora_moe"
    for path in repo.glob("*.py"):
        path.write_text(path.read_text().replace(f"from .{cache} import", "from .older_dylora_moe import"))
    (repo / f"{cache}.py").rename(repo / "older_dylora_moe.py")
    found = findings(verify(repo))
    assert found["files"][0] and found["code"][0] is False
    assert f"{cache}.py of this package is not there" in found["code"][1]
    assert "older_dylora_moe.py is no file of this package's" in found["code"][1]
    (repo / "older_dylora_moe.py").unlink()
    assert findings(verify(repo))["files"] == (False, "lacks older_dylora_moe.py")


SAVE_AGAIN = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
full, adapter, out = sys.argv[1:]
load = lambda kind=AutoModelForCausalLM, name=full, **more: kind.from_pretrained(name, trust_remote_code=True, **more)
load().save_pretrained(out + "/full")
load().save_pretrained(out + "/adapter", layout="adapter")
load(name=adapter).save_pretrained(out + "/adapter-as-full")
load(name=adapter).save_pretrained(out + "/adapter-again", layout="adapter")
load(name=out + "/full").save_pretrained(out + "/again")
load().save_pretrained(out + "/shards", max_shard_size="20KB")
load(dtype=torch.bfloat16).save_pretrained(out + "/rounded")
load(AutoModel).save_pretrained(out + "/body")
load(experts=["expert_2", "expert_0"]).save_pretrained(out + "/subset")
trained = load()
trained.expert_layers()["model.layers.0.self_attn.q_proj"].lora_B.data.add_(1)
trained.save_pretrained(full)
assert not any(name.partition(".")[0] == "dylora_moe" for name in sys.modules)
row = {"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}
arguments = TrainingArguments(out + "/run", max_steps=1, save_steps=1, report_to=[], use_cpu=True)
trainer = Trainer(trained, arguments, train_dataset=[row] * 4, processing_class=AutoTokenizer.from_pretrained(full))
trainer.train()
trainer.save_model(out + "/trained")
"""


@pytest.mark.slow
def test_a_model_saved_again_passes(tmp_path, repo, checkpoint):
    """By stock transformers, which imports the code from its own cache, where there is no `__init__.py` of
    the repo's."""
    adapter = export(checkpoint, tmp_path / "light", layout="adapter", verify=False).output_dir
    out = tmp_path / "out"
    run_python(sys.executable, SAVE_AGAIN, str(repo), str(adapter), str(out), home=tmp_path)
    saved = [*(path for path in out.iterdir() if path.name != "run"), out / "run" / "checkpoint-1", repo]
    assert len(saved) == 12
    for folder in saved:
        result = verify(folder)
        assert result.passed, (folder, findings(result))
        assert findings(result)["code"][0] is True and findings(result)["safetensors"][0] is True
        assert findings(result)["checksums"] == (None, "not compared: there is no SHA256SUMS")
    assert findings(verify(out / "full"))["card"] == (None, "there is no README.md")
    (out / "full" / "__init__.py").touch()  # as it was written by earlier versions
    assert verify(out / "full").passed
    DyloraMoeForCausalLM.from_pretrained(out / "full").save_pretrained(tmp_path / "by-this-package")
    assert verify(tmp_path / "by-this-package").passed


CHANGES = {
    "foundation.model.norm.weight": (None, "lacks model.norm.weight of its base model"),
    "foundation.model.layers.1.self_attn.v_proj.base_layer.weight": (torch.ones(3, 3), "v_proj.weight of its base model is [3, 3]"),
    "foundation.model.extra.weight": (torch.ones(2), "holds model.extra.weight, which its base model"),
    "foundation.model.layers.0.mlp.up_proj.lora_A": (torch.ones(4, 32), "nothing that its config.json speaks of"),
    "router.gate.scale": (torch.ones(3), "nothing that its config.json speaks of"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_repo_that_is_not_whole_is_neither_verified_nor_exported(repo, tmp_path, name):
    tensor, message = CHANGES[name]
    change_weights(
        repo, "model.safetensors", lambda t: t.pop(name) if tensor is None else t.update({name: tensor})
    )
    assert not verify(repo).passed
    with pytest.raises(InputError, match=re.escape(message)):
        export(repo, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_an_expert_means_one_thing_to_peft_and_to_the_model(checkpoint, tmp_path):
    """Its folder and the repo's config say the same, with the same tensors."""
    repo = export(checkpoint, tmp_path / "repo", layout="adapter", verify=False).output_dir
    config = repo / "experts" / "expert_1" / "adapter_config.json"
    change_json(config, lora_alpha=4)
    with pytest.raises(InputError, match=r"lora_alpha is 4, config\.json has 8 for expert_1"):
        export(repo, tmp_path / "out")
    passed, detail = findings(verify(repo))["headers"]
    assert passed is False and "lora_alpha is 4" in detail
    change_json(config, lora_alpha=8)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    change_weights(
        repo / "experts" / "expert_1", "*.safetensors", lambda tensors: tensors.update({name: torch.ones(32)})
    )
    with pytest.raises(
        InputError, match=r"lora_magnitude_vector.* is nothing that its config\.json speaks of"
    ):
        export(repo, tmp_path / "out")


def test_other_numbers_than_the_sources(quick_check, repo, checked, checkpoint):
    change_weights(repo, "model.safetensors", lambda tensors: tensors["router.gate.bias"].add_(1))
    found = findings(verify(repo, against=checkpoint))
    assert found["tensors"] == (False, "the gate's bias is not the source's")
    shutil.copyfile(checked[0] / "model.safetensors", repo / "model.safetensors")
    change_weights(
        repo, "model.safetensors", lambda tensors: tensors["foundation.model.norm.weight"].mul_(1.1)
    )
    found = findings(verify(repo, against=checkpoint))
    assert found["logits"][0] is False and "the logits of strategy base" in found["logits"][1]


def test_foreign_code_is_run_only_if_trusted(tmp_path, repo, checkpoint):
    mark = tmp_path / "ran"
    append("modeling_dylora_moe.py", f"\nimport pathlib\npathlib.Path({str(mark)!r}).touch()\n")(repo)
    found = findings(verify(repo, against=checkpoint))
    assert not mark.exists() and found["logits"][0] is False and "--trust_remote_code" in found["logits"][1]
    found = findings(verify(repo, against=checkpoint, trust_remote_code=True))
    assert mark.exists() and found["logits"][0] is True and found["code"][0] is False


@pytest.mark.slow
def test_the_command(repo, checkpoint):
    command = [sys.executable, "-m", "dylora_moe", "verify", str(repo)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0 and good.stdout.count("\nok") == 4, good.stdout + good.stderr
    (repo / "routing_dylora_moe.py").write_text("")
    bad = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and json.loads(bad.stdout)["passed"] is False
    none = subprocess.run([*command[:-1], str(checkpoint)], capture_output=True, text=True, check=False)
    assert (
        none.returncode == 2 and "is not an exported repo" in none.stderr and "Traceback" not in none.stderr
    )


MERGED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 13)[None]).logits.detach(), sys.argv[2])
"""


def test_a_merged_model_needs_no_code_and_equals_the_expert(tmp_path, checked):
    result = merge(checked[0], expert="expert_1", output_dir=tmp_path / "merged")
    assert result.difference < 1e-4 and result.expert == "expert_1" and result.dtype == "float32"
    assert not list((tmp_path / "merged").glob("*.py"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert "routing_strategy" not in json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    home = tmp_path / "home"
    home.mkdir()
    python = make_environment(tmp_path / "env", ("transformers", "torch", "safetensors"))
    run_python(python, MERGED, str(tmp_path / "merged"), str(home / "logits.pt"), home=home)
    model = AutoModelForCausalLM.from_pretrained(checked[0], trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.arange(3, 13)[None], routing_strategy="single:1").logits
    torch.testing.assert_close(torch.load(home / "logits.pt"), expected, atol=1e-4, rtol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 97


def test_merging_in_the_foundations_dtype(tmp_path):
    foundation = save_foundation(tmp_path / "foundation", dtype=torch.bfloat16, tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", foundation, use_rslora=True, target_modules="all-linear")
    export(adapter, tmp_path / "repo", layout="adapter", verify=False)
    assert merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "rounded").dtype == "bfloat16"
    assert all(
        t.dtype == torch.bfloat16 for t in load_file(tmp_path / "rounded" / "model.safetensors").values()
    )
    merge(tmp_path / "repo", expert="0", output_dir=tmp_path / "exact", dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    routed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo", trust_remote_code=True, dtype=torch.float32
    )
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected = routed(ids, routing_strategy="single:0").logits
        torch.testing.assert_close(exact(ids).logits, expected, atol=1e-4, rtol=0)


def test_what_cannot_be_merged(tmp_path, checked, checkpoint):
    for repo, expert, message in (
        (checked[0], "nobody", "There is no expert named 'nobody'"),
        (checked[0], "7", "out of range"),
        (checkpoint, "expert_0", "is not an exported repo"),
    ):
        with pytest.raises(InputError, match=message):
            merge(repo, expert=expert, output_dir=tmp_path / "out")
    shutil.copytree(checked[0], tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        merge(checked[0], expert="expert_0", output_dir=tmp_path / "out")


def test_merging_says_what_rounding_costs(tmp_path):
    foundation = save_foundation(tmp_path / "foundation", dtype=torch.bfloat16)
    export(save_adapter(tmp_path / "adapter", foundation), tmp_path / "repo", verify=False)
    rounded = merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "rounded")
    exact = merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "exact", dtype="float32")
    assert rounded.difference < 1e-4 < rounded.rounding and exact.rounding < 1e-4


@pytest.mark.slow
def test_verifying_with_the_options_of_the_export(tmp_path, checkpoint, adapters):
    chosen = {"dtype": "bfloat16", "router_mode": "dense", "router_temperature": 0.5}
    export(checkpoint, tmp_path / "chosen", verify=False, **chosen)
    assert verify(tmp_path / "chosen", against=checkpoint, **chosen).passed
    assert not verify(tmp_path / "chosen", against=checkpoint).passed
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("plain: a\nstabilised: b\neverywhere: c\n")
    result = export(adapters, tmp_path / "prompted", router_prompts=prompts, verify=False)
    assert result.routing_strategy == "router"
    assert verify(tmp_path / "prompted", against=adapters, router_prompts=prompts).passed
    export(adapters, tmp_path / "plain", verify=False)
    again = export(tmp_path / "plain", tmp_path / "routed", router_prompts=prompts, verify=False)
    assert again.routing_strategy == "router"


def test_what_export_warns_of_is_no_error_to_verify(tmp_path):
    source = save_final_checkpoint(tmp_path / "final", "nobody/small-llama", tokenizer=False)
    with pytest.warns(DyloraMoeWarning, match="no tokenizer"):
        export(source, tmp_path / "light", layout="adapter")
    result = verify(tmp_path / "light")
    assert result.passed and findings(result)["tokenizer"][0] is None


def test_a_list_of_checksums_must_be_whole(repo):
    (repo / "SHA256SUMS").write_text("")
    assert findings(verify(repo))["checksums"][0] is False
