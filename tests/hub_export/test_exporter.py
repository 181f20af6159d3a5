"""The exported repo: what is in it, what a user may choose, and what happens when something goes wrong."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    save_adapter,
    save_final_checkpoint,
    save_foundation,
    save_tokenizer,
    snapshot,
    write_json,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from dylora_moe.hub_export import FailureError, InputError, export, exporter, merge, staging
from dylora_moe.hub_export.sources.json_files import read_json
from dylora_moe.modeling import DyloraMoeForCausalLM


def export_error(source, output, **options) -> str:
    with pytest.raises(InputError) as caught:
        export(source, output, verify=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_repo_is_complete(checked, checkpoint):
    repo, result = checked
    names = {path.name for path in repo.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert {"modeling_dylora_moe.py", "configuration_dylora_moe.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert len({path.stat().st_mode for path in repo.iterdir()}) == 1
    config = read_json(repo / "config.json")
    assert config["model_type"] == "dylora_moe"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["weights_layout"] == "full"
    assert result.format == "final checkpoint" and result.tokenizer == str(checkpoint)


def test_the_strategy_survives_reading_and_the_foundations_fields_with_it(checked):
    generation_config = GenerationConfig.from_pretrained(checked[0])
    assert generation_config.routing_strategy == "router"
    assert (generation_config.eos_token_id, generation_config.bos_token_id) == (1, 0)
    assert "_from_model_config" not in read_json(checked[0] / "generation_config.json")


def test_a_generation_config_of_the_foundations_own_is_kept(tmp_path, checkpoint, foundation):
    """Even one that transformers would not save anew: a temperature without sampling."""
    base = shutil.copytree(foundation, tmp_path / "base")
    write_json(
        base / "generation_config.json", {"eos_token_id": [1, 5], "do_sample": False, "temperature": 0.6}
    )
    export(checkpoint, tmp_path / "out", base_model=str(base), verify=False)
    stored = read_json(tmp_path / "out" / "generation_config.json")
    assert (stored["eos_token_id"], stored["temperature"]) == ([1, 5], 0.6)
    assert stored["routing_strategy"] == "router"
    assert (
        DyloraMoeForCausalLM.from_pretrained(tmp_path / "out").generation_config.routing_strategy == "router"
    )


def test_the_tokenizer_comes_back_the_same(checked, checkpoint):
    saved, source = AutoTokenizer.from_pretrained(checked[0]), AutoTokenizer.from_pretrained(checkpoint)
    assert saved.get_vocab() == source.get_vocab()
    assert saved.chat_template == source.chat_template
    assert saved("abc")["input_ids"] == source("abc")["input_ids"]


def test_the_tokenizer_falls_back_to_the_foundation_or_is_asked_for(tmp_path, foundation):
    bare = save_foundation(tmp_path / "bare")
    for path in [*bare.glob("tokenizer*"), *bare.glob("chat*")]:
        path.unlink()
    folder = save_final_checkpoint(tmp_path / "final", foundation, tokenizer=False)
    assert export(folder, tmp_path / "a", verify=False).tokenizer == str(foundation)
    assert "--tokenizer" in export_error(folder, tmp_path / "b", base_model=str(bare))
    save_tokenizer(tmp_path / "words")
    given = export(
        folder, tmp_path / "c", base_model=str(bare), tokenizer=str(tmp_path / "words"), verify=False
    )
    assert given.tokenizer == str(tmp_path / "words")


def test_weights_are_split_beyond_the_given_size(tmp_path, checkpoint, checked):
    export(checkpoint, tmp_path / "out", max_shard_size="40KB", verify=False)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    whole = load_file(checked[0] / "model.safetensors")
    split = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert split.keys() == whole.keys()
    assert all(torch.equal(split[name], whole[name]) for name in whole)
    again = export(tmp_path / "out", tmp_path / "again", verify=False)
    assert torch.equal(
        load_file(again.output_dir / "model.safetensors")["router.gate.weight"], whole["router.gate.weight"]
    )


@pytest.mark.usefixtures("quick_check")
def test_an_exported_repo_is_exported_again_with_other_settings(tmp_path, checked):
    repo, _ = checked
    result = export(
        repo,
        tmp_path / "again",
        routing_strategy="single:second",
        expert_names=["first", "second", "third"],
        num_experts_per_tok=2,
        router_mode="sparse",
    )
    assert result.format == "exported repo"
    assert result.check.largest_difference == 0
    assert result.routing_strategy == "single:1"
    config = DyloraMoeForCausalLM.from_pretrained(result.output_dir).config
    assert config.expert_names == ["first", "second", "third"]
    assert (config.num_experts_per_tok, config.router_mode, config.router_input) == (
        2,
        "sparse",
        "experts_sum",
    )
    tensors, copied = (
        load_file(repo / "model.safetensors"),
        load_file(result.output_dir / "model.safetensors"),
    )
    assert tensors.keys() == copied.keys()
    assert all(torch.equal(tensors[name], copied[name]) for name in tensors)


def test_a_repo_can_replace_itself(quick_check, repo):
    before = load_file(repo / "model.safetensors")
    result = export(repo, repo, overwrite=True, routing_strategy="best")
    assert result.check.passed
    after = load_file(repo / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(repo / "generation_config.json")["routing_strategy"] == "best"


def test_the_card_is_true(checked):
    card = (checked[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    assert "base_model" not in card.split("---")[1]  # a local folder means nothing to others
    for part in (
        "| 1 | `expert_1` | 4 | 8 | 6 | 1,536 |",
        "from_pretrained(",
        "evalplus.evaluate",
        "The default here is `router`",
    ):
        assert part in card


@pytest.mark.parametrize("strategy", ["fastest", "single", "single:3", "single:nobody", "router:1"])
def test_an_unknown_strategy_lists_the_valid_ones_and_the_experts(tmp_path, checkpoint, strategy):
    """The experts where one of them is asked for: what no mixture has is refused before any is read."""
    message = export_error(checkpoint, tmp_path / "out", routing_strategy=strategy)
    for part in (strategy, "router, best, single:", "round_robin"):
        assert part in message
    if strategy.startswith("single:"):
        assert "0 (expert_0), 1 (expert_1), 2 (expert_2)" in message
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be(tmp_path, checkpoint, adapters):
    output = tmp_path / "out"
    assert "float32" in export_error(checkpoint, output, dtype="int8")
    assert "2 names" in export_error(checkpoint, output, expert_names=["a", "b"])
    assert "named 'a'" in export_error(checkpoint, output, expert_names=["a", "b", "a"])
    assert "'a/b'" in export_error(checkpoint, output, expert_names=["a/b", "b", "c"])
    assert "router_input" in export_error(checkpoint, output, router_input="sideways")
    assert "num_experts_per_tok" in export_error(checkpoint, output, num_experts_per_tok=4)
    assert "colour" in export_error(checkpoint, output, colour="red")
    assert "more than once" in export_error([checkpoint, checkpoint], output)
    assert "different formats" in export_error([checkpoint, adapters[0]], output)
    assert "no source" in export_error([], output)
    assert not output.exists()


def test_a_foundation_of_other_shapes_names_both(tmp_path, checkpoint):
    wide = save_foundation(tmp_path / "wide", hidden_size=64)
    message = export_error(checkpoint, tmp_path / "out", base_model=str(wide))
    assert "size 32" in message and "64" in message and "--base_model" in message
    (tmp_path / "none").mkdir()
    assert "--base_model" in export_error(checkpoint, tmp_path / "out", base_model=str(tmp_path / "none"))


def test_a_mixture_is_no_foundation(tmp_path, checkpoint, checked):
    assert "plain base model" in export_error(checkpoint, tmp_path / "out", base_model=str(checked[0]))


def test_a_foundation_without_all_its_weights_is_refused(tmp_path, checkpoint, foundation):
    base = shutil.copytree(foundation, tmp_path / "base")
    change_json(base / "config.json", num_hidden_layers=3)
    assert "no weights for model.layers.2" in export_error(checkpoint, tmp_path / "out", base_model=str(base))


def test_an_unknown_folder_says_what_it_holds(tmp_path):
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "notes.txt").touch()
    message = export_error(tmp_path / "stuff", tmp_path / "out")
    assert "notes.txt" in message and "final checkpoint" in message and "PEFT LoRA adapters" in message
    assert "does not exist" in export_error(tmp_path / "no where", tmp_path / "out")
    assert "W&B" in export_error("wandb:me/project/model:v0", tmp_path / "out")
    assert "nobody/nothing" in export_error("nobody/nothing", tmp_path / "out")
    assert "is a file" in export_error(tmp_path / "stuff" / "notes.txt", tmp_path / "out")


def test_an_output_that_is_not_empty_is_not_touched(tmp_path, checkpoint, repo):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert "not an exported repo" in export_error(checkpoint, tmp_path / "mine", overwrite=True)
    assert "--overwrite" in export_error(checkpoint, repo)
    assert snapshot(tmp_path) == before


def test_a_source_inside_the_output_is_refused(repo, checkpoint):
    inside = shutil.copytree(checkpoint, repo / "experts")
    assert "would be" in export_error(inside, repo, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_beyond_the_systems_limit_leave_no_trace(tmp_path, checkpoint, repo, overwrite):
    """A real write error in the middle of the weights, from the system itself."""
    output = repo if overwrite else tmp_path / "out"
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(FailureError, match=r"cannot write .* too large"):
            export(checkpoint, output, overwrite=overwrite, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line(tmp_path, checkpoint, repo, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter, "_write", full)
    before = snapshot(tmp_path)
    with pytest.raises(FailureError, match="no space left on the disk"):
        export(checkpoint, repo, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_what_does_not_fit_the_disk_is_not_begun(layout, tmp_path, checkpoint, monkeypatch):
    """The weights are known to the byte; their files have a header besides."""
    asked = []
    monkeypatch.setattr(exporter, "check_room", lambda place, num_bytes: asked.append(num_bytes))
    repo = export(checkpoint, tmp_path / "out", layout=layout, verify=False).output_dir
    files = list(repo.rglob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert asked == [sum(path.stat().st_size for path in files) - headers]
    monkeypatch.undo()
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=asked[0] - 1))
    monkeypatch.setattr(exporter, "_write", None)
    with pytest.raises(
        FailureError, match=r"no takes .* MB, and the disk has room for .* choose another folder"
    ):
        export(checkpoint, tmp_path / "no", layout=layout, verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


KILLED = """
import os, signal, sys
from dylora_moe.hub_export import export, exporter
source, output, moment = sys.argv[1:]
def die(message):
    if message == moment:
        os.kill(os.getpid(), signal.SIGKILL)
