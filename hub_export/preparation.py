"""What an export will write, before anything is written: experts and router, foundation and config, tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from .errors import DyloraMoeWarning, InputError
from .repo.options import ExportOptions
from .repo.plan import Plan, make_plan, renew_config
from .repo.router_prompts import read_prompts, router_from_prompts
from .tensors.mixture import Mixture, check_expert_names
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
    prompts = None
    if options.drops_router:
        _drop_router(mixture)
    elif options.router_prompts is not None:
        prompts = read_prompts(options.router_prompts, mixture)
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


def _drop_router(mixture: Mixture) -> None:
    mixture.router = None
    if mixture.routing_strategy in ("router", "best"):
        mixture.routing_strategy = None
