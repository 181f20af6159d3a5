"""The expert layer: a frozen layer plus the low-rank updates of all experts in two matrix products.

    sum_i w_i s_i B_i A_i x  =  B ((A x) * g)        g = (w * s), each entry repeated over its expert's rank

Knows how weights reach the layers during a pass. Knows nothing about how the weights come about.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D


RankLayout = tuple[tuple[int, float], ...]
# How transformers calls the classes of a foundation's gates: MixtralTopKRouter, DeepseekV3TopkRouter, …
GATE_CLASS = re.compile(r".+(Router|Gate)")
PAST_TOKENS = (
    "Experts adapt a layer that every step runs over all past tokens (DeepSeek's `kv_b_proj`, Doge's `dt_proj`), whose "
    "weights are not kept: pass `use_cache=False`, or a strategy with one choice for all of a row's tokens, as 'best'."
)


class ActiveExperts:
    """The experts' weights for one pass, spread over the ranks once for each distinct rank layout.

    Args:
        weights: `int`, the one expert that acts, with weight 1, or a `torch.Tensor` of shape
            `[batch or 1, sequence or 1, num_experts]`.
        layouts: the distinct rank layouts of the model's expert layers.
        dtype: the dtype of the experts.
        tokens: how many tokens of each row the weights are for; `None`: all, those in a cache, too.
    """

    def __init__(
        self, weights: int | torch.Tensor, layouts: list[RankLayout], dtype: torch.dtype, tokens=None
    ):
        self.single = weights if isinstance(weights, int) else None
        self.tokens: int | None = tokens if self.single is None else None
        self.scales: dict[RankLayout, torch.Tensor] = {}
        if self.single is None:
            # Eagerly and not in the first layer that asks: a checkpointed layer runs without gradients at
            # first.
            self.scales = {layout: spread_over_ranks(weights, layout).to(dtype) for layout in layouts}

    def with_scales(self, scales: tuple[torch.Tensor, ...]) -> "ActiveExperts":
        """The same experts with other tensors for the scales, in the order of `self.scales`."""
        copy = ActiveExperts.__new__(ActiveExperts)
        copy.single, copy.tokens = self.single, self.tokens
        copy.scales = dict(zip(self.scales, scales, strict=True))
        return copy


def spread_over_ranks(weights: torch.Tensor, layout: RankLayout) -> torch.Tensor:
    """g of the formula above: `[..., num_experts]` -> `[..., sum of ranks]`."""
    if len(set(layout)) == 1:
        return (weights * layout[0][1]).repeat_interleave(layout[0][0], dim=-1)
    parts = [
        (weights[..., index : index + 1] * scale).expand(*weights.shape[:-1], rank)
        for index, (rank, scale) in enumerate(layout)
    ]
    return torch.cat(parts, dim=-1)


class _PassInProgress(threading.local):
    """Weights cannot be passed through a foundation's own forward, so they travel beside it, apart in each
    thread."""

    def __init__(self):  # not a class attribute: torch 2.7 cannot guard one
        self.active: ActiveExperts | None = None  # which is when the experts are off
        self.running = False  # a pass with the experts off is one too
        self.add_update = None  # of fast decoding: whether it added a layer's update


# A thread-local object and no context variable: `torch.compile` traces the first and guards it for the
# calling thread.
_pass_in_progress = _PassInProgress()


@contextmanager
def use_experts(active: ActiveExperts | None) -> Iterator[None]:
    """Within the context, every expert layer applies `active`; `None` leaves the foundation alone."""
    before = _pass_in_progress.active, _pass_in_progress.running
    _pass_in_progress.active, _pass_in_progress.running = active, True
    try:
        yield
    finally:
        _pass_in_progress.active, _pass_in_progress.running = before


def refuse_recomputation() -> None:
    """Raises RuntimeError: an expert layer is recomputed during a backward pass without the weights of its
    pass."""
    if torch.compiler.is_compiling() or _pass_in_progress.running:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "An expert layer is recomputed in a backward pass and cannot know the experts of its forward pass: switch "
            "checkpointing on by `gradient_checkpointing_enable()` of the whole model, not of its foundation, and not "
            "by a wrapper around layers (FSDP's activation checkpointing)."
        )


def refuse_offloaded(model: nn.Module, everything: bool = False) -> None:
    """Raises ValueError: a weight of the experts or the router (with `everything`, any) is not in the
    model."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and (everything or ".lora_" in name or name.startswith("router.")):
            raise ValueError(
                f"The weights of {name.rpartition('.')[0]!r} are offloaded, so they can be neither read nor changed: "
                "load the model without offloading (`device_map`)."
            )


