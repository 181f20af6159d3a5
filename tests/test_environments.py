"""Exported repos and wheels where they will be used: in environments with nothing of this project, or with
only its wheel."""

import json

import pytest
from environments import build_wheel, make_environment, run_python
from helpers_checkpoints import save_final_checkpoint, save_foundation

from dylora_moe.hub_export import export


LOAD = """
import importlib.util, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

assert importlib.util.find_spec("dylora_moe") is None
assert importlib.util.find_spec("peft") is None
repo = sys.argv[1]
config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
assert config.model_type == "dylora_moe" and config.num_experts == 3
tokenizer = AutoTokenizer.from_pretrained(repo)
inputs = tokenizer("AbCdE", return_tensors="pt")
hidden = AutoModel.from_pretrained(repo, trust_remote_code=True)(**inputs).last_hidden_state
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
output = model(**inputs, output_hidden_states=True)
assert torch.equal(hidden, output.hidden_states[-1])
generate = pipeline("text-generation", model=repo, trust_remote_code=True)
text = generate("AbCdE", max_new_tokens=5, do_sample=False)[0]["generated_text"]
tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
assert text.split() == ("AbCdE" + tokenizer.decode(new_tokens, skip_special_tokens=True)).split(), text
print("loaded", text)
"""

REQUIRED = ("torch", "transformers", "accelerate", "huggingface_hub", "peft", "safetensors", "rich", "typer")
WITHOUT_EXTRAS = """
import contextlib, importlib.util, io, runpy, sys
from dylora_moe.cli import main
from dylora_moe.hub_export import InputError

assert importlib.util.find_spec("evalplus") is None
options = ["--model", "no such model", "-o", "out"]
for command in ("benchmark", "expert-analysis", "routing-analysis"):
    for run in (main, lambda arguments: runpy.run_module(module, run_name="__main__")):
        sys.argv = ["python", *options]
        module = "dylora_moe.eval." + command.replace("-", "_")
        sys.modules.pop(module, None)
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                run([command, *options])
        except SystemExit as ended:
            assert ended.code == 2, said.getvalue()
        print(said.getvalue().strip())
for name in ("run_codegen", "evaluate"):
    try:
        getattr(importlib.import_module("dylora_moe.eval"), name)
    except InputError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    foundation = save_foundation(folder / "foundation")
    return save_final_checkpoint(folder / "checkpoint", foundation)


def test_a_repo_loads_where_nothing_of_this_project_is_installed(checkpoint, tmp_path):
    export([checkpoint], tmp_path / "repo", verify=False)
    python = make_environment(tmp_path / "environment", ("torch", "transformers"))
    assert "loaded" in run_python(python, LOAD, str(tmp_path / "repo"), home=tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment with the wheel and what it requires, and no extra."""
    folder = tmp_path_factory.mktemp("installed")
    return make_environment(folder / "environment", REQUIRED, wheel=build_wheel(folder / "wheel"))


@pytest.mark.slow
def test_a_wheel_can_export_in_a_clean_environment(checkpoint, installed, tmp_path):
    code = "import sys; from dylora_moe.cli import main; sys.argv = ['dylora-moe', *sys.argv[1:]]; main()"
    output = run_python(
        installed,
        code,
        "export",
        str(checkpoint),
        "-o",
        str(tmp_path / "repo"),
        "--json",
        home=tmp_path,
        stderr=False,
    )
    assert json.loads(output)["experts"] == ["expert_0", "expert_1", "expert_2"]
    stock = make_environment(tmp_path / "stock", ("torch", "transformers"))
    assert "loaded" in run_python(stock, LOAD, str(tmp_path / "repo"), home=tmp_path)


@pytest.mark.slow
def test_without_extras_every_way_in_says_what_to_install(installed, tmp_path):
    lines = run_python(installed, WITHOUT_EXTRAS, home=tmp_path, stderr=False).splitlines()
    assert [
        line for line in lines if "evalplus" in line and "pip install 'dylora-moe[eval]'" in line
    ] == lines
    assert len(lines) == 8
