"""The expert layer: a frozen linear layer plus the low-rank updates of all experts, in two matrix products.

    sum_i w_i s_i B_i A_i x  =  B ((A x) * g)        g = (w * s), each entry repeated over its expert's rank

A is all experts' A_i stacked, B all their B_i, w the routing weights and s the LoRA scales. The weights of a
pass reach the layers through `use_experts`.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .arrow_dylora_moe import PROTOTYPES, LayerRouting, prototype


RankLayout = tuple[tuple[int, float], ...]  # rank and scale of every expert at one place
GATE_CLASS = re.compile(r".+(Router|Gate)")  # MixtralTopKRouter, DeepseekV3TopkRouter and others
PAST_TOKENS = (
    "Experts adapt a layer that every step runs over all past tokens (DeepSeek's `kv_b_proj`, Doge's `dt_proj`), whose "
    "weights are not kept: pass `use_cache=False`, or a strategy with one choice for all of a row's tokens, as 'best'."
)


class ActiveExperts:
    """The experts' weights for one pass, spread over the ranks once for each distinct rank layout.

    Args:
        weights: the one expert that acts, with weight 1, or weights `[batch or 1, sequence or 1,
            num_experts]`, or what lets every layer find its own.
        layouts: the distinct rank layouts of the model's expert layers.
        dtype: the dtype of the experts.
        tokens: how many tokens of each row the weights are for; `None`: all, including those in a cache.

    Attributes:
        single: the one expert that acts, or `None`.
        layer_routing: what lets every layer find its own weights, or `None`.
        compute: what computes a layer instead of its own forward, if it does not return `None`: fast decoding's kernels.
        scales: g of the formula above by rank layout, `[batch or 1, sequence or 1, R]`; else empty.
    """

    def __init__(
        self,
        weights: int | torch.Tensor | LayerRouting,
        layouts: list[RankLayout],
        dtype: torch.dtype,
        tokens: int | None = None,
    ):
        self.single: int | None = None
        self.tokens: int | None = None
        self.layer_routing: LayerRouting | None = None
        self.compute: Callable[[nn.Module, torch.Tensor], torch.Tensor | None] | None = None
        self.scales: dict[RankLayout, torch.Tensor] = {}
        if isinstance(weights, int):
            self.single = weights
            return
        if isinstance(weights, LayerRouting):
            self.layer_routing = weights
            return
        self.tokens = tokens
        for layout in layouts:
            # Here and not in the first layer that asks: a checkpointed layer runs without gradients at first.
            self.scales[layout] = spread_over_ranks(weights, layout).to(dtype)

    def with_scales(self, scales: tuple[torch.Tensor, ...]) -> "ActiveExperts":
        """Copy with other tensors for the scales, in the order of `self.scales`."""
        copy = ActiveExperts.__new__(ActiveExperts)
        copy.single = self.single
        copy.tokens = self.tokens
        copy.layer_routing = self.layer_routing
        copy.compute = self.compute
        copy.scales = dict(zip(self.scales, scales, strict=True))
        return copy


def spread_over_ranks(weights: torch.Tensor, layout: RankLayout) -> torch.Tensor:
    """Compute g of the formula above: `[..., num_experts]` -> `[..., R]`, R the sum of the ranks."""
    if len(set(layout)) == 1:
        rank, scale = layout[0]
        return (weights * scale).repeat_interleave(rank, dim=-1)
    parts = []
    for index, (rank, scale) in enumerate(layout):
        weight = weights[..., index : index + 1]  # [..., 1]
        parts.append((weight * scale).expand(*weights.shape[:-1], rank))
    return torch.cat(parts, dim=-1)


class _PassInProgress(threading.local):
    """What the expert layers read of the pass in progress in this thread.

    Weights cannot be passed as an argument, since the foundation's own forward calls the layers.
    """

    def __init__(self):  # instance attributes, since torch 2.7 cannot guard those of a class
        self.active: ActiveExperts | None = None  # `None` with the experts off
        self.running = False  # also true of a pass with the experts off


# Thread-local, since `torch.compile` traces no context variable; it guards this for the calling thread.
_pass_in_progress = _PassInProgress()


@contextmanager
def use_experts(active: ActiveExperts | None) -> Iterator[None]:
    """Apply `active` in every expert layer within the context; `None` switches the experts off."""
    outer_active = _pass_in_progress.active
    outer_running = _pass_in_progress.running
    _pass_in_progress.active = active
    _pass_in_progress.running = True
    try:
        yield
    finally:
        _pass_in_progress.active = outer_active
        _pass_in_progress.running = outer_running


def refuse_recomputation() -> None:
    """Refuse to recompute an expert layer during a backward pass without the weights of its forward pass.

    Raises:
        RuntimeError: this is such a backward pass.
    """
    if torch.compiler.is_compiling() or _pass_in_progress.running:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "An expert layer is recomputed in a backward pass and cannot know the experts of its forward pass: switch "
            "checkpointing on by `gradient_checkpointing_enable()` of the whole model, not of `model.foundation`, and not "
            "by a wrapper around layers (FSDP's activation checkpointing)."
        )


def refuse_offloaded(model: nn.Module, everything: bool = False) -> None:
    """Refuse a model whose experts or router (with `everything`, any weight) are offloaded.

    Raises:
        ValueError: a weight is not in the model.
    """
    for name, parameter in model.named_parameters():
        is_needed = everything or ".lora_" in name or name.startswith("router.")
        if parameter.is_meta and is_needed:
            raise ValueError(
                f"The weights of {name.rpartition('.')[0]!r} are offloaded, so they can be neither read nor changed: "
                "load the model without offloading (`device_map`)."
            )


def checkpoint_with_experts(checkpoint_function):
    """Wrap a checkpoint function so that recomputation gets the pass's scales, with gradients."""

    def checkpoint(function, *args, **kwargs):
        active = _pass_in_progress.active
        scales = () if active is None else tuple(active.scales.values())

        def run(*scales_and_args):
            inner = None if active is None else active.with_scales(scales_and_args[: len(scales)])
            with use_experts(inner):
                return function(*scales_and_args[len(scales) :])

        return checkpoint_function(run, *scales, *args, **kwargs)

    return checkpoint


