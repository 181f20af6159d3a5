"""The experts of a model: which layers they adapt, their weights, and how to add, freeze and merge them."""

import re
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_dylora_moe import DyloraMoeConfig
from .experts_dylora_moe import (
    DyloraMoeLinear,
    LowRankStacks,
    RankLayout,
    find_modules,
    in_base_layer,
    is_gate,
    linear_shape,
    refuse_offloaded,
)
from .routing_dylora_moe import DyloraMoeRouter
from .stacked_experts_dylora_moe import (
    DyloraMoeFoundationGate,
    DyloraMoeStackedExperts,
    as_in_peft,
    rows_of_stack,
    stack_shape,
)


ALL_LINEAR = "all-linear"  # PEFT's word


class ExpertSetMixin:
    """Puts experts on the foundation's layers, copies their weights in and out, adds and freezes them."""

    def expert_layers(self) -> dict[str, LowRankStacks]:
        """Return the modules that hold the stacks, by the name of the adapted layer or parameter."""
        modules = self._stack_modules.items()
        return {name: self.foundation.get_submodule(module) for name, module in modules}

    def unnamed_expert_layers(self) -> list[LowRankStacks]:
        """Return the same modules without names: in one walk, which a load can afford several times."""
        return [module for module in self.foundation.modules() if isinstance(module, LowRankStacks)]

    def freeze_foundation(self) -> None:
        """Freeze the foundation; experts and gate stay trainable."""
        self.foundation.requires_grad_(False)
        for layer in self.unnamed_expert_layers():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)

    def set_expert_weights(
        self, expert: int | str, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Copy one expert's matrices into the stacks.

        Args:
            expert: name or number.
            weights: A and B as PEFT stores them, by the name of a module (`[r, in_features]` and
                `[out_features, r]`) or of a parameter of stacked experts (`[experts * r, in_features]` and
                `[out_features, r * experts]`).

        Raises:
            ValueError: names that are not just the expert's, a shape that does not fit (names both shapes),
                or weights that are offloaded.
        """
        refuse_offloaded(self)
        index = self.config.expert_index(expert)
        expected = set(self._places_of(index))
        if set(weights) != expected:
            raise ValueError(
                f"Expert {expert!r} adapts {len(expected)} modules and parameters, and weights were passed for "
                f"{len(weights)}; the difference is {sorted(expected ^ set(weights))[:4]}."
            )
        layers = self.expert_layers()
        with torch.no_grad():
            for name, (lora_a, lora_b) in weights.items():
                layer = layers[name]
                rows_a = layer.lora_A[layer.rows(index)]  # views of the stacks
                rows_b = layer.lora_B[layer.rows(index)]
                needed_a, needed_b = as_in_peft(rows_a, rows_b)
                _check_shape(f"Expert {expert!r}, layer {name!r}: lora_A", lora_a, needed_a)
                _check_shape(f"Expert {expert!r}, layer {name!r}: lora_B", lora_b, needed_b)
                num_stacked = layer.lora_A.shape[1] if layer.lora_A.dim() == 3 else 0
                given_a, given_b = rows_of_stack(lora_a, lora_b, num_stacked)
                rows_a.copy_(given_a)
                rows_b.copy_(given_b)
                if self.config.routes_by_layer:
                    layer.update_prototypes()

    def expert_weights(self, expert: int | str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Copy one expert's matrices out of the stacks, as PEFT stores them; see `set_expert_weights`.

        Raises:
            ValueError: no such expert, or its weights are offloaded.
        """
        refuse_offloaded(self)
        index = self.config.expert_index(expert)
        weights = {}
        for name in self._places_of(index):
            layer = self.foundation.get_submodule(self._stack_modules[name])
            rows = layer.rows(index)
            lora_a, lora_b = as_in_peft(layer.lora_A.detach()[rows], layer.lora_B.detach()[rows])
            weights[name] = lora_a.clone(), lora_b.clone()
        return weights

    def _places_of(self, expert: int) -> list[str]:
        entry = self.config.expert_configs[expert]
        return [*entry["target_modules"], *entry["target_parameters"]]

    def add_expert(
        self, name: str, target_modules: list[str] | str | None = None, mature: bool = False, **fields
    ) -> int:
        """Add an expert that changes nothing yet (its B is zero), and a row for it to the gate.

        What the other experts compute stays the same, bit for bit. The stacks and the gate become new
        parameters, which an optimiser made before does not have: make a new one. Prototypes (`router_kind`
        'arrow') are computed again, for all experts.

        Args:
            name: the expert's name.
            target_modules: modules of the foundation, as PEFT names them: see `DyloraMoeConfig`; the last
                expert's, if left out.
            mature: whether the expert is finished; an immature one keeps a router of mode `auto` dense.
            fields: further fields of the expert's config: `target_parameters`, which are the last expert's
                where `target_modules` are; `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`,
                `lora_dropout`, `use_rslora`.

        Returns:
            The expert's number.

        Raises:
            ValueError: the name is taken, a field or module is not valid, or a part of the model is
                offloaded.
        """
        refuse_offloaded(self, everything=True)
        if target_modules is None:
            if not self.config.expert_configs:
                raise ValueError("The first expert needs `target_modules`.")
            target_modules = self.config.expert_configs[-1]["target_modules"]
            fields = {"target_parameters": self.config.expert_configs[-1]["target_parameters"], **fields}
        entry = {"name": name, "target_modules": target_modules, "mature": mature, **fields}
        grown = DyloraMoeConfig(
            expert_configs=[*self.config.expert_configs, entry], router_kind=self.config.router_kind
        )
        self._resolve_targets(grown)  # this and the check of parameters may fail, so nothing changes before
        new_modules = [name for name in grown.adapted_modules() if name not in self._stack_modules]
        new_parameters = [name for name in grown.adapted_parameters() if name not in self._stack_modules]
        self._check_parameters(grown)
        layouts = grown.rank_layouts()
        self._wrap_modules(new_modules, layouts)
        self._wrap_parameters(new_parameters, layouts)
        wrapped = {f"foundation.{module}" for module in new_modules}
        tied = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {in_base_layer(target, wrapped): source for target, source in tied}
        self.config.expert_configs = grown.expert_configs
        self._stack_modules = grown.stack_modules()
        self.expert_dropouts.append(nn.Dropout(grown.expert_configs[-1]["lora_dropout"]).train(self.training))
        for module_name, layer in self.expert_layers().items():
            if module_name in new_modules or module_name in new_parameters:
                layer.initialize_experts()
            else:
                layer.extend(layouts[module_name])
        self._describe_foundation()
        self._extend_router()
        return self.config.num_experts - 1

    def update_prototypes(self) -> None:
        """Compute the prototypes of a router of kind `arrow` from the experts' weights, as they are now.

        Training does not do it: call this after the experts have learned.

        Raises:
            ValueError: the router is of another kind, or experts are offloaded.
        """
        if not self.config.routes_by_layer:
            raise ValueError(
                f"`router_kind` is {self.config.router_kind!r}; prototypes are those of 'arrow'."
            )
        refuse_offloaded(self)
        for layer in self.unnamed_expert_layers():
            layer.update_prototypes()

    def _extend_router(self) -> None:
        """Replace the router by one with a row for every expert, and copy the rows that there were."""
        if self.config.routes_by_layer:
            self.update_prototypes()
        if not self.config.has_gate:
            return
        old = self.router
        router = DyloraMoeRouter(self.config)
        self._init_weights(router.gate)
        if old is not None:
            router.to(old.gate.weight.device).train(old.training)
            with torch.no_grad():
                router.gate.weight[: len(old.gate.weight)] = old.gate.weight
                router.gate.bias[: len(old.gate.bias)] = old.gate.bias
            router.requires_grad_(old.gate.weight.requires_grad)
        self.router = router

    def mark_mature(self, name: int | str, mature: bool = True) -> None:
        """Mark an expert as finished (or not): see `DyloraMoeConfig.router_mode`."""
        self.config.expert_configs[self.config.expert_index(name)]["mature"] = mature

    def freeze_expert(self, name: int | str) -> None:
        """Freeze an expert: its rows of the stacks get no gradient.

        With a new optimiser and no weight decay on experts (it moves weights without a gradient, too;
        Trainer's default is 0), they stay the same bit for bit. Not saved: loaded models have every expert
        trainable.
        """
        expert = self.config.expert_index(name)
        for layer in self.expert_layers().values():
            layer.frozen_experts |= {expert}

    def unfreeze_expert(self, name: int | str) -> None:
        """Make an expert trainable again."""
        expert = self.config.expert_index(name)
        for layer in self.expert_layers().values():
            layer.frozen_experts -= {expert}

    def expert_is_frozen(self, name: int | str) -> bool:
        """Say whether an expert is frozen."""
        expert = self.config.expert_index(name)
        return any(expert in layer.frozen_experts for layer in self.expert_layers().values())

    def _resolve_targets(self, config: DyloraMoeConfig) -> None:
        """Put whole names in the place of what `target_modules` means: for all experts, or none on error.

        Raises:
            ValueError: it means no module of the foundation, or one that experts cannot adapt; or an expert names
                neither modules nor parameters.
        """
        modules = _modules_around_experts(self.foundation)
        resolved = []
        checked: set[str] = set()
        for entry in config.expert_configs:
            given = entry["target_modules"]
            if given == [] and not entry["target_parameters"]:
                raise ValueError(
                    f"Expert {entry['name']!r} adapts nothing: give it `target_modules`, as PEFT takes them (a list of ends "
                    "of names, 'all-linear' or a regular expression)."
                )
            names = _target_names(given, modules, self.foundation)
            for name in names:
                if name not in checked:
                    _check_adaptable(name, modules[name], given)
                    checked.add(name)
            fields = {"target_modules": names}
            if names != given:
                for field in ("rank_pattern", "alpha_pattern"):
                    fields[field] = _pattern_of_names(entry, field, names)
            resolved.append({**entry, **fields})
        config.expert_configs = resolved

    def _wrap_modules(self, names: list[str], layouts: dict[str, RankLayout]) -> None:
        """Wrap linear layers and gates of the foundation into expert layers."""
        wrapped = set()
        for name in names:
            parent_name, _, child_name = name.rpartition(".")
            parent = self.foundation.get_submodule(parent_name)
            module = getattr(parent, child_name)
            layer_class = DyloraMoeFoundationGate if is_gate(module) else DyloraMoeLinear
            layer = layer_class(module, layouts[name], self.expert_dropouts)
            layer.training = self.foundation.training  # `train` would visit the frozen layer, too
            setattr(parent, child_name, layer)
            wrapped.add(name)
        self._rename_tied_weights(wrapped)

    def merge_expert(self, expert: int | str) -> PreTrainedModel:
        """Merge one expert into a copy of the foundation, and return this model of transformers."""
        return merge_expert(self, expert)

    def _check_parameters(self, config: DyloraMoeConfig) -> None:
        """Check that the adapted parameters are those of stacked experts.

        Raises:
            ValueError: one is not.
        """
        for name in config.adapted_parameters():
            module_name, _, parameter = name.rpartition(".")
            try:
                module = self.foundation.get_submodule(module_name)
                stack_shape(getattr(module, "base_layer", module), parameter)
            except (AttributeError, ValueError) as error:
                raise ValueError(f"`target_parameters` names {name!r}. {error}") from error

    def _wrap_parameters(self, names: list[str], layouts: dict[str, RankLayout]) -> None:
        """Add updates to parameters of stacked experts."""
        for name in names:
            module_name, _, parameter = name.rpartition(".")
            module = self.foundation.get_submodule(module_name)
            if not isinstance(module, DyloraMoeStackedExperts):
                module = DyloraMoeStackedExperts(module).train(module.training)
                parent_name, _, child_name = module_name.rpartition(".")
                setattr(self.foundation.get_submodule(parent_name), child_name, module)
            module.add_update(parameter, layouts[name], self.expert_dropouts)

    def _rename_tied_weights(self, wrapped: set[str]) -> None:
        """Keep an adapted head tied under its new name: experts act on its output, not its weight."""
        tied = self.foundation.all_tied_weights_keys
        if not any(name.rpartition(".")[0] in wrapped for name in tied):
            return
        renamed = {
            in_base_layer(target, wrapped): in_base_layer(source, wrapped) for target, source in tied.items()
        }
        # transformers reads both: the one when it loads, the other when it saves or ties again.
        self.foundation.all_tied_weights_keys = dict(renamed)
        self.foundation._tied_weights_keys = renamed


# What `target_modules` means


def _modules_around_experts(foundation: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of a foundation by name, without those inside a layer that experts or PEFT wrapped."""
    modules = {}
    inside = None
    for name, module in foundation.named_modules():
        if name and (inside is None or not name.startswith(inside)):  # the foundation itself has the name ""
            modules[name] = module
            inside = f"{name}." if hasattr(module, "base_layer") else None
    return modules


def _frozen_module(module: nn.Module) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _target_names(
    targets: list[str] | str, modules: dict[str, nn.Module], foundation: PreTrainedModel
) -> list[str]:
    """Find the whole names of the modules that `targets` means, in the order of `modules`.

    PEFT finds the same, except that here a module's whole name never means another module whose name ends so.
    A list of whole names is returned as it is.

    Raises:
        ValueError: a target means no module.
    """
    if isinstance(targets, list):
        ends = [target for target in targets if target not in modules]
        if not ends:
            return targets
        found, unknown = find_modules(ends, modules)
        if unknown:
            raise ValueError(
                f"`target_modules` names {unknown[0]!r}, which a {type(foundation).__name__} does not have, as a whole "
                f"name or as the end of one. {_names_to_choose_from(unknown[0], modules)}"
            )
        named = {*targets, *found}
        return [name for name in modules if name in named]
    if targets.lower() == ALL_LINEAR:
        head = foundation.get_output_embeddings()
        names = [name for name, module in modules.items() if _is_linear(module) and module is not head]
        if not names:
            raise ValueError(
                f"`target_modules` is {targets!r}, and a {type(foundation).__name__} has no linear layers (nn.Linear, "
                "Conv1D), as where it was loaded quantised by layers of another class."
            )
        return names
    names = _matching(targets, modules)
    if not names:
        raise ValueError(
            f"`target_modules` is the text {targets!r}, which is read as a regular expression for whole names; no module "
            f"of a {type(foundation).__name__} has such a name. Ends of names go into a list. "
            f"{_names_to_choose_from(targets, modules)}"
        )
    return names


def _matching(expression: str, modules: dict[str, nn.Module]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"`target_modules` is the text {expression!r}, which is no regular expression ({error}). Ends of names go "
            "into a list."
        ) from error
    return [name for name in modules if pattern.fullmatch(name)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(_frozen_module(module), (nn.Linear, Conv1D))


def _names_to_choose_from(target: str, modules: dict[str, nn.Module]) -> str:
    """Name the linear layers, with one in full that is called like `target`, if there is one."""
    layers = [name for name, module in modules.items() if _is_linear(module)]
    if not layers:
        return "It has no linear layers (nn.Linear, Conv1D)."
    ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    like = [name for name in layers if name.rpartition(".")[2] == target.rpartition(".")[2]]
    return f"Its linear layers end in {', '.join(ends)}; one is {(like or layers)[0]!r}."


def _check_adaptable(name: str, module: nn.Module, targets: list[str] | str) -> None:
    """Check that experts can adapt a module that `targets` means.

    Raises:
        ValueError: they cannot.
    """
    if isinstance(module, LowRankStacks):
        return  # other experts do
    try:
        linear_shape(module)
    except ValueError as error:
        if not isinstance(targets, str):
            targets = next(target for target in targets if f".{name}".endswith(f".{target}"))
        by = "" if targets == name else f" by {targets!r}"
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"`target_modules` names {name!r}{by}, and an adapter of PEFT is around that layer: merge or unload it "
                "first."
            ) from error
        raise ValueError(f"`target_modules` names {name!r}{by}. {error} Leave it out.") from error


def _pattern_of_names(entry: dict, field: str, names: list[str]) -> dict:
    """Return an expert's `rank_pattern` or `alpha_pattern` with whole names for ends of them.

    As in PEFT the first key that means a layer counts.

    Raises:
        ValueError: a key means nothing that the expert adapts.
    """
    resolved = {}
    for key, value in entry[field].items():
        found, unknown = find_modules([key], [*names, *entry["target_parameters"]])
        if unknown:
            raise ValueError(
                f"Expert {entry['name']!r} has {key!r} in its `{field}`, which is none of the layers that it adapts, nor "
                "the end of their names."
            )
        for name in found:
            resolved.setdefault(name, value)
    return resolved


def _check_shape(name: str, given: torch.Tensor, needed: torch.Tensor) -> None:
    if given.shape != needed.shape:
        raise ValueError(
            f"{name} is of shape {tuple(given.shape)}, and this base model needs {tuple(needed.shape)}. It was trained "
            "on a base model of other shapes."
        )


@torch.no_grad()
def merge_expert(model, expert: int | str):
    """Merge one expert into a copy of the foundation (W + s B A), and return this model of transformers.

    Raises:
        ValueError: no such expert, or the foundation is quantised or offloaded, so that W cannot be added to.
    """
    index = model.config.expert_index(expert)
    refuse_offloaded(model, everything=True)
    for name in model.expert_layers():
        weight, _ = _frozen_weight(model, model.foundation, name)
        # torchao's quantised weights claim to be floating point; their class shows that they are not.
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
            raise ValueError(
                f"Layer {name!r} is quantised, so an expert cannot be merged into it; load without that."
            )
    merged = deepcopy(model.foundation)
    adapts_tied = any(_adapts(model, index, name) for name in merged.all_tied_weights_keys)
    _tie_as_before(merged, keep_tied=not adapts_tied)
    for name, layer in model.expert_layers().items():
        rank, scale = layer.layout[index]
        if rank == 0:
            continue
        weight, transposed = _frozen_weight(model, merged, name)
        lora_a = layer.lora_A[layer.rows(index)].float()  # [r, in], or [r, stacked experts, in]
        lora_b = layer.lora_B[layer.rows(index)].float()  # [r, out], or [r, stacked experts, out]
        update = scale * torch.einsum("r...i, r...o -> ...oi", lora_a, lora_b)
        if transposed:
            update = update.mT
        weight.copy_(weight.float() + update.to(weight.device))
    for name in model.config.wrapped_modules():
        parent_name, _, child_name = name.rpartition(".")
        setattr(merged.get_submodule(parent_name), child_name, merged.get_submodule(name).base_layer)
    if getattr(model, "generation_config", None) is not None and merged.can_generate():
        # It may name further tokens that end a text.
        merged.generation_config = deepcopy(model.generation_config)
        vars(merged.generation_config).pop("routing_strategy", None)
    merged.requires_grad_(True)
    return merged.eval()


def _frozen_weight(model, foundation: PreTrainedModel, place: str) -> tuple[torch.Tensor, bool]:
    """Return the foundation's weight at an adapted place, and whether it is stored as `[.., in, out]`."""
    if place in model.config.adapted_parameters():
        module, _, parameter = place.rpartition(".")
        experts = foundation.get_submodule(module).base_layer
        return getattr(experts, parameter), experts.is_transposed
    layer = foundation.get_submodule(place).base_layer
    return layer.weight, isinstance(layer, Conv1D)


def _adapts(model, expert: int, parameter: str) -> bool:
    """Say whether an expert adapts the module of a parameter."""
    module = parameter.rpartition(".")[0].removesuffix(".base_layer")
    return module in model.config.expert_configs[expert]["target_modules"]


def _tie_as_before(foundation: PreTrainedModel, keep_tied: bool) -> None:
    """Give tied weights their names without experts, or untie them.

    Folded into a tied head, an expert would change the embeddings, too.
    """
    tied = foundation.all_tied_weights_keys
    vars(foundation).pop("_tied_weights_keys", None)  # so that those of the class apply again
    if keep_tied:
        names = {target.replace(".base_layer.", "."): source for target, source in tied.items()}
        foundation.all_tied_weights_keys = names
        return
    for target in tied:
        module, _, kind = target.rpartition(".")
        copied = nn.Parameter(foundation.get_parameter(target).detach().clone())
        setattr(foundation.get_submodule(module), kind, copied)
    foundation.all_tied_weights_keys = {}
    for config in (foundation.config, foundation.config.get_text_config()):
        config.tie_word_embeddings = False


__all__ = ["ExpertSetMixin", "merge_expert"]
