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
from ..foundation.copied_weights import check_copied_weights
from ..foundation.layer_names import with_current_names
from ..foundation.reference import (
    check_experts_fit,
    check_router_fits,
    is_available,
    is_local,
    load_foundation_config,
    local_folder,
    resolve_foundation,
)
from ..foundation.weights import carried_weights, foundation_weights, skeleton
from ..tensors.mixture import ArrowRouter, FoundationReference, Mixture, Router
from ..tensors.stored_tensors import StoredTensor, same_numbers
from ..tensors.subtraction import subtract
from .options import ExportOptions
from .writer import finest_dtype


@dataclass
class Plan:
    """Everything but the weights of experts and router.

    Attributes:
        foundation: where it is named to be.
        config: the repo's config.
        skeleton: the foundation without weights; None where not even its config is available (layout
            `adapter` alone).
        find_weights: gives its tensors by their own names; None where they are not available (layout
            `adapter` alone).
        generation: the fields of the repo's `generation_config.json`, the strategy apart.
    """

    foundation: FoundationReference
    config: Any
    skeleton: nn.Module | None
    find_weights: Callable[[], dict[str, StoredTensor]] | None
    generation: dict[str, Any]

    @cached_property
    def weights(self) -> dict[str, StoredTensor] | None:
        """The foundation's tensors; found when they are first used, as that may mean a download."""
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
        """How many parameters the foundation has, tied ones counted once; None where its config is missing."""
        if self.skeleton is None:
            return None
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    def load_foundation(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Load the foundation into memory."""
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
    base_config = mixture.foundation_config if carried else _available_config(mixture, reference, options)
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
    _subtract(mixture, model, reference, options)
    config = _config(mixture, base_config, reference, options)
    plan = Plan(reference, config, model, find, _generation(mixture, reference, model))
    adapters = [*mixture.experts, *([mixture.subtracted.expert] if mixture.subtracted is not None else [])]
    if any(adapter.copied_weights for adapter in adapters):
        check_copied_weights(adapters, model, plan.weights, reference.name)
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
    """Resolve where the foundation is named to be.

    For layout `full` of a source that carries it, it need not be anywhere else.
    """
    try:
        return resolve_foundation(mixture.foundation, options.base_model, options.base_revision)
    except InputError:
        carried = mixture.foundation_weights is not None
        if carried and options.base_model is None and options.layout == "full":
            return mixture.foundation
        raise


def _warn_about_adapter(mixture: Mixture, reference: FoundationReference) -> None:
    """Warn of an adapter in the foundation's folder.

    PEFT and transformers would apply it; it is no part of the model.
    """
    if not is_local(reference):
        return
    if Path(reference.name) in [folder.path.resolve() for folder in mixture.folders]:
        return
    folder = local_folder(reference)
    if folder is not None and folder.has("adapter_config.json"):
        message = (
            f"the base model's folder {reference.name} holds an adapter too (adapter_config.json), which is left out; if "
            "the experts were trained on top of it, merge it into the base model first"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=4)


def _available_config(mixture: Mixture, reference: FoundationReference, options: ExportOptions) -> Any:
    """Load the foundation's config; for layout `adapter`, without it, what the source says, or else None."""
    try:
        return load_foundation_config(reference)
    except InputError as error:
        if options.layout != "adapter" or is_local(reference):
            raise
        if mixture.foundation_config is None:
            message = (
                f"the experts could not be compared with their base model, which is not available: {error}"
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
            f"{mixture.foundation.named_in} has vocab_size {mixture.foundation.vocab_size}, the base model has "
            f"{vocab_size}; pass the model it was trained on with --base_model"
        )
    if isinstance(mixture.router, Router):
        check_router_fits(mixture.router, model.config, name)
    mixture.experts[:] = [with_current_names(expert, model) for expert in mixture.experts]
    check_experts_fit(mixture.experts, model, name)


def _subtract(
    mixture: Mixture, model: nn.Module | None, reference: FoundationReference, options: ExportOptions
) -> None:
    """Subtract from every expert what is to be subtracted, if anything is.

    Raises:
        InputError: it does not fit the foundation, or would be rounded.
    """
    subtracted = mixture.subtracted
    if subtracted is None:
        return
    if model is not None:
        subtracted.expert = with_current_names(subtracted.expert, model)
        check_experts_fit([subtracted.expert], model, reference.name or "the source")
    experts, subtracted.is_exact = subtract(mixture.experts, subtracted.expert, options.torch_dtype)
    mixture.experts[:] = experts


def _find_weights(
    mixture: Mixture,
    carried: dict[str, StoredTensor] | None,
    reference: FoundationReference,
    model: nn.Module,
    options: ExportOptions,
) -> Callable[[], dict[str, StoredTensor]] | None:
    """Choose where the foundation's tensors come from: the source itself, or where the foundation is named to be.

    Args:
        carried: those that the source brings.

    Raises:
        InputError: the named one would stand in for the source's own, and is another one.
    """
    is_adapter = options.layout == "adapter"
    if carried is None:
        if is_adapter and not is_available(reference):
            return None
        return lambda: foundation_weights(reference, model)
    if not is_adapter and options.base_model is None:
        return lambda: carried
    if not is_available(reference):
        _warn_not_compared(mixture, reference)
        return None if is_adapter else lambda: carried
    # By its own config, which those who load the repo will need; the source's may be of another one.
    named = foundation_weights(reference, skeleton(load_foundation_config(reference)))
    _check_same(carried, named, reference)
    return lambda: named


def _check_same(
    carried: dict[str, StoredTensor], named: dict[str, StoredTensor], reference: FoundationReference
):
    """Check that the named foundation is the source's own, which it stands in for.

    Raises:
        InputError: names the first tensor that differs.
    """
    for name in sorted(carried.keys() | named.keys()):
        mine, other = carried.get(name), named.get(name)
        if mine is None or other is None or not same_numbers(mine, other):
            raise InputError(
                f"the source's own {name} is not that of the base model {reference.name}, which would stand in for it; "
                "leave out --base_model and export with --layout full"
            )


def _warn_not_compared(mixture: Mixture, reference: FoundationReference) -> None:
    """Warn that the named foundation is taken for the source's own.

    Raises:
        InputError: it is known to be another one.
    """
    if mixture.has_trained_foundation:
        raise InputError(
            f"training changed the source's own base model, so that {reference.name} cannot stand in for it; leave out "
            "--base_model and export with --layout full"
        )
    message = (
        f"the source's own base model could not be compared with {reference.name}, which is not available and will be taken "
        "for it"
    )
    warnings.warn(message, DyloraMoeWarning, stacklevel=5)


def _main_dtype(weights: dict[str, StoredTensor] | None) -> torch.dtype | None:
    """Find the dtype that most of the foundation is stored in."""
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
    finest_dtype(mixture)  # refuses experts that are not stored as floats
    if isinstance(mixture.router, ArrowRouter):
        _refuse_stacked_experts(mixture)
    optional = {"router_input": None} if mixture.router is None else mixture.router.config_fields()
    if mixture.has_trained_foundation:
        optional["has_trained_foundation"] = True
    if mixture.limits:
        optional["limits"] = mixture.limits
    try:
        config = DyloraMoeConfig(
            base_config=base_config,
            expert_configs=[expert.config() for expert in mixture.experts],
            base_model_name_or_path=reference.name,
            base_model_revision=reference.revision,
            weights_layout=options.layout,
            architectures=["DyloraMoeForCausalLM"],
            **optional,
        )
    except Exception as error:  # any wrong field may make a config class fail in its own way
        raise InputError(one_line(error, 500)) from error
    _check_it_can_be_built(config)
    return config


def _refuse_stacked_experts(mixture: Mixture) -> None:
    """Raise InputError where a router of every layer would be for a parameter of stacked experts."""
    for expert in mixture.experts:
        for name, layer in expert.layers.items():
            if layer.num_stacked:
                raise InputError(
                    f"--router arrow routes linear layers, and expert {expert.name} ({expert.origin}) adapts {name}, a parameter of "
                    "stacked experts; leave it out, or make a gate with --router_prompts"
                )


def _generation(mixture: Mixture, reference: FoundationReference, model: nn.Module | None) -> dict[str, Any]:
    """Read the source's own `generation_config.json`, else the foundation's, else the foundation's config.

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
        foundation = local_folder(reference)
        if foundation is not None and foundation.has(name):
            return _generation_config(foundation / name, foundation.read_json(name)).to_diff_dict()
    elif reference.name is not None:
        found = _generation_config_on_hub(reference)
        if found is not None:
            return found.to_diff_dict()
    return {} if model is None else model.generation_config.to_diff_dict()


def _generation_config_on_hub(reference: FoundationReference) -> Any:
    """Read the foundation's on the Hub; None where there is no such file, or the repo cannot be had."""
    from dylora_moe.modeling.loading_dylora_moe import read_generation_config

    try:
        return read_generation_config(reference.name, {"revision": reference.revision})
    except OSError:  # no such repo, which layout `adapter` can be written without
        return None
    except ValueError as error:
        raise InputError(f"the base model {reference.name}: {one_line(error)}") from error


def _generation_config(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # any wrong field may make the class fail in its own way
        raise InputError(f"{path} is not a valid generation config: {one_line(error)}") from error
