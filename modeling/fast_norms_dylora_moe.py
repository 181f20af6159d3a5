"""Norms in one kernel each, for the prompts and the steps of fast decoding. Optional, too.

Knows RMS norms by their name, and by trying out whether PyTorch's gives the same numbers. Knows no model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class FusedNorms:
    """The norms of a foundation that PyTorch computes in one kernel where transformers' code takes eight."""

    def __init__(self, foundation: nn.Module):
        self.norms = [module for module in foundation.modules() if _is_rms_norm(module)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the context, and in this thread alone, they run in one kernel."""
        replaced = [module for module in self.norms if "forward" not in vars(module)]
        try:
            for module in replaced:
                module.forward = _in_one_kernel(module, module.forward, threading.get_ident())
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)


def _in_one_kernel(module: nn.Module, original: Callable, owner: int) -> Callable:
    def forward(hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        weight = module.weight
        if args or kwargs or hidden_states.dtype != weight.dtype or threading.get_ident() != owner:
            return original(hidden_states, *args, **kwargs)
        return F.rms_norm(hidden_states, weight.shape, weight, _epsilon(module))

    return forward


def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float) or "forward" in vars(module):
        return False
    if weight is None or weight.dim() != 1:
        return False
    hidden_states = trial(4, weight.shape[0], like=weight)
    try:
        return close(F.rms_norm(hidden_states, weight.shape, weight, epsilon), module(hidden_states))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # a norm of that name that takes more than hidden states


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def trial(*shape: int, like: torch.Tensor, start: int = 1) -> torch.Tensor:
    """Numbers to try functions with; no random ones, since sampling would draw others afterwards."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, device=like.device).sin().view(shape).to(like.dtype)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 4 * torch.finfo(other.dtype).eps
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


__all__ = ["FusedNorms", "close", "trial"]
