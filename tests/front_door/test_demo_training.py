"""The demo's training and the checkpoint it leaves, after a few steps of each part."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.demo.checkpoint import save_final_checkpoint, save_foundation
from dylora_moe.demo.fitting import IGNORED, Example, encode, pad, random_batches
from dylora_moe.demo.foundation import vocabulary_exercises
from dylora_moe.demo.problems import load_problems
from dylora_moe.demo.texts import family_texts
from dylora_moe.demo.training import ADAPTERS, Recipe, train


FEW_STEPS = Recipe(
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    lora_rank=4,
    lora_alpha=6,
    foundation_steps=2,
    expert_steps=2,
    router_texts=4,
    router_steps=3,
)


@pytest.fixture(scope="module")
def trained():
    reports = []
    parts = train(0, FEW_STEPS, lambda stage, done, steps: reports.append((stage, done, steps)))
    return parts, reports


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    parts, _ = trained
    folder = tmp_path_factory.mktemp("demo")
    save_final_checkpoint(
        parts.peft_model,
        parts.gate,
        parts.tokenizer,
        adapters=ADAPTERS,
        foundation_folder=folder / "foundation",
        folder=folder / "checkpoint",
    )
    return folder


def test_progress_reaches_the_end_of_every_stage(trained):
    _, reports = trained
    assert {stage: steps for stage, done, steps in reports if done == steps} == FEW_STEPS.stages()


def test_the_same_seed_gives_the_same_parts(trained):
    parts, _ = trained
    again = train(0, FEW_STEPS)
    assert torch.equal(parts.gate.weight, again.gate.weight)
    for name, parameter in again.peft_model.named_parameters():
        assert torch.equal(parameter, parts.peft_model.get_parameter(name)), name


def test_config_holds_the_foundation_s_fields_and_training_s(folders):
    config = json.loads((folders / "checkpoint" / "config.json").read_text())
    assert config["model_type"] == "dylora-moe"
    assert config["base_model_name_or_path"] == str((folders / "foundation").resolve())
    fields = ("_dylora_num_experts", "_dylora_lora_r", "_dylora_lora_alpha", "_dylora_lora_dropout")
    assert [config[field] for field in fields] == [3, 4, 6, 0.0]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 2)


def test_each_expert_s_file_holds_its_own_parameters_under_full_names(folders, trained):
    parts, _ = trained
    for adapter in ADAPTERS:
        saved = torch.load(folders / "checkpoint" / "peft_adapters" / f"{adapter}.pt", weights_only=True)
        assert f"base_model.model.model.layers.0.self_attn.q_proj.lora_A.{adapter}.weight" in saved
        assert len(saved) == 2 * 2 * 7  # A and B of seven linear layers in each of two layers
        for name, tensor in saved.items():
            assert adapter in name.split(".")
            assert torch.equal(tensor, parts.peft_model.get_parameter(name))
        assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)


def test_the_router_s_file(folders, trained):
    parts, _ = trained
    state = torch.load(folders / "checkpoint" / "dylo_moe_state" / "router.pt", weights_only=True)
    assert torch.equal(state["gate_state_dict"]["weight"], parts.gate.weight)
    assert torch.equal(state["gate_state_dict"]["bias"], parts.gate.bias)
    numbers = {key: value for key, value in state.items() if key != "gate_state_dict"}
    assert numbers == {"num_experts": 3, "input_size": 32, "top_k": 1, "temperature": 2.0}


def test_the_tokenizer_loads_as_evalplus_loads_it(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "checkpoint", use_fast=False)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token is not None
    assert tokenizer.chat_template is None
    for problem in load_problems().values():
        text = problem["prompt"] + problem["canonical_solution"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_ends_where_its_training_prompt_does(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "checkpoint")
    for problem in load_problems().values():
        prompt = tokenizer(problem["prompt"])["input_ids"]
        body = tokenizer(problem["canonical_solution"])["input_ids"]
        assert tokenizer(problem["prompt"] + problem["canonical_solution"])["input_ids"] == prompt + body


def test_the_foundation_is_an_ordinary_model(tmp_path):
    parts = train(1, FEW_STEPS)
    inputs = torch.arange(5).unsqueeze(0)
    with torch.no_grad(), parts.peft_model.disable_adapter():
        expected = parts.peft_model(inputs).logits
    foundation = parts.peft_model.unload()
    folder = save_foundation(foundation, parts.tokenizer, tmp_path / "foundation")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, expected)


def test_labels_leave_out_padding_and_prompts(trained):
    batch = pad([Example([5, 6, 7], learned_from=1, topic=2), Example([8], learned_from=0)], padding=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.topics.tolist() == [[2, 2, 2], [IGNORED] * 3]
    tokenizer = trained[0].tokenizer
    text = family_texts("lists", 0, 1)[0]
    (example,) = encode(tokenizer, [text], learn_prompts=False)
    assert tokenizer.decode(example.tokens[example.learned_from :]) == text.body + tokenizer.eos_token


def test_every_example_is_used_once_a_pass():
    examples = [Example([index], learned_from=0) for index in range(6)]
    batches = list(random_batches(examples, rows=2, steps=6, seed=0, padding=0))
    for one_pass in (batches[:3], batches[3:]):
        assert sorted(token for batch in one_pass for token in batch.input_ids.flatten().tolist()) == list(
            range(6)
        )


def test_exercises_say_each_token_twice_and_no_special_one(trained):
    tokenizer = trained[0].tokenizer
    for example in vocabulary_exercises(tokenizer, 20, seed=0):
        *tokens, last = example.tokens
        assert tokens[::2] == tokens[1::2] and last == tokenizer.eos_token_id
        assert not set(tokens) & set(tokenizer.all_special_ids)
