"""The check of a router in every layer: are the prototypes those of the experts, and does the repo route by them?

It shares no code with the model: prototypes are tried by the equation that they solve, and the routed logits
are those of the foundation with a plain hook on every adapted layer, which loops over the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..tensors.mixture import ArrowRouter, Expert
from ..tensors.stored_tensors import StoredTensor
from . import rounding
from .comparison import Computed


# What `prototype_error` may be: rounding to float32 alone makes it 1e-7, another vector up to 1.
LARGEST_ERROR = 1e-6


def prototype_error(
    experts: list[Expert], prototypes: Mapping[str, StoredTensor], dtype: torch.dtype | None = None
) -> tuple[float, str]:
    """Measure how far prototypes are from solving the equation of a top right singular vector.

    With M = B A of an expert on a layer, s its largest singular value and v the prototype, that is

        |M^T M v - s^2 v| / s^2,  or  ||v| - 1|  if that is larger;

    it knows no sign, and where s is that of several vectors any of them solves it. Infinite where v should be
    zero and is not (M is zero there, or the expert does not adapt the layer), and where something is no number.

    Args:
        prototypes: by layer, [num_experts, in_features].
        dtype: what the experts are rounded to first.

    Returns:
        The largest error, and which expert's on which layer it is.
    """
    worst, where = 0.0, "no layer"
    for module, stored in prototypes.items():
        for vector, expert in zip(stored.read(), experts, strict=True):
            factors = None
            if module in expert.layers:
                factors = [matrix.to(dtype or matrix.dtype).double() for matrix in expert.read(module)]
            error = _error(vector.double(), factors)
            if error > worst:
                worst, where = error, f"{module}, expert {expert.name}"
    return worst, where


def _error(vector: torch.Tensor, factors: list[torch.Tensor] | None) -> float:
    largest = torch.zeros(())
    if not all(tensor.isfinite().all() for tensor in (vector, *(factors or ()))):
        return float("inf")
    if factors is not None:
        lora_a, lora_b = factors
        # M has the singular values of the product of the triangular factors, which is small.
        largest = torch.linalg.matrix_norm(torch.linalg.qr(lora_b).R @ torch.linalg.qr(lora_a.T).R.T, 2)
    if largest == 0:
        return float("inf") if vector.any() else 0.0
    product = lora_a.T @ (lora_b.T @ (lora_b @ (lora_a @ vector)))
    error = (product / largest**2 - vector).norm()
    return float(torch.maximum(error, (vector.norm() - 1).abs()))


def routed_quantities(
    foundation: nn.Module,
    experts: list[Expert],
    router: ArrowRouter,
    prototypes: Mapping[str, StoredTensor],
    rows: torch.Tensor,
    precision: torch.dtype,
    dtype: torch.dtype | None,
) -> Computed:
    """Compute the logits of the strategy `router`, and how far rounding moves them.

    In float32 those of a choice among experts are left out: two as good as equal scores are no wrong choice.

    Args:
        foundation: rounded as an export does; it gets hooks.
        rows: token ids, [rows, tokens].
        dtype: what the experts are rounded to first.
    """
    rounding.convert(foundation, precision)
    foundation.set_experts_implementation("eager")
    layers = {
        module: _Layer(module, experts, stored, precision, dtype) for module, stored in prototypes.items()
    }
    for module, layer in layers.items():
        layer.put_on(foundation.get_submodule(module))
    is_dense = router.router_mode == "dense" or (
        router.router_mode == "auto" and not all(expert.mature for expert in experts)
    )
    chooses = any(router.num_experts_per_tok < len(layer.vectors) for layer in layers.values())

    def quantities() -> Iterator[tuple[str, torch.Tensor]]:
        counts = {"router, dense": len(experts)}
        if is_dense:
            counts["router"] = len(experts)
        elif not chooses or precision == torch.float64:
            counts["router"] = router.num_experts_per_tok
        for name, count in counts.items():
            for layer in layers.values():
                layer.weigh = partial(_weights, num_experts=count, temperature=router.router_temperature)
            with rounding.computing_in(precision):
                yield name, foundation(rows).logits

    tensors = [tensor for layer in layers.values() for tensor in layer.tensors()]
    return Computed(*rounding.measure(lambda choice: quantities(), [*foundation.parameters(), *tensors]))


class _Layer:
    """What the experts that adapt a layer add to it, one after the other."""

    def __init__(
        self,
        module: str,
        experts: list[Expert],
        prototypes: StoredTensor,
        precision: torch.dtype,
        dtype: torch.dtype | None,
    ):
        self.vectors, self.pairs, self.scales = [], [], []
        for vector, expert in zip(prototypes.read(), experts, strict=True):
            if module in expert.layers:
                layer = expert.layers[module]
                matrices = [matrix.to(dtype or matrix.dtype).to(precision) for matrix in expert.read(module)]
                self.vectors.append(vector.to(precision))
                self.pairs.append(matrices)
                self.scales.append(layer.lora_alpha / (layer.rank**0.5 if expert.use_rslora else layer.rank))

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from self.vectors
        for pair in self.pairs:
            yield from pair

    def put_on(self, module: nn.Module) -> None:
        """Make a module of the foundation compute with the updates."""
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(self._add_updates)
        else:  # what a gate of a mixture-of-experts layer does with its product is its own
            module.forward = partial(self._run_gate, module, module.forward)

    def _weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the weights of the experts that adapt this layer, [..., experts]."""
        return self.weigh(torch.stack([(hidden @ vector).abs() for vector in self.vectors], dim=-1))

    def _add_updates(
        self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        (hidden,) = inputs
        weights = self._weights(hidden)
        for index, ((lora_a, lora_b), scale) in enumerate(zip(self.pairs, self.scales, strict=True)):
            output = output + weights[..., index, None] * scale * (hidden @ lora_a.T @ lora_b.T)
        return output

    def _run_gate(
        self, gate: nn.Module, forward: Callable, hidden: torch.Tensor, *others: torch.Tensor
    ) -> Any:
        """Run a gate token by token, with a weight of each token's own; of `others`, whole numbers belong to tokens."""
        own, outputs = gate.weight.data, []
        for token, inputs in enumerate(hidden.flatten(0, -2)):
            of_token = (
                other if other.is_floating_point() else other.flatten()[token, None] for other in others
            )
            weights = self._weights(inputs)
            for weight, (lora_a, lora_b), scale in zip(weights, self.pairs, self.scales, strict=True):
                gate.weight.data = gate.weight.data + weight * scale * (lora_b @ lora_a)
            outputs.append(forward(inputs[None], *of_token))
            gate.weight.data = own
        if isinstance(outputs[0], torch.Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def _weights(scores: torch.Tensor, num_experts: int, temperature: float) -> torch.Tensor:
    """Compute softmax(scores / temperature) over the largest `num_experts`, [..., experts]."""
    smallest = scores.topk(min(num_experts, scores.shape[-1]), dim=-1).values[..., -1:]
    return torch.softmax((scores / temperature).masked_fill(scores < smallest, float("-inf")), dim=-1)


__all__ = ["LARGEST_ERROR", "prototype_error", "routed_quantities"]