if moment == "half the files":
    exporter.write_generation_config = lambda *arguments: die(moment)
export(source, output, overwrite=True, verify=False, progress=die)
"""


@pytest.mark.slow
def test_killed_half_way_and_run_again(tmp_path, checkpoint, repo):
    """With the old repo there, and with nothing there; both at once to save time."""
    old, new = snapshot(repo), tmp_path / "new"
    moments = {repo: "putting the repo in its place", new: "half the files"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(checkpoint), str(output), moment], stderr=subprocess.DEVNULL
        )
        for output, moment in moments.items()
    ]
    assert [run.wait() for run in runs] == [-9, -9]
    assert snapshot(repo) == old
    assert not new.exists()
    assert len(list(tmp_path.glob(".*.partial-*"))) == 2
    for output in moments:
        export(checkpoint, output, overwrite=True, verify=False, routing_strategy="uniform")
        assert json.loads((output / "generation_config.json").read_text())["routing_strategy"] == "uniform"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("quick_check")
def test_a_router_can_be_left_out(tmp_path, checkpoint, checked):
    for index, source in enumerate((checkpoint, checked[0])):
        result = export(source, tmp_path / str(index), router_input="none")
        assert not result.router and result.routing_strategy == "uniform" and result.check.passed
        assert read_json(tmp_path / str(index) / "config.json")["router_input"] is None
        assert "router.gate.weight" not in load_file(tmp_path / str(index) / "model.safetensors")
    assert "leave out" in export_error(checkpoint, tmp_path / "out", router_input="none", router_mode="dense")


@pytest.mark.parametrize("place", ["foundation", "expert"])
def test_a_dtype_that_cannot_hold_a_number_is_refused(quick_check, tmp_path, foundation, place):
    base = shutil.copytree(foundation, tmp_path / "base")
    source = save_adapter(tmp_path / "adapter", base)
    path = base / "model.safetensors" if place == "foundation" else source / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(("q_proj.weight", "q_proj.lora_A.weight")))
    tensors[name][0, 0] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    message = r"holds numbers that are too large for torch\.float16 \(choose another --dtype\) (in|on) model\.layers\.0"
    with pytest.raises(InputError, match=message):
        export(source, tmp_path / "repo", dtype="float16", verify=False)
    assert export(source, tmp_path / "repo", dtype="bfloat16").check.passed is not False


def test_no_folder_of_this_machine_in_base_config(repo):
    config = json.loads((repo / "config.json").read_text())
    assert not config["base_config"].get("_name_or_path")


def test_experts_of_one_name_are_refused_whatever_its_case(tmp_path, checkpoint):
    with pytest.raises(InputError, match="two experts are named"):
        export(checkpoint, tmp_path / "out", expert_names=["a", "b", "A"])


def test_an_output_inside_the_repo_that_is_read_is_refused(tmp_path, checked):
    copy = shutil.copytree(checked[0], tmp_path / "copy")
    for write in (lambda: export(copy, copy / "in"), lambda: merge(copy, expert=0, output_dir=copy / "in")):
        with pytest.raises(InputError, match="lies in the repo"):
            write()