def checkpoint_with_experts(checkpoint_function):
    """Make the pass's scales an argument of a checkpoint, so that recomputing a layer sees them, with
    gradients."""

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
    """The stacks `lora_A` and `lora_B` of all experts at one place: an expert is the same contiguous rows of
    both."""

    layout: RankLayout
    dropouts: nn.ModuleList
    frozen_experts: frozenset[int]
    has_merged_adapter: bool

    def rows(self, expert: int) -> slice:
        """The rows of both stacks that belong to one expert; empty where it does not adapt this layer."""
        start = sum(rank for rank, _ in self.layout[:expert])
        return slice(start, start + self.layout[expert][0])

    def share_dropouts(self, dropouts: nn.ModuleList) -> None:
        """Refer to the model's dropouts, which are no part of this layer: going through all layers must not
        go through all experts in each."""
        vars(self)["dropouts"] = dropouts

    def extend(self, layout: RankLayout) -> None:
        """Take on experts that come after those there are, as rows at the end of the stacks, with B = 0."""
        added = sum(rank for rank, _ in layout) - self.lora_A.shape[0]
        self.layout = layout
        if added == 0:
            return
        for name in ("lora_A", "lora_B"):
            stack = getattr(self, name)
            rows = torch.zeros(added, *stack.shape[1:], dtype=stack.dtype, device=stack.device)
            if name == "lora_A":
                nn.init.kaiming_uniform_(rows.view(-1, rows.shape[-1]), a=5**0.5)
            grown = nn.Parameter(torch.cat([stack.detach(), rows]), requires_grad=stack.requires_grad)
            setattr(self, name, grown)

    def _stack(self, name: str) -> torch.Tensor:
        """A stack whose frozen experts' rows get no gradient."""
        stack = getattr(self, name)
        if not self.frozen_experts or not torch.is_grad_enabled():
            return stack
        parts = [
            stack[self.rows(expert)].detach() if expert in self.frozen_experts else stack[self.rows(expert)]
            for expert in range(len(self.layout))
        ]
        return torch.cat(parts)


class DyloraMoeLinear(LowRankStacks):
    """A linear layer of the foundation with the experts' low-rank updates beside it.

    Parameters are the stacks of all experts: `lora_A` `[R, in_features]` and `lora_B` `[R, out_features]`
    (transposed), R the sum of the experts' ranks here; an expert is the same contiguous rows of both.
    The frozen layer is `base_layer`.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D` (GPT-2).
        layout: rank and scale of every expert here, see `DyloraMoeConfig.rank_layouts`.
        dropouts: every expert's dropout on the input of its A, while training; the layers of a model share
            them.
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
        return self.base_layer.weight  # for code that looks at a layer's weight, as at that of a head

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        result = self.base_layer(hidden_states, *args, **kwargs)
        active = _pass_in_progress.active
        if active is None:
            refuse_recomputation()
            return result
        if active.tokens is not None and hidden_states.dim() > 2 and hidden_states.shape[-2] > active.tokens:
            raise ValueError(PAST_TOKENS)
        if _pass_in_progress.add_update and _pass_in_progress.add_update(self, hidden_states, result, active):
            return result
        if active.single is not None and self.layout[active.single][0] == 0:
            return result
        return result + self.update(hidden_states, active).to(result.dtype)

    def update(self, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        """What the experts that act add to the product of `hidden_states` and the weight."""
        if active.single is None:
            return self._mixed(hidden_states, active.scales[self.layout])
        scale, dropout = self.layout[active.single][1], self.dropouts[active.single].p
        return self._low_rank(hidden_states, self.rows(active.single), dropout, scale)

    def _mixed(self, hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """All experts: `hidden_states` `[batch, sequence, in]`, `scale` `[batch or 1, sequence or 1, R]`."""
        scale = scale.to(hidden_states.device)
        if not self.training or not any(dropout.p for dropout in self.dropouts):
            return self._low_rank(hidden_states, slice(None), 0.0, scale)
        # A dropout mask belongs to one expert's input, as in PEFT, so no product can serve two experts.
        return sum(
            self._low_rank(hidden_states, self.rows(expert), dropout.p, scale[..., self.rows(expert)])
            for expert, dropout in enumerate(self.dropouts)
            if self.layout[expert][0] > 0
        )

    def _low_rank(
        self, hidden_states: torch.Tensor, rows: slice, dropout: float, scale: float | torch.Tensor
    ) -> torch.Tensor:
        hidden_states = F.dropout(hidden_states.to(self.lora_A.dtype), dropout, self.training)
        ranks = F.linear(hidden_states, self._stack("lora_A")[rows])  # [batch, sequence, rank]
        if isinstance(scale, torch.Tensor):
            scale = scale.to(ranks.dtype)
            if ranks.dim() == 2:  # foundations that flatten batch and sequence before a layer
                scale = scale.expand(*_batch_and_sequence(scale, ranks.shape[0]), -1).reshape(
                    -1, scale.shape[-1]
                )
            elif (
                ranks.dim() == 4
            ):  # [batch, 1, past and present tokens, rank], DeepSeek's compressed keys and values
                scale = scale.unsqueeze(1)
        return (ranks * scale) @ self._stack("lora_B")[rows].to(ranks.dtype)

    # PEFT takes every module with a `base_layer` for one of its own when it unloads an adapter, and asks it
    # to merge and what is left of it. Its own layer is inside, in place of `base_layer`, and is asked
    # separately.

    def merge(self, *args, **kwargs) -> None:
        """Merge nothing: an adapter on top is merged into the frozen layer by PEFT's own layer."""
        self.has_merged_adapter = True

    def get_base_layer(self) -> "DyloraMoeLinear":
        """What is left once PEFT's layers are taken off: this one."""
        return self

    def extra_repr(self) -> str:
        """Name the remedy where PEFT refuses this layer, too: its error shows the layer."""
        total_rank = self.lora_A.shape[0]
        return f"num_experts={len(self.layout)}, {total_rank=}; for PEFT: model.peft_target_modules([<name>, ...])"

    def initialize_experts(self) -> None:
        """A random and B zero, so that the update starts at zero (https://arxiv.org/abs/2106.09685, section
        4.1), A Kaiming-uniform with a = sqrt(5), as PEFT has it; leaves alone what was read from a file."""
        init.kaiming_uniform_(
            self.lora_A, a=5**0.5
        )  # its bound depends on in_features alone, so experts can share it
        init.zeros_(self.lora_B)


