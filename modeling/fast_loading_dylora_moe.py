"""Reading the experts' stacks of a repo of layout `full` straight from its files. Optional.

transformers takes half a millisecond of Python for every tensor that it loads, and the stacks are more
tensors than the foundation has. So where its loader would do nothing with a stack but copy it to the one
device, it is handed a model without stacks, and they are put in afterwards. Everywhere else, and where the
files do not hold exactly the stacks that the config describes, it reads them itself and says what is wrong.
Knows what transformers does with a tensor on the way, and nothing about how a model computes.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import safe_open
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.modeling_utils import _is_on_hf_mount


KINDS = ("lora_A", "lora_B")
READERS, PIECE = (
    4,
    1 << 22,
)  # threads, as many as transformers has, and the bytes that each hands to a GPU at once


class FastLoadingMixin:
    """For a model with `expert_layers()`, before `PreTrainedModel`."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # The one place where it is known which files were chosen, of which commit; the signature is that of
        # 5.10 to 5.24.
        try:
            state_dict, aside = set_aside(model, state_dict, checkpoint_files, load_config)
        except AttributeError:  # a transformers that keeps these things elsewhere; the model is as it was
            aside = {}
        loaded = super()._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if aside:
            with ThreadPoolExecutor(1) as thread:  # as transformers reads: in none of this thread's modes
                thread.submit(put_in, aside, only_device(load_config)).result()
        return loaded


def set_aside(model, state_dict: dict | None, checkpoint_files: list[str] | None, load_config) -> tuple:
    """Take the stacks out of a model that transformers is about to fill.

    Returns:
        A state dict for transformers, slices of files, and the stacks: name -> (layer, kind, slice, dtype).
        Where transformers is to read them, what it was given and nothing, and the model as it was.
    """
    names = model.config.stack_modules()
    here = {
        f"foundation.{names[n]}.{k}": (layer, k) for n, layer in model.expert_layers().items() for k in KINDS
    }
    stacks = {name: getattr(layer, kind) for name, (layer, kind) in here.items()}
    being_made = bool(stacks) and all(
        type(stack) is nn.Parameter and stack.is_meta for stack in stacks.values()
    )
    can_be_read = state_dict is None and bool(checkpoint_files) and all(map(can_be_mapped, checkpoint_files))
    if not (being_made and can_be_read and just_copies(load_config, here)):
        return state_dict, {}  # a live model whose adapter transformers loads comes here, too
    files = [safe_open(path, framework="pt") for path in checkpoint_files]
    stored = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118
    slices = {name: file.get_slice(name) for name, file in stored}
    found = sorted(name for name, _ in stored if "lora_" in name)
    if found != sorted(stacks) or any(slices[name].get_shape() != list(stacks[name].shape) for name in found):
        return state_dict, {}
    aside = {name: (*here[name], slices.pop(name), stack.dtype) for name, stack in stacks.items()}
    for layer, kind in here.values():
        setattr(layer, kind, None)
    return slices, aside


def just_copies(load_config, names: dict) -> bool:
    """Whether tensors of these names keep name, shape and the model's dtype on their way to one device."""
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled() or load_config.device_mesh is not None:
        return False
    if load_config.hf_quantizer is not None or load_config.disable_mmap or only_device(load_config) is None:
        return False
    patterns = set(load_config.dtype_plan or ())  # of modules that stay in float32, the gate among them
    if patterns - {"router.gate"} or any("router" in name for name in names):
        return False  # the pattern is a regular expression
    renamings = load_config.weight_mapping or ()
    if any(
        "lora_" in target or "\\" in target for renaming in renamings for target in renaming.target_patterns
    ):
        return False  # another tensor may become a stack
    return not any(renaming._scoped_match(name) for renaming in renamings for name in names)


def only_device(load_config) -> torch.device | None:
    """Where the whole model goes, if that is a CPU or a CUDA device."""
    if load_config.device_map is None:
        return torch.device("cpu")
    if list(load_config.device_map) != [""] or load_config.device_map[""] == "disk":
        return None
    device = torch.device(load_config.device_map[""])
    return device if device.type == "cpu" or (device.type == "cuda" and device.index is not None) else None


def can_be_mapped(path: str) -> bool:
    """Whether transformers would map this file into memory, too."""
    return path.endswith(".safetensors") and sys.platform != "win32" and not _is_on_hf_mount(path)


def put_in(aside: dict[str, tuple], device: torch.device) -> None:
    stacks = {name: mapped[...] for name, (_, _, mapped, _) in aside.items()}
    if device.type == "cuda":
        large = [n for n, stack in stacks.items() if stack.nbytes > PIECE // 2 and stack.dtype == aside[n][3]]
        with ThreadPoolExecutor(READERS) as readers:
            copies = readers.map(lambda name: upload(stacks[name], device), large)
            stacks |= zip(large, copies, strict=True)
    for name, (layer, kind, _, dtype) in aside.items():
        parameter = nn.Parameter(stacks.pop(name).to(device, dtype))
        parameter._is_hf_initialized = True  # or transformers would initialise it
        setattr(layer, kind, parameter)


def upload(stack: torch.Tensor, device: torch.device) -> torch.Tensor:
    """By way of page-locked memory, twice as fast for large stacks: CUDA copies mapped memory for one thread
    at a time."""
    try:
        piece = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")  # PyTorch keeps it
    except RuntimeError:  # so much memory cannot be locked here
        return stack.to(device)
    there, stream = torch.empty_like(stack, device=device), torch.cuda.current_stream(device)
    source, target = (tensor.view(-1).view(torch.uint8).split(PIECE) for tensor in (stack, there))
    for mapped, part in zip(source, target, strict=True):
        piece.numpy()[: len(mapped)] = (
            mapped.numpy()
        )  # PyTorch's own copy would start threads for each of ours
        part.copy_(piece[: len(mapped)], non_blocking=True)
        stream.synchronize()  # before the piece is filled again
    return there


__all__ = ["FastLoadingMixin"]
