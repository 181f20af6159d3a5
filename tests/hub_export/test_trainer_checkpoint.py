"""Reading the trainer's own checkpoints: PEFT's nested folders, the gate beside them, and all that can be
missing."""

import os
import shutil

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    random_gate,
    save_adapter,
    save_final_checkpoint,
    save_router,
    save_trainer_checkpoint,
    snapshot,
)
from helpers_reading import assert_same, read, read_error, source_quantities
from safetensors.torch import load_file, save_file

from dylora_moe.hub_export import detect


NESTED = "peft_adapters/expert_1/expert_1"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, foundation):
    return save_trainer_checkpoint(tmp_path_factory.mktemp("trainer") / "checkpoint-10", foundation)


@pytest.fixture
def step(trained, tmp_path):
    """A copy of the checkpoint, in a run of its own, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run" / "checkpoint-10")


def change_adapter(step, change, name=NESTED):
    path = step / name / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_it_is_recognised_by_its_tensors(trained, step):
    detection = detect(trained)
    assert detection.format == "trainer checkpoint"
    expected = f"{NESTED.replace('1', '0')}/adapter_model.safetensors holds base_model.model.model.layers.0"
    assert detection.reason.startswith(expected)
    change_json(step / "config.json", model_type="llama", checkpoint_type=None)
    assert detect(step).reason == detection.reason


def test_without_any_adapter_the_config_tells(step):
    shutil.rmtree(step / "peft_adapters")
    assert detect(step).reason == 'config.json has checkpoint_type "peft_only"'


@pytest.mark.parametrize("router", ["router.safetensors", "router.pt"])
def test_experts_and_gate_equal_peft(foundation, tmp_path, router):
    step = save_trainer_checkpoint(tmp_path / "checkpoint-7", foundation, router=router, rank=3, alpha=5)
    before = snapshot(step)
    mixture = read(step)
    assert [expert.name for expert in mixture.experts] == ["expert_0", "expert_1", "expert_2"]
    assert {layer.lora_alpha for layer in mixture.experts[2].layers.values()} == {5}
    assert [expert.lora_dropout for expert in mixture.experts] == [0.05] * 3
    assert all(expert.mature for expert in mixture.experts)
    for found, expected in zip(mixture.router.read(), random_gate(3).values(), strict=True):
        assert torch.equal(found, expected)
    assert mixture.router.router_input == "experts_sum"
    assert_same(mixture, foundation)
    assert snapshot(step) == before


def test_the_adapters_name_the_foundation(trained, foundation, step, tmp_path):
    assert read(trained).foundation.name == str(foundation)
    change_json(step / "config.json", base_model_name_or_path="somebody/else")
    assert read(step).foundation.name == "somebody/else"


def test_adapters_of_two_foundations_are_a_problem(step):
    change_json(step / NESTED / "adapter_config.json", base_model_name_or_path="somebody/else")
    assert "somebody/else" in read(step).problems[0] and "--base_model" in read(step).problems[0]
    assert read(step, base_model="somebody/else").problems == []


def test_without_a_foundation_the_best_model_of_the_run_names_it(step, checkpoint, foundation):
    for index in range(3):
        path = step / f"peft_adapters/expert_{index}/expert_{index}/adapter_config.json"
        change_json(path, base_model_name_or_path=None)
    assert read(step).foundation.name is None
    shutil.copytree(checkpoint, step.parent / "best_model")
    assert read(step).foundation.name == str(foundation)


def test_settings_that_nobody_stored_are_trainings_defaults_and_told(trained, foundation):
    mixture = read(trained)
    assert (mixture.router.num_experts_per_tok, mixture.router.router_temperature) == (1, 2.0)
    assert len(mixture.notes) == 1 and "top_k 1, temperature 2.0" in mixture.notes[0]
    partly = read(trained, num_experts_per_tok=2)
    assert partly.router.num_experts_per_tok == 2
    assert "temperature 2.0" in partly.notes[0] and "top_k" not in partly.notes[0]
    assert read(trained, num_experts_per_tok=2, router_temperature=0.5).notes == []


@pytest.mark.parametrize("place", [".", "..", "../best_model"])
def test_settings_come_from_the_run(step, foundation, place):
    (step / place).mkdir(exist_ok=True)
    (step / place / "dylo_moe_state").mkdir()
    save_router(step / place, 3, top_k=2, temperature=0.7)
    mixture = read(step)
    assert (mixture.router.num_experts_per_tok, mixture.router.router_temperature) == (2, 0.7)
    assert mixture.notes == []
    chosen = read(step, num_experts_per_tok=3, router_temperature=4.0).router
    assert (chosen.num_experts_per_tok, chosen.router_temperature) == (3, 4.0)
    assert_same(mixture, foundation)
    weights = torch.softmax(source_quantities(mixture, foundation)["router logits"] / 0.7, dim=-1)
    assert weights.shape[-1] == 3


def test_the_reference_takes_the_runs_settings_too(step, foundation):
    before = source_quantities(read(step), foundation)
    (step.parent / "dylo_moe_state").mkdir()
    save_router(step.parent, 3, top_k=2, temperature=0.2)
    after = source_quantities(read(step), foundation)
    assert torch.equal(before["router logits"], after["router logits"])
    assert not torch.allclose(before["router"], after["router"], atol=1e-3)
    assert not torch.allclose(before["router, dense"], after["router, dense"], atol=1e-3)


def test_a_gate_under_training_state_alone_is_read(step, foundation):
    (step / "router.safetensors").unlink()
    (step / "dylo_moe_state").mkdir()
    save_router(step, 3, expert_maturity=torch.tensor([1, 0, 0]))
    mixture = read(step)
    assert "expert_maturity [1, 0, 0]" in mixture.notes[0]
    assert all(expert.mature for expert in mixture.experts)
    assert_same(mixture, foundation)


def test_what_training_leaves_besides_is_never_opened(step):
    """Their content is no file of torch, so opening one would be an error; this makes it a certain one."""
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        path = step / name
        path.unlink()
        os.mkfifo(path)  # reading it would hang
    assert len(read(step).experts) == 3


def test_adapters_that_are_not_nested_are_read_as_well(step, foundation):
    for index in range(3):
        place = step / f"peft_adapters/expert_{index}"
        for path in (place / place.name).iterdir():
            path.rename(place / path.name)
        (place / place.name).rmdir()
    assert_same(read(step), foundation)


def test_ten_experts_keep_their_numbers(foundation, tmp_path):
    step = save_trainer_checkpoint(tmp_path / "checkpoint-1", foundation, num_experts=12, rank=1)
    for index, expert in enumerate(read(step).experts):
        stored = load_file(step / f"peft_adapters/expert_{index}/expert_{index}/adapter_model.safetensors")
        for module in expert.layers:
            assert torch.equal(expert.read(module)[0], stored[f"base_model.model.{module}.lora_A.weight"])


def lose_adapter(step):
    shutil.rmtree(step / "peft_adapters" / "expert_1")


def lose_weights(step):
    (step / NESTED / "adapter_model.safetensors").unlink()


def empty_weights(step):
    change_adapter(step, lambda tensors: tensors.clear())


@pytest.mark.parametrize("damage", [lose_adapter, lose_weights, empty_weights])
def test_an_expert_that_is_not_there_is_named_with_a_sibling_that_has_it(step, trained, checkpoint, damage):
    damage(step)
    assert (
        "expert_1" in read(step).problems[0]
        and "no checkpoint-* folder or best_model" in read(step).problems[0]
    )
    for other, keep in ((9, True), (11, True), (12, False)):
        sibling = shutil.copytree(trained, step.parent / f"checkpoint-{other}")
        if not keep:
            damage(sibling)
    assert "checkpoint-11 has expert_1: export that folder instead" in read(step).problems[0]
    for other in (9, 11, 12):
        shutil.rmtree(step.parent / f"checkpoint-{other}")
    shutil.copytree(checkpoint, step.parent / "best_model")
    assert "best_model has expert_1: export that folder instead" in read(step).problems[0]
    assert [expert.name for expert in read(step).experts] == ["expert_0", "expert_2"]


def test_the_earlier_form_is_read_by_its_files(foundation, tmp_path):
    """`expert_<i>.pt`, a training state, and no alpha: the files of a final checkpoint, which reads them."""
    step = save_final_checkpoint(tmp_path / "run" / "checkpoint-5", foundation, alpha=None)
    (step / "config.json").unlink()
    (step / "config.json").write_text(
        '{"model_type": "dylora-moe", "num_experts": 3, "checkpoint_type": "peft_only"}'
    )
    assert detect(step).format == "final checkpoint"
    mixture = read(step)
    assert len(mixture.experts) == 3
    assert "--lora_alpha" in mixture.problems[0] and mixture.foundation.name is None
    assert_same(read(step, lora_alpha=6), foundation, lora_alpha=6)
    save_final_checkpoint(tmp_path / "run" / "best_model", foundation, alpha=11)
    found = read(step)
    assert {layer.lora_alpha for layer in found.experts[0].layers.values()} == {11}
    assert found.foundation.name == str(foundation)
    assert_same(found, foundation)
    change_json(step / "config.json", num_experts=4)
    assert "expert_3.pt" in read_error(step)


def test_the_foundations_own_experts_are_not_ours(foundation, tmp_path):
    """A final checkpoint copies its foundation's config, which may count experts of its own."""
    final = save_final_checkpoint(tmp_path / "final", foundation)
    change_json(final / "config.json", _dylora_num_experts=None, num_experts=60)
    assert len(read(final).experts) == 3


