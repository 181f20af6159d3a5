"""What an export will write, before anything is written: experts and router, foundation and config, tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from .errors import DyloraMoeWarning, InputError
from .readers.open_source import check_same_foundation, open_source
from .readers.peft_adapters import FORMAT as ADAPTERS
from .repo.options import ExportOptions
from .repo.plan import Plan, make_plan, renew_config
from .repo.router_prompts import read_prompts, router_from_prompts
from .sources.hub_and_folders import is_on_hub
from .sources.source_options import ReadOptions
from .tensors.mixture import ArrowRouter, Mixture, Router, Subtracted, check_expert_names
from .tokenizers.tokenizer import FoundTokenizer, check_vocabulary, find_tokenizer


def prepare(
    mixture: Mixture, options: ExportOptions, tell: Callable[[str], None]
) -> tuple[Plan, FoundTokenizer | None]:
    """Give the mixture the user's names and router settings; find its foundation, config and tokenizer.

    Raises:
        InputError: what was given cannot be exported as it is.
    """
    if mixture.problems:
        raise InputError(mixture.problems[0])
    _name_experts(mixture, options)
    if options.subtract is not None:
        mixture.subtracted = _read_subtracted(options.subtract, mixture, options)
    prompts = None
    if options.drops_router:
        _drop_router(mixture)
    elif options.router_prompts is not None:
        if isinstance(mixture.router, ArrowRouter):
            mixture.router = None  # the gate takes its place
        prompts = read_prompts(options.router_prompts, mixture)
    elif options.router == "arrow":
        _set_arrow(mixture, options)
    else:
        _set_router(mixture, options)
    for note in mixture.notes:
        warnings.warn(note, DyloraMoeWarning, stacklevel=3)
    plan = make_plan(mixture, options)
    tokenizer = find_tokenizer(options, mixture, plan.foundation, plan.config.base_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, plan.num_embeddings)
    if prompts is not None:
        tell("making a router from the prompts")
        if mixture.router is None and mixture.routing_strategy == "uniform":
            mixture.routing_strategy = None  # what a mixture without a router starts with
        mixture.router = router_from_prompts(
            mixture, plan, tokenizer and tokenizer.tokenizer, prompts, options
        )
        renew_config(plan, mixture, options)
    if mixture.router is None and not options.drops_router:
        _say_there_is_no_router(mixture)
    return plan, tokenizer


def _name_experts(mixture: Mixture, options: ExportOptions) -> None:
    names = options.expert_names
    if names is not None:
        if len(names) != len(mixture.experts):
            raise InputError(
                f"--expert_names has {len(names)} names, the source has {len(mixture.experts)} experts "
                f"({', '.join(expert.name for expert in mixture.experts)})"
            )
        for expert, name in zip(mixture.experts, names, strict=True):
            expert.name = name
    check_expert_names(
        [expert.name for expert in mixture.experts], [expert.origin for expert in mixture.experts]
    )


def _set_router(mixture: Mixture, options: ExportOptions) -> None:
    """Give the source's router the user's settings; leave it out, with a warning, where it lacks experts."""
    if mixture.router is None:
        if options.router_settings:
            raise InputError(
                f"--{next(iter(options.router_settings))} needs a router, which {mixture.folders[0]} does not have"
            )
        return
    if isinstance(mixture.router, ArrowRouter):
        _set_own_arrow(mixture, options)
        return
    mixture.router = replace(mixture.router, **options.router_settings)
    if mixture.router.num_experts != len(mixture.experts):
        message = (
            f"the router knows {mixture.router.num_experts} of {len(mixture.experts)} experts and is left out; "
            "--router_prompts makes its new rows"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=4)
        _drop_router(mixture)


def _say_there_is_no_router(mixture: Mixture) -> None:
    from dylora_moe.modeling.routing_strategies_dylora_moe import WAYS_TO_A_ROUTER

    if len(mixture.experts) > 1:
        message = f"this mixture of {len(mixture.experts)} experts has no router: {WAYS_TO_A_ROUTER}"
        warnings.warn(message, DyloraMoeWarning, stacklevel=4)


def _set_arrow(mixture: Mixture, options: ExportOptions) -> None:
    """Give every layer a router, in place of the router that the source has.

    Raises:
        InputError: there is one expert alone.
    """
    if len(mixture.experts) == 1:
        raise InputError(
            f"--router arrow chooses among experts, and {mixture.folders[0]} has one; leave it out, or give more adapters"
        )
    router = ArrowRouter(num_experts_per_tok=min(ArrowRouter.num_experts_per_tok, len(mixture.experts)))
    if isinstance(mixture.router, Router):
        warnings.warn(
            f"--router arrow takes the place of the gate of {mixture.folders[0]}",
            DyloraMoeWarning,
            stacklevel=4,
        )
    elif mixture.router is not None:
        router = replace(mixture.router, stored={}, num_stored=0)  # all prototypes are computed again
    mixture.router = replace(router, **options.router_settings)
    if mixture.routing_strategy is not None:
        mixture.routing_strategy = "router"


def _set_own_arrow(mixture: Mixture, options: ExportOptions) -> None:
    """Give the source's own routers of every layer the user's settings; appended experts get prototypes, too.

    Raises:
        InputError: a setting of a gate.
    """
    if options.router_input is not None:
        raise InputError(
            f"--router_input is what a gate reads, and {mixture.folders[0]} has none: its router is of kind arrow; make a "
            "gate with --router_prompts"
        )
    mixture.router = replace(mixture.router, **options.router_settings)
    stored = {layer.dtype for expert in mixture.experts for layer in expert.layers.values()}
    if options.torch_dtype is not None and stored != {options.torch_dtype}:
        # Prototypes are those of the numbers that the experts are converted to.
        mixture.router = replace(mixture.router, stored={}, num_stored=0)


def _read_subtracted(source: str, mixture: Mixture, options: ExportOptions) -> Subtracted:
    """Read the adapter that is to be subtracted from every expert.

    Raises:
        InputError: it is no LoRA adapter of the same foundation, or the experts are those of a repo.
    """
    if mixture.routing_strategy is not None:
        raise InputError(
            f"--subtract is for adapters and checkpoints, and {mixture.folders[0]} is a repo; export its adapters again"
        )
    found = open_source(source, ReadOptions(base_model=options.base_model))
    if found.format != ADAPTERS or len(found.experts) != 1 or found.experts[0].is_adalora:
        raise InputError(f"--subtract {source} is not one LoRA adapter, as PEFT saves it; give such a folder")
    if options.base_model is None:
        check_same_foundation(mixture, found)
    name = source if is_on_hub(source) else found.experts[0].name
    mixture.limits = [
        *mixture.limits,
        f"the adapter {name} was subtracted from every expert: each computes its own adapter's update less that one's",
    ]
    return Subtracted(name, found.experts[0], found.folders[0])


def _drop_router(mixture: Mixture) -> None:
    mixture.router = None
    if mixture.routing_strategy in ("router", "best"):
        mixture.routing_strategy = None
