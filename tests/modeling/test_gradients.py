"""What a backward pass computes and reaches: losses, gradients, gradient checkpointing, dropout."""

import copy

import pytest
import torch
from helpers_models import STRATEGIES, build, labelled_batch, left_padded, random_rows


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("strategy", ["router", "best", "single:1", "uniform", "ensemble"])
def test_gradient_checkpointing_changes_no_gradient(strategy, use_reentrant):
    model = build().train()
    model.generation_config.routing_strategy = strategy
    expected = gradients(model, **labelled_batch())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    found = gradients(model, **labelled_batch())
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_dense_training_reaches_every_expert_and_the_gate_and_nothing_else():
    model = build().train()
    found = gradients(model, **labelled_batch())
    trainable = {
        n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B")) or n.startswith("router.")
    }
    assert found.keys() == trainable
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    for name, layer in model.expert_layers().items():
        for expert in range(3):
            rows = layer.rows(expert)
            if rows.start != rows.stop:
                assert found[f"foundation.{name}.lora_A"][rows].abs().max() > 0


def test_the_loss_is_cross_entropy_plus_the_balance_loss():
    model = build(router_aux_loss_coef=0.5).train()
    batch = labelled_batch()
    output = model(**batch, output_router_logits=True)
    shifted = batch["labels"][:, 1:].reshape(-1)
    entropy = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, 97), shifted, ignore_index=-100
    )
    weights = torch.softmax(output.router_logits / 2.0, dim=-1)[batch["attention_mask"].bool()]
    balance = ((weights.mean(dim=0) - 1 / 3) ** 2).mean()
    torch.testing.assert_close(output.aux_loss, balance)
    torch.testing.assert_close(output.loss, entropy + 0.5 * balance)


def test_the_balance_loss_counts_once_however_the_step_is_accumulated():
    """With `num_items_in_batch`, as the Trainer passes it, the losses of the parts add up to the step's
    loss."""
    model = build(router_aux_loss_coef=0.5).train()
    batch = labelled_batch()
    total = (batch["labels"][:, 1:] != -100).sum()
    parts = [model(**{k: v[i : i + 1] for k, v in batch.items()}, num_items_in_batch=total) for i in range(2)]
    shares = [(batch["labels"][i : i + 1, 1:] != -100).sum() / total for i in range(2)]
    whole = model(**batch, num_items_in_batch=total)
    entropy = whole.loss - 0.5 * whole.aux_loss
    expected = entropy + 0.5 * sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), expected)
    torch.testing.assert_close(model(**batch).loss, whole.loss)


def test_dropout_draws_one_mask_an_expert():
    experts = [
        {**expert, "lora_dropout": dropout}
        for expert, dropout in zip(build().config.expert_configs, (0.5, 0.0, 0.9), strict=True)
    ]
    model = build(experts=experts)
    batch = left_padded(random_rows((6, 4)))
    evaluated = model(**batch, routing_strategy="uniform").logits
    model.train()
    assert not torch.equal(model(**batch, routing_strategy="uniform").logits, evaluated)
    once, again = (model(**batch, routing_strategy="single:1").logits for _ in range(2))
    assert torch.equal(once, again)  # that expert has no dropout
    torch.manual_seed(0)
    assert not torch.equal(*(model(**batch, routing_strategy="single:2").logits for _ in range(2)))


def test_a_trainer_that_switches_dropout_off_switches_off_that_of_experts():
    """As TRL does, through all modules; and what it switched off stays off in a model that grows."""
    model = build(experts=[{**expert, "lora_dropout": 0.5} for expert in build().config.expert_configs])
    model.train()
    batch = left_padded(random_rows((6, 4)))
    assert not torch.equal(*(model(**batch).logits for _ in range(2)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    copied = copy.deepcopy(model)
    model.add_expert("fourth", r=2, lora_dropout=0.0)
    for each in (model, copied):
        for strategy in ("router", "uniform", "single:1"):
            assert torch.equal(*(each(**batch, routing_strategy=strategy).logits for _ in range(2)))
    assert all(name.startswith(("foundation.", "router.")) for name in model.state_dict())


def test_training_after_inference_mode():
    """Tensors made in inference mode and kept would fail here."""
    model = build()
    ids = torch.tensor(random_rows((6,)))
    with torch.inference_mode():
        for strategy in STRATEGIES:
            model.generate(ids, routing_strategy=strategy, max_new_tokens=3, **GREEDY)
            model(ids, routing_strategy=strategy)
    assert gradients(model.train(), **labelled_batch())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimiser.step()
    with torch.inference_mode():
        model.eval().generate(ids, max_new_tokens=3, **GREEDY)