def _batch_and_sequence(scale: torch.Tensor, num_tokens: int) -> tuple[int, int]:
    """Batch and sequence that `num_tokens` flattened tokens came from.

    Raises:
        ValueError: it cannot be told from the scale's own shape.
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
    """The name of a foundation's parameter once the modules `adapted` are wrapped:
    `<module>.base_layer.weight`."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in adapted:
            return ".".join([module, "base_layer", *parts[end:]])
    return name


def is_gate(module: nn.Module) -> bool:
    """Whether this is the gate of a mixture-of-experts layer, with a weight of its own, `[stacked experts,
    in_features]`."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return (
        weight is not None and weight.dim() == 2 and GATE_CLASS.fullmatch(type(module).__name__) is not None
    )


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a layer that experts can adapt.

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


class PeftTargetsMixin:
    """What tells PEFT where an adapter goes on a routed model."""

    def peft_target_modules(self, names: list[str]) -> list[str]:
        """Find the modules that `names` means in PEFT's `target_modules` (or `feedforward_modules`,
        `modules_to_save`).

        PEFT replaces the layers that it adapts, and takes only those that it knows. Of a layer that experts
        adapt this is the frozen one inside, `<layer>.base_layer`.

        Args:
            names: whole names of modules or their ends, such as `"q_proj"`.

        Returns:
            Whole names, in the order of the model's modules.

        Raises:
            ValueError: a name that no module has.
        """
        modules = dict(self.named_modules())
        ends = {name: f".{name}" for name in names}
        unknown = [name for name in ends if not any(f".{module}".endswith(ends[name]) for module in modules)]
        if unknown:
            raise ValueError(
                f"No module of {type(self).__name__} is called {unknown}, as a whole or at its end."
            )
        return [
            f"{name}.base_layer" if isinstance(module, DyloraMoeLinear) else name
            for name, module in modules.items()
            if f".{name}".endswith(tuple(ends.values()))
        ]

    def refuse_adapters_around_experts(self) -> None:
        """Raises ValueError: PEFT put an adapter around an expert layer, which it would take away with the
        adapter. It does so, without an error of its own, where it knows a layer by the class of its weight
        (torchao)."""
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
    "in_base_layer",
    "is_gate",
    "linear_shape",
    "refuse_offloaded",
    "use_experts",
]
