"""What an export is about to write, known before anything large is read: foundation, config, generation settings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DyloraMoeWarning, InputError, one_line
from ..foundation.layer_names import named_as_now
from ..foundation.reference import (
    check_experts_fit,
    check_router_fits,
    is_available,
    is_local,
    load_foundation_config,
    open_foundation,
    resolve_foundation,
)
from ..foundation.weights import carried_weights, foundation_weights, skeleton
from ..foundation.whole_weights import check_whole_weights
from ..tensors.mixture import FoundationReference, Mixture
from ..tensors.stored_tensors import StoredTensor, same_numbers
from .options import ExportOptions
from .writer import finest_dtype


@dataclass
class Plan:
    """Everything but the weights of experts and router.

    Attributes:
        foundation: where it is named to be.
        config: the repo's config.
        skeleton: the foundation without weights; None where not even its config is at hand (layout `adapter`
            alone).
        find_weights: gives its tensors by their own names; None where they are not at hand (layout `adapter`
            alone).
        generation: the fields of the repo's `generation_config.json`, the strategy apart.
    """

    foundation: FoundationReference
    config: Any
    skeleton: nn.Module | None
    find_weights: Callable[[], dict[str, StoredTensor]] | None
    generation: dict[str, Any]

    @cached_property
    def weights(self) -> dict[str, StoredTensor] | None:
        """The foundation's tensors; looked for when they are asked for, as that may mean to download them."""
        return None if self.find_weights is None else self.find_weights()

    @property
    def transposed(self) -> frozenset[str]:
        """Modules whose weight is stored as [in, out]."""
        from transformers.pytorch_utils import Conv1D

        if self.skeleton is None:
            return frozenset()
        return frozenset(name for name, module in self.skeleton.named_modules() if isinstance(module, Conv1D))

    @property
    def num_embeddings(self) -> int | None:
        """How many tokens the foundation embeds; None where its config is not on this machine."""
        return None if self.skeleton is None else self.skeleton.get_input_embeddings().weight.shape[0]

    @property
    def num_foundation_parameters(self) -> int | None:
        """Tied ones once."""
        if self.skeleton is None:
            return None
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def load_foundation(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The foundation in memory."""
        state = {name: tensor.to(dtype).read() for name, tensor in self.weights.items()}
        config = copy.deepcopy(self.config.base_config)
        return type(self.skeleton).from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def make_plan(mixture: Mixture, options: ExportOptions) -> Plan:
    """Find the foundation, compare experts and router with it, and make the repo's config.

    Raises:
        InputError: there is no foundation, or it is not the one that the experts were trained on.
    """
    carried = mixture.foundation_weights is not None
    reference = _reference(mixture, options)
    _warn_about_adapter(mixture, reference)
    base_config = mixture.foundation_config if carried else _config_at_hand(mixture, reference, options)
    model = find = None
    if base_config is not None:
        if getattr(base_config, "quantization_config", None) is not None:
            raise InputError(
                f"{reference.name} is quantised; pass the original model in full precision with --base_model"
            )
        model = skeleton(base_config)
        check_fit(mixture, model, reference)
        own = carried_weights(mixture.foundation_weights, model, mixture.folders[0]) if carried else None
        find = _find_weights(mixture, own, reference, model, options)
    config = _config(mixture, base_config, reference, options)
    plan = Plan(reference, config, model, find, _generation(mixture, reference, model))
    if any(expert.whole_weights for expert in mixture.experts):
        check_whole_weights(mixture.experts, model, plan.weights, reference.name)
    main_dtype = _main_dtype(plan.weights) if options.layout == "full" else None
    config.dtype = options.torch_dtype or main_dtype or getattr(base_config, "dtype", None)
    return plan


def renew_config(plan: Plan, mixture: Mixture, options: ExportOptions) -> None:
    """Make the repo's config again, for a mixture that has got another router."""
    old = plan.config
    plan.config = _config(mixture, old.base_config, plan.foundation, options)
    plan.config.dtype = old.dtype


def _check_it_can_be_built(config: Any) -> None:
    """Build the model without weights, as loading the repo will.

    Raises:
        InputError: no model can be made of this config.
    """
    from dylora_moe.modeling import DyloraMoeForCausalLM

    if config.base_config is None:
        return
    try:
        with torch.device("meta"):
            DyloraMoeForCausalLM(copy.deepcopy(config))
    except ValueError as error:
        raise InputError(f"no model can be made of these experts: {one_line(error, 500)}") from error


def _reference(mixture: Mixture, options: ExportOptions) -> FoundationReference:
    """Where the foundation is named to be; for layout `full` of a source that carries it that need not be
    anywhere."""
    try:
        return resolve_foundation(mixture.foundation, options.base_model, options.base_revision)
    except InputError:
        if (
            mixture.foundation_weights is None
            or options.base_model is not None
            or options.layout == "adapter"
        ):
            raise
        return mixture.foundation


def _warn_about_adapter(mixture: Mixture, reference: FoundationReference) -> None:
    """PEFT and transformers would apply an adapter that lies in the foundation's folder; it is no part of the
    model."""
    if not is_local(reference) or Path(reference.name) in [
        folder.path.resolve() for folder in mixture.folders
    ]:
        return
    if open_foundation(reference.name).has("adapter_config.json"):
        message = (
            f"the foundation's folder {reference.name} holds an adapter too (adapter_config.json), which is left out; if "
            "the experts were trained on top of it, merge it into the foundation first"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=4)


def _config_at_hand(mixture: Mixture, reference: FoundationReference, options: ExportOptions) -> Any:
    """The foundation's config; for layout `adapter`, where it cannot be had, what the source says, or else
    None."""
    try:
        return load_foundation_config(reference)
    except InputError as error:
        if options.layout != "adapter" or is_local(reference):
            raise
        if mixture.foundation_config is None:
            message = (
                f"the experts could not be compared with their foundation, which is not at hand: {error}"
            )
            warnings.warn(message, DyloraMoeWarning, stacklevel=4)
        return mixture.foundation_config


def check_fit(mixture: Mixture, model: nn.Module, reference: FoundationReference) -> None:
    """Compare router and experts with the foundation; layers get the names that they have there.

    Raises:
        InputError: one of them does not fit.
    """
    name = reference.name or "the source"
    vocab_size = model.config.get_text_config().vocab_size
    if mixture.foundation.vocab_size not in (None, vocab_size):
        raise InputError(
            f"{mixture.foundation.named_in} has vocab_size {mixture.foundation.vocab_size}, the foundation has "
            f"{vocab_size}; pass the model it was trained on with --base_model"
        )
    if mixture.router is not None:
        check_router_fits(mixture.router, model.config, name)
    mixture.experts[:] = [named_as_now(expert, model) for expert in mixture.experts]
    check_experts_fit(mixture.experts, model, name)


def _find_weights(
    mixture: Mixture,
    carried: dict[str, StoredTensor] | None,
    reference: FoundationReference,
    model: nn.Module,
    options: ExportOptions,
) -> Callable[[], dict[str, StoredTensor]] | None:
    """What gives the foundation's tensors: the source itself, or where the foundation is named to be.

    Args:
        carried: those that the source brings.

    Raises:
        InputError: the named one would stand in for the source's own, and is another one.
    """
    is_light = options.layout == "adapter"
    if carried is not None and not is_light and options.base_model is None:
        return lambda: carried
    if not is_available(reference) and (is_light or carried is not None):
        if carried is not None:
            _warn_not_compared(mixture, reference)
        return None if is_light else lambda: carried
    if carried is None:
        return lambda: foundation_weights(reference, model)
    # By its own config, which those who load the repo will need; the source's may be of another one.
    named = foundation_weights(reference, skeleton(load_foundation_config(reference)))
    _check_same(carried, named, reference)
    return lambda: named


def _check_same(
    carried: dict[str, StoredTensor], named: dict[str, StoredTensor], reference: FoundationReference
):
    """A source's own foundation can be left away, or called by a name, only if the one of that name is the
    same.

    Raises:
        InputError: names the first tensor that differs.
    """
    for name in sorted(carried.keys() | named.keys()):
        mine, other = carried.get(name), named.get(name)
        if mine is None or other is None or not same_numbers(mine, other):
            raise InputError(
                f"the source's own {name} is not that of the foundation {reference.name}, which would stand in for it; "
                "leave out --base_model and export with --layout full"
            )


def _warn_not_compared(mixture: Mixture, reference: FoundationReference) -> None:
    """The named foundation will be taken for the source's own.

    Raises:
        InputError: it is known to be another one.
    """
    if mixture.has_trained_foundation:
        raise InputError(
            f"training changed the source's own foundation, so that {reference.name} cannot stand in for it; leave out "
            "--base_model and export with --layout full"
        )
    message = (
        f"the source's own foundation could not be compared with {reference.name}, which is not at hand and will be taken "
        "for it"
    )
    warnings.warn(message, DyloraMoeWarning, stacklevel=5)


def _main_dtype(weights: dict[str, StoredTensor] | None) -> torch.dtype | None:
    """The dtype that most of the foundation is stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in (weights or {}).values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=sizes.get, default=None)


def _config(
    mixture: Mixture, base_config: Any, reference: FoundationReference, options: ExportOptions
) -> Any:
    from dylora_moe.modeling import DyloraMoeConfig

    if base_config is not None:
        base_config = copy.deepcopy(base_config)
        base_config._name_or_path = ""  # the folder it happened to be loaded from means nothing elsewhere
    router: dict[str, Any] = {"router_input": None}
    if mixture.router is not None:
        names = (
            "router_input",
            "router_mode",
            "num_experts_per_tok",
            "router_temperature",
            "router_aux_loss_coef",
        )
        values = {name: getattr(mixture.router, name) for name in names}
        router = {name: value for name, value in values.items() if value is not None}
    finest_dtype(mixture)
    try:
        config = DyloraMoeConfig(
            base_config=base_config,
            expert_configs=[expert.config() for expert in mixture.experts],
            base_model_name_or_path=reference.name,
            base_model_revision=reference.revision,
            weights_layout=options.layout,
            architectures=["DyloraMoeForCausalLM"],
            **router,
            **({"has_trained_foundation": True} if mixture.has_trained_foundation else {}),
            **({"limits": mixture.limits} if mixture.limits else {}),
        )
    except Exception as error:  # any wrong field may make a config class fail in its own way
        raise InputError(one_line(error, 500)) from error
    _check_it_can_be_built(config)
    return config


def _generation(mixture: Mixture, reference: FoundationReference, model: nn.Module | None) -> dict[str, Any]:
    """What the source's own `generation_config.json` says, else the foundation's, else the foundation's
    config.

    Raises:
        InputError: that file is damaged; what is not said would be another way to generate.
    """
    source, name = mixture.folders[0], "generation_config.json"
    is_repo = mixture.routing_strategy is not None
    if (is_repo or mixture.foundation_weights is not None) and source.has(name):
        fields = source.read_json(name)
        _generation_config(source / name, fields)
        return fields
    if is_local(reference):
        foundation = open_foundation(reference.name)
        if foundation.has(name):
            return _generation_config(foundation / name, foundation.read_json(name)).to_diff_dict()
    elif reference.name is not None and (found := _generation_config_on_hub(reference)) is not None:
        return found.to_diff_dict()
    return {} if model is None else model.generation_config.to_diff_dict()


def _generation_config_on_hub(reference: FoundationReference) -> Any:
    """None where there is no such file, or the repo is not on this machine."""
    from dylora_moe.modeling.layouts_dylora_moe import read_generation_config

    try:
        return read_generation_config(reference.name, {"revision": reference.revision})
    except OSError:  # no such repo, which layout `adapter` can be written without
        return None
    except ValueError as error:
        raise InputError(f"the foundation {reference.name}: {one_line(error)}") from error


def _generation_config(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # any wrong field may make the class fail in its own way
        raise InputError(f"{path} is not a valid generation config: {one_line(error)}") from error
