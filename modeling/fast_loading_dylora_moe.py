"""Reading the experts' stacks of a repo of layout `full` straight from its files. Optional.

transformers takes half a millisecond of Python for every tensor that it loads, and the stacks are more tensors than the
foundation has. So where its loader would do nothing with a stack but copy it to the one device, it is handed a model without
stacks, and they are put in afterwards. Everywhere else, and where the files do not hold exactly the stacks that the config
describes, it reads them itself and says what is wrong. Knows what transformers does with a tensor on the way, and nothing
about how a model computes.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import safe_open
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.modeling_utils import _is_on_hf_mount


KINDS = ("lora_A", "lora_B")
READERS = 4  # threads, as many as transformers has


class FastLoadingMixin:
    """For a model with `expert_layers()`, before `PreTrainedModel`."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # The one place where it is known which files were chosen, of which commit; the signature is that of 5.10 to 5.24.
        try:
            aside = set_aside(model, state_dict, checkpoint_files, load_config)
        except AttributeError:  # a transformers that keeps these things elsewhere; the model is as it was
            aside = {}
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if aside:
            loaded[0].unexpected_keys.difference_update(aside)
            put_in(aside, only_device(load_config))
        return loaded


def set_aside(model, state_dict: dict | None, checkpoint_files: list[str] | None, load_config) -> dict[str, tuple]:
    """Take the stacks out of a model that transformers is about to fill: name -> (layer, kind, slice of a file, dtype).

    Returns:
        Nothing, and the model as it was, where transformers is to read them.
    """
    layers = model.expert_layers().items()
    here = {f"foundation.{name}.{kind}": (layer, kind) for name, layer in layers for kind in KINDS}
    stacks = {name: getattr(layer, kind) for name, (layer, kind) in here.items()}
    being_made = bool(stacks) and all(type(stack) is nn.Parameter and stack.is_meta for stack in stacks.values())
    if not being_made or state_dict is not None or not just_copies(load_config, here):
        return {}  # a live model whose adapter transformers loads comes here, too
    if not checkpoint_files or not all(map(can_be_mapped, checkpoint_files)):
        return {}
    files = [safe_open(path, framework="pt") for path in checkpoint_files]
    stored = [(name, file) for file in files for name in file.keys() if name.endswith(KINDS)]  # noqa: SIM118
    slices = {name: file.get_slice(name) for name, file in stored}
    shapes = {name: list(stack.shape) for name, stack in stacks.items()}
    if len(stored) != len(slices) or {name: stack.get_shape() for name, stack in slices.items()} != shapes:
        return {}
    aside = {name: (*here[name], slices[name], stack.dtype) for name, stack in stacks.items()}
    for layer, kind in here.values():
        setattr(layer, kind, None)
    return aside


def just_copies(load_config, names: dict) -> bool:
    """Whether tensors of these names keep name, shape and the model's dtype on their way to one device."""
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled() or load_config.device_mesh is not None:
        return False
    if load_config.hf_quantizer is not None or load_config.disable_mmap or only_device(load_config) is None:
        return False
    patterns = set(load_config.dtype_plan or ())  # of modules that stay in float32, the gate among them
    if patterns - {"router.gate"} or any("router.gate" in name for name in names):
        return False
    renamings = load_config.weight_mapping or ()
    if any("lora_" in target or "\\" in target for renaming in renamings for target in renaming.target_patterns):
        return False  # another tensor may become a stack
    return not any(renaming.compiled_sources.search(name) for renaming in renamings for name in names)


def only_device(load_config) -> torch.device | None:
    """Where the whole model goes, if that is a CPU or a CUDA device."""
    if load_config.device_map is None:
        return torch.device("cpu")
    if list(load_config.device_map) != [""] or load_config.device_map[""] == "disk":
        return None
    device = torch.device(load_config.device_map[""])
    return device if device.type in ("cpu", "cuda") else None


def can_be_mapped(path: str) -> bool:
    """Whether transformers would map this file into memory, too."""
    return path.endswith(".safetensors") and sys.platform != "win32" and not _is_on_hf_mount(path)


def put_in(aside: dict[str, tuple], device: torch.device) -> None:
    def read(entry: tuple) -> torch.Tensor:
        _, _, stack, dtype = entry
        return stack[...].to(device, dtype)

    with ThreadPoolExecutor(READERS) as readers:
        for (layer, kind, *_), stack in zip(aside.values(), readers.map(read, aside.values()), strict=True):
            setattr(layer, kind, nn.Parameter(stack))
            getattr(layer, kind)._is_hf_initialized = True  # or transformers would initialise it


__all__ = ["FastLoadingMixin"]
