"""Exports that went wrong once without a word, or with the wrong one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import save_adapter, save_final_checkpoint, save_foundation

from dylora_moe.hub_export import InputError, export, make_variant


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    foundation = save_foundation(folder / "foundation")
    return foundation, save_final_checkpoint(folder / "checkpoint", foundation)


@pytest.fixture
def repo(sources, tmp_path):
    export([sources[1]], tmp_path / "repo", verify=False)
    return tmp_path / "repo"


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dylora_moe", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("other", ["checkpoint-10/optimizer.pt", ".git/HEAD", "notes.txt", "samples.jsonl"])
def test_overwrite_never_takes_other_things_along(sources, repo, tmp_path, other):
    (repo / other).parent.mkdir(exist_ok=True)
    (repo / other).write_text("mine")
    before = {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=Path(other).parts[0]):
        export([sources[1]], repo, overwrite=True, verify=False)
    make_variant(tmp_path / "repo", routing_strategy="best", output_dir=tmp_path / "variant")
    (tmp_path / "variant" / "mine.pt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.pt"):
        make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant", overwrite=True)
    assert {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()} == before


def test_a_foundation_inside_the_output_folder_is_not_replaced(sources, repo):
    inside = save_foundation(repo / "experts" / "foundation")
    with pytest.raises(InputError, match=r"would be (lost|replaced)"):
        export([sources[1]], repo, base_model=str(inside), overwrite=True, verify=False)
    assert (inside / "model.safetensors").is_file()


def test_nan_is_refused_by_name(tmp_path):
    foundation = save_foundation(tmp_path / "foundation")
    checkpoint = save_final_checkpoint(tmp_path / "checkpoint", foundation)
    file = checkpoint / "peft_adapters" / "expert_2.pt"
    tensors = torch.load(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    torch.save(tensors, file)
    with pytest.raises(InputError, match=r"expert_2.*NaN.*q_proj"):
        export([checkpoint], tmp_path / "repo", verify=False)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--lora_alpha", "0"),
        ("--lora_alpha", "-4"),
        ("--lora_alpha", "nan"),
        ("--lora_alpha", "1e400"),
        ("--router_temperature", "nan"),
        ("--router_temperature", "inf"),
    ],
)
def test_nonsense_options_are_one_line_and_exit_code_2(sources, tmp_path, options):
    done = command("export", sources[1], "-o", tmp_path / "repo", "--no_verify", *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"(": 3}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("base_model_name_or_path", 5),
        ("lora_alpha", 0),
        ("lora_dropout", "x"),
    ],
)
def test_malformed_adapter_configs_are_bad_input(sources, tmp_path, field, value):
    adapter = save_adapter(tmp_path / "adapter", sources[0])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    done = command("export", adapter, "-o", tmp_path / "repo", "--no_verify")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "repo").exists()


@pytest.mark.slow
def test_the_check_works_where_torch_is_on_the_python_path(sources, tmp_path):
    """As with packages of a user or a cluster: the repo's side is another process, which must find them
    too."""
    site = Path(torch.__file__).parents[1]
    done = command("export", sources[1], "-o", tmp_path / "repo", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout


def test_no_variant_of_half_a_repo(repo, tmp_path):
    (repo / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"not a complete repo: model\.safetensors is missing"):
        make_variant(repo, routing_strategy="best", output_dir=tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_no_folder_of_this_machine_in_base_config(repo):
    config = json.loads((repo / "config.json").read_text())
    assert not config["base_config"].get("_name_or_path")
