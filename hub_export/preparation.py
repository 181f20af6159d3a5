"""What an export will write, before anything is written: experts and router, foundation and config,
tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from .errors import DyloraMoeWarning, InputError
from .readers.open_source import read_sources
from .repo.options import ExportOptions
from .repo.plan import Plan, make_plan
from .repo.router_prompts import read_prompts, router_from_prompts
from .repo.tokenizer import FoundTokenizer, check_vocabulary, find_tokenizer
from .sources.hub_and_folders import Source
from .tensors.mixture import Mixture, ReadOptions, check_expert_names


def prepare(
    sources: list[Source], options: ExportOptions, tell: Callable[[str], None]
) -> tuple[Mixture, Plan, FoundTokenizer | None]:
    """What will be written: experts and router, foundation and config, the tokenizer.

    Raises:
        InputError: what was given cannot be exported as it is.
    """
    mixture = read_mixture(sources, options)
    plan = make_plan(mixture, options)
    tokenizer = find_tokenizer(options, mixture, plan.foundation, plan.config.base_config)
    if tokenizer is not None:
        skeleton = plan.skeleton
        check_vocabulary(
            tokenizer, None if skeleton is None else skeleton.get_input_embeddings().weight.shape[0]
        )
    if options.router_prompts is not None:
        tell("making a router from the prompts")
        if mixture.router is None and mixture.routing_strategy == "uniform":
            mixture.routing_strategy = None  # what a mixture without a router starts with
        mixture.router = router_from_prompts(mixture, plan, tokenizer and tokenizer.tokenizer, options)
        plan = make_plan(mixture, options)
    return mixture, plan, tokenizer


def read_mixture(sources: list[Source], options: ExportOptions) -> Mixture:
    """The mixture with the user's names and router settings, ready to be exported."""
    mixture = read_sources(
        sources,
        ReadOptions(
            lora_alpha=options.lora_alpha,
            base_model=options.base_model,
            num_experts_per_tok=options.num_experts_per_tok,
            router_temperature=options.router_temperature,
        ),
    )
    if mixture.problems:
        raise InputError(mixture.problems[0])
    if options.expert_names is not None:
        if len(options.expert_names) != len(mixture.experts):
            raise InputError(
                f"--expert_names has {len(options.expert_names)} names, the source has {len(mixture.experts)} experts "
                f"({', '.join(expert.name for expert in mixture.experts)})"
            )
        for expert, name in zip(mixture.experts, options.expert_names, strict=True):
            expert.name = name
    check_expert_names(
        [expert.name for expert in mixture.experts], [expert.origin for expert in mixture.experts]
    )
    if options.drops_router:
        mixture.router, mixture.routing_strategy = None, _without_router(mixture.routing_strategy)
    elif options.router_prompts is not None:
        read_prompts(options.router_prompts, mixture)
    elif mixture.router is not None:
        mixture.router = replace(mixture.router, **options.router_settings)
        if mixture.router.num_experts != len(mixture.experts):
            message = (
                f"the router knows {mixture.router.num_experts} of {len(mixture.experts)} experts and is left out; "
                "--router_prompts makes its new rows"
            )
            warnings.warn(message, DyloraMoeWarning, stacklevel=3)
            mixture.router, mixture.routing_strategy = None, _without_router(mixture.routing_strategy)
    elif options.router_settings:
        raise InputError(
            f"--{next(iter(options.router_settings))} needs a router, which {mixture.folders[0]} does not have"
        )
    for note in mixture.notes:
        warnings.warn(note, DyloraMoeWarning, stacklevel=3)
    return mixture


def _without_router(strategy: str | None) -> str | None:
    return None if strategy in ("router", "best") else strategy
