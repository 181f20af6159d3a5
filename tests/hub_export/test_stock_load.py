"""Every source format, exported in both layouts, loaded where nothing of this project and no peft is
installed.

What stock transformers computes there is held against PEFT on the source's own files: by check_source for all
formats, and for final checkpoints and adapters by a plainer way that is written out here, one token after the
other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from environments import make_environment, run_python
from helpers_checkpoints import (
    VOCABULARY,
    change_json,
    save_adalora_adapter,
    save_adapter,
    save_final_checkpoint,
    save_foundation,
    save_router,
    save_tokenizer,
    save_trainer_checkpoint,
    save_whole_model,
)
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM

from dylora_moe.hub_export import InputError, export
from dylora_moe.hub_export.checking.check_source import reference


ROWS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))

LOAD = """
import importlib.util, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec("dylora_moe") is None and importlib.util.find_spec("peft") is None
request = json.loads(sys.argv[1])
rows = torch.tensor(request["rows"])
for repo, result in request["repos"].items():
    model, info = AutoModelForCausalLM.from_pretrained(
        repo, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (repo, info)
    strategies = ["base", "uniform", *(f"single:{index}" for index in range(model.config.num_experts))]
    with torch.no_grad():
        logits = {strategy: model(rows, routing_strategy=strategy).logits for strategy in strategies}
        if model.config.has_router:
            output = model(rows, routing_strategy="router", output_router_logits=True)
            logits.update({"router": output.logits, "router logits": output.router_logits})
            model.config.router_mode = "dense"
            logits["router, dense"] = model(rows, routing_strategy="router").logits
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, result)
"""


@dataclass
class Case:
    """A source and how it is exported.

    Attributes:
        reference: format, folders and foundation of the files that say what is right, for check_source.
        lora_alpha: where the source stores none.
        options: of the export.
        layouts: those that it can be exported to.
    """

    sources: list[Path]
    reference: tuple[str, list[Path], Path]
    lora_alpha: float | None = None
    options: dict = field(default_factory=dict)
    layouts: tuple[str, ...] = ("full", "adapter")


def whole_models(folder: Path, foundation: Path, tied: Path) -> dict[str, Case]:
    """State dicts of the training wrapper, in every form that training left them in."""
    made = {
        "whole model": save_whole_model(folder / "whole", foundation),
        "whole model, no config": save_whole_model(folder / "bare", foundation, config=False),
        "whole model, trained head": save_whole_model(folder / "trained_head", tied, head="trained"),
        "whole model, tied head": save_whole_model(folder / "tied_head", tied, head="equal"),
        "whole model, sharded": save_whole_model(folder / "sharded", foundation, rank=3, shards=3),
        "whole model, .bin": save_whole_model(
            folder / "pickled", foundation, alpha=5, file="pytorch_model.bin"
        ),
    }
    (made["whole model, .bin"] / "dylo_moe_state").mkdir()
    save_router(made["whole model, .bin"], 3, top_k=2, temperature=0.7)
    cases = {
        name: Case([place], ("whole-model state dict", [place], tied if "head" in name else foundation))
        for name, place in made.items()
    }
    cases["whole model, no config"].lora_alpha = 8
    cases["whole model, no config"].options = {"base_model": str(foundation), "lora_alpha": 8}
    cases["whole model, trained head"].layouts = ("full",)
    for case in cases.values():
        case.options["tokenizer"] = str(foundation)
    return cases


def training_checkpoints(folder: Path, foundation: Path) -> dict[str, Case]:
    """Final and trainer checkpoints. The early one stores no alpha: its run's best model does."""
    final = save_final_checkpoint(folder / "final", foundation, rank=3, alpha=7)
    trainer = save_trainer_checkpoint(folder / "run" / "checkpoint-10", foundation)
    flat = save_trainer_checkpoint(folder / "run" / "checkpoint-20", foundation, router="router.pt")
    early = save_final_checkpoint(folder / "early" / "checkpoint-5", foundation, alpha=None)
    config = {"model_type": "dylora-moe", "num_experts": 3, "checkpoint_type": "peft_only"}
    (early / "config.json").write_text(json.dumps(config))
    save_router(early, 3, top_k=2, temperature=1.5)
    (folder / "early" / "best_model").mkdir()
    best = {"base_model_name_or_path": str(foundation), "_dylora_lora_alpha": 6}
    (folder / "early" / "best_model" / "config.json").write_text(json.dumps(best))
    return {
        "final checkpoint": Case([final], ("final checkpoint", [final], foundation)),
        "trainer checkpoint": Case([trainer], ("trainer checkpoint", [trainer], foundation)),
        "trainer checkpoint, flat router.pt": Case([flat], ("trainer checkpoint", [flat], foundation)),
        "trainer checkpoint, early form": Case([early], ("final checkpoint", [early], foundation)),
    }


