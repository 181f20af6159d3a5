"""The experts' stacks and the gate, from a repo's files to the layers of vLLM's that they act on.

A repo of layout `full` holds stacks beside the base model's weights; one of layout `adapter` holds a PEFT folder an
expert. Both become stacks by the names of the base model's own layers, which are checked and then placed.
"""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from dylora_moe.modeling.configuration_dylora_moe import DyloraMoeConfig
from dylora_moe.modeling.loading_dylora_moe import expert_stacks
from dylora_moe.modeling.saving_dylora_moe import ADAPTER_WEIGHTS, ROUTER_WEIGHTS

from .routed_linear import Part, RoutedLinear, own_outputs, whole_outputs


Edges = tuple[torch.Tensor, torch.Tensor]  # first column and first row of a weight in a file
Stacks = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by place: lora_A [R, in] and lora_B [R, out]


def read_adapters(
    location: str, revision: str | None, config: DyloraMoeConfig
) -> tuple[Stacks, dict[str, torch.Tensor]]:
    """Read the stacks and the gate of a repo of layout `adapter`.

    Args:
        location: a folder or a Hub id.

    Returns:
        The stacks, and the gate's tensors by name.

    Raises:
        ValueError: an expert's matrices are missing or of another rank, or it has more than the config says.
        OSError: a file is missing.
    """
    where = {"revision": revision}
    named = expert_stacks(location, config, dict.fromkeys(config.adapted_modules(), 0), where)
    stacks = {}
    for name in config.adapted_modules():
        stacks[name] = tuple(named.pop(f"foundation.{name}.{kind}") for kind in ("lora_A", "lora_B"))
    for name in config.expert_names:
        for key in sorted(named):  # what is left of an expert's file
            if key.startswith(f"experts.{name}."):
                path = f"{location}/experts/{name}/{ADAPTER_WEIGHTS}"
                further = key.removeprefix(f"experts.{name}.")
                raise ValueError(f"{path} holds {further}, of which config.json says nothing.")
    gate = {}
    if config.has_gate:
        with safe_open(cached_file(location, ROUTER_WEIGHTS, **where), framework="pt") as file:
            gate = {name.removeprefix("gate."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return stacks, gate


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that holds NaN or an infinity, which a server would turn into a token all the same.

    Raises:
        ValueError: it does; names it.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinity: its file is damaged or lacks a part of it, or training failed."
        )


def check_stacks(stacks: Stacks, config: DyloraMoeConfig) -> None:
    """Compare the stacks with the config.

    Raises:
        ValueError: one is missing, has other ranks or holds NaN, or none is in the config; names it.
    """
    layouts = config.rank_layouts()
    for name in sorted(set(layouts) | set(stacks)):
        if name not in layouts:
            raise ValueError(f"The weights have experts at {name}, and config.json has none there.")
        if name not in stacks:
            raise ValueError(f"The weights lack the experts' stacks of {name}, which config.json names.")
        rank = sum(rank for rank, _ in layouts[name])
        for kind, stack in zip(("lora_A", "lora_B"), stacks[name], strict=True):
            if stack.dim() != 2 or stack.shape[0] != rank:
                raise ValueError(
                    f"{name}.{kind} is of shape {list(stack.shape)}, and by the ranks in config.json it has {rank} rows."
                )
            check_finite(f"{name}.{kind}", stack)


def place_experts(
    streams: list[nn.Module],
    stacks: Stacks,
    config: DyloraMoeConfig,
    weights: torch.Tensor,
    dtype: torch.dtype,
    edges: dict[str, Edges],
) -> None:
    """Put every stack beside the layer of vLLM's that it adapts, in each of the given streams.

    Args:
        streams: those in which experts act.
        weights: see `RoutedLinear`.
        dtype: of the base model; stacks of more precision keep theirs.
        edges: of the weights of the layers that experts adapt, by name.

    Raises:
        ValueError: vLLM has no linear layer for a stack, or one of another shape or order; names both.
    """
    layouts = config.rank_layouts()
    parts: dict[str, list[Part]] = {}
    names = _VllmNames(streams[0])
    for name, (lora_a, lora_b) in stacks.items():
        module, index = names.find(name)
        part = Part(index, layouts[name], lora_a, lora_b)
        _check_place(name, streams[0].get_submodule(module), part, edges.get(name))
        parts.setdefault(module, []).append(part)
    for module, of_layer in parts.items():
        base_layer = streams[0].get_submodule(module)
        of_layer.sort(key=lambda part: part.index or 0)
        stored = [tensor.dtype for part in of_layer for tensor in (part.lora_A, part.lora_B)]
        products = dtype
        for stored_dtype in stored:
            products = torch.promote_types(products, stored_dtype)
        routed = RoutedLinear(base_layer, of_layer, weights, products)
        for stream in streams:
            _replace(stream, base_layer, routed)


def _replace(stream: nn.Module, layer: nn.Module, by: nn.Module) -> None:
    """Replace a layer wherever a stream holds it: some modules are handed a layer of their parent's."""
    for module in list(stream.modules()):
        for name, child in list(module._modules.items()):
            if child is layer and module is not by:
                setattr(module, name, by)


def _check_place(name: str, layer: nn.Module, part: Part, edges: Edges | None) -> None:
    """Make sure that a stack fits the layer of vLLM's beside which it is put, and that the layer's order is the file's.

    vLLM reorders the rows of some layers when it loads them (queries, keys and values that a file has head by head);
    updates would then be added in another order.

    Raises:
        ValueError: it does not fit.
    """
    wholes = whole_outputs(layer)
    if part.index is not None and part.index >= len(wholes):
        raise ValueError(f"Experts adapt {name}, and vLLM has no such part of its layer.")
    wanted = [layer.input_size, sum(wholes) if part.index is None else wholes[part.index]]
    found = [part.lora_A.shape[1], part.lora_B.shape[1]]
    if found != wanted:
        raise ValueError(
            f"The experts' stacks of {name} are of {found[0]} inputs and {found[1]} outputs, and the base model's layer "
            f"is of {wanted[0]} and {wanted[1]}: they were trained on another one."
        )
    if edges is None:
        raise ValueError(f"The files have no {name}.weight, which experts adapt.")
    if isinstance(layer, RowParallelLinear) and layer.tp_rank > 0:
        return  # the edges are of the first process's inputs
    for first, columns in own_outputs(layer, part.index, torch.arange(wanted[1])[None]):
        here = layer.weight[first : first + columns.shape[1], 0].cpu()
        stored = [edge[columns[0]] for edge in edges if len(edge) == wanted[1]]
        if not any(torch.equal(here, edge.to(here.dtype)) for edge in stored):
            raise ValueError(
                f"Experts adapt {name}, whose outputs vLLM has in another order than the files. Serve a mixture without "
                "it, or merge one expert with `dylora-moe merge`."
            )


class _VllmNames:
    """Where vLLM's implementation of a base model has the layers that transformers' has.

    Args:
        stream: the implementation.
    """

    def __init__(self, stream: nn.Module):
        self.layers = {name: layer for name, layer in stream.named_modules() if isinstance(layer, LinearBase)}
        self.family = type(stream).__name__
        self.mapper = getattr(stream, "hf_to_vllm_mapper", None)
        # By the last part of a name: that of the fused layer, and which of its outputs.
        self.fused: dict[str, tuple[str, int]] = {}
        for fused, kids in getattr(stream, "packed_modules_mapping", {}).items():
            self.fused |= {kid: (fused, index) for index, kid in enumerate(kids)}
        shards = {"q": 0, "k": 1, "v": 2}
        for kid, (fused, shard) in getattr(self.mapper, "orig_to_new_stacked", {}).items():
            index = shards.get(shard, shard)
            self.fused[kid.strip(".").rpartition(".")[2]] = (fused.strip(".").rpartition(".")[2], index)

    def find(self, name: str) -> tuple[str, int | None]:
        """Give the layer of vLLM's that holds one of transformers', and which of its outputs.

        Raises:
            ValueError: there is none.
        """
        parent, _, leaf = name.rpartition(".")
        candidates: list[tuple[str, int | None]] = [(name, None)]
        if leaf in self.fused:
            fused, index = self.fused[leaf]
            candidates.append((f"{parent}.{fused}", index))
        if self.mapper is not None:
            mapped = self.mapper.map_name(f"{name}.weight")
            if mapped is not None:
                index = self.fused[leaf][1] if leaf in self.fused else None
                candidates.append((mapped.removesuffix(".weight"), index))
        for module, index in candidates:
            if module in self.layers and (index is None or isinstance(index, int)):
                return module, index
        raise ValueError(
            f"Experts adapt {name}, and vLLM's {self.family} has no linear layer for it, or one whose update it "
            "cannot take (the head, experts of the base model, gates). Serve a mixture without these, or merge one "
            "expert with `dylora-moe merge`."
        )


__all__ = [
    "Edges",
    "check_finite",
    "check_stacks",
    "place_experts",
    "read_adapters",
]
