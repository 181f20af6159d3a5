"""Larger kernels for fast decoding: experts' updates over several layers, fused norms. Optional.

RMS norms are found by their name, and by trying out whether PyTorch's gives the same numbers.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from .experts_dylora_moe import ActiveExperts, DyloraMoeLinear, RankLayout, _pass_in_progress
from .fast_buffers_dylora_moe import close, trial


try:
    from .fast_kernels_dylora_moe import LARGEST_RANK, add_few, are_few, multiply_few
except ImportError:  # no Triton, or that file was left empty or out
    LARGEST_RANK = 0

    def are_few(*tensors) -> bool:
        return False


class SharedProducts:
    """The experts' updates with one product for the A of all layers with the same input, and one for each B.

    Which layers those are shows in a first pass; then `read_stacks` copies their A together, again for each
    `generate`, since training changes them in place. Where one expert acts alone, its B are copied as well:
    experts of the same ranks and scales take turns in the same copies, so that one graph serves them all.
    """

    def __init__(self):
        # By the layer that reads the tensor first and the first expert like the one that acts, or `None`
        # where all do.
        self.groups: dict[tuple, list[DyloraMoeLinear]] = {}
        self.copies: dict[tuple, torch.Tensor] = {}  # of a group's A and, for one expert, its B
        self.lora_A: dict[tuple, torch.Tensor] = {}  # within those, `[ranks of all layers, in_features]`
        self.lora_B: dict[
            tuple, torch.Tensor
        ] = {}  # within those, `[rank, out_features]`, by the layer itself
        self.first_alike: list[int] = []  # for every expert, the first of the same ranks and scales
        self.up_to_date: int | None = None  # for which single expert the copies are
        self._finish()

    def tell_apart(self, num_experts: int, layouts: list[RankLayout]) -> None:
        """Find out which experts are alike."""
        experts = [tuple(layout[expert] for layout in layouts) for expert in range(num_experts)]
        self.first_alike = [experts.index(expert) for expert in experts]

    def alike(self, single: int | None) -> int | None:
        return None if single is None else self.first_alike[single]

    def keep(self, wanted: set) -> None:
        """Forget the copies for one expert but for these, each the first of those that are alike."""
        for known in (self.groups, self.copies, self.lora_A, self.lora_B):
            for key in [key for key in known if key[1] is not None and key[1] not in wanted]:
                del known[key]

    @contextmanager
    def in_use(self, of_all_rows: int | None = None, one_a_row: bool = False):
        """Let expert layers take their updates from here within the context, which is one pass.

        `of_all_rows`: the one expert of every row, if there is one; `one_a_row`: every row has one expert.
        """
        _pass_in_progress.add_update = self.add_update
        self.of_all_rows, self.one_a_row = of_all_rows, one_a_row
        try:
            yield
        except BaseException:
            # A pass that breaks off may have seen a part of a group only. Those with copies were seen whole.
            self.groups = {key: group for key, group in self.groups.items() if key in self.copies}
            raise
        finally:
            _pass_in_progress.add_update = None
            self._finish()

    def _finish(self) -> None:
        self.of_all_rows, self.one_a_row = None, False
        self.input: tuple[torch.Tensor, ActiveExperts] | None = None
        self.first: DyloraMoeLinear | None = None  # of the layers that read that input
        self.ranks: dict[DyloraMoeLinear, torch.Tensor] = {}
        self.scales: dict[tuple, torch.Tensor] = {}

    def read_stacks(self, single: int | None) -> None:
        """Copy what passes under one expert alone, or under all (`None`), are going to read."""
        self.up_to_date, alike = single, self.alike(single)
        for key, group in self.groups.items():
            if key[1] != alike or (single is None and len(group) < 2):
                continue
            parts = [layer.lora_A[_rows(layer, single)] for layer in group]
            if single is not None:
                parts += [layer.lora_B[_rows(layer, single)].to(parts[0].dtype) for layer in group]
            flat = [part.flatten() for part in parts]
            if key in self.copies:
                torch.cat(flat, out=self.copies[key])
                continue
            copies = torch.cat(flat)
            views = [
                copy.view_as(part)
                for copy, part in zip(copies.split(list(map(len, flat))), parts, strict=True)
            ]
            total = sum(len(part) for part in parts[: len(group)])
            self.lora_A[key] = copies[: total * parts[0].shape[1]].view(total, -1)
            self.lora_B.update(zip(((layer, alike) for layer in group), views[len(group) :], strict=False))
            self.copies[key] = copies  # at last, for what breaks off in between

    def add_update(self, layer, hidden_states, result, active: ActiveExperts) -> bool:
        """Add the layer's update to `result` in place; false where the layer must do it itself."""
        single = self.of_all_rows if active.single is None else active.single
        if single is None:
            if hidden_states.dim() != 3 or not layer.lora_A.dtype == hidden_states.dtype == result.dtype:
                return False
            if active.scales[layer.layout].shape[1] not in (1, hidden_states.shape[1]):
                return False  # a head that sees the last of a prompt's tokens
        elif layer.layout[single][0] == 0:
            return True
        hidden_states = hidden_states.to(layer.lora_A.dtype)  # another tensor is nobody else's input
        if self.input is None or self.input[0] is not hidden_states or self.input[1] is not active:
            if self.input is not None and self.input[1] is not active:
                self.scales = {}
            self.input, self.first, self.ranks = (hidden_states, active), layer, {}
        key = layer, self.alike(single)
        if layer not in self.ranks:
            self._note(key, first=(self.first, key[1]))
            self.ranks.update(self._multiply(key, single))
        ranks, scale = self.ranks[layer], 1.0 if single is None else layer.layout[single][1]
        copied = single == self.up_to_date and key in self.lora_B
        lora_B = self.lora_B[key] if copied else layer.lora_B[_rows(layer, single)].to(ranks.dtype)
        result = result.view(-1, result.shape[-1])
        if ranks.dtype != result.dtype:
            result.add_(ranks @ lora_B, alpha=scale)
        elif self._largest_alone(layer, single) <= LARGEST_RANK and are_few(result, lora_B):
            add_few(result, ranks, lora_B, scale)
        else:
            result.addmm_(ranks, lora_B, alpha=scale)
        return True

    def _note(self, key: tuple, first: tuple) -> None:
        """Which layers read what `first` read first."""
        group = self.groups.setdefault(first, [])
        if key[0] not in group and first in self.copies:  # which stay as they are
            self.groups.setdefault(key, [key[0]])
        elif key[0] not in group:
            group.append(key[0])

    def _multiply(self, key: tuple, single: int | None) -> dict[DyloraMoeLinear, torch.Tensor]:
        """Multiply A by the input, for a layer or all of its group: `[batch * sequence, rank]`.

        Scaled unless one expert acts.
        """
        copied = single == self.up_to_date and key in self.copies
        group = self.groups[key] if copied else [key[0]]
        rows = [_rows(layer, single) for layer in group]
        lora_A = self.lora_A[key] if copied else group[0].lora_A[rows[0]]
        scales = None if single is not None else self._joined_scales(tuple(layer.layout for layer in group))
        inputs = self.input[0].reshape(-1, lora_A.shape[1])
        if are_few(inputs, lora_A) and (scales is None or scales[..., 0].numel() in (1, len(inputs))):
            ranks = multiply_few(inputs, lora_A, None if scales is None else scales.flatten(0, 1))
        else:
            ranks = F.linear(self.input[0], lora_A)
            ranks = (ranks if scales is None else ranks * scales).view(-1, ranks.shape[-1])
        return dict(
            zip(group, ranks.split_with_sizes([each.stop - each.start for each in rows], dim=-1), strict=True)
        )

    def _largest_alone(self, layer: DyloraMoeLinear, single: int | None) -> float:
        """The largest rank that may act in a row, if that is one expert's."""
        ranks = [rank for rank, _ in layer.layout] if single is None else [layer.layout[single][0]]
        return max(ranks) if self.one_a_row or single is not None else float("inf")

    def _joined_scales(self, layouts: tuple[RankLayout, ...]) -> torch.Tensor:
        """`[batch or 1, sequence or 1, ranks of all layers]`"""
        if layouts not in self.scales:
            self.scales[layouts] = torch.cat([self.input[1].scales[layout] for layout in layouts], dim=-1)
        return self.scales[layouts]


