"""The Trainer beyond training: evaluation, metrics, going back to a checkpoint, in both layouts; other
checkpointing."""

import functools
import warnings

import pytest
import torch
from helpers_models import build, llama_config, random_rows, save_layouts
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


ROWS = [
    {"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in random_rows((10,) * 8, seed=12)
]
IDS = torch.stack([row["input_ids"] for row in ROWS[:2]])


def settings(folder, make=TrainingArguments, **fields):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return make(**{**defaults, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_layouts(build(), folder)
    return folder


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_the_best_checkpoint_is_loaded_at_the_end(saved, tmp_path, layout):
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments = settings(
        tmp_path, **every_step, learning_rate=3.0, load_best_model_at_end=True
    )  # far too fast
    model = DyloraMoeForCausalLM.from_pretrained(saved / layout)
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses) + 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_training_resumes_in_a_new_process(saved, tmp_path, layout):
    arguments = settings(tmp_path, save_strategy="steps", save_steps=2)
    models = [DyloraMoeForCausalLM.from_pretrained(saved / layout) for _ in range(2)]
    Trainer(models[0], arguments, train_dataset=ROWS).train()
    resumed = Trainer(models[1], arguments, train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), parameter, atol=1e-6, rtol=0)


def test_predictions_are_logits_and_nothing_else(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    model = build(output_router_logits=True)
    Trainer(model, settings(tmp_path), eval_dataset=ROWS, compute_metrics=metrics).evaluate()
    with torch.no_grad():
        expected = model(torch.stack([row["input_ids"] for row in ROWS])).logits
    torch.testing.assert_close(torch.tensor(seen[0]), expected, atol=1e-4, rtol=0)


def test_predicting_by_generation_without_a_tokenizer(tmp_path):
    model = build()
    model.generation_config.max_new_tokens = 4
    arguments = settings(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    found = Seq2SeqTrainer(model, arguments, eval_dataset=ROWS).predict(ROWS).predictions
    expected = model.generate(torch.stack([row["input_ids"] for row in ROWS]), do_sample=False)
    assert found[:, : expected.shape[1]].tolist() == expected.tolist()


def test_the_trainer_keeps_skill_a_bit_for_bit(tmp_path):
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    config = DyloraMoeConfig(
        llama_config(), [{"name": "a", "r": 4, "target_modules": targets, "lora_dropout": 0.1}]
    )
    model = DyloraMoeForCausalLM(config)
    model.freeze_foundation()
    Trainer(model, settings(tmp_path), train_dataset=ROWS).train()
    with torch.no_grad():
        skill_a = model.eval()(IDS, routing_strategy="single:a").logits
    model.add_expert("b", [*targets, "model.layers.0.mlp.up_proj"], r=6)
    model.freeze_expert("a")
    Trainer(model, settings(tmp_path, gradient_checkpointing=True), train_dataset=ROWS).train()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS, routing_strategy="single:a").logits, skill_a)
        assert not torch.equal(
            model(IDS, routing_strategy="single:b").logits, model(IDS, routing_strategy="base").logits
        )


def test_training_warns_of_nothing():
    model = build().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", ["of the foundation", "by a wrapper"])
def test_checkpointing_that_cannot_know_the_experts_is_refused(way, use_reentrant):
    model = build().train()
    if way == "of the foundation":
        model.foundation.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
        layers = tuple(model.foundation.model.layers)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: m in layers)
        model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="of the whole model"):
        model(IDS, labels=IDS, use_cache=False).loss.backward()


def test_a_copy_without_parameters_of_its_own_runs(monkeypatch):
    """DataParallel's replicas have none, so asking such a model for its device fails."""

    def no_parameters(self):
        raise StopIteration

    model = build(router_input="experts_sum")
    expected = [model(IDS, routing_strategy=strategy).logits for strategy in ("router", "best")]
    monkeypatch.setattr(DyloraMoeForCausalLM, "device", property(no_parameters))
    for strategy, logits in zip(("router", "best"), expected, strict=True):
        assert torch.equal(model(IDS, routing_strategy=strategy).logits, logits)
