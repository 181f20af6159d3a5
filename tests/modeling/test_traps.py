"""What goes wrong easily when a model is a mixture inside another model; one test or more for each such
trap."""

import ast
import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers_models import STRATEGIES, build, left_padded, llama_config, random_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    MixtralConfig,
    StaticCache,
)

import dylora_moe.modeling
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM
from dylora_moe.modeling.cache_dylora_moe import CACHE


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


# Initialising


def test_new_experts_start_as_in_peft():
    model = DyloraMoeForCausalLM(build().config)
    for layer in model.expert_layers().values():
        bound = 1 / layer.lora_A.shape[1] ** 0.5  # kaiming_uniform with a = sqrt(5)
        assert 0.5 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()


def test_experts_missing_from_a_file_are_initialised_too(tmp_path):
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "lora_" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    for layer in model.expert_layers().values():
        bound = 1 / layer.lora_A.shape[1] ** 0.5
        assert 0.5 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()


def test_building_on_the_meta_device():
    with torch.device("meta"):
        model = DyloraMoeForCausalLM(build().config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_wrapping_a_loaded_foundation_keeps_its_weights():
    foundation = AutoModelForCausalLM.from_config(llama_config())
    foundation.lm_head = torch.nn.Linear(32, 97, bias=False)  # a module that transformers has not initialised
    before = {name: tensor.clone() for name, tensor in foundation.state_dict().items()}
    model = DyloraMoeForCausalLM.from_foundation(foundation, build().config)
    after = {
        k.replace(".base_layer.", "."): v
        for k, v in model.foundation.state_dict().items()
        if "lora_" not in k
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrapping_a_loaded_foundation_leaves_its_attention_as_it_was():
    foundation = AutoModelForCausalLM.from_config(llama_config(), attn_implementation="sdpa").eval()
    ids = torch.tensor(random_rows((6,)))
    before = foundation(ids).logits
    config = DyloraMoeConfig(base_config=foundation.config, expert_configs=build().config.expert_configs)
    assert foundation.config._attn_implementation == "sdpa"
    model = DyloraMoeForCausalLM.from_foundation(foundation, config)
    assert model.foundation.config is model.config.base_config
    assert model.foundation.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, routing_strategy="base").logits, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_foundation(tmp_path, implementation):
    build().save_pretrained(tmp_path)
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.foundation.config._attn_implementation == implementation
    assert model.foundation.model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    assert model.foundation.config._attn_implementation == "eager"


# Where the strategy comes from


def test_the_strategy_is_the_arguments_then_a_handed_configs_then_the_models():
    model = build()
    ids = torch.tensor(random_rows((6,)))

    def tokens(**arguments):
        return model.generate(ids, max_new_tokens=6, **arguments)[0].tolist()

    expected = {
        s: tokens(routing_strategy=s, **GREEDY) for s in ("router", "single:0", "single:1", "single:2")
    }
    assert len({tuple(value) for value in expected.values()}) == 4
    assert tokens(**GREEDY) == expected["router"]  # the default
    model.generation_config.routing_strategy = "single:0"
    handed = GenerationConfig(routing_strategy="single:1", max_new_tokens=6, **GREEDY)
    assert tokens(**GREEDY) == expected["single:0"]
    assert model.generate(ids, generation_config=handed)[0].tolist() == expected["single:1"]
    chosen = model.generate(ids, generation_config=handed, routing_strategy="single:2")
    assert chosen[0].tolist() == expected["single:2"]
    assert tokens(routing_strategy="single:2", **GREEDY) == expected["single:2"]
    assert torch.equal(model(ids).logits, model(ids, routing_strategy="single:first").logits)


@pytest.mark.parametrize(
    "wrong", ["nope", "single", "single:", "single:7", "single:other", "router:1", "single:-1", ""]
)
def test_a_wrong_strategy_lists_the_valid_ones_and_the_experts(wrong):
    model = build()
    ids = torch.tensor(random_rows((4,)))
    for call in (model.generate, model.forward):
        with pytest.raises(ValueError) as raised:
            call(ids, routing_strategy=wrong)
        message = str(raised.value)
        assert "\n" not in message
        for part in (
            "router",
            "best",
            "single:",
            "ensemble",
            "round_robin",
            "base",
            "uniform",
            "first",
            "third",
        ):
            assert part in message


def test_defaults_without_a_router_and_with_one_expert():
    experts = build().config.expert_configs
    assert str(build().routing_strategy()) == "router"
    assert str(build(router_input=None).routing_strategy()) == "uniform"
    assert str(build(experts=experts[:1]).routing_strategy()) == "single:0"
    with pytest.raises(ValueError, match="needs a router"):
        build(router_input=None).routing_strategy("best")


def test_no_config_field_is_named_like_an_argument_of_from_pretrained():
    """AutoConfig would swallow `experts=` before the model sees it."""
    assert "experts" not in DyloraMoeConfig().to_dict()


# Training


def training_batch():
    batch = left_padded(random_rows((9, 6), seed=6))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


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
    expected = gradients(model, **training_batch())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    found = gradients(model, **training_batch())
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_dense_training_reaches_every_expert_and_the_gate_and_nothing_else():
    model = build().train()
    found = gradients(model, **training_batch())
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
    batch = training_batch()
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
    batch = training_batch()
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
    assert gradients(model.train(), **training_batch())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimiser.step()
    with torch.inference_mode():
        model.eval().generate(ids, max_new_tokens=3, **GREEDY)


# Mixture-of-experts foundations


def mixtral(**fields):
    base = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=2,
        **fields,
    )
    targets = [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]
    return build(
        base, [{"name": "a", "r": 2, "target_modules": targets}, {"name": "b", "target_modules": targets}]
    )


