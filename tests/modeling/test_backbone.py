"""`base_model` and `get_decoder()`: the routed backbone, whose hidden states under the head are the model's
logits."""

import copy
import pickle

import pytest
import torch
import transformers
from helpers_models import SIZES, STRATEGIES, build, left_padded, random_rows, randomise

from dylora_moe.modeling import DyloraMoeForCausalLM, DyloraMoeModel


BATCH = left_padded(random_rows((9, 5), seed=4))
WITH_HIDDEN_STATES = [strategy for strategy in STRATEGIES if strategy != "ensemble"]


def logits_of_the_backbone(model, **arguments):
    return model.get_output_embeddings()(model.get_decoder()(**BATCH, **arguments).last_hidden_state)


@pytest.mark.parametrize("strategy", WITH_HIDDEN_STATES)
def test_the_head_on_the_backbone_gives_the_logits_of_the_model(strategy):
    model = build()
    assert isinstance(model.base_model, DyloraMoeModel) and model.get_decoder() is model.base_model
    for training in (False, True):
        model.train(training)
        expected = model(**BATCH, routing_strategy=strategy).logits
        torch.testing.assert_close(logits_of_the_backbone(model, routing_strategy=strategy), expected)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.routing_strategy = (
        strategy  # a default that is set after the backbone was asked for
    )
    torch.testing.assert_close(logits_of_the_backbone(model), model(**BATCH).logits)


@pytest.mark.parametrize("strategy", WITH_HIDDEN_STATES)
def test_the_backbone_continues_from_a_cache(strategy):
    model, ids = build(), torch.tensor(random_rows((9,), seed=5))
    whole = model.base_model(ids, routing_strategy=strategy).last_hidden_state
    prompt = model.base_model(ids[:, :6], routing_strategy=strategy, use_cache=True)
    expected = model(
        ids[:, :6], routing_strategy=strategy, use_cache=True
    )  # `best` and `round_robin` choose by it
    rest = model.base_model(ids[:, 6:], routing_strategy=strategy, past_key_values=prompt.past_key_values)
    other = model(ids[:, 6:], routing_strategy=strategy, past_key_values=expected.past_key_values)
    torch.testing.assert_close(model.get_output_embeddings()(rest.last_hidden_state), other.logits)
    if strategy != "best":  # whose prompt was the whole row above
        torch.testing.assert_close(rest.last_hidden_state, whole[:, 6:])


def test_ensemble_has_no_backbone_and_says_so():
    with pytest.raises(
        ValueError, match="'ensemble' mixes next-token distributions, so it has no hidden states"
    ):
        build().base_model(**BATCH, routing_strategy="ensemble")


def test_experts_on_the_head_are_not_left_out_without_a_word():
    experts = [{"name": name, "r": 3, "target_modules": ["lm_head"]} for name in ("one", "two")]
    model = build(experts=experts)
    with pytest.raises(ValueError, match="Experts adapt the head"):
        model.base_model(**BATCH, routing_strategy="single:0")
    expected = model(**BATCH, routing_strategy="base").logits
    torch.testing.assert_close(logits_of_the_backbone(model, routing_strategy="base"), expected)


def test_the_backbone_is_no_submodule_and_has_no_weights_of_its_own(tmp_path):
    model = build()
    names = [name for name, _ in model.named_modules()]
    parameters = list(model.state_dict())
    backbone = model.base_model
    assert [name for name, _ in model.named_modules()] == names and list(model.state_dict()) == parameters
    assert all(name.startswith(("foundation.", "router.gate.")) for name in parameters)
    assert dict(backbone.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for mine, theirs in zip(model.parameters(), backbone.parameters(), strict=True):
        assert mine is theirs
    assert backbone.base_model is backbone and backbone.get_decoder() is backbone
    model.save_pretrained(tmp_path)
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of_the_backbone(loaded), model(**BATCH).logits)


