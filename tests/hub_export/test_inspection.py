"""What `inspect` says of each format, and of what is missing."""

import json
import shutil

import pytest
import torch
from helpers_checkpoints import change_json, layer_shapes, save_final_checkpoint, save_whole_model
from safetensors.torch import load_file

from dylora_moe.hub_export import InputError, export, inspect


FOUNDATION_PARAMETERS = 97 * 32 * 2 + 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32)
EXPERT_PARAMETERS = sum(4 * (inputs + outputs) for inputs, outputs in layer_shapes().values())


def test_a_final_checkpoint(checkpoint, foundation):
    found = inspect(checkpoint)
    assert (found.format, found.missing) == ("final checkpoint", [])
    assert "expert_0.pt holds" in found.reason
    assert found.foundation.name == found.foundation.folder == str(foundation)
    assert found.foundation.num_parameters == FOUNDATION_PARAMETERS
    expert = found.experts[1]
    assert (expert.name, expert.rank, expert.lora_alpha, expert.num_layers) == ("expert_1", (4, 4), (8, 8), 6)
    assert expert.modules == {"q_proj": 2, "v_proj": 2, "down_proj": 2}
    assert (expert.num_parameters, expert.num_bytes) == (EXPERT_PARAMETERS, 4 * EXPERT_PARAMETERS)
    assert found.router["num_experts"] == 3 and found.router["router_temperature"] == 2.0
    gate = 4 * 3 * 33
    assert found.memory["bfloat16"]["total"] == 2 * (FOUNDATION_PARAMETERS + 3 * EXPERT_PARAMETERS) + gate
    json.dumps(found.to_dict())


def test_an_exported_repo(checked):
    found = inspect(checked[0])
    assert (found.format, found.routing_strategy, found.missing) == ("exported repo", "router", [])
    assert found.foundation.num_parameters == FOUNDATION_PARAMETERS
    assert [expert.num_parameters for expert in found.experts] == [EXPERT_PARAMETERS] * 3
    assert found.router["router_input"] == "experts_sum"


def test_adapters(adapters):
    found = inspect(adapters)
    assert [expert.name for expert in found.experts] == ["plain", "stabilised", "everywhere"]
    assert (found.experts[0].rank, found.experts[0].lora_alpha) == ((2, 6), (3, 8))
    assert found.experts[1].use_rslora
    assert found.router is None


def test_what_is_missing_is_listed_and_not_raised(damaged):
    change_json(damaged / "config.json", _dylora_lora_alpha=None, base_model_name_or_path="nobody/nothing")
    (damaged / "dylo_moe_state" / "router.pt").unlink()
    for path in [*damaged.glob("tokenizer*"), *damaged.glob("chat*")]:
        path.unlink()
    found = inspect(damaged)
    missing = "\n".join(found.missing)
    for part in ("--lora_alpha", "router.pt is missing", "nobody/nothing is not on this machine"):
        assert part in missing
    assert found.experts[0].lora_alpha is None
    assert found.memory["float32"]["total"] is None
    assert found.tokenizer is None


def test_the_foundations_size_is_that_of_what_is_loaded(foundation, tmp_path):
    """Of the pickled form, too, and not of weights that lie beside them in a form of somebody's own."""
    base = shutil.copytree(foundation, tmp_path / "base")
    source = save_final_checkpoint(tmp_path / "final", base)
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    assert inspect(source).foundation.num_parameters == FOUNDATION_PARAMETERS
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    for path in base.glob("*.safetensors"):
        path.unlink()
    assert inspect(source).foundation.num_parameters == FOUNDATION_PARAMETERS


def test_a_source_that_brings_its_foundation_takes_the_tokenizer_of_the_named_one(foundation, tmp_path):
    """As an export does, so that nothing is said to be missing which an export finds."""
    source = save_whole_model(tmp_path / "whole", foundation)
    found = inspect(source)
    assert found.tokenizer == str(foundation) and found.missing == []
    assert export(source, tmp_path / "out", verify=False).tokenizer == str(foundation)
    change_json(source / "config.json", base_model_name_or_path=None)
    (missing,) = inspect(source).missing
    assert missing == f"no tokenizer in {source}; pass one with --tokenizer"


def test_an_unknown_folder(tmp_path):
    with pytest.raises(InputError, match="an empty folder"):
        inspect(tmp_path)


def test_an_ordinary_model_needs_no_export(foundation, tmp_path):
    found = inspect(foundation)
    assert found.format == "merged model" and found.experts == [] and "needs no export" in found.missing[0]
    assert found.foundation.num_parameters > 0 and found.reason.endswith("model_type llama")
    with pytest.raises(InputError, match=r"\(model.safetensors holds .*\): it needs no export"):
        export(foundation, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_is_refused_as_an_export_refuses_it(checkpoint, tmp_path, name):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    outside = shutil.copyfile(source / name, tmp_path / "outside")
    (source / name).unlink()
    (source / name).symlink_to(outside)
    for command in (inspect, lambda folder: export(folder, tmp_path / "out")):
        with pytest.raises(InputError, match=f"{name} leads out of"):
            command(source)


def test_a_foundations_tokenizer_that_an_export_refuses_is_listed(foundation, adapters, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in foundation.iterdir():
        (linked / path.name).symlink_to(path)
    (problem,) = inspect(adapters[0], base_model=str(linked)).missing
    assert "chat_template.jinja leads out of" in problem
    with pytest.raises(InputError, match=r"chat_template\.jinja leads out of"):
        export(adapters[0], tmp_path / "out", base_model=str(linked))


def test_what_was_chosen_among_several_is_said(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-20")
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-100")
    found = inspect(tmp_path / "run")
    assert found.sources == [str(tmp_path / "run" / "checkpoint-100")] and "checkpoint-100" in found.notes[0]
    found = inspect(tmp_path / "run", subfolder="checkpoint-20")
    assert found.sources == [str(tmp_path / "run" / "checkpoint-20")]