def break_rank(step):
    change_adapter(
        step, lambda tensors: tensors.update({key: tensors[key][:2].contiguous() for key in tensors})
    )


def break_gate(step, **tensors):
    stored = {**{f"gate.{key}": value for key, value in random_gate(3).items()}, **tensors}
    save_file({key: value for key, value in stored.items() if value is not None}, step / "router.safetensors")


def link_adapter_outside(step):
    outside = shutil.copytree(step / NESTED, step.parent.parent / "elsewhere")
    shutil.rmtree(step / NESTED)
    (step / NESTED).symlink_to(outside)


def link_gate_outside(step):
    (step / "router.safetensors").rename(step.parent.parent / "router.safetensors")
    (step / "router.safetensors").symlink_to(step.parent.parent / "router.safetensors")


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES = {
    "too few": (
        lambda step: change_json(step / "config.json", num_experts=2),
        ["expert_2", "num_experts is 2"],
    ),
    "number is text": (
        lambda step: change_json(step / "config.json", num_experts="3"),
        ["num_experts is '3'"],
    ),
    "number is huge": (
        lambda step: change_json(step / "config.json", num_experts=10**30),
        ["num_experts is 1000"],
    ),
    "number is true": (
        lambda step: change_json(step / "config.json", num_experts=True),
        ["num_experts is True"],
    ),
    "rank": (break_rank, ["expert_1", "one rank"]),
    "gate of other size": (
        lambda step: break_gate(step, **{"gate.weight": torch.zeros(2, 32)}),
        ["[2, 32]", "3 exp"],
    ),
    "gate of integers": (
        lambda step: break_gate(step, **{"gate.weight": torch.zeros(3, 32, dtype=torch.int32)}),
        ["router.safetensors", "not as floats"],
    ),
    "no bias": (
        lambda step: break_gate(step, **{"gate.bias": None}),
        ["router.safetensors has no gate.bias"],
    ),
    "more than a gate": (lambda step: break_gate(step, **{"noise.weight": torch.ones(1)}), ["noise.weight"]),
    "truncated gate": (lambda step: truncate(step / "router.safetensors"), ["router.safetensors"]),
    "truncated adapter": (lambda step: truncate(step / NESTED / "adapter_model.safetensors"), ["expert_1"]),
    "no adapter config": (
        lambda step: (step / NESTED / "adapter_config.json").unlink(),
        ["adapter_config.json"],
    ),
    "DoRA": (
        lambda step: change_json(step / NESTED / "adapter_config.json", use_dora=True),
        ["expert_1", "DoRA"],
    ),
    "alpha is a list": (
        lambda step: change_json(step / NESTED / "adapter_config.json", lora_alpha=[8]),
        ["expert_1", "lora_alpha is [8]"],
    ),
    "adapter elsewhere": (link_adapter_outside, ["leads out of", "elsewhere"]),
    "gate elsewhere": (link_gate_outside, ["router.safetensors", "leads out of"]),
    "config is a list": (
        lambda step: (step / "config.json").write_text("[]"),
        ["config.json", "expected an object"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_it(step, damage):
    apply, expected = DAMAGES[damage]
    apply(step)
    message = read_error(step)
    for part in expected:
        assert part in message


def test_a_missing_router_is_a_problem(step):
    (step / "router.safetensors").unlink()
    mixture = read(step)
    assert mixture.router is None
    assert "router.safetensors" in mixture.problems[0]


def test_the_adapters_state_their_alpha(step):
    assert "--lora_alpha" in read_error(step, lora_alpha=4)


def test_one_checkpoint_at_a_time(step, trained):
    assert "one at a time" in read_error(step, trained)


def test_files_in_the_hubs_cache_are_links_and_are_read(trained, foundation, tmp_path):
    """`snapshots/<commit>/` of the cache holds links into `blobs/`."""
    cache = tmp_path / "models--some--run"
    snapshot_folder = cache / "snapshots" / "0a1b"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(trained.rglob("*")) if path.is_file()):
        shutil.copy(path, cache / "blobs" / str(number))
        link = snapshot_folder / path.relative_to(trained)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / "blobs" / str(number), link.parent))
    assert_same(read(snapshot_folder), foundation)


