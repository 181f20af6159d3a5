"""PEFT's adapters on top of a routed model, against PEFT on plain models.

An adapter goes onto the frozen foundation; the experts stay what they are. So a routed model with an adapter
on top must equal the same experts over a plain foundation that PEFT merged the same adapter into, whatever
the method is; and with a method that adds to a layer's weight, PEFT on the plain model that one expert is
merged into.
"""

import copy

import peft
import pytest
import torch
from helpers_models import STRATEGIES, build, left_padded, llama_config, random_rows, save_layouts
from helpers_peft import needs_peft_of_transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, TorchAoConfig

from dylora_moe.modeling import DyloraMoeForCausalLM
from dylora_moe.modeling.experts_dylora_moe import DyloraMoeLinear


# Older ones tell their layers by names, which are those of experts, too.
pytestmark = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="needs PEFT 0.21")

IDS = torch.tensor(random_rows((6, 6)))
BATCH = left_padded(random_rows((6, 4)))
REAL = BATCH["attention_mask"].bool()
TASK = {"task_type": "CAUSAL_LM"}
NAMES = ["q_proj", "v_proj", "down_proj"]

ADDITIVE = {
    "LoRA": lambda names: LoraConfig(r=4, target_modules=names, **TASK),
    "rsLoRA": lambda names: LoraConfig(r=4, use_rslora=True, target_modules=names, **TASK),
    "AdaLoRA": lambda names: peft.AdaLoraConfig(
        init_r=4, total_step=9, tinit=1, tfinal=1, target_modules=names, **TASK
    ),
    "LoHa": lambda names: peft.LoHaConfig(r=4, target_modules=names, **TASK),
    "LoKr": lambda names: peft.LoKrConfig(r=4, target_modules=names, **TASK),
    "VeRA": lambda names: peft.VeraConfig(r=4, target_modules=[n for n in names if "q_proj" in n], **TASK),
    "norms": lambda names: peft.LNTuningConfig(target_modules=["input_layernorm"], **TASK),
}
OTHERS = {
    "DoRA": lambda names: LoraConfig(r=4, use_dora=True, target_modules=names, **TASK),
    "IA3": lambda names: peft.IA3Config(
        target_modules=names, feedforward_modules=[name for name in names if "down_proj" in name], **TASK
    ),
    "OFT": lambda names: peft.OFTConfig(oft_block_size=4, target_modules=names, **TASK),
}


def plain_foundation(model):
    """A copy of the foundation without experts, an ordinary model."""
    plain = AutoModelForCausalLM.from_config(model.config.base_config).eval()
    state = {
        name.replace(".base_layer.", "."): value for name, value in model.foundation.state_dict().items()
    }
    plain.load_state_dict({name: value for name, value in state.items() if ".lora_" not in name})
    return plain


def experts_over(foundation, model) -> DyloraMoeForCausalLM:
    """The experts and the gate of `model` over another foundation."""
    routed = DyloraMoeForCausalLM.from_foundation(foundation, copy.deepcopy(model.config))
    for expert in range(model.config.num_experts):
        routed.set_expert_weights(expert, model.expert_weights(expert))
    routed.router.load_state_dict(model.router.state_dict())
    return routed


def on_plain(name: str) -> str:
    return name.replace("model.foundation.", "model.", 1).replace(".base_layer", "")


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_adapter(source, target) -> None:
    """Copy what PEFT trains, under the names of a plain model."""
    theirs = {on_plain(name): parameter for name, parameter in trainable(target).items()}
    assert theirs.keys() == {on_plain(name) for name in trainable(source)}  # the experts are frozen
    with torch.no_grad():
        for name, parameter in trainable(source).items():
            theirs[on_plain(name)].copy_(parameter)


def adapted(model, make, names=NAMES, like=None):
    """A model with an adapter whose weights are random, or those of `like`."""
    targets = model.peft_target_modules(names) if hasattr(model, "peft_target_modules") else names
    top = get_peft_model(model, make(targets)).eval()
    if like is not None:
        copy_adapter(like, top)
        return top
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(top).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return top


