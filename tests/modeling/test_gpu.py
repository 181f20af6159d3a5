"""What only a GPU can show: the same tokens as on a CPU, offloaded and compiled caches, flash attention."""

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, llama_config, random_rows
from transformers import AutoModelForCausalLM, utils


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BATCH = left_padded(random_rows((9, 5, 7), seed=2))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def pair():
    """The same model on the CPU and on the GPU."""
    return build(seed=7), build(seed=7).to("cuda")


def on_gpu(model, strategy, **arguments):
    """The prompts stay on the CPU, as some tools leave them: `generate` moves them."""
    model.reset_round_robin()
    return model.generate(**BATCH, routing_strategy=strategy, **{**GREEDY, **arguments}).tolist()


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_equal_those_of_the_cpu(pair, strategy, arguments):
    cpu, gpu = pair
    assert on_gpu(gpu, strategy, **arguments) == on_gpu(cpu, strategy, **arguments)


@pytest.mark.parametrize("cache", ["offloaded", "static", "offloaded_static"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_caches(pair, strategy, cache):
    cpu, gpu = pair
    found = on_gpu(gpu, strategy, cache_implementation=cache, disable_compile=True)
    assert found == on_gpu(cpu, strategy)


@pytest.mark.parametrize("strategy", ["router", "best", "single:1"])
def test_a_static_cache_compiles_by_itself(pair, strategy):
    cpu, gpu = pair
    assert on_gpu(gpu, strategy, cache_implementation="static") == on_gpu(cpu, strategy)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_automatic_device_map_in_bfloat16(tmp_path, layout):
    model = build()
    if layout == "adapter":
        PeftLoop(model).peft.unload().save_pretrained(tmp_path / "foundation")
        model.config.base_model_name_or_path = str(tmp_path / "foundation")
    model.save_pretrained(tmp_path / "repo", layout=layout)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo", trust_remote_code=True, device_map="auto", dtype=torch.bfloat16
    )
    assert loaded.device.type == "cuda" and loaded.router.gate.weight.dtype == torch.float32
    assert torch.equal(loaded.router.gate.weight.cpu(), model.router.gate.weight)
    loaded.generate(**BATCH, routing_strategy="router", **GREEDY)


@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_layers_on_two_devices(tmp_path, layout, second):
    """A hand-written map: each device gets the experts of its layers, and the routing weights come to them."""
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = build(seed=7)
    PeftLoop(model).peft.unload().save_pretrained(tmp_path / "foundation")
    model.config.base_model_name_or_path = str(tmp_path / "foundation")
    model.save_pretrained(tmp_path / "repo", layout=layout)
    # Every part by its name: with a "" for the rest, accelerate's hooks undo the map, on any model.
    first = ("foundation.model.embed_tokens", "foundation.model.rotary_emb", "foundation.model.layers.0")
    last = ("foundation.model.layers.1", "foundation.model.norm", "foundation.lm_head", "router")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo",
        trust_remote_code=True,
        device_map={**dict.fromkeys(first, "cuda:0"), **dict.fromkeys(last, second)},
    )
    devices = {str(layer.lora_A.device) for layer in loaded.expert_layers().values()}
    assert devices == {"cuda:0", second} if second != "cpu" else len(devices) == 2
    for strategy in STRATEGIES:
        assert on_gpu(loaded, strategy) == on_gpu(model, strategy), strategy


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_flash_attention(tmp_path, strategy, version):
    if not getattr(utils, f"is_flash_attn_{version}_available", lambda: False)():
        pytest.skip(f"needs flash-attn {version}")
    model = build(llama_config(hidden_size=256))
    model.save_pretrained(tmp_path)
    both = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path, trust_remote_code=True, device_map="cuda", dtype=torch.bfloat16, attn_implementation=name
        )
        for name in (f"flash_attention_{version}", "eager")
    ]
    batch = {name: tensor.to("cuda") for name, tensor in BATCH.items()}
    with torch.no_grad():
        flash, eager = (loaded(**batch, routing_strategy=strategy).logits.float() for loaded in both)
        decoded = [loaded.generate(**batch, routing_strategy=strategy, **GREEDY) for loaded in both]
    assert decoded[0].shape == decoded[1].shape
    real = batch["attention_mask"].bool()
    assert (flash - eager)[real].abs().mean() < 0.1 * eager[real].abs().mean()
