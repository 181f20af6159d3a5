"""Device maps, offloading to CPU and disk, dtypes, quantised foundations; on the CPU here, on a GPU where
there is one."""

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, llama_config, random_rows, save_layouts
from helpers_slow import slow_but
from transformers import AutoModelForCausalLM

from dylora_moe.modeling import DyloraMoeForCausalLM


BATCH = left_padded(random_rows((9, 5), seed=2))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = build()
    PeftLoop(model).peft.unload().save_pretrained(folder / "foundation")
    model.config.base_model_name_or_path = str(folder / "foundation")
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    model.save_pretrained(folder / "adapter", layout="adapter")
    return model, folder


def same(one, other) -> None:
    for strategy in STRATEGIES:
        with torch.no_grad():
            left, right = (model(**BATCH, routing_strategy=strategy).logits.cpu() for model in (one, other))
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
        one.reset_round_robin(), other.reset_round_robin()
        tokens = [
            model.generate(**BATCH, routing_strategy=strategy, **GREEDY).tolist() for model in (one, other)
        ]
        assert tokens[0] == tokens[1]


LAYER_ON_DISK = {
    "foundation.model.embed_tokens": "cpu",
    "foundation.model.layers.0": "cpu",
    "foundation.model.layers.1": "disk",
    "foundation.model.norm": "cpu",
    "foundation.model.rotary_emb": "cpu",
    "foundation.lm_head": "disk",
    "router": "cpu",
}


# The first and the last weights that are read, so that the model itself lies nowhere.
ENDS_ON_DISK = {**LAYER_ON_DISK, "foundation.model.embed_tokens": "disk", "router": "disk"}


@pytest.mark.parametrize("layout", slow_but("full", "adapter", of=["full", "sharded", "adapter"]))
@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, LAYER_ON_DISK, ENDS_ON_DISK],
    ids=["auto", "one", "disk", "ends on disk"],
)
def test_device_maps(saved, tmp_path, layout, device_map):
    model, folder = saved
    loaded = DyloraMoeForCausalLM.from_pretrained(
        folder / layout, device_map=device_map, offload_folder=tmp_path
    )
    if device_map == "auto":  # all on a GPU, where there is one, and then nothing moves inputs there
        loaded.to("cpu")
    same(model, loaded)


def test_a_subset_with_a_device_map(saved, tmp_path):
    model, folder = saved
    loaded = DyloraMoeForCausalLM.from_pretrained(
        folder / "full", experts=["second"], device_map=LAYER_ON_DISK, offload_folder=tmp_path
    )
    with torch.no_grad():
        found = loaded(**BATCH, routing_strategy="single:0").logits
        expected = model(**BATCH, routing_strategy="single:second").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_needs_the_weights_of_an_offloaded_model_is_refused(saved, tmp_path):
    model, folder = saved
    loaded = DyloraMoeForCausalLM.from_pretrained(
        folder / "full", device_map=LAYER_ON_DISK, offload_folder=tmp_path / "offloaded"
    )
    for call in (
        lambda: loaded.merge_expert(0),
        lambda: loaded.expert_weights(0),
        lambda: loaded.set_expert_weights(0, model.expert_weights(0)),
        lambda: loaded.save_adapters(tmp_path / "adapters"),
        lambda: loaded.save_pretrained(tmp_path / "adapter", layout="adapter"),
        lambda: loaded.add_expert("fourth"),
    ):
        with pytest.raises(ValueError, match=r"layers\.1\..*offloaded"):
            call()
    loaded.save_pretrained(tmp_path / "whole")
    same(model, DyloraMoeForCausalLM.from_pretrained(tmp_path / "whole"))


@pytest.mark.parametrize("layout", ["full", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtypes(saved, layout, dtype):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder / layout, trust_remote_code=True, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert loaded.router.gate.weight.dtype == torch.float32
    assert torch.equal(loaded.router.gate.weight, model.router.gate.weight)
    with torch.no_grad():
        found = loaded(**BATCH, routing_strategy="single:1").logits.float()
        expected = model(**BATCH, routing_strategy="single:1").logits
    coarse = dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(found, expected, atol=0.3 if coarse else 1e-4, rtol=0)


def test_the_gate_stays_in_float32_when_a_model_is_cast():
    model = build()
    weight = model.router.gate.weight.detach().clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()):
        cast(model)
        assert torch.equal(model.router.gate.weight, weight)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_torchao_int8_of_the_foundation_alone(saved, layout):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / layout, trust_remote_code=True, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    layer = loaded.foundation.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer.weight).__name__ != "Parameter" and "Int8" in repr(
        type(layer.base_layer.weight.data)
    )
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name or name.startswith("router."):
            assert type(parameter) is torch.nn.Parameter and parameter.dtype == torch.float32, name
            assert torch.equal(parameter, model.get_parameter(name))
    with torch.no_grad():
        found = loaded(**BATCH, routing_strategy="single:1").logits
        expected = model(**BATCH, routing_strategy="single:1").logits
    assert 0 < (found - expected).abs().max() < 0.5
    loaded.generate(**BATCH, routing_strategy="router", **GREEDY)
    with pytest.raises(ValueError, match="quantised"):
        loaded.merge_expert(0)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_are_saved_in_both_layouts(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    save_layouts(build(llama_config(hidden_size=128, intermediate_size=256)), tmp_path)
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)}
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path / "full", **quantised)
    batch = {name: tensor.to(model.device) for name, tensor in BATCH.items()}
    model.save_pretrained(tmp_path / "again", layout="adapter")
    plain = DyloraMoeForCausalLM.from_pretrained(tmp_path / "again")
    assert not hasattr(plain.config, "quantization_config")
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path / "again", **quantised)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="quantised"):
        model.merge_expert(0)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="saved quantised"):
        DyloraMoeForCausalLM.from_pretrained(tmp_path / "whole", experts=["first"])


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_of_the_foundation_alone(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = build(
        llama_config(hidden_size=128, intermediate_size=256)
    )  # its 4-bit kernels need rows this long
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        trust_remote_code=True,
        quantization_config=BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4),
    )
    layer = loaded.foundation.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    assert type(loaded.router.gate).__name__ == "DyloraMoeGate"
    assert loaded.router.gate.weight.dtype == torch.float32
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name or name.startswith("router."):
            assert parameter.is_floating_point(), name
            assert parameter.shape == model.get_parameter(name).shape
    batch = {name: tensor.to(loaded.device) for name, tensor in BATCH.items()}
    with torch.no_grad():
        found = loaded(**batch, routing_strategy="single:1").logits.float().cpu()
        plain = loaded(**batch, routing_strategy="base").logits.float().cpu()
        expected, expected_plain = (model(**BATCH, routing_strategy=s).logits for s in ("single:1", "base"))
    # what quantising the foundation costs, next to what the expert does
    assert (found - expected).norm() < 0.5 * (expected - expected_plain).norm()
    assert (found - plain).abs().max() > 1
    loaded.generate(**batch, routing_strategy="router", **GREEDY)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float16])
def test_a_subset_in_any_spelling_of_a_dtype(tmp_path, dtype):
    build().save_pretrained(tmp_path)
    part = DyloraMoeForCausalLM.from_pretrained(tmp_path, experts=[0], dtype=dtype)
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert part.dtype == expected