class LowRankStacks(nn.Module):
    """The stacks `lora_A` and `lora_B` of all experts at one place; an expert is the same rows of both."""

    layout: RankLayout
    dropouts: nn.ModuleList
    frozen_experts: frozenset[int]
    has_merged_adapter: bool

    def rows(self, expert: int) -> slice:
        """Return one expert's rows of both stacks; none where it does not adapt this layer."""
        start = sum(rank for rank, _ in self.layout[:expert])
        return slice(start, start + self.layout[expert][0])

    def share_dropouts(self, dropouts: nn.ModuleList) -> None:
        """Refer to the model's dropouts, without making them submodules of this layer.

        Iterating over a model's modules would otherwise visit every expert's dropout once for each layer.
        """
        vars(self)["dropouts"] = dropouts

    def extend(self, layout: RankLayout) -> None:
        """Add experts after the existing ones, as rows at the end of the stacks, with B = 0."""
        added = sum(rank for rank, _ in layout) - self.lora_A.shape[0]
        self.layout = layout
        if added == 0:
            return
        rows_a = self.lora_A.new_zeros(added, *self.lora_A.shape[1:])
        nn.init.kaiming_uniform_(rows_a.view(-1, rows_a.shape[-1]), a=5**0.5)
        rows_b = self.lora_B.new_zeros(added, *self.lora_B.shape[1:])
        self.lora_A = _append_rows(self.lora_A, rows_a)
        self.lora_B = _append_rows(self.lora_B, rows_b)

    def _stack(self, name: str) -> torch.Tensor:
        """Return a stack in which the rows of frozen experts get no gradient."""
        stack = getattr(self, name)
        if not self.frozen_experts or not torch.is_grad_enabled():
            return stack
        parts = []
        for expert in range(len(self.layout)):
            rows = stack[self.rows(expert)]
            parts.append(rows.detach() if expert in self.frozen_experts else rows)
        return torch.cat(parts)


def _append_rows(stack: nn.Parameter, rows: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([stack.detach(), rows]), requires_grad=stack.requires_grad)


