"""Inspects a source: what it holds, and what it lacks to be exported. No model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from .errors import InputError
from .foundation.copied_weights import check_copied_weights
from .foundation.reference import load_foundation_config, local_folder, resolve_foundation
from .foundation.weights import carried_weights, foundation_weights, skeleton, tied_head
from .readers.open_source import open_source
from .repo.plan import check_fit
from .sources.hub_and_folders import is_elsewhere
from .sources.source_folder import SourceFolder, open_folder
from .sources.source_options import ReadOptions, SourceOptions
from .tensors.mixture import ArrowRouter, Expert, FoundationReference, Mixture, idle_experts
from .tensors.weight_files import stored_tensors, weight_files
from .tokenizers.tokenizer_files import has_tokenizer, tokenizer_files


BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class ExpertSummary:
    """One expert of a source. Ranks and alphas are (smallest, largest) over its layers; `num_bytes` as stored."""

    name: str
    rank: tuple[int, int] | None
    lora_alpha: tuple[float, float] | None
    use_rslora: bool
    num_layers: int
    modules: dict[str, int]
    num_parameters: int
    num_bytes: int
    dtypes: list[str]
    mature: bool


@dataclass
class FoundationSummary:
    """The base model of a source. `folder` and `num_parameters` are None where it is not on this machine."""

    name: str | None
    revision: str | None
    folder: str | None
    num_parameters: int | None


@dataclass
class Inspection:
    """What `inspect` found. `memory` is bytes by dtype when loaded; `missing` is what an export lacks."""

    sources: list[str]
    format: str
    reason: str
    foundation: FoundationSummary
    experts: list[ExpertSummary]
    router: dict[str, Any] | None
    routing_strategy: str | None
    tokenizer: str | None
    memory: dict[str, dict[str, int | None]]
    missing: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    sources: str | Path | list[str | Path],
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Inspection:
    """Inspect one or several sources without loading a model.

    Args:
        sources: a folder, a Hub id or `wandb:entity/project/name:version`; several only for PEFT adapters,
            which may follow an exported repo.
        progress: is told when a source has to be fetched first, which may take long.
        options: `base_model`, `lora_alpha`, `revision` and `subfolder`, as for `export`, to see whether an
            export would still lack something; see `SourceOptions`.

    Raises:
        InputError: of no known format, or damaged. What is merely missing is listed.
    """
    chosen = SourceOptions.of(options)
    asked = [sources] if isinstance(sources, str | Path) else sources
    elsewhere = [str(source) for source in asked if is_elsewhere(source)]
    if elsewhere and progress is not None:
        progress(f"fetching {', '.join(elsewhere)}")
    mixture = open_source(sources, ReadOptions(**vars(chosen)))
    missing = list(mixture.problems)
    notes = list(mixture.notes)
    foundation = _foundation(mixture, chosen.base_model, missing)
    _compare(mixture, foundation, missing, notes)
    idle = idle_experts(mixture)
    if idle is not None:
        notes.append(idle)
    tokenizer = _tokenizer(mixture, chosen.base_model, missing)
    return Inspection(
        sources=[str(source) for source in mixture.sources],
        format=mixture.format,
        reason=mixture.reason,
        foundation=foundation,
        experts=[_expert(expert) for expert in mixture.experts],
        router=_router(mixture),
        routing_strategy=mixture.routing_strategy,
        tokenizer=tokenizer,
        memory=_memory(mixture, foundation),
        missing=missing,
        notes=notes,
    )


def _expert(expert: Expert) -> ExpertSummary:
    layers = expert.layers.values()
    alphas = [layer.lora_alpha for layer in layers if layer.lora_alpha is not None]
    ranks = [layer.rank for layer in layers]
    return ExpertSummary(
        name=expert.name,
        rank=(min(ranks), max(ranks)) if ranks else None,
        lora_alpha=(min(alphas), max(alphas)) if alphas else None,
        use_rslora=expert.use_rslora,
        num_layers=len(expert.layers),
        modules=dict(Counter(name.rsplit(".", 1)[-1] for name in expert.layers)),
        num_parameters=expert.num_parameters,
        num_bytes=sum(layer.num_parameters * layer.dtype.itemsize for layer in layers),
        dtypes=sorted({str(layer.dtype).removeprefix("torch.") for layer in layers}),
        mature=expert.mature,
    )


def _router(mixture: Mixture) -> dict[str, Any] | None:
    router = mixture.router
    if router is None:
        return None
    if isinstance(router, ArrowRouter):
        return {
            "router_kind": "arrow",
            "num_layers": len(router.shapes(mixture.experts)),
            "router_mode": router.router_mode,
            "num_experts_per_tok": router.num_experts_per_tok,
            "router_temperature": router.router_temperature,
        }
    return {
        "num_experts": router.num_experts,
        "hidden_size": router.hidden_size,
        "router_input": router.router_input,
        "router_mode": router.router_mode,
        "num_experts_per_tok": router.num_experts_per_tok,
        "router_temperature": router.router_temperature,
    }


def _foundation(mixture: Mixture, base_model: str | None, missing: list[str]) -> FoundationSummary:
    reference = mixture.foundation
    if mixture.foundation_weights is not None:
        total = sum(tensor.num_parameters for tensor in mixture.foundation_weights.values())
        return FoundationSummary(reference.name, reference.revision, str(mixture.folders[0]), total)
    try:
        found, folder = _place(reference, base_model)
    except InputError as error:
        missing.append(str(error))
        return FoundationSummary(base_model or reference.name, reference.revision, None, None)
    if folder is None:
        missing.append(
            f"the base model {found.name} is not on this machine; an export downloads it, or takes --base_model"
        )
        return FoundationSummary(found.name, found.revision, None, None)
    tensors = stored_tensors(weight_files(folder))
    count = sum(tensor.num_parameters for tensor in tensors.values()) if tensors else None
    return FoundationSummary(found.name, found.revision, str(folder), count)


def _compare(mixture: Mixture, foundation: FoundationSummary, missing: list[str], notes: list[str]) -> None:
    """Add what an export would refuse in experts or router, where the foundation is on this machine."""
    if foundation.folder is None or not mixture.experts:
        return
    reference = FoundationReference(foundation.folder)
    carried = mixture.foundation_weights is not None
    try:
        model = skeleton(mixture.foundation_config if carried else load_foundation_config(reference))
        check_fit(mixture, model, replace(reference, name=foundation.name))
        if carried:
            carried_weights(mixture.foundation_weights, model, mixture.folders[0])
        if any(expert.copied_weights for expert in mixture.experts):
            check_copied_weights(
                mixture.experts, model, foundation_weights(reference, model), foundation.name
            )
    except InputError as error:
        missing.append(str(error))
        return
    head = tied_head(model)
    adapted = [expert.name for expert in mixture.experts if head in expert.layers]
    if adapted:
        notes.append(
            f"{head} is tied to the embeddings and adapted by {', '.join(adapted)}: that acts on the head's output alone, "
            "and the embeddings stay as they are"
        )


def _place(
    reference: FoundationReference, base_model: str | None
) -> tuple[FoundationReference, SourceFolder | None]:
    """Find where the foundation is named to be, and open its folder on this machine, if there is one."""
    found = resolve_foundation(reference, base_model, None)
    return found, local_folder(found)


def _tokenizer(mixture: Mixture, base_model: str | None, missing: list[str]) -> str | None:
    """Find the folder that an export would take it from.

    A named foundation may have it where the source brings its own.

    Raises:
        InputError: a file of the source's own is a link that leads out of it, which an export refuses.
    """
    try:
        _, foundation = _place(mixture.foundation, base_model)
        elsewhere = foundation is None  # from where an export downloads it
    except InputError:
        foundation, elsewhere = None, False
    places = [*mixture.folders, *([foundation] if foundation else [])]
    found = next((folder for folder in places if has_tokenizer(folder)), None)
    if found is None and not elsewhere:
        missing.append(f"no tokenizer in {', '.join(map(str, places))}; pass one with --tokenizer")
    if found is None:
        return None
    if found is foundation:
        try:
            tokenizer_files(
                open_folder(found.path)
            )  # of a tokenizer, an export follows no link that leads out
        except InputError as error:
            missing.append(str(error))
    else:
        tokenizer_files(found)
    return str(found)


def _router_parameters(mixture: Mixture) -> int:
    shapes = {} if mixture.router is None else mixture.router.shapes(mixture.experts)
    return sum(prod(shape) for shape in shapes.values())


def _memory(mixture: Mixture, foundation: FoundationSummary) -> dict[str, dict[str, int | None]]:
    """Count bytes of the loaded parameters by dtype; the router is float32 in each.

    None where the foundation is not on this machine.
    """
    experts = sum(expert.num_parameters for expert in mixture.experts)
    router = 4 * _router_parameters(mixture)
    memory: dict[str, dict[str, int | None]] = {}
    for dtype, size in BYTES_PER_PARAMETER.items():
        base = None if foundation.num_parameters is None else size * foundation.num_parameters
        total = None if base is None else base + size * experts + router
        memory[dtype] = {"foundation": base, "experts": size * experts, "router": router, "total": total}
    return memory
