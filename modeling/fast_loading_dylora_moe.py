"""Reading the experts' stacks of a repo of layout `full` straight from its files. Optional.

transformers takes half a millisecond of Python for every tensor that it loads, and the stacks are more tensors than the
foundation has. So where a whole model goes to one device, transformers is handed a model without stacks, and they are put in
afterwards; everywhere else, and where the files do not hold exactly the stacks that the config describes, transformers reads
them and says what is wrong. Knows how transformers treats a tensor, and nothing about how a model computes.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
from safetensors import safe_open
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from .layouts_dylora_moe import HUB_OPTIONS, weight_files


# Under these arguments and no others a stack is what the file holds, in the model's dtype, beside the layer's own weight.
PLAIN = {"config", "dtype", "torch_dtype", "device_map", "attn_implementation", "trust_remote_code", *HUB_OPTIONS}
PLAIN |= {"adapter_kwargs", "code_revision", "_commit_hash", "_from_auto"}  # what `AutoModelForCausalLM` adds
SEVERAL_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")
READERS = 4  # threads, as many as transformers has
STACK = r"\.lora_[AB]$"

# The repo that is being loaded in this thread: its place, and arguments for the Hub.
_repo: ContextVar[tuple[str, dict] | None] = ContextVar("_repo", default=None)


class FastLoadingMixin:
    """For a model with `expert_layers()`, before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        device_map = kwargs.get("device_map")
        spread = isinstance(device_map, dict) or device_map in SEVERAL_DEVICES
        parallel = is_deepspeed_zero3_enabled() or is_fsdp_enabled()
        if pretrained_model_name_or_path is None or args or spread or parallel or set(kwargs) - PLAIN:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        where = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        token = _repo.set((str(pretrained_model_name_or_path), where))
        try:
            model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            _repo.reset(token)
        put_in(model, model.__dict__.pop("_stacks_aside", {}))
        return model

    def post_init(self):
        super().post_init()
        if _repo.get() is not None:
            self._stacks_aside = set_aside(self, *_repo.get())


def set_aside(model, location: str, where: dict) -> dict[tuple[nn.Module, str], tuple]:
    """Take the stacks out of a model that transformers is about to load: (layer, name) -> (slice of a file, dtype).

    Returns:
        Nothing, and the model as it was, where the files hold other stacks than the model has, or transformers would
        convert some.
    """
    in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())} - {"router.gate"}
    if in_float32 or getattr(model.config, "quantization_config", None) is not None:
        return {}
    here = {
        f"foundation.{name}.{kind}": (layer, kind)
        for name, layer in model.expert_layers().items()
        for kind in ("lora_A", "lora_B")
    }
    stored = stored_stacks(location, where)
    shapes = {name: list(getattr(layer, kind).shape) for name, (layer, kind) in here.items()}
    if not here or {name: stack.get_shape() for name, stack in stored.items()} != shapes:
        return {}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), STACK}
    aside = {}
    for name, (layer, kind) in here.items():
        aside[layer, kind] = (stored[name], getattr(layer, kind).dtype)
        setattr(layer, kind, None)
    return aside


def stored_stacks(location: str, where: dict) -> dict:
    """Slices by name, of files that transformers has downloaded already; none where they are no safetensors."""
    try:
        paths = weight_files(location, None, {**where, "force_download": False, "local_files_only": True})
    except OSError:
        return {}
    files = [safe_open(path, framework="pt") for path in paths]
    names = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118  (not a dict)
    return {name: file.get_slice(name) for name, file in names if re.search(STACK, name)}


def put_in(model, aside: dict[tuple[nn.Module, str], tuple]) -> None:
    if not aside:
        return
    model._keys_to_ignore_on_load_unexpected.discard(STACK)

    def read(entry) -> torch.Tensor:
        (layer, _), (stack, dtype) = entry
        return stack[...].to(layer.weight.device, dtype)

    with ThreadPoolExecutor(READERS) as readers:
        for (layer, kind), stack in zip(aside, readers.map(read, aside.items()), strict=True):
            setattr(layer, kind, nn.Parameter(stack))
            getattr(layer, kind)._is_hf_initialized = True  # as transformers marks what it has read


__all__ = ["FastLoadingMixin"]