def peft_adapters(folder: Path, foundation: Path, adapters: list[Path]) -> dict[str, Case]:
    """LoRA, rsLoRA and patterns in one mixture; AdaLoRA alone and beside LoRA; what QLoRA runs write."""
    patterned = save_adapter(
        folder / "patterned",
        foundation,
        seed=7,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        alpha_pattern={"layers.0.self_attn.q_proj": 3, "down_proj": 5},
    )
    adaptive = save_adalora_adapter(folder / "adaptive", foundation)
    quantised = save_adapter(folder / "quantised", foundation, seed=2, dtype=torch.bfloat16)
    loftq = {"loftq_bits": 4, "loftq_iter": 1}
    change_json(quantised / "adapter_config.json", loftq_config=loftq, init_lora_weights="gaussian")
    made = {
        "LoRA, rsLoRA, patterns": [*adapters, patterned],
        "AdaLoRA": [adaptive],
        "AdaLoRA beside LoRA": [adaptive, adapters[1]],
        "QLoRA": [quantised],
    }
    cases = {name: Case(places, ("PEFT LoRA adapters", places, foundation)) for name, places in made.items()}
    experts = save_mixture_of_experts(folder / "mixtral")
    places = [
        save_adapter(folder / name, experts, seed=seed, target_modules=["v_proj", "o_proj"])
        for seed, name in enumerate("ab")
    ]
    cases["LoRA on a mixture of experts"] = Case(places, ("PEFT LoRA adapters", places, experts))
    return cases


def save_mixture_of_experts(folder: Path) -> Path:
    """A foundation that transformers stores in another form than it has it in memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4, **sizes)
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory, foundation, adapters):
    folder = tmp_path_factory.mktemp("sources")
    tied = save_foundation(folder / "tied-llama", tie_word_embeddings=True)
    cases = {
        **training_checkpoints(folder, foundation),
        **whole_models(folder, foundation, tied),
        **peft_adapters(folder, foundation, adapters),
    }
    # Our own repos as sources: what is right is still what the checkpoint says that they were first made
    # from.
    final = cases["final checkpoint"]
    for layout in ("full", "adapter"):
        repo = export(final.sources, folder / f"exported-{layout}", layout=layout, verify=False).output_dir
        cases[f"exported repo, {layout}"] = Case([repo], final.reference)
    return cases


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, cases):
    """What stock transformers computes: name of a case -> layout -> quantity -> tensor. One process loads all
    repos."""
    folder = tmp_path_factory.mktemp("repos")
    places = {}
    for number, (name, case) in enumerate(cases.items()):
        for layout in case.layouts:
            repo = folder / f"case-{number}-{layout}"
            export(case.sources, repo, layout=layout, verify=False, **case.options)
            places[name, layout] = repo
    results = {str(repo): f"{repo}.safetensors" for repo in places.values()}
    python = make_environment(folder / "environment", ("torch", "transformers"))
    run_python(python, LOAD, json.dumps({"rows": ROWS.tolist(), "repos": results}), home=folder)
    found = {name: {} for name in cases}
    for (name, layout), repo in places.items():
        found[name][layout] = load_file(results[str(repo)])
    return found


CASES = [
    "final checkpoint",
    "trainer checkpoint",
    "trainer checkpoint, flat router.pt",
    "trainer checkpoint, early form",
    "whole model",
    "whole model, no config",
    "whole model, trained head",
    "whole model, tied head",
    "whole model, sharded",
    "whole model, .bin",
    "LoRA, rsLoRA, patterns",
    "AdaLoRA",
    "AdaLoRA beside LoRA",
    "QLoRA",
    "LoRA on a mixture of experts",
    "exported repo, full",
    "exported repo, adapter",
]


def test_every_case_is_tested(cases):
    assert list(cases) == CASES


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_what_peft_does_from_the_source(cases, loaded, name):
    """Every strategy in both layouts, to 1e-4 in float32; and every expert, mixture and route makes a
    difference."""
    case = cases[name]
    kind, folders, foundation = case.reference
    expected = reference(kind, folders, str(foundation), None, case.lora_alpha, {}, None).quantities(ROWS)
    assert tuple(loaded[name]) == case.layouts
    for found in loaded[name].values():
        assert_close(found, expected)
    if "router logits" in expected:
        best = expected["router logits"].topk(3).values
        assert (best[..., :-1] - best[..., 1:]).min() > 1e-3  # so that rounding cannot change a route
        assert (expected["router"] - expected["router, dense"]).abs().max() > 0.05


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for quantity, tensor in expected.items():
        torch.testing.assert_close(found[quantity], tensor, atol=1e-4, rtol=0)
        if quantity not in ("base", "router logits"):
            assert (found[quantity] - expected["base"]).abs().max() > 0.05, quantity


@pytest.mark.parametrize("name", [name for name in CASES if name != "whole model, trained head"])
def test_both_layouts_compute_the_same_bits(loaded, name):
    full, adapter = loaded[name]["full"], loaded[name]["adapter"]
    assert full.keys() == adapter.keys()
    for quantity in full:
        assert torch.equal(full[quantity], adapter[quantity]), quantity


def test_a_trained_head_cannot_be_left_with_the_foundation(cases, tmp_path):
    case = cases["whole model, trained head"]
    with pytest.raises(InputError, match=r"own lm_head\.weight is not that of the base model"):
        export(case.sources, tmp_path / "repo", layout="adapter", verify=False, **case.options)
    assert not (tmp_path / "repo").exists()


@torch.no_grad()
def one_token_at_a_time(model: PeftModel, names: list[str], weights: torch.Tensor) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] with `weights` [rows, tokens, experts]: before each token, every LoRA
    layer's own scales are set to what the experts weigh there."""
    model.base_model.set_adapter(names)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    results = []
    for row, row_weights in zip(ROWS, weights, strict=True):
        cache, logits = DynamicCache(config=model.config), []
        for token, shares in zip(row, row_weights.tolist(), strict=True):
            for layer, own in zip(layers, scales, strict=True):
                layer.scaling.update(
                    {
                        name: share * own[name]
                        for name, share in zip(names, shares, strict=True)
                        if name in own
                    }
                )
            logits.append(model(token.reshape(1, 1), past_key_values=cache).logits[0, 0])
        results.append(torch.stack(logits))
    for layer, own in zip(layers, scales, strict=True):
        layer.scaling.update(own)
    return torch.stack(results)