def _rows(layer: DyloraMoeLinear, single: int | None) -> slice:
    return slice(0, len(layer.lora_A)) if single is None else layer.rows(single)


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
                module.forward = OneKernel(module)
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)


class OneKernel:
    """What stands in the place of a norm's `forward`."""

    def __init__(self, module: nn.Module):
        self.module, self.owner = module, threading.get_ident()

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        weight = self.module.weight
        if args or kwargs or hidden_states.dtype != weight.dtype or threading.get_ident() != self.owner:
            return type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        return F.rms_norm(hidden_states, weight.shape, weight, _epsilon(self.module))

    def __reduce__(self):
        return getattr, (self.module, "forward")  # for a copy that another thread makes meanwhile, its own


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(_epsilon(module), float):
        return False
    if weight is None or weight.dim() != 1 or replaced_forward(module) is not None:
        return False
    # In float32, too, since half precision would take much for the same; at two sizes, for where epsilon
    # goes.
    return all(
        _gives_the_same(norm, size) for norm in (module, deepcopy(module).float()) for size in (1.0, 1e-3)
    )


def _gives_the_same(norm: nn.Module, size: float) -> bool:
    hidden_states = size * trial(4, norm.weight.shape[0], like=norm.weight)
    try:
        expected = type(norm).forward(norm, hidden_states)
        return close(F.rms_norm(hidden_states, norm.weight.shape, norm.weight, _epsilon(norm)), expected)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # a norm of that name that takes more than hidden states


def replaced_forward(module: nn.Module) -> Callable | None:
    """Return what replaced a module's own `forward`, but not what another thread's prefill put there.

    That may be another copy of this file, as from another repo.
    """
    forward = vars(module).get("forward")
    return None if type(forward).__name__ == OneKernel.__name__ else forward


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


__all__ = ["FusedNorms", "SharedProducts", "close", "replaced_forward", "trial"]
