"""Stacks read past transformers' loader: the model is the one that transformers would have made, or it makes
it itself."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers_models import build, llama_config
from peft import IA3Config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM, DyloraMoeModel


pytest.importorskip("dylora_moe.modeling.fast_loading_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_loading_dylora_moe as fast_loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = build(seed=3)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    build(experts=[]).save_pretrained(folder / "without_experts")
    return folder


@pytest.fixture
def put_in(monkeypatch):
    """How many stacks were put in, a number for each model loaded."""
    counts, original = [], fast_loading.put_in
    monkeypatch.setattr(
        fast_loading, "put_in", lambda aside, to: (counts.append(len(aside)), original(aside, to))
    )
    return counts


def by_transformers(folder, network=DyloraMoeForCausalLM, **arguments):
    """The same model, all of it read by transformers, and what that has to say."""
    with mock.patch.object(fast_loading, "set_aside", lambda model, state_dict, *_: (state_dict, {})):
        return network.from_pretrained(folder, output_loading_info=True, **arguments)


def facts(model) -> dict:
    """Whatever could differ in a tensor but its numbers."""
    return {
        name: (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad, tensor.is_contiguous())
        + (getattr(tensor, "_is_hf_initialized", False), tensor.is_leaf)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(one, other) -> None:
    assert list(facts(one).items()) == list(facts(other).items())
    expected = other.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())
    assert one.training == other.training and one.config.to_dict() == other.config.to_dict()
    assert set(one._keys_to_ignore_on_load_unexpected) == set(other._keys_to_ignore_on_load_unexpected)


@pytest.mark.parametrize("repo", ["whole", "sharded", "bfloat16"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"dtype": torch.float16, "device_map": "cpu"},
        {"device_map": 0},
    ],
    ids=str,
)
def test_the_model_is_the_one_that_transformers_makes(saved, put_in, repo, arguments):
    if arguments.get("device_map") == 0:
        arguments = {"device_map": 0 if torch.cuda.is_available() else torch.device("cpu")}
    loaded, info = DyloraMoeForCausalLM.from_pretrained(saved / repo, output_loading_info=True, **arguments)
    assert put_in == [2 * len(loaded.expert_layers())]
    expected, expected_info = by_transformers(saved / repo, **arguments)
    same(loaded, expected)
    assert info == expected_info and not any(info.values())
    assert not loaded.generation_config.to_dict().keys() ^ expected.generation_config.to_dict().keys()


class CopiesLater:
    """A stream whose copies, asked for with `non_blocking`, are done when it is waited for: as late as they
    can be."""

    def __init__(self, monkeypatch):
        self.waiting, copy = [], torch.Tensor.copy_

        def later(target, source, non_blocking=False):
            return self.waiting.append((target, source)) if non_blocking else copy(target, source)

        self.copy = copy
        monkeypatch.setattr(torch.Tensor, "copy_", later)

    def synchronize(self):
        for target, source in self.waiting:
            self.copy(target, source)
        self.waiting.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("piece", [1, 7, 24, 100, 1 << 22])
def test_a_stack_in_pieces_is_the_whole_stack(monkeypatch, dtype, piece):
    stack = torch.randn(6, 5).to(dtype)
    monkeypatch.setattr(fast_loading, "PIECE", piece)
    stream = CopiesLater(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    copy = fast_loading.upload(stack, torch.device("cpu"))
    assert copy.dtype == dtype and copy.shape == stack.shape
    assert torch.equal(copy.view(torch.uint8), stack.view(torch.uint8))


def test_the_large_stacks_of_the_right_dtype_go_in_pieces(monkeypatch):
    """The choice that is made for a GPU, which a CPU plays here."""
    stacks = {"small": torch.randn(2, 6), "large": torch.randn(5, 6), "other dtype": torch.randn(5, 6).half()}
    layers = {name: torch.nn.Module() for name in stacks}
    aside = {name: (layers[name], "lora_A", stack, torch.float32) for name, stack in stacks.items()}
    pieces, to = [], torch.Tensor.to
    monkeypatch.setattr(fast_loading, "PIECE", 2 * stacks["small"].nbytes)
    monkeypatch.setattr(fast_loading, "upload", lambda stack, device: (pieces.append(stack), stack + 1)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, dtype: to(tensor, dtype))
    fast_loading.put_in(aside, torch.device("cuda", 0))
    assert len(pieces) == 1 and torch.equal(pieces[0], stacks["large"])
    expected = {
        **stacks,
        "large": stacks["large"] + 1,
        "other dtype": to(stacks["other dtype"], torch.float32),
    }
    assert all(torch.equal(layers[name].lora_A, expected[name]) for name in stacks)


def test_a_stack_goes_the_plain_way_where_no_memory_can_be_locked(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    stack = torch.randn(6, 5)
    monkeypatch.setattr(torch, "empty", refuse)
    assert torch.equal(fast_loading.upload(stack, torch.device("cpu")), stack)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("around", ["nothing", "a stream", "a device", "inference mode"])
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_large_stacks_go_to_a_gpu_in_pieces(saved, put_in, monkeypatch, arguments, around):
    monkeypatch.setattr(fast_loading, "PIECE", 100)
    sizes, original = [], fast_loading.upload
    monkeypatch.setattr(
        fast_loading, "upload", lambda stack, device: (sizes.append(stack.nbytes), original(stack, device))[1]
    )
    contexts = {
        "a stream": lambda: torch.cuda.stream(torch.cuda.Stream()),
        "a device": lambda: torch.device("cuda"),
    }
    contexts["inference mode"] = torch.inference_mode
    with contexts.get(around, nullcontext)():
        loaded = DyloraMoeForCausalLM.from_pretrained(saved / "whole", device_map="cuda", **arguments)
        expected, _ = by_transformers(saved / "whole", device_map="cuda", **arguments)
    same(loaded, expected)
    assert (
        len(put_in) == 1 and len(sizes) == (0 if arguments else put_in[0]) and min(sizes, default=101) > 100
    )


def test_what_a_mode_of_the_calling_thread_does_to_tensors_is_not_done_to_stacks(saved, put_in):
    """`torch.set_default_device` is such a mode, and slices of safetensors are made by the function that it
    redirects."""

    class Elsewhere(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if function is torch.asarray and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    with Elsewhere():
        model = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    assert len(put_in) == 1
    same(model, by_transformers(saved / "whole")[0])


def test_a_model_without_a_head_and_one_in_a_subfolder(saved, put_in):
    loaded = DyloraMoeModel.from_pretrained(str(saved), subfolder="whole")
    expected, _ = by_transformers(saved / "whole", DyloraMoeModel)
    assert len(put_in) == 1 and put_in[0] > 0
    expected.name_or_path = expected.config.name_or_path = loaded.name_or_path
    same(loaded, expected)


def test_code_in_the_repo_does_it_too(saved, caplog):
    model = AutoModelForCausalLM.from_pretrained(saved / "whole", trust_remote_code=True)
    assert type(model) is not DyloraMoeForCausalLM
    same(model, by_transformers(saved / "whole")[0])
    assert "not initialized" not in caplog.text and "not used" not in caplog.text


def test_a_model_loaded_in_inference_mode_can_be_trained(saved, put_in):
    with torch.inference_mode():
        model = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    assert len(put_in) == 1
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_no_experts_no_stacks(saved, put_in):
    same(
        DyloraMoeForCausalLM.from_pretrained(saved / "without_experts"),
        by_transformers(saved / "without_experts")[0],
    )
    assert put_in == []


def test_transformers_is_handed_no_stacks(saved, monkeypatch):
    seen = []
    original = PreTrainedModel._load_pretrained_model

    def spy(model, *args, **kwargs):
        seen.append([name for name in model.state_dict() if "lora_" in name])
        return original(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(spy))
    DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    by_transformers(saved / "whole")
    assert not seen[0] and seen[1]


def damaged(saved, tmp_path, change):
    shutil.copytree(saved / "whole", tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    name = next(name for name in weights if name.endswith("lora_A"))
    change(weights, name)
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    return tmp_path / "damaged", name


def test_a_stack_that_is_missing_is_for_transformers_to_report(saved, tmp_path, put_in, caplog):
    folder, name = damaged(saved, tmp_path, lambda weights, name: weights.pop(name))
    model = DyloraMoeForCausalLM.from_pretrained(folder)
    assert put_in == [] and name in caplog.text
    assert by_transformers(folder)[1]["missing_keys"] == {name}
    assert torch.isfinite(dict(model.named_parameters())[name]).all()


def test_a_stack_too_many_is_for_transformers_to_report(saved, tmp_path, put_in, caplog):
    def add(weights, name):
        weights["foundation.model.layers.9.mlp.up_proj.lora_A"] = weights[name].clone()

    folder, _ = damaged(saved, tmp_path, add)
    DyloraMoeForCausalLM.from_pretrained(folder)
    assert put_in == [] and "layers.9.mlp.up_proj.lora_A" in caplog.text


def test_a_stack_twice_in_place_of_another_is_for_transformers_to_report(saved, tmp_path, put_in, caplog):
    shutil.copytree(saved / "sharded", tmp_path / "damaged")
    index_path = tmp_path / "damaged" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted({file for name, file in index["weight_map"].items() if name.endswith("lora_A")})
    first, last = (load_file(tmp_path / "damaged" / shard) for shard in (shards[0], shards[-1]))
    missing = next(name for name in last if name.endswith("lora_A"))
    twice = next(name for name in first if name.endswith("lora_A"))
    del last[missing], index["weight_map"][missing]
    save_file({**last, twice: first[twice]}, tmp_path / "damaged" / shards[-1], {"format": "pt"})
    index_path.write_text(json.dumps(index))
    DyloraMoeForCausalLM.from_pretrained(tmp_path / "damaged")
    assert put_in == [] and missing in caplog.text


def test_a_stack_of_another_shape_is_for_transformers_to_report(saved, tmp_path):
    folder, _ = damaged(
        saved, tmp_path, lambda weights, name: weights.update({name: weights[name][1:].clone()})
    )
    with pytest.raises(RuntimeError, match="mismatch"):
        DyloraMoeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": {"foundation": "cpu", "router": "cpu"}},
        {"disable_mmap": True},
        {"key_mapping": {"q_proj.lora_A": "q_proj.lora_A"}},
    ],
    ids=str,
)
def test_what_does_more_than_copy_is_for_transformers(saved, put_in, arguments):
    model = DyloraMoeForCausalLM.from_pretrained(saved / "whole", **arguments)
    assert put_in == []
    same(model, by_transformers(saved / "whole", **arguments)[0])


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_files_are_those_that_transformers_chose(saved, tmp_path, suffix):
    """`transformers_weights` names one, and another lies beside it."""
    shutil.copytree(saved / "whole", tmp_path / "two")
    weights = {name: tensor + 1 for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items()}
    if suffix == "bin":
        (tmp_path / "two" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "two" / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "two" / "other.safetensors", {"format": "pt"})
        path = tmp_path / "two" / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "transformers_weights": "other.safetensors"})
        )
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path / "two")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_files_on_a_mount_of_the_hub_are_for_transformers(saved, put_in, monkeypatch):
    monkeypatch.setattr(fast_loading, "_is_on_hf_mount", lambda path: True)
    same(DyloraMoeForCausalLM.from_pretrained(saved / "whole"), by_transformers(saved / "whole")[0])
    assert put_in == []


def test_experts_on_what_stays_in_float32_with_the_gate(tmp_path, put_in):
    """transformers goes by the name, and a module of the foundation may have the gate's."""

    class Block(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].router = torch.nn.Module()
            self.model.layers[0].router.gate = torch.nn.Linear(32, 4)

    module = "model.layers.0.router.gate"
    config = DyloraMoeConfig(base_config=llama_config(), expert_configs=[{"target_modules": [module]}])
    model = DyloraMoeForCausalLM(config, Block(llama_config()))
    model.save_pretrained(tmp_path)
    with mock.patch.object(AutoModelForCausalLM, "from_config", Block):
        loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        same(loaded, by_transformers(tmp_path, dtype=torch.bfloat16)[0])
    assert put_in == [] and loaded.expert_layers()[module].lora_A.dtype == torch.float32