def test_a_foundation_with_experts_of_its_own_adds_no_loss_of_its_own():
    model = mixtral(output_router_logits=True).train()
    batch = training_batch()
    output = model(**batch, output_router_logits=True)
    assert output.router_logits.shape == (2, 9, 2)
    shifted = batch["labels"][:, 1:].reshape(-1)
    entropy = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, 97), shifted, ignore_index=-100
    )
    torch.testing.assert_close(output.loss, entropy + 0.01 * output.aux_loss)


def test_a_foundation_with_experts_of_its_own_survives_saving(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path)
    again, information = DyloraMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    batch = left_padded(random_rows((5, 3)))
    assert torch.equal(model(**batch).logits, again(**batch).logits)


# Caches


@pytest.fixture(scope="module")
def mixture():
    return build(seed=7)


@pytest.fixture(scope="module")
def sliding():
    base = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        pad_token_id=2,
    )
    return build(base, seed=7)


def without_cache(model, batch, strategy, **arguments):
    model.reset_round_robin()
    try:
        arguments = {**GREEDY, **arguments}
        return model.generate(**batch, routing_strategy=strategy, use_cache=False, **arguments).tolist()
    finally:
        model.reset_round_robin()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["mixture", "sliding"])
def test_prompt_lookup_rolls_every_stream_back(kind, strategy, request):
    model = request.getfixturevalue(kind)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    ends = {**GREEDY, "eos_token_id": 1}  # transformers 5.10 cannot look prompts up without one
    expected = without_cache(model, batch, strategy, max_new_tokens=8, eos_token_id=1)
    found = model.generate(
        **batch, routing_strategy=strategy, prompt_lookup_num_tokens=3, max_new_tokens=8, **ends
    )
    assert found[:, :18].tolist() == expected  # transformers 5.10 may go past `max_new_tokens`, on any model


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["mixture", "sliding"])
@pytest.mark.parametrize(
    "arguments", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"num_beams": 3}]
)
def test_other_ways_to_decode_left_padded_batches(kind, strategy, arguments, request):
    model = request.getfixturevalue(kind)
    batch = left_padded(random_rows((9, 4, 7), seed=3))
    beams = {"num_beams": arguments["num_beams"]} if "num_beams" in arguments else {}
    expected = without_cache(model, batch, strategy, max_new_tokens=6, **beams)
    found = model.generate(**batch, routing_strategy=strategy, max_new_tokens=6, **GREEDY, **arguments)
    assert found.tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", ["empty", "configured", "static"])