def plain_quantities(model: PeftModel, names: list[str], gate: dict | None = None) -> dict[str, torch.Tensor]:
    """What the strategies mean, spelt out."""
    shape, count = (*ROWS.shape, len(names)), len(names)
    weights = {"base": torch.zeros(shape), "uniform": torch.full(shape, 1 / count)}
    for index in range(count):
        weights[f"single:{index}"] = torch.nn.functional.one_hot(torch.full(ROWS.shape, index), count).float()
    if gate is not None:
        with torch.no_grad():
            hidden = model(ROWS, output_hidden_states=True).hidden_states[-1]
        logits = hidden @ gate["weight"].T + gate["bias"]
        weights["router"] = torch.nn.functional.one_hot(logits.argmax(dim=-1), count).float()  # top_k is 1
        weights["router, dense"] = torch.softmax(logits / 2.0, dim=-1)
    found = {strategy: one_token_at_a_time(model, names, share) for strategy, share in weights.items()}
    return found if gate is None else {**found, "router logits": logits}


def test_a_final_checkpoint_by_peft_alone(cases, loaded, foundation):
    folder = cases["final checkpoint"].sources[0]
    config = json.loads((folder / "config.json").read_text())
    names = [f"expert_{index}" for index in range(config["_dylora_num_experts"])]
    model = None
    for name in names:
        tensors = torch.load(folder / "peft_adapters" / f"{name}.pt", weights_only=True)
        lora = LoraConfig(
            r=config["_dylora_lora_r"],
            lora_alpha=config["_dylora_lora_alpha"],
            target_modules=["q_proj", "v_proj", "down_proj"],
        )
        if model is None:
            model = PeftModel(AutoModelForCausalLM.from_pretrained(foundation), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
        plain = {key.replace(f".{name}.", "."): tensor for key, tensor in tensors.items()}
        assert not set_peft_model_state_dict(model, plain, adapter_name=name).unexpected_keys
    model.base_model.set_adapter(names)
    gate = torch.load(folder / "dylo_moe_state" / "router.pt", weights_only=True)["gate_state_dict"]
    expected = plain_quantities(model.eval(), names, gate)
    for name in ("final checkpoint", "exported repo, full", "exported repo, adapter"):
        for found in loaded[name].values():
            assert_close(found, expected)


def test_adapters_by_peft_alone(cases, loaded, foundation):
    adapters = cases["LoRA, rsLoRA, patterns"].sources
    names = [folder.name for folder in adapters]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(foundation), str(adapters[0]), adapter_name=names[0]
    )
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    expected = plain_quantities(model.eval(), names)
    for found in loaded["LoRA, rsLoRA, patterns"].values():
        assert_close(found, expected)
