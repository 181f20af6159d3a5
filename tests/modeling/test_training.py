"""Trainer and a plain accelerate loop: what learns, what stays, accumulation, autocast, resuming."""

import copy
import doctest
import math
import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers_models import build, left_padded, llama_config, random_rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dylora_moe.modeling import DyloraMoeForCausalLM


def dataset(count: int = 16, length: int = 10) -> list[dict]:
    """Rows with different numbers of labels, so that averaging per batch and per token differ."""
    items = []
    for index, row in enumerate(random_rows((length,) * count, seed=12)):
        labels = torch.tensor(row)
        labels[: index % 7] = -100
        items.append({"input_ids": torch.tensor(row), "labels": labels})
    return items


def arguments(folder, **fields) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(**{**defaults, **fields})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_trainer_moves_experts_and_gate_alone_and_the_loss_falls(tmp_path):
    model = build()
    before = weights(model)
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=12), train_dataset=dataset(4))
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    trainable = {name for name in before if name.endswith(("lora_A", "lora_B")) or name.startswith("router.")}
    assert changed(model, before) == trainable


def test_accumulated_steps_equal_whole_ones(tmp_path):
    """Losses are averaged over the step's label tokens, whatever the batches it comes in."""
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = build(router_aux_loss_coef=0.0)  # its balance is over a batch's tokens, so it may differ
        fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = Trainer(model=model, args=arguments(tmp_path, **fields), train_dataset=dataset())
        trainer.train()
        results.append((losses(trainer), weights(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-3, rtol=1e-3)


def test_the_balance_loss_counts_once_in_an_accumulated_step(tmp_path):
    """With equal rows the balance is the same in every batch, so accumulation must change no loss."""
    rows = [dataset(1)[0]] * 16
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = build(router_aux_loss_coef=50.0)
        fields = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 2,
        }
        trainer = Trainer(model=model, args=arguments(tmp_path, **fields), train_dataset=rows)
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_gradient_checkpointing_changes_nothing(tmp_path, use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = build()
        fields = {"gradient_checkpointing": checkpointing}
        if checkpointing:
            fields["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        trainer = Trainer(model=model, args=arguments(tmp_path, **fields), train_dataset=dataset())
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_resuming_from_a_checkpoint_ends_where_an_undisturbed_run_does(tmp_path):
    whole = build()
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    Trainer(model=whole, args=arguments(tmp_path / "a", **fields), train_dataset=dataset()).train()
    again = build(seed=5)  # other weights: they must come from the checkpoint
    again.foundation.load_state_dict(whole.foundation.state_dict())
    trainer = Trainer(model=again, args=arguments(tmp_path / "a", **fields), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), atol=1e-6, rtol=0)
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in whole.named_parameters())


def test_bfloat16_autocast(tmp_path):
    results = []
    for autocast in (False, True):
        model = build()
        trainer = Trainer(model=model, args=arguments(tmp_path, bf16=autocast), train_dataset=dataset())
        trainer.train()
        results.append(losses(trainer))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.05)


def test_an_accelerate_loop():
    model = build().train()
    before = weights(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    loader = torch.utils.data.DataLoader(dataset(8), batch_size=4)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    seen = []
    for _ in range(6):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
                seen.append(loss.item())
    assert seen[-1] < seen[0]
    model = accelerator.unwrap_model(model)
    trainable = {name for name in before if name.endswith(("lora_A", "lora_B")) or name.startswith("router.")}
    assert changed(model, before) == trainable


def test_padding_counts_neither_for_the_loss_nor_for_the_balance():
    model = build(router_aux_loss_coef=1.0).train()
    row = random_rows((7,), seed=2)[0]
    padded = left_padded([row, row + row])
    short = {name: tensor[:1] for name, tensor in padded.items()}
    short["labels"] = short["input_ids"].masked_fill(short["attention_mask"] == 0, -100)
    short["labels"][0, -len(row)] = -100  # a first token has nothing before it to be predicted from
    short["position_ids"] = (short["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = model(input_ids=torch.tensor([row]), labels=torch.tensor([row]))
    found = model(**short)
    torch.testing.assert_close(found.loss, alone.loss)
    torch.testing.assert_close(found.aux_loss, alone.aux_loss)


def tables(printed: str) -> list[dict[str, dict[str, float]]]:
    """The example's figures, by what they are on and by strategy."""
    found = []
    for line in printed.splitlines():
        first, *others = line.removeprefix("loss on ").split()
        if line.startswith("loss on "):
            found.append({column: {} for column in (first, *others)})
        else:
            for column, loss in zip(found[-1].values(), others, strict=True):
                column[first] = float(loss)
    return found


def test_in_the_example_each_expert_learns_its_own_and_the_router_finds_it(tmp_path, capsys):
    script = Path(__file__).parents[2] / "examples" / "train_experts.py"
    runpy.run_path(str(script))["main"]([str(tmp_path)])
    two, three = tables(capsys.readouterr().out)
    assert list(two) == ["shift", "mirror"] and list(three) == ["shift", "mirror", "triple"]
    for skill, losses in [*two.items(), *three.items()]:
        chance = math.log(10 if skill == "triple" else 26)
        others = {name: loss for name, loss in losses.items() if name not in (f"single:{skill}", "router")}
        assert losses[f"single:{skill}"] < 0.35 * chance and losses["base"] > 0.95 * chance
        assert min(others.values()) > 0.9 * chance
        assert losses["router"] < losses[f"single:{skill}"] + 0.1
    for skill, losses in two.items():  # growing changed nothing of the experts before
        singles = [strategy for strategy in losses if strategy != "router"]
        assert [losses[strategy] for strategy in singles] == [three[skill][strategy] for strategy in singles]
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    assert model.config.expert_names == ["shift", "mirror", "triple"]
    assert all(len(entry["target_modules"]) == 2 * 4 for entry in model.config.expert_configs)


def test_the_docstring_of_from_foundation_runs(tmp_path):
    """On other texts and in few steps."""
    foundation = AutoModelForCausalLM.from_config(llama_config())
    texts = {"python": dataset(4), "sql": dataset(4)}
    names = {"foundation": foundation, "texts": texts, "arguments": arguments(tmp_path)}
    for example in doctest.DocTestParser().get_examples(DyloraMoeForCausalLM.from_foundation.__doc__):
        exec(example.source, names)
    model = names["model"]
    assert model.config.expert_names == ["python", "sql"] and model.expert_is_frozen("sql")


def test_frozen_experts_stay_frozen_in_a_copy_and_whatever_was_trainable_before():
    for prepare in (copy.deepcopy, lambda model: model):
        model = build()
        model.requires_grad_(False)
        model.freeze_expert(0)
        model.freeze_foundation()
        model = prepare(model)
        ids = torch.tensor(random_rows((7, 7), seed=3))
        model(ids, labels=ids, routing_strategy="uniform").loss.backward()
        for layer in model.expert_layers().values():
            for stack in (layer.lora_A, layer.lora_B):
                assert not stack.grad[layer.rows(0)].any()
                assert stack.grad[layer.rows(1)].any() or layer.layout[1][0] == 0