def test_checkpoints_of_one_adapter_are_not_several_experts(foundation, tmp_path):
    """PEFT's own trainers save one adapter per step; the folder above them is no set of adapters."""
    for name in ("checkpoint-1", "checkpoint-2", "best_model"):
        save_adapter(tmp_path / "run" / name, foundation)
    assert "of no known format" in read_error(tmp_path / "run")
    save_adapter(tmp_path / "run" / "named", foundation)
    assert [expert.name for expert in read(tmp_path / "run").experts] == ["named"]


def test_what_older_versions_of_peft_save_along_is_passed_over(foundation, tmp_path):
    """They match names by their beginning: expert_1's file holds tensors of expert_10, under names of its
    own."""
    folder = save_trainer_checkpoint(tmp_path / "checkpoint-1", foundation)
    path = folder / "peft_adapters" / "expert_1" / "expert_1" / "adapter_model.safetensors"
    tensors = load_file(path)
    extra = {key.replace(".weight", ".expert_10.weight"): tensor.clone() for key, tensor in tensors.items()}
    save_file({**tensors, **extra}, path)
    assert set(read(folder).experts[1].layers) == {
        key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors
    }


def test_a_router_beside_the_last_checkpoint_alone(trained, foundation, tmp_path):
    """As older runs left it; what lies beside a step is of another one."""
    (best := tmp_path / "run" / "best_model").parent.mkdir()
    shutil.copytree(trained, best)
    (best / "router.safetensors").unlink()
    (best.parent / "dylo_moe_state").mkdir()
    save_router(best.parent, 3)
    mixture = read(best)
    assert any(str(best.parent) in note for note in mixture.notes)
    assert_same(mixture, foundation)
    step = best.rename(best.parent / "checkpoint-7")
    assert "not of this step" in read(step).problems[0]