@torch.no_grad()
def logits(model, strategies=STRATEGIES, **inputs) -> dict[str, torch.Tensor]:
    inputs = inputs or {"input_ids": IDS}
    return {strategy: model(**inputs, routing_strategy=strategy).logits for strategy in strategies}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of float32: a few dozen of its units at the largest number."""
    tolerance = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def assert_all_close(found: dict, expected: dict) -> None:
    for strategy, values in expected.items():
        assert_close(found[strategy], values)


@pytest.mark.parametrize("method", [*ADDITIVE, *OTHERS])
def test_every_method_under_every_strategy(method):
    make = {**ADDITIVE, **OTHERS}[method]
    model = build()
    before = logits(model)
    plain = adapted(plain_foundation(model), make)
    merged = adapted(model.merge_expert(1), make, like=plain)
    top = adapted(model, make, like=plain)
    reference = experts_over(copy.deepcopy(plain).merge_and_unload(), build())

    found = logits(top)
    assert all((found[strategy] - before[strategy]).abs().max() > 1e-2 for strategy in STRATEGIES)
    assert_all_close(found, logits(reference))
    with torch.no_grad():
        assert_close(found["base"], plain(input_ids=IDS).logits)
        if method in ADDITIVE:
            assert_close(found["single:1"], merged(input_ids=IDS).logits)
        with top.disable_adapter():
            assert all(torch.equal(value, before[strategy]) for strategy, value in logits(top).items())

    merged_in = copy.deepcopy(top).merge_and_unload()
    assert_all_close(logits(merged_in), found)
    unloaded = top.unload()
    assert all(torch.equal(value, before[strategy]) for strategy, value in logits(unloaded).items())
    for routed in (merged_in, unloaded):
        layers = routed.expert_layers().values()
        assert {(type(layer), type(layer.base_layer)) for layer in layers} == {
            (DyloraMoeLinear, torch.nn.Linear)
        }
        assert not hasattr(routed, "peft_config")


def test_targets_are_named_by_the_model():
    model = build()
    with pytest.raises(ValueError, match=r"model\.peft_target_modules\("):
        get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    layers = [f"foundation.model.layers.{i}" for i in range(2)]
    assert model.peft_target_modules(["q_proj", "k_proj"]) == [
        name
        for layer in layers
        for name in (f"{layer}.self_attn.q_proj.base_layer", f"{layer}.self_attn.k_proj")
    ]
    whole = "model.layers.0.mlp.down_proj"
    assert model.peft_target_modules([whole]) == [f"foundation.{whole}.base_layer"]
    with pytest.raises(ValueError, match=r"\['p_proj', 'proj'\]"):
        model.peft_target_modules(["q_proj", "p_proj", "proj"])


def test_all_linear_means_the_layers_of_a_plain_model():
    def targets(model) -> list[str]:
        names = [
            name for name, _ in get_peft_model(model, LoraConfig(target_modules="all-linear")).named_modules()
        ]
        return [on_plain(name) for name in names if name.endswith(".lora_A")]

    model = build()
    assert targets(model) == targets(plain_foundation(build()))


def test_several_adapters_are_saved_and_loaded(tmp_path):
    top = adapted(build(), lambda _: LoraConfig(r=4, target_modules="all-linear", **TASK))
    top.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **TASK))
    expected = {"default": logits(top)}
    top.set_adapter("second")
    expected["second"] = logits(top)
    top.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 2 * 7 * 2 and not [key for key in keys if key.endswith((".lora_A", ".lora_B"))]
    again = PeftModel.from_pretrained(build(), tmp_path).eval()
    again.load_adapter(tmp_path / "second", "second")
    for name, values in expected.items():
        again.set_adapter(name)
        assert all(torch.equal(value, values[strategy]) for strategy, value in logits(again).items())


def test_adapters_of_two_methods_at_once():
    model = build()
    before = logits(model)
    mixed = get_peft_model(
        model, LoraConfig(target_modules=model.peft_target_modules(["q_proj"])), "a", mixed=True
    )
    loha = peft.LoHaConfig(target_modules=build().peft_target_modules(["q_proj"]), init_weights=False)
    mixed.add_adapter("b", loha)
    mixed.set_adapter(["a", "b"])
    mixed.eval()
    found = logits(mixed)
    assert (found["router"] - before["router"]).abs().max() > 1e-2
    assert_all_close(logits(copy.deepcopy(mixed).merge_and_unload()), found)
    unloaded = logits(mixed.unload())
    assert all(torch.equal(value, before[strategy]) for strategy, value in unloaded.items())


def test_training_moves_the_adapter_alone():
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    top = adapted(model, ADDITIVE["LoRA"]).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(top.parameters(), lr=0.1)
    for strategy in STRATEGIES:
        optimizer.zero_grad()
        top(input_ids=IDS, labels=IDS, routing_strategy=strategy).loss.backward()
        assert all(parameter.grad.any() for parameter in trainable(top).values()), strategy
        optimizer.step()
    for name, parameter in top.unload().named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad


def test_a_merged_foundation_is_saved_whole(tmp_path):
    model = build()
    save_layouts(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    top = get_peft_model(
        loaded, LoraConfig(target_modules=["k_proj"], init_lora_weights=False, **TASK)
    ).eval()
    top.merge_adapter()
    with pytest.raises(ValueError, match="An adapter was merged into the base model"):
        loaded.save_pretrained(tmp_path / "again", layout="adapter")
    top.unmerge_adapter()
    loaded.save_pretrained(tmp_path / "as_it_was", layout="adapter")
    merged = top.merge_and_unload()
    with pytest.raises(ValueError, match="An adapter was merged into the base model"):
        merged.save_pretrained(tmp_path / "again", layout="adapter")
    merged.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(value, logits(merged)[strategy]) for strategy, value in logits(again).items())


@pytest.mark.parametrize("bits", ["8", "4", "torchao"])
def test_on_a_quantised_foundation(tmp_path, bits):
    pytest.importorskip("torchao" if bits == "torchao" else "bitsandbytes")
    model = build(llama_config(hidden_size=64, intermediate_size=64))
    plain_foundation(model).save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "routed")
    if bits == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": torch.float32})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
    routed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", quantization_config=how, trust_remote_code=True
    )
    before = logits(routed)
    plain = adapted(plain, ADDITIVE["LoRA"])
    top = adapted(routed, ADDITIVE["LoRA"], like=plain)
    found = logits(top)
    with torch.no_grad():
        assert_close(found["base"], plain(input_ids=IDS).logits)
        merged = copy.deepcopy(top).merge_and_unload()
        assert_close(logits(merged)["base"], plain.merge_and_unload()(input_ids=IDS).logits)
    unloaded = top.unload()
    for left in (merged, unloaded):
        assert {type(layer).__name__ for layer in left.expert_layers().values()} == {DyloraMoeLinear.__name__}
    assert all(torch.equal(value, before[strategy]) for strategy, value in logits(unloaded).items())
    with pytest.raises(ValueError, match=r"model\.peft_target_modules\("):
        logits(get_peft_model(unloaded, LoraConfig(target_modules=["v_proj"])))


# Prompts and prefixes

PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "projected prefix": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def with_prompt(model, method: str, like=None):
    top = get_peft_model(model, copy.deepcopy(PROMPTS[method])).eval()
    if like is not None:
        top.prompt_encoder.load_state_dict(like.prompt_encoder.state_dict())
        return top
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(top).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return top


@needs_peft_of_transformers
@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_and_prefixes(method):
    model = build()
    plain = with_prompt(plain_foundation(model), method)
    singles = [with_prompt(model.merge_expert(expert), method, plain) for expert in range(3)]
    top = with_prompt(model, method, plain)
    assert {on_plain(name) for name in trainable(top)} == set(trainable(plain))

    def real(values: torch.Tensor) -> torch.Tensor:
        """Without what a row was padded with; a prompt stands between that and the row, and has logits,
        too."""
        return values[REAL] if "prefix" in method else values[:, -6:][REAL]

    with torch.no_grad():
        base = plain(**BATCH, output_hidden_states=True)
        each = [single(**BATCH).logits for single in singles]
        found = logits(top, **BATCH)
        routed = top(**BATCH, routing_strategy="router", output_router_logits=True)
        assert_close(real(routed.router_logits), real(model.router(base.hidden_states[-1])))
    assert_close(real(found["base"]), real(base.logits))
    for expert in range(3):
        assert_close(real(logits(top, [f"single:{expert}"], **BATCH)[f"single:{expert}"]), real(each[expert]))
    assert_close(real(found["round_robin"]), real(torch.stack([each[0][0], each[1][1]])))
    mixture = torch.stack([values.softmax(dim=-1) for values in each]).mean(dim=0).log()
    assert_close(real(found["ensemble"]), real(mixture))

    # one choice for every token makes the router one expert, whose stream must have had the prompt, too
    with torch.no_grad():
        model.router.gate.bias += torch.tensor([0.0, 1e4, 0.0])
    for strategy in ("router", "best"):
        assert_close(real(logits(top, [strategy], **BATCH)[strategy]), real(each[1]))
    expected = singles[1].generate(**BATCH, **GREEDY)
    for strategy in ("single:1", "router", "best"):
        assert torch.equal(top.generate(**BATCH, **GREEDY, routing_strategy=strategy), expected)


@needs_peft_of_transformers
@pytest.mark.parametrize("strategy", ["uniform", "ensemble"])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_generating_after_a_prompt_is_what_a_pass_over_all_tokens_says(method, strategy):
    top = with_prompt(build(), method)
    row = IDS[:1]
    for _ in range(GREEDY["max_new_tokens"]):
        row = torch.cat([row, logits(top, [strategy], input_ids=row)[strategy][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(top.generate(input_ids=IDS[:1], **GREEDY, routing_strategy=strategy), row)


def test_best_chooses_by_the_text_after_a_prefix():
    model = build()
    top = with_prompt(model, "prefix tuning")
    with torch.no_grad():
        expected = model(**BATCH, routing_strategy="best", output_router_logits=True).router_logits
        found = top(**BATCH, routing_strategy="best", output_router_logits=True).router_logits
    assert_close(found[REAL], expected[REAL])


@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_and_prefixes_learn_under_every_strategy_and_are_saved(method, tmp_path):
    top = with_prompt(build(), method).train()
    for strategy in STRATEGIES:
        top.zero_grad()
        top(**BATCH, labels=BATCH["input_ids"], routing_strategy=strategy).loss.backward()
        assert all(parameter.grad.any() for parameter in trainable(top).values()), strategy
    top.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert_all_close(logits(again, **BATCH), logits(top, **BATCH))


def test_sizes_are_read_whatever_the_foundation_calls_them():
    """GPT-2 has `n_embd`, `n_head` and `n_layer`."""
    base = GPT2Config(
        vocab_size=97, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    model = build(base, [{"name": "a", "target_modules": ["transformer.h.0.attn.c_attn"]}])
    top = get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK)).eval()
    assert logits(top, ["single:0"])["single:0"].isfinite().all()
    assert (top.active_peft_config.token_dim, top.active_peft_config.num_layers) == (32, 2)