def test_a_subclass_sees_its_stacks_while_it_is_made(saved, put_in):
    class Careful(DyloraMoeForCausalLM):
        def __init__(self, config, *args):
            super().__init__(config, *args)
            self.ranks = sum(layer.lora_A.shape[0] for layer in self.expert_layers().values())
            self.freeze_foundation()
            with torch.device("cpu"):
                object.__setattr__(self, "reference", DyloraMoeForCausalLM(config))
            self.post_init()

    model = Careful.from_pretrained(saved / "whole")
    assert len(put_in) == 1 and model.ranks > 0
    same(model, by_transformers(saved / "whole", Careful)[0])
    assert all(layer.lora_A is not None for layer in model.reference.expert_layers().values())


@pytest.mark.parametrize("field", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_a_foundation_that_keeps_layers_in_float32_is_for_transformers(saved, put_in, monkeypatch, field):
    foundation = type(build(llama_config()).foundation)
    monkeypatch.setattr(foundation, field, ["q_proj"])
    model = DyloraMoeForCausalLM.from_pretrained(saved / "whole", dtype=torch.float16)
    assert put_in == []
    layer = next(layer for name, layer in model.expert_layers().items() if name.endswith("q_proj"))
    assert layer.lora_A.dtype == torch.float32
    same(model, by_transformers(saved / "whole", dtype=torch.float16)[0])


def test_parallel_loading_is_for_transformers(saved, put_in, monkeypatch):
    monkeypatch.setattr(fast_loading, "is_fsdp_enabled", lambda: True)
    DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    assert put_in == []


def test_files_that_a_larger_model_left_behind_are_not_read(saved, tmp_path):
    """transformers takes the whole file where there is an index, too."""
    shutil.copytree(saved / "sharded", tmp_path / "both")
    index = json.loads((tmp_path / "both" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / "both" / name)
        save_file(
            {key: tensor + 1 for key, tensor in shard.items()}, tmp_path / "both" / name, {"format": "pt"}
        )
    shutil.copy(saved / "whole" / "model.safetensors", tmp_path / "both")
    same(DyloraMoeForCausalLM.from_pretrained(tmp_path / "both"), by_transformers(tmp_path / "both")[0])
    subset = DyloraMoeForCausalLM.from_pretrained(tmp_path / "both", experts=[0])
    whole = DyloraMoeForCausalLM.from_pretrained(saved / "whole", experts=[0])
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in subset.state_dict().items())


def test_an_adapter_that_peft_loads_onto_a_model_leaves_the_stacks_alone(saved, tmp_path):
    adapted = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    adapted.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    adapted.save_pretrained(tmp_path)
    model = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    before = {
        name: (layer.lora_A.clone(), layer.lora_B.clone()) for name, layer in model.expert_layers().items()
    }
    model.load_adapter(tmp_path)
    for name, layer in model.expert_layers().items():
        assert torch.equal(layer.lora_A, before[name][0]) and torch.equal(layer.lora_B, before[name][1])
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_tensor_that_a_mapping_makes_a_stack_is_for_transformers(saved, tmp_path, put_in):
    folder, name = damaged(
        saved, tmp_path, lambda weights, name: weights.update({"aaa.q": weights[name] + 1})
    )
    mapping = {r"^aaa\.q$": name}
    model = DyloraMoeForCausalLM.from_pretrained(folder, key_mapping=mapping)
    same(model, by_transformers(folder, key_mapping=mapping)[0])
    assert put_in == []


def test_a_tensor_that_a_mapping_makes_a_stack_by_a_part_of_its_name(saved, tmp_path, put_in):
    def add(weights, name):
        weights[name.removesuffix("A") + "0"] = weights[name] + 1

    folder, _ = damaged(saved, tmp_path, add)
    model = DyloraMoeForCausalLM.from_pretrained(folder, key_mapping={"_0$": "_A"})
    same(model, by_transformers(folder, key_mapping={"_0$": "_A"})[0])
    assert put_in == []


def load_config(**fields):
    nothing = {
        "device_mesh": None,
        "hf_quantizer": None,
        "disable_mmap": False,
        "device_map": None,
        "dtype_plan": None,
    }
    return SimpleNamespace(**{**nothing, "weight_mapping": [], **fields})


def test_a_mapping_of_the_foundation_sees_names_without_our_prefix():
    renaming = WeightRenaming(r"^model\.layers\.0", "model.layers.1")
    renaming.scope_prefix = "foundation"
    names = {"foundation.model.layers.0.mlp.up_proj.lora_A": None}
    assert fast_loading.just_copies(load_config(), names)
    assert not fast_loading.just_copies(load_config(weight_mapping=[renaming]), names)


def test_what_stays_in_float32_is_named_by_a_pattern():
    plan = {"router.gate": torch.float32}
    assert fast_loading.just_copies(
        load_config(dtype_plan=plan), {"foundation.layers.0.mlp.gate.lora_A": None}
    )
    assert not fast_loading.just_copies(
        load_config(dtype_plan=plan), {"foundation.layers.0.mlp.router_gate.lora_A": None}
    )


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        (None, "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": torch.device("cuda", 1)}, "cuda:1"),
        ({"": "cuda"}, None),  # that of each thread
        ({"": "disk"}, None),
        ({"": "meta"}, None),
        ({"foundation": 0, "router": 0}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_only_device(monkeypatch, device_map, device):
    monkeypatch.setattr(
        torch, "device", lambda name, *, real=torch.device: real(f"cuda:{name}" if name == 1 else name)
    )
    found = fast_loading.only_device(load_config(device_map=device_map))
    assert str(found) == str(device)


def test_a_transformers_that_keeps_things_elsewhere_reads_the_stacks_itself(saved, put_in, monkeypatch):
    class Elsewhere:
        def __init__(self, config):
            self.__dict__.update(
                {name: value for name, value in vars(config).items() if name != "weight_mapping"}
            )

    original = fast_loading.just_copies
    monkeypatch.setattr(fast_loading, "just_copies", lambda config, names: original(Elsewhere(config), names))
    same(DyloraMoeForCausalLM.from_pretrained(saved / "whole"), by_transformers(saved / "whole")[0])
    assert put_in == []
