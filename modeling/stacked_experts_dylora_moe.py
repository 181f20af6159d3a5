"""The low-rank updates of a mixture-of-experts foundation: of its stacked experts, and of its gates.

Such a foundation has experts of its own, called stacked experts here, whose matrices are parameters of three
dimensions, one stacked expert after the other. An expert of the mixture adapts such a parameter as PEFT's
`target_parameters` do: with an A and a B for each stacked expert e. A token x that the foundation sends to e
gets

    sum_i w_i s_i B_ie A_ie x  =  B_e ((A_e x) * g)        g as in `experts_dylora_moe`

A gate multiplies tokens by a weight W of its own, and chooses stacked experts by the product:

    (W + sum_i w_i s_i B_i A_i) x
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import initialization as init

from .configuration_dylora_moe import STACKED_PARAMETERS
from .experts_dylora_moe import (
    ActiveExperts,
    DyloraMoeLinear,
    LowRankStacks,
    RankLayout,
    _batch_and_sequence,
    _pass_in_progress,
    refuse_recomputation,
)


COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Attributes that transformers' `use_experts_implementation` sets on modules with the standard forward, which
# is the one computed here.
MARKS = ("has_gate", "has_bias", "is_transposed")


def stack_shape(experts: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Return `(number of stacked experts, in_features, out_features)` of a parameter of stacked experts.

    Raises:
        ValueError: it is none, or the module computes something else than transformers' standard experts.
    """
    found = dict(experts.named_parameters(recurse=False))
    names = [name for name in found if name in STACKED_PARAMETERS]
    needed = ["gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"]
    is_standard = all(hasattr(experts, mark) for mark in MARKS) and names == needed
    if parameter not in names or not is_standard or any(found[name].dim() != 3 for name in names):
        raise ValueError(
            f"Experts adapt the parameters gate_up_proj (or up_proj) and down_proj of a mixture-of-experts layer whose "
            f"experts are stacked as transformers has it; {parameter!r} of this {type(experts).__name__} is none of these."
        )
    count, first, second = found[parameter].shape
    return (count, first, second) if experts.is_transposed else (count, second, first)


