"""transformers' conversion of a checkpoint's tensors on loading: renamed, stacked, or cut into several.

It asks transformers' own machinery (`transformers.core_model_loading`, which has no public form), on the meta
device, which stored tensors make up each tensor of a model, and lets it do the same with their numbers when
that is read. Of the operations it is known only that a row of a stack is made of as many tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError, one_line
from ..tensors.stored_tensors import StoredTensor, of_tensor


class UnknownConversion(Exception):
    """This version of transformers does it in another way; no fault of the checkpoint's."""


@dataclass(frozen=True)
class Parts:
    """The stored tensors that one operation takes together.

    Attributes:
        converter: transformers' `WeightConverter`; it is never used itself, as using it up is how it works.
        target: the (first) tensor of the model that comes out of it.
        members: each with the pattern that its name matched, in the order in which they are stacked.
    """

    converter: Any
    target: str
    members: list[tuple[str, str, StoredTensor]]

    def convert(self, model: nn.Module, content: Callable[[StoredTensor], Any]) -> dict[str, torch.Tensor]:
        """Give what comes out, by the model's names.

        `content` gives a tensor, or what will give one when it is called.
        """
        converter = copy.deepcopy(self.converter)
        for pattern, key, tensor in self.members:
            converter.add_tensor(self.target, key, pattern, content(tensor))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @property
    def is_stack(self) -> bool:
        """Whether a row of what comes out is made of the member of that number, one for each pattern."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        first, *others = self.converter.operations
        side_by_side = all(isinstance(operation, Concatenate) and operation.dim != 0 for operation in others)
        return isinstance(first, MergeModulelist) and first.dim == 0 and side_by_side

    @property
    def stacks_outputs(self) -> bool:
        """Whether it is a stack of matrices, of several of them one below the other."""
        from transformers.core_model_loading import Concatenate

        others = self.converter.operations[1:]
        return self.is_stack and all(isinstance(each, Concatenate) and each.dim == 1 for each in others)

    def rows(self, start: int, stop: int) -> Parts:
        """Give those of some rows of a stack."""
        of_pattern: dict[str, list[tuple[str, str, StoredTensor]]] = {}
        for member in self.members:
            of_pattern.setdefault(member[0], []).append(member)
        return replace(
            self, members=[member for group in of_pattern.values() for member in group[start:stop]]
        )

    def describe(self) -> str:
        keys = [key for _, key, _ in self.members]
        return keys[0] if len(keys) == 1 else f"{len(keys)} tensors, {keys[0]} to {keys[-1]}"


def by_model_name(
    stored: dict[str, StoredTensor], model: nn.Module
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Give a checkpoint's tensors by the model's names, made of their parts when they are read.

    Args:
        stored: by their names in the checkpoint.
        model: a model of transformers, which needs no weights.

    Returns:
        The tensors that the model has a place for, whatever their shapes are, and the stored names that it
        has none for.

    Raises:
        InputError: parts of one tensor do not fit together.
        UnknownConversion: how transformers converts cannot be found out.
    """
    try:
        found, groups, unknown = _assign(stored, model)
    except Exception as error:  # whatever may be named or called otherwise
        raise UnknownConversion(one_line(error)) from error
    for parts in groups.values():
        for name, made in _outcome(parts, model).items():
            found.setdefault(name, _stored(parts, model, name, made))
    return found, unknown


def by_current_name(
    stored: dict[str, StoredTensor], model: nn.Module
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Give a state dict's tensors by the names that the model has today, and the names that it lacks.

    A state dict has the names that the model had in the transformers that it was trained with, which may be
    an older one, or those that it was saved under; transformers converts both as it does a checkpoint's. One
    that has all names of the model is not converted.

    Raises:
        InputError: parts of one tensor do not fit together.
    """
    names = model.state_dict().keys()
    unknown = [name for name in stored if name not in names]
    if not unknown:
        return dict(stored), []
    try:
        return by_model_name(stored, model)
    except UnknownConversion:
        return {name: tensor for name, tensor in stored.items() if name in names}, unknown


def renamed(names: list[str], model: nn.Module) -> dict[str, str]:
    """Map names in a checkpoint to those of today, where transformers only renames them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        return {name: rename_source_key(name, renamings, [])[0] for name in names}
    except Exception:  # this version does it in another way
        return {name: name for name in names}


def stacks(names: list[str], model: nn.Module) -> dict[str, dict[str, list[str]]]:
    """Find the layers, by an older version's names, whose weights are stacked into one parameter each.

    Returns:
        The parameter -> for each matrix of a row, one below the other along its outputs
        (`experts.*.w1.weight`, `experts.*.w3.weight`), the layers of all rows in order. An empty list is a
        matrix that no layer is for.
    """
    try:
        _, groups, _ = _assign({f"{name}.weight": of_tensor(torch.empty(0)) for name in names}, model)
    except Exception:  # this version does it in another way
        return {}
    found = {}
    for target, parts in groups.items():
        of_pattern: dict[str, list[str]] = {pattern: [] for pattern in parts.converter.source_patterns}
        for pattern, key, _ in parts.members:
            of_pattern[pattern].append(key.removesuffix(".weight"))
        if parts.stacks_outputs:
            found[target] = of_pattern
    return found


def is_part(key: str, model: nn.Module) -> bool:
    """Whether transformers would make one tensor of the model out of a checkpoint's `key` and others."""
    try:
        _, groups, _ = _assign({key: of_tensor(torch.empty(0))}, model)
    except Exception:  # this version does it in another way
        return False
    return bool(groups)


def _assign(
    stored: dict[str, StoredTensor], model: nn.Module
) -> tuple[dict[str, StoredTensor], dict[str, Parts], list[str]]:
    """Sort tensors: stored as the model has them, to be put together, and names it has no place for.

    The same steps in the same order as in `convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, expected = model.base_model_prefix, model.state_dict()
    found: dict[str, StoredTensor] = {}
    groups: dict[str, Parts] = {}
    unknown = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unknown.append(key)
        elif pattern is None:
            found.setdefault(name, stored[key])
        else:
            parts = groups.setdefault(name, Parts(by_pattern[pattern], name, []))
            parts.members.append((pattern, key, stored[key]))
    return found, groups, unknown


def _outcome(parts: Parts, model: nn.Module) -> dict[str, torch.Tensor]:
    """Give tensors of the shapes and dtypes that come out.

    Raises:
        InputError: the parts do not fit together.
    """
    try:
        return parts.convert(
            model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        )
    except Exception:  # they do not fit, or an operation wants to see numbers
        return _converted(parts, model)


def _stored(parts: Parts, model: nn.Module, name: str, made: torch.Tensor) -> StoredTensor:
    """Describe what comes out under a name. `made` is of the same shape and dtype."""
    read = lambda: _converted(parts, model)[name]  # noqa: E731
    read_rows = lambda start, stop: _converted(parts.rows(start, stop), model)[name]  # noqa: E731
    return StoredTensor(tuple(made.shape), made.dtype, read, read_rows if parts.is_stack else None)


def _converted(parts: Parts, model: nn.Module) -> dict[str, torch.Tensor]:
    try:
        return parts.convert(model, lambda tensor: tensor.read)
    except InputError:
        raise
    except Exception as error:  # each operation fails in its own way
        raise InputError(
            f"{parts.target} cannot be made of {parts.describe()}: {one_line(error, 200)}; the files are incomplete, or of "
            "another model"
        ) from error