class DyloraMoeLinear(LowRankStacks):
    """A linear layer of the foundation with the experts' low-rank updates beside it.

    Parameters are the stacks of all experts: `lora_A` `[R, in_features]` and `lora_B` `[R, out_features]`
    (transposed), R the sum of the experts' ranks here; an expert is the same contiguous rows of both.
    The frozen layer is `base_layer`.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D` (GPT-2).
        layout: rank and scale of every expert here, see `DyloraMoeConfig.rank_layouts`.
        dropouts: every expert's dropout on the input of its A, while training; shared by a model's layers.
    """

    def __init__(self, base_layer: nn.Module, layout: RankLayout, dropouts: nn.ModuleList):
        super().__init__()
        in_features, out_features = linear_shape(base_layer)
        total_rank = sum(rank for rank, _ in layout)
        weight = base_layer.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        self.base_layer = base_layer
        self.layout = layout
        self.share_dropouts(dropouts)
        self.lora_A = nn.Parameter(torch.empty(total_rank, in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(total_rank, out_features, dtype=dtype, device=weight.device))
        self.frozen_experts: frozenset[int] = frozenset()
        self.has_merged_adapter = False  # in the frozen layer, which is then no longer the foundation's

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that reads a layer's weight, such as a head's."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        active = _pass_in_progress.active
        if active is not None and active.compute is not None:
            computed = active.compute(self, hidden_states)
            if computed is not None:
                return computed
        result = self.base_layer(hidden_states, *args, **kwargs)
        if active is None:
            refuse_recomputation()
            return result
        if active.tokens is not None and hidden_states.dim() > 2 and hidden_states.shape[-2] > active.tokens:
            raise ValueError(PAST_TOKENS)
        if active.single is not None and self.layout[active.single][0] == 0:
            return result
        return result + self.update(hidden_states, active).to(result.dtype)

    def update(self, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        """Compute what the active experts add to the product of `hidden_states` and the weight."""
        if active.layer_routing is not None:
            weights = active.layer_routing.weights(self, hidden_states)
            return self._mixed_update(
                hidden_states, spread_over_ranks(weights, self.layout).to(self.lora_A.dtype)
            )
        if active.single is None:
            return self._mixed_update(hidden_states, active.scales[self.layout])
        _, scale = self.layout[active.single]
        dropout = self.dropouts[active.single].p
        return self._low_rank_update(hidden_states, self.rows(active.single), dropout, scale)

    def _mixed_update(self, hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Compute the update of all experts.

        Args:
            hidden_states: `[batch, sequence, in_features]`.
            scale: g of the formula above, `[batch or 1, sequence or 1, R]`, or of the shape of `hidden_states`
                but for its last dimension.
        """
        scale = scale.to(hidden_states.device)
        if not self.training or not any(dropout.p for dropout in self.dropouts):
            return self._low_rank_update(hidden_states, slice(None), 0.0, scale)
        # A dropout mask belongs to one expert's input, as in PEFT, so no product can serve two experts.
        update = 0
        for expert, dropout in enumerate(self.dropouts):
            if self.layout[expert][0] > 0:
                rows = self.rows(expert)
                update = update + self._low_rank_update(hidden_states, rows, dropout.p, scale[..., rows])
        return update

    def _low_rank_update(
        self, hidden_states: torch.Tensor, rows: slice, dropout: float, scale: float | torch.Tensor
    ) -> torch.Tensor:
        """Compute B ((A x) * scale) with some rows of the stacks."""
        hidden_states = hidden_states.to(self.lora_A.dtype)
        if self.training and dropout:
            hidden_states = F.dropout(hidden_states, dropout)
        ranks = F.linear(hidden_states, self._stack("lora_A")[rows])  # [batch, sequence, rank]
        if isinstance(scale, torch.Tensor):
            scale = _fit_scale(scale.to(ranks.dtype), ranks)
        return (ranks * scale) @ self._stack("lora_B")[rows].to(ranks.dtype)

    # When PEFT unloads an adapter, it takes every module with a `base_layer` for one of its own, and calls
    # the next two methods. Its own layer is inside, in place of `base_layer`, and is called separately.

    def merge(self, *args, **kwargs) -> None:
        """Merge nothing: PEFT's own layer merges an adapter on top into the frozen layer."""
        self.has_merged_adapter = True

    def get_base_layer(self) -> "DyloraMoeLinear":
        """Return what is left without PEFT's layers: this layer."""
        return self

    def extra_repr(self) -> str:
        """Describe the layer, with the remedy where PEFT refuses it: PEFT's error shows this text."""
        total_rank = self.lora_A.shape[0]
        return f"num_experts={len(self.layout)}, {total_rank=}; for PEFT: model.peft_target_modules([<name>, ...])"

    def update_prototypes(self) -> None:
        """Compute every expert's prototype from its matrices, `[num_experts, in_features]`: see `arrow_dylora_moe`."""
        prototypes = torch.zeros(len(self.layout), self.lora_A.shape[1], device=self.lora_A.device)
        for expert, (rank, _) in enumerate(self.layout):
            if rank > 0:
                rows = self.rows(expert)
                prototypes[expert] = prototype(self.lora_A.detach()[rows], self.lora_B.detach()[rows].T)
        self.register_buffer(PROTOTYPES, prototypes)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` moves prototypes, and leaves them in float32.
        prototypes = self._buffers.get(PROTOTYPES)
        super()._apply(fn, recurse)
        if prototypes is not None and self.prototypes.dtype != prototypes.dtype:
            self.prototypes = prototypes.to(self.prototypes.device)
        return self

    def initialize_experts(self) -> None:
        """Initialise what was not read from a file: A random and B zero, so that the update starts at zero.

        As in https://arxiv.org/abs/2106.09685, section 4.1, and PEFT: A is Kaiming-uniform with a = sqrt(5).
        The bound depends on in_features alone, so all experts' A can be one tensor.
        """
        init.kaiming_uniform_(self.lora_A, a=5**0.5)
        init.zeros_(self.lora_B)
        if PROTOTYPES in self._buffers:
            init.zeros_(self.prototypes)


def _fit_scale(scale: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Bring `[batch or 1, sequence or 1, rank]` to a shape that broadcasts with `ranks`."""
    if scale.shape == ranks.shape:
        return scale
    if ranks.dim() == 2:  # foundations that flatten batch and sequence before a layer
        return scale.expand(*_batch_and_sequence(scale, ranks.shape[0]), -1).reshape(-1, scale.shape[-1])
    if ranks.dim() == 4:  # [batch, 1, past and present tokens, rank], DeepSeek's compressed keys and values
        return scale.unsqueeze(1)
    return scale


def _batch_and_sequence(scale: torch.Tensor, num_tokens: int) -> tuple[int, int]:
    """Return the batch size and sequence length that `num_tokens` flattened tokens came from.

    Raises:
        ValueError: the scale's shape does not say it.
    """
    batch, sequence = scale.shape[:2]
    if batch * sequence == num_tokens:
        return batch, sequence
    if sequence == 1 and num_tokens % batch == 0:
        return batch, num_tokens // batch
    raise ValueError(
        f"An adapted layer got {num_tokens} tokens without their batch shape, and the experts' weights are of shape "
        f"{tuple(scale.shape)}: adapt another layer, this one sees a selection of the tokens."
    )


def in_base_layer(name: str, adapted: set[str]) -> str:
    """Return the name of a foundation's parameter when the modules `adapted` are wrapped.

    The weight of an adapted module becomes `<module>.base_layer.weight`.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in adapted:
            return ".".join([module, "base_layer", *parts[end:]])
    return name


def is_gate(module: nn.Module) -> bool:
    """Say whether a module is the gate of a mixture-of-experts layer, with a weight of its own.

    The weight is of shape `[stacked experts, in_features]`.
    """
    if GATE_CLASS.fullmatch(type(module).__name__) is None:  # first, since it is the quicker question
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return `(in_features, out_features)` of a layer that experts can adapt.

    Raises:
        ValueError: the layer is neither a linear one nor a gate.
    """
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_gate(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    raise ValueError(
        "Experts adapt linear layers (nn.Linear, Conv1D) and gates of mixture-of-experts layers; this one is a "
        f"{type(layer).__name__}."
    )


def find_modules(targets: Sequence[str], modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find modules by their whole names or the ends of them, which is how PEFT reads a list of targets.

    Returns:
        The modules that are meant, in the order of `modules`, and the targets that mean none.
    """
    wanted = set(targets)
    found, used = [], set()
    for module in modules:
        parts = module.split(".")
        matching = wanted.intersection(".".join(parts[start:]) for start in range(len(parts)))
        if matching:
            found.append(module)
            used |= matching
    return found, [target for target in targets if target not in used]


class PeftTargetsMixin:
    """Tells PEFT where an adapter goes on a routed model."""

    def peft_target_modules(self, names: list[str]) -> list[str]:
        """Find the modules that `names` means, for PEFT's `target_modules`.

        The result fits its `feedforward_modules` and `modules_to_save`, too. PEFT replaces the layers that it
        adapts, and takes only those that it knows. For a layer that experts adapt this is the frozen one
        inside, `<layer>.base_layer`.

        Args:
            names: whole names of modules or their ends, such as `"q_proj"`.

        Returns:
            Whole names, in the order of the model's modules.

        Raises:
            ValueError: a name that no module has.
        """
        modules = dict(self.named_modules())
        found, missing = find_modules(names, modules)
        if missing:
            raise ValueError(
                f"No module of {type(self).__name__} is called {missing}, as a whole or at its end."
            )
        return [
            f"{name}.base_layer" if isinstance(modules[name], DyloraMoeLinear) else name for name in found
        ]

    def refuse_adapters_around_experts(self) -> None:
        """Refuse an adapter around an expert layer, which PEFT would remove together with the adapter.

        PEFT wraps a layer that it knows by the class of its weight (torchao), without an error of its own.

        Raises:
            ValueError: there is such an adapter.
        """
        for name, layer in self.expert_layers().items():
            if not isinstance(layer, LowRankStacks):
                raise ValueError(
                    f"A {type(layer).__name__} was put around layer {name!r}, which experts adapt: adapters go inside, on "
                    "`<layer>.base_layer`. Reload the model and let `model.peft_target_modules([<name>, ...])` name "
                    "PEFT's `target_modules`."
                )


__all__ = [
    "ActiveExperts",
    "DyloraMoeLinear",
    "PeftTargetsMixin",
    "checkpoint_with_experts",
    "find_modules",
    "in_base_layer",
    "is_gate",
    "linear_shape",
    "refuse_offloaded",
    "use_experts",
]