def rows_of_stack(
    lora_a: torch.Tensor, lora_b: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert PEFT's matrices into one expert's rows of both stacks.

    PEFT's A lists a stacked expert's ranks one after the other, its B a rank's stacked experts
    (`ParamWrapper.get_delta_weight`).

    Args:
        lora_a: `[count * r, in_features]`.
        lora_b: `[out_features, r * count]`.
        count: the number of stacked experts; 0 for a linear layer, which has none.

    Returns:
        `[r, count, in_features]` and `[r, count, out_features]`; of a linear layer `[r, in_features]` and
        `[r, out_features]`.
    """
    return rows_of_a(lora_a, count), rows_of_b(lora_b, count)


def rows_of_a(lora_a: torch.Tensor, count: int) -> torch.Tensor:
    """Convert PEFT's A into rows of a stack."""
    return lora_a.unflatten(0, (count, -1)).transpose(0, 1) if count else lora_a


def rows_of_b(lora_b: torch.Tensor, count: int) -> torch.Tensor:
    """Convert PEFT's B into rows of a stack."""
    return lora_b.T.unflatten(0, (-1, count)) if count else lora_b.T


def as_in_peft(rows_a: torch.Tensor, rows_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert one expert's rows into PEFT's A `[.., in_features]` and B `[out_features, ..]`."""
    return a_as_in_peft(rows_a), b_as_in_peft(rows_b)


def a_as_in_peft(rows: torch.Tensor) -> torch.Tensor:
    """Convert rows of a stack into PEFT's A."""
    return rows.transpose(0, 1).flatten(0, 1) if rows.dim() == 3 else rows


def b_as_in_peft(rows: torch.Tensor) -> torch.Tensor:
    """Convert rows of a stack into PEFT's B."""
    return rows.flatten(0, 1).T if rows.dim() == 3 else rows.T


class StackedUpdate(LowRankStacks):
    """The low-rank updates of one parameter of stacked experts.

    Parameters are the stacks of all experts: `lora_A` `[R, stacked experts, in_features]` and `lora_B`
    `[R, stacked experts, out_features]`, R the sum of the experts' ranks here.
    """

    def __init__(
        self, shape: tuple[int, int, int], layout: RankLayout, dropouts: nn.ModuleList, weight: torch.Tensor
    ):
        super().__init__()
        count, in_features, out_features = shape
        total_rank = sum(rank for rank, _ in layout)
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        self.layout = layout
        self.share_dropouts(dropouts)
        kind = {"dtype": dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(total_rank, count, in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(total_rank, count, out_features, **kind))
        self.frozen_experts: frozenset[int] = frozenset()
        self.has_merged_adapter = False  # in the frozen parameter

    def initialize_experts(self) -> None:
        """Initialise as linear layers: A Kaiming-uniform over `in_features`, B zero."""
        bound = self.lora_A.shape[-1] ** -0.5
        init.uniform_(self.lora_A, -bound, bound)
        init.zeros_(self.lora_B)


class DyloraMoeStackedExperts(nn.Module):
    """Stacked experts of the foundation (`base_layer`) with a `StackedUpdate` for each adapted parameter."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.updates = nn.ModuleDict()

    def add_update(self, parameter: str, layout: RankLayout, dropouts: nn.ModuleList) -> None:
        """Add the updates of a parameter.

        Raises:
            ValueError: it is none that experts can adapt.
        """
        shape = stack_shape(self.base_layer, parameter)
        update = StackedUpdate(shape, layout, dropouts, getattr(self.base_layer, parameter))
        self.updates[parameter] = update.train(self.training)

    # The next two methods are called by PEFT, as those of `DyloraMoeLinear`.

    def merge(self, *args, **kwargs) -> None:
        """Merge nothing: PEFT's own layer merges an adapter on top into the frozen parameters."""
        for update in self.updates.values():
            update.has_merged_adapter = True

    def get_base_layer(self) -> "DyloraMoeStackedExperts":
        """Return what is left without PEFT's layers: this module."""
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute what the foundation's own module does, with the updates.

        Args:
            hidden_states: `[tokens, hidden_size]`.
            top_k_index: the stacked experts of each token, `[tokens, top_k]`.
            top_k_weights: their weights, `[tokens, top_k]`.
        """
        active = _pass_in_progress.active
        if active is None:
            refuse_recomputation()
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        updates = {}
        for name, update in self.updates.items():
            if active.single is None or update.layout[active.single][0] > 0:
                updates[name] = update
        if not updates:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        with ExitStack() as stack:
            for module in (self.base_layer, *updates.values()):
                stack.enter_context(_on_device(module))
            return self._adapted(active, updates, hidden_states, top_k_index, top_k_weights)

    def _adapted(
        self,
        active: ActiveExperts,
        updates: dict[str, StackedUpdate],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the foundation's loop over its experts, with the updates in its two products."""
        base = self.base_layer
        if not all(hasattr(base, mark) for mark in MARKS):
            raise ValueError(
                f"A {type(base).__name__} stands in the place of stacked experts that experts adapt: put no adapter on "
                "those."
            )
        if any(parameter.dtype not in COMPUTED for parameter in base.parameters()):
            raise ValueError(
                f"The stacked experts of this {type(base).__name__} are quantised, and experts adapt them: load the model "
                "without quantising those."
            )
        scales = {name: _token_scales(active, update, len(hidden_states)) for name, update in updates.items()}

        def linear(name: str, number: int, inputs: torch.Tensor, token_idx: torch.Tensor) -> torch.Tensor:
            """Compute one product of a stacked expert, with the update: `[tokens, out_features]`."""
            weight = getattr(base, name)[number]
            bias = getattr(base, f"{name}_bias")[number] if base.has_bias else None
            outputs = F.linear(inputs, weight.T if base.is_transposed else weight, bias)
            if name not in updates:
                return outputs
            scale = scales[name] if active.single is not None else scales[name][token_idx]
            return outputs + _update(updates[name], inputs, number, active.single, scale).to(outputs.dtype)

        final_hidden_states = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= base.num_experts:  # with expert parallelism, one of another process
                continue
            token_idx, top_k_pos = torch.where(top_k_index == number)
            if base.has_gate:
                current = linear("gate_up_proj", number, hidden_states[token_idx], token_idx)
                current = base._apply_gate(current)
            else:
                current = linear("up_proj", number, hidden_states[token_idx], token_idx)
                current = base.act_fn(current)
            current = linear("down_proj", number, current, token_idx)
            if getattr(base, "has_post_expert_norm", False):
                current = base.post_expert_norm(current)
            current = current * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, current.to(final_hidden_states.dtype))
        return final_hidden_states


@contextmanager
def _on_device(module: nn.Module) -> Iterator[None]:
    """Bring offloaded weights to their device within the context, as accelerate does around a forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def _token_scales(active: ActiveExperts, update: StackedUpdate, num_tokens: int) -> float | torch.Tensor:
    """Return the scale of the one expert, or g of every token, `[tokens, R]`."""
    if active.single is not None:
        return update.layout[active.single][1]
    scale = active.scales[update.layout].to(update.lora_A.device)
    return scale.expand(*_batch_and_sequence(scale, num_tokens), -1).reshape(-1, scale.shape[-1])


def _update(
    update: StackedUpdate, inputs: torch.Tensor, number: int, single: int | None, scale: float | torch.Tensor
) -> torch.Tensor:
    """Compute the update of the tokens of one stacked expert.

    Args:
        inputs: `[tokens, in_features]`.
        number: the stacked expert.
        single: the one expert that acts, or `None`.
        scale: that expert's, or `[tokens, R]`.
    """
    if single is not None:
        return _low_rank(update, inputs, number, update.rows(single), update.dropouts[single].p, scale)
    if not update.training or not any(dropout.p for dropout in update.dropouts):
        return _low_rank(update, inputs, number, slice(None), 0.0, scale)
    # A dropout mask belongs to one expert's input, as in PEFT, so no product can serve two experts.
    result = 0
    for expert, dropout in enumerate(update.dropouts):
        if update.layout[expert][0] > 0:
            rows = update.rows(expert)
            result = result + _low_rank(update, inputs, number, rows, dropout.p, scale[:, rows])
    return result


def _low_rank(
    update, inputs, number: int, rows: slice, dropout: float, scale: float | torch.Tensor
) -> torch.Tensor:
    """Compute B_e ((A_e x) * scale) with some rows of the stacks."""
    inputs = F.dropout(inputs.to(update.lora_A.dtype), dropout, update.training)
    ranks = F.linear(inputs, update._stack("lora_A")[rows, number])  # [tokens, rank]
    if isinstance(scale, torch.Tensor):
        scale = scale.to(ranks.dtype)
    return (ranks * scale) @ update._stack("lora_B")[rows, number].to(ranks.dtype)


# Gates

PRODUCTS = (F.linear, torch.mm)  # the functions by which gates multiply by their weight


class DyloraMoeFoundationGate(DyloraMoeLinear):
    """A gate of the foundation (`base_layer`) with the experts' updates in its product.

    Stacks are those of a linear layer: `lora_A` `[R, in_features]`, `lora_B` `[R, stacked experts]`. What a
    gate does with the product differs from family to family, so its own forward runs.
    """

    @property
    def e_score_correction_bias(self) -> torch.Tensor:
        """The frozen gate's, for foundations that choose outside of the gate."""
        return self.base_layer.e_score_correction_bias

    def forward(self, *args, **kwargs):
        """Compute what the foundation's own gate does, with the updates.

        Raises:
            ValueError: it does not multiply by its weight once, by one of `PRODUCTS`.
        """
        active = _pass_in_progress.active
        if active is None:
            refuse_recomputation()
            return self.base_layer(*args, **kwargs)
        if active.single is not None and self.layout[active.single][0] == 0:
            return self.base_layer(*args, **kwargs)
        return self._adapted(*args, **kwargs)

    @torch.compiler.disable  # a compiled product would get the update twice
    def _adapted(self, *args, **kwargs):
        with _UpdatedProduct(self) as product:
            result = self.base_layer(*args, **kwargs)
        if product.count != 1:
            raise ValueError(
                f"Experts adapt a {type(self.base_layer).__name__}, in whose forward {product.count} products were found, "
                "and not just the one with its weight: take it out of their `target_modules`."
            )
        return result


class _UpdatedProduct(TorchFunctionMode):
    """Adds the updates to the product in a gate's forward, and counts the products."""

    def __init__(self, layer: DyloraMoeFoundationGate):
        super().__init__()
        self.layer = layer
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in PRODUCTS:
            return result
        self.count += 1
        update = self.layer.update(args[0], _pass_in_progress.active)
        return result + update.to(result.dtype)


__all__ = [
    "DyloraMoeFoundationGate",
    "DyloraMoeStackedExperts",
    "StackedUpdate",
    "as_in_peft",
    "rows_of_stack",
    "stack_shape",
]
