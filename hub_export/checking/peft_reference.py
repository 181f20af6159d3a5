"""A source's side of the check: its quantities as PEFT computes them, one strategy after the other.

Slow and plain. For weights that differ from token to token there is a hook on each adapter's `lora_B`, or where
that is no module, as in AdaLoRA, on what goes into the adapter. Stacked experts with adapters on their parameters, and
gates, are run by the foundation's own code, token by token, with PEFT's delta added to the token's experts, or to
the gate's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import ParamWrapper

from . import rounding
from .peft_layers import nested_wrappers


DEFAULT_TEMPERATURE = 2.0  # of training runs that do not store theirs


class Reference:
    """A source as PEFT computes it: `model` with the adapters `names`, and perhaps a `gate` with its settings.

    Args:
        subtracted: the name of an adapter that is subtracted from each of the others.
    """

    def __init__(
        self,
        model: PeftModel,
        names: list[str],
        gate: dict[str, Any] | None,
        precision: torch.dtype = torch.float32,
        subtracted: str | None = None,
    ):
        self.model = model.eval()
        self.names = names
        self.subtracted = subtracted
        self.gate = None
        if gate is not None:
            self.gate = {**gate, **{name: gate[name].float().to(precision) for name in ("weight", "bias")}}
        self.precision = precision
        rounding.convert(model, precision)
        # The plain loop over a mixture-of-experts foundation's own experts: the other ways know no float64.
        model.get_base_model().set_experts_implementation("eager")

    def quantities(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute logits [rows, tokens, vocabulary] by strategy, and "router logits" [rows, tokens, experts]."""
        return dict(self._quantities(rows))

    def measure(self, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Compute `quantities`, and how far rounding moves each; nothing can be computed afterwards."""
        gate = [] if self.gate is None else [self.gate["weight"], self.gate["bias"]]
        return rounding.measure(
            lambda choice: self._quantities(rows, choice), [*self.model.parameters(), *gate]
        )

    def _quantities(
        self, rows: torch.Tensor, router_logits: torch.Tensor | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Give name and value of each quantity.

        Args:
            router_logits: those by which sparse weights choose; None for the gate's own.
        """
        count = len(self.names)
        with self.model.disable_adapter():
            output = self._run(rows, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        yield "base", output.logits
        for index, name in enumerate(self.names):
            yield f"single:{index}", self._alone(rows, index, name)
        self.model.base_model.set_adapter(self._all_names())
        ones = torch.ones((*rows.shape, count), dtype=self.precision)
        yield "uniform", self._mix(rows, ones / count)
        if self.gate is None:
            return
        if self.gate["router_input"] == "experts_sum":
            with nullcontext() if self.subtracted is None else self._weighted(ones):
                hidden = self._run(rows, output_hidden_states=True).hidden_states[-1]
        logits = (hidden @ self.gate["weight"].T + self.gate["bias"]).detach()
        yield "router logits", logits
        choosing = logits if router_logits is None else router_logits
        yield "router", self._mix(rows, self._routing_weights(choosing))
        # What training weights by, and what shows the temperature, which sparse weights do without.
        temperature = self.gate["router_temperature"] or DEFAULT_TEMPERATURE
        yield "router, dense", self._mix(rows, torch.softmax(logits / temperature, dim=-1))

    def _run(self, rows: torch.Tensor, **options: Any) -> Any:
        with rounding.computing_in(self.precision):
            return self.model(rows, **options)

    def _all_names(self) -> list[str]:
        return self.names if self.subtracted is None else [*self.names, self.subtracted]

    def _alone(self, rows: torch.Tensor, index: int, name: str) -> torch.Tensor:
        if self.subtracted is None:
            self.model.base_model.set_adapter([name])
            return self._run(rows).logits
        self.model.base_model.set_adapter(self._all_names())
        weights = torch.zeros((*rows.shape, len(self.names)), dtype=self.precision)
        weights[..., index] = 1
        return self._mix(rows, weights)

    def _mix(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with self._weighted(weights):
            return self._run(rows).logits

    def _routing_weights(self, logits: torch.Tensor) -> torch.Tensor:
        if self.gate["router_mode"] == "dense":
            return torch.softmax(logits / (self.gate["router_temperature"] or DEFAULT_TEMPERATURE), dim=-1)
        top = logits.topk(self.gate["num_experts_per_tok"], dim=-1)
        masked = torch.full_like(logits, float("-inf")).scatter(-1, top.indices, top.values)
        return torch.softmax(masked, dim=-1)

    @contextmanager
    def _weighted(self, weights: torch.Tensor):
        """Weigh the active adapters, adapter i by `weights[..., i]`; weights are [rows, tokens, experts].

        The one that is subtracted from each of them has the weight -(the sum of theirs).
        """
        handles, names = [], self._all_names()
        if self.subtracted is not None:
            weights = torch.cat([weights, -weights.sum(dim=-1, keepdim=True)], dim=-1)
        wrapped = [module for path, module in self.model.named_modules() if _is_outermost(path, module)]
        for module in wrapped:
            compute = _gate_by_token if module.parameter_name == "weight" else _token_by_token
            module.forward = partial(compute, module, weights.flatten(0, 1), names)
        for path, module in self.model.named_modules():
            for index, name in enumerate(names):
                if path.endswith(f".lora_B.{name}"):
                    handles.append(module.register_forward_hook(_times(weights[..., index])))
                if isinstance(module, AdaLoraLayer) and name in module.lora_A:
                    handles.append(
                        module.lora_dropout[name].register_forward_hook(_times(weights[..., index]))
                    )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in wrapped:
                del module.forward


def _is_outermost(path: str, module: torch.nn.Module) -> bool:
    return isinstance(module, ParamWrapper) and not path.endswith(".base_layer")


def _token_by_token(
    wrapper: ParamWrapper,
    weights: torch.Tensor,
    names: list[str],
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run stacked experts, adapter i weighed by `weights[:, i]`; each argument has a row for a token."""
    experts = wrapper.get_base_layer()
    deltas = _deltas(wrapper, names)
    outputs = []
    for token, index in enumerate(top_k_index):
        chosen = {name: parameter[index] for name, parameter in experts.named_parameters(recurse=False)}
        for name, of_adapters in deltas.items():
            chosen[name] = chosen[name] + sum(weights[token, i] * delta[index] for i, delta in of_adapters)
        place = torch.arange(len(index))[None]  # of the token's own experts among those chosen
        inputs = hidden[token, None], place, top_k_weights[token, None]
        outputs.append(torch.func.functional_call(experts, chosen, inputs))
    return torch.cat(outputs)


def _gate_by_token(
    wrapper: ParamWrapper,
    weights: torch.Tensor,
    names: list[str],
    hidden: torch.Tensor,
    *others: torch.Tensor,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run the gate of a mixture-of-experts layer, as `_token_by_token`; of `others`, whole numbers belong to tokens."""
    gate, deltas = wrapper.get_base_layer(), _deltas(wrapper, names)["weight"]
    outputs = []
    for token, inputs in enumerate(hidden.flatten(0, -2)):
        changed = gate.weight + sum(weights[token, i] * delta for i, delta in deltas)
        of_token = (other if other.is_floating_point() else other.flatten()[token, None] for other in others)
        outputs.append(torch.func.functional_call(gate, {"weight": changed}, (inputs[None], *of_token)))
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def _deltas(wrapper: ParamWrapper, names: list[str]) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Collect for each parameter the number of every adapter that is on it, and its delta in the parameter's shape."""
    deltas = {}
    for layer in nested_wrappers(wrapper):
        shape = layer.get_param().shape  # PEFT's delta is a matrix where there is one expert alone
        deltas[layer.parameter_name] = [
            (i, layer.get_delta_weight(name).reshape(shape))
            for i, name in enumerate(names)
            if name in layer.lora_A
        ]
    return deltas


def _times(weight: torch.Tensor):
    # some layers see rows and tokens as one dimension
    return lambda module, inputs, output: output * weight.reshape(*output.shape[:-1], 1)