def test_the_backbone_follows_what_changes_on_its_model():
    model = build()
    backbone = model.base_model
    model.add_expert("fourth", r=2, lora_alpha=2)
    randomise(model, seed=9)
    assert backbone.router is model.router and backbone.config.num_experts == 4
    model.train()
    assert backbone.training and backbone.routes_densely
    model.eval()
    for strategy in ("router", "single:3", "uniform"):
        expected = model(**BATCH, routing_strategy=strategy).logits
        torch.testing.assert_close(logits_of_the_backbone(model, routing_strategy=strategy), expected)
    model.gradient_checkpointing_enable()
    model.train()
    assert backbone(**BATCH).past_key_values is None  # layers that are recomputed keep none


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_the_model_has_a_backbone_of_its_own(copied):
    model = build()
    assert model.base_model is model.base_model
    other = copied(model)
    if copied is copy.copy:  # as DataParallel makes its replicas: other modules in a dict of its own
        other._modules = copy.deepcopy(model._modules)
    assert other.base_model is not model.base_model and other.base_model.foundation is other.foundation
    randomise(other, seed=3)
    torch.testing.assert_close(logits_of_the_backbone(other), other(**BATCH).logits)
    torch.testing.assert_close(logits_of_the_backbone(model), model(**BATCH).logits)


def test_a_forward_that_a_client_put_on_the_model_is_not_the_backbones():
    model = build()
    model.forward = lambda *args, **kwargs: pytest.fail("called for the hidden states")
    assert model.base_model(**BATCH).last_hidden_state.shape == (2, 9, 32)


def test_gradients_of_a_loss_outside_are_those_of_the_model():
    model = build(router_aux_loss_coef=0.0).train()
    labels = BATCH["input_ids"]
    model(**BATCH, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = logits_of_the_backbone(model)
    model.loss_function(logits, labels, vocab_size=logits.shape[-1]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any("router.gate" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_loss_outside_is_told_of_the_balance_loss_once(messages):
    model = build()
    model.base_model(**BATCH)  # evaluates
    model.train()
    with torch.no_grad():
        model.base_model(**BATCH)
    outputs = model.base_model(**BATCH, output_router_logits=True)  # who asks for them can add it
    model.base_model(**BATCH, routing_strategy="uniform")
    assert messages == []
    model.base_model(**BATCH)
    model.base_model(**BATCH)
    assert len(messages) == 1 and "router_aux_loss_coef" in messages[0]
    own = model.balance_loss(outputs.router_logits, BATCH["attention_mask"])
    torch.testing.assert_close(own, model(**BATCH, output_router_logits=True).aux_loss)
    model.config.router_aux_loss_coef = 0.0
    messages.clear()
    transformers.utils.logging.warning_once.cache_clear()
    model.base_model(**BATCH)
    assert messages == []


def test_a_loss_from_logits_is_told_of_the_balance_loss_once(messages):
    model = build().train()
    model(**BATCH, labels=BATCH["input_ids"])
    model(**BATCH, output_router_logits=True)
    model(**BATCH, routing_strategy="uniform")
    model.config.router_mode = "sparse"  # with one expert per token its weight is 1 whatever the gate says
    model(**BATCH)
    with torch.no_grad():
        model(**BATCH)
    assert messages == []
    model.config.router_mode = "dense"
    model(**BATCH)
    model.base_model(**BATCH)
    assert len(messages) == 1 and "router_aux_loss_coef" in messages[0]


@pytest.mark.slow
def test_a_training_backbone_compiles_in_one_graph():
    model = build().train()
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    found = compiled(**BATCH, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, model.base_model(**BATCH, use_cache=False).last_hidden_state)


def test_a_shallow_copy_of_the_same_modules_has_settings_of_its_own():
    model = build()
    assert model.base_model.routing_strategy().name == "router"
    other = copy.copy(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.routing_strategy = "base"
    torch.testing.assert_close(logits_of_the_backbone(other), other(**BATCH).logits)
    torch.testing.assert_close(logits_of_the_backbone(model), model(**BATCH).logits)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "gpt2", "opt"])
def test_backbones_of_foundations_that_scale_or_cap_their_logits(kind):
    """The model's logits are the head on the backbone, then what the config says of scaling and capping."""
    fields = {"final_logit_softcapping": 5.0, "head_dim": 8} if kind == "gemma2" else {}
    fields |= {"logits_scaling": 3.0} if kind == "granite" else {}
    config = transformers.AutoConfig.for_model(kind, **SIZES, **fields)
    target = {"gpt2": "transformer.h.0.attn.c_attn", "opt": "model.decoder.layers.0.self_attn.q_proj"}
    target = target.get(kind, "model.layers.0.self_attn.q_proj")
    model = build(config, [{"name": name, "r": 3, "target_modules": [target]} for name in ("one", "two")])
    logits = logits_of_the_backbone(model)
    if kind == "gemma2":
        logits = 5.0 * torch.tanh(logits / 5.0)
    logits = logits / 3.0 if kind == "granite" else logits
    torch.testing.assert_close(logits, model(**BATCH).logits)