def test_a_cache_of_the_users_own_and_continuing_it(mixture, strategy, make):
    caches = {
        "empty": lambda: DynamicCache(),
        "configured": lambda: DynamicCache(config=mixture.config),
        "static": lambda: StaticCache(config=mixture.config, max_cache_len=32),
    }
    cache = caches[make]()
    batch = {"input_ids": torch.tensor(random_rows((6, 6), seed=4))}
    arguments = {"routing_strategy": strategy, "past_key_values": cache, **GREEDY}
    mixture.reset_round_robin()
    first = mixture.generate(**batch, max_new_tokens=4, **arguments)
    second = mixture.generate(first, max_new_tokens=4, **arguments)
    assert second.tolist() == without_cache(mixture, batch, strategy, max_new_tokens=8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_step_by_step_equals_one_forward(mixture, strategy):
    batch = left_padded(random_rows((7, 5), seed=5))
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    first = {name: tensor[:, :4] for name, tensor in batch.items()}
    output = mixture(**first, routing_strategy=strategy, use_cache=True)
    logits = [output.logits]
    for position in range(4, 7):
        output = mixture(
            input_ids=batch["input_ids"][:, position : position + 1],
            attention_mask=batch["attention_mask"][:, : position + 1],
            position_ids=batch["position_ids"][:, position : position + 1],
            routing_strategy=strategy,
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits)
    kept = output.past_key_values.layers[-1].expert_ids if strategy == "best" else None
    whole = mixture(**batch, routing_strategy=strategy, expert_ids=kept)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole.logits[real], atol=1e-4, rtol=0)


def test_a_cache_filled_under_another_strategy_is_refused(mixture):
    ids = torch.tensor(random_rows((6,)))
    for strategy, other in (
        ("single:0", "single:1"),
        ("router", "base"),
        ("base", "router"),
        ("best", "round_robin"),
    ):
        cache = mixture(ids, routing_strategy=strategy).past_key_values
        with pytest.raises(ValueError, match="cannot be continued"):
            mixture(ids[:, :1], routing_strategy=other, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_goes_by_either_name_and_nothing_warns(mixture, strategy):
    """transformers 5.24 calls it `cache`, and older ones `past_key_values`."""
    ids = torch.tensor(random_rows((6, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = mixture(ids[:, :5], routing_strategy=strategy)
        mixture.generate(ids, routing_strategy=strategy, max_new_tokens=2, **GREEDY)
    cache = start[CACHE]
    copies = copy.deepcopy(cache), copy.deepcopy(cache)
    logits = [
        mixture(ids[:, 5:], routing_strategy=strategy, **{name: value}).logits
        for name, value in zip(("cache", "past_key_values"), copies, strict=True)
    ]
    assert torch.equal(*logits) and [copied.get_seq_length() for copied in copies] == [6, 6]
    with pytest.raises(ValueError, match="two names"):
        mixture(ids[:, 5:], routing_strategy=strategy, cache=cache, past_key_values=cache)


def test_each_rows_expert_stays_with_the_row_of_a_cache(mixture):
    rows = random_rows((6,) * 6, seed=4)
    output = mixture(torch.tensor(rows), routing_strategy="best")
    cache = output.past_key_values
    ids = cache.layers[-1].expert_ids.clone()
    assert len(ids.unique()) > 1
    cache.batch_select_indices(torch.tensor([4, 1, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[-1].expert_ids.tolist() == ids[[4, 4, 1, 1, 0, 0]].tolist()
    mixture(torch.full((6, 1), 5), routing_strategy="best", past_key_values=cache)
    cache.reset()
    assert cache.layers[-1].expert_ids is None


def test_a_batch_size_that_changes_between_calls(mixture):
    for lengths in ((5,), (4, 7, 3), (6, 6)):
        batch = left_padded(random_rows(lengths))
        for strategy in STRATEGIES:
            expected = without_cache(mixture, batch, strategy, max_new_tokens=3)
            assert (
                mixture.generate(**batch, routing_strategy=strategy, max_new_tokens=3, **GREEDY).tolist()
                == expected
            )


# The code that is shipped with a repo


def test_shipped_code_is_flat_and_needs_transformers_alone():
    files = sorted(Path(dylora_moe.modeling.__file__).parent.glob("*.py"))
    allowed = set(sys.stdlib_module_names) | {
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "packaging",
    }
    allowed.add("triton")  # by an optional file, in a `try`
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file
            elif isinstance(node, ast.ImportFrom):
                # The Hub's loader follows `from .x import Y`, and neither `from . import x` nor packages.
                there = (file.parent / f"{node.module}.py").is_file() or node.module.startswith("fast_")
                assert node.level == 1 and node.module and there, file
