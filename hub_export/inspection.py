"""Inspect: what a source holds, and what it lacks to be exported. It loads no model and knows nothing about
formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import InputError
from .foundation.reference import in_hub_cache, is_local, load_foundation_config, resolve_foundation
from .foundation.weights import WEIGHT_NAMES, foundation_weights, skeleton, tied_head, weight_files
from .foundation.whole_weights import check_whole_weights
from .readers.open_source import open_sources, read_sources
from .repo.plan import check_fit
from .repo.tokenizer_files import has_tokenizer
from .sources.hub_and_folders import is_elsewhere
from .tensors.mixture import Expert, FoundationReference, Mixture, ReadOptions, Router, idle_experts
from .tensors.tensor_files import TensorFile


BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class ExpertSummary:
    """Ranks and alphas are (smallest, largest) over the layers; `num_bytes` is the size of the tensors as
    stored."""

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
    """`folder` is where it lies on this machine, None where it does not; then `num_parameters` is unknown,
    too."""

    name: str | None
    revision: str | None
    folder: str | None
    num_parameters: int | None


@dataclass
class Inspection:
    """What `inspect` found. `memory` is bytes by dtype when loaded; `missing` what stands in the way of an
    export."""

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
    base_model: str | None = None,
    lora_alpha: float | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Look at one or several sources without loading a model.

    Args:
        sources: a folder, a Hub id or `wandb:entity/project/name:version`; several only for PEFT adapters,
            which may follow an exported repo.
        base_model, lora_alpha, revision, subfolder: as for `export`, to see whether an export would still
            lack something.
        progress: is told when a source has to be fetched first, which may take long.

    Raises:
        InputError: of no known format, or damaged. What is merely missing is listed.
    """
    asked = [sources] if isinstance(sources, str | Path) else sources
    elsewhere = [str(source) for source in asked if is_elsewhere(source)]
    if elsewhere and progress is not None:
        progress(f"fetching {', '.join(elsewhere)}")
    resolved = open_sources(sources, revision=revision, subfolder=subfolder)
    mixture = read_sources(resolved, ReadOptions(lora_alpha=lora_alpha, base_model=base_model))
    missing = list(mixture.problems)
    notes = list(mixture.notes)
    foundation = _foundation(mixture, base_model, missing)
    _compare(mixture, foundation, missing, notes)
    idle = idle_experts(mixture)
    if idle is not None:
        notes.append(idle)
    tokenizer = _tokenizer(mixture, base_model, missing)
    return Inspection(
        sources=[str(source.folder) for source in resolved],
        format=mixture.format,
        reason=mixture.reason,
        foundation=foundation,
        experts=[_expert(expert) for expert in mixture.experts],
        router=None if mixture.router is None else _router(mixture.router),
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


def _router(router: Router) -> dict[str, Any]:
    names = (
        "num_experts", "hidden_size", "router_input", "router_mode", "num_experts_per_tok", "router_temperature",
    )  # fmt: skip
    return {name: getattr(router, name) for name in names}


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
            f"the foundation {found.name} is not on this machine; an export downloads it, or takes --base_model"
        )
        return FoundationSummary(found.name, found.revision, None, None)
    files = next((files for name in WEIGHT_NAMES if (files := weight_files(folder, name))), [])
    count = sum(_num_parameters(path) for path in files) if files else None
    return FoundationSummary(found.name, found.revision, str(folder), count)


def _compare(mixture: Mixture, foundation: FoundationSummary, missing: list[str], notes: list[str]) -> None:
    """Add what an export would refuse in experts or router beside their foundation, where that is on this
    machine."""
    if foundation.folder is None or not mixture.experts:
        return
    reference = FoundationReference(foundation.folder)
    carried = mixture.foundation_weights is not None
    try:
        model = skeleton(mixture.foundation_config if carried else load_foundation_config(reference))
        check_fit(mixture, model, replace(reference, name=foundation.name))
        if any(expert.whole_weights for expert in mixture.experts):
            check_whole_weights(mixture.experts, model, foundation_weights(reference, model), foundation.name)
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


def _place(reference: FoundationReference, base_model: str | None) -> tuple[FoundationReference, Path | None]:
    """Where the foundation is named to be, and its folder on this machine, where there is one."""
    found = resolve_foundation(reference, base_model, None)
    return found, Path(found.name) if is_local(found) else in_hub_cache(found)


def _tokenizer(mixture: Mixture, base_model: str | None, missing: list[str]) -> str | None:
    """The folder that an export would take it from. A named foundation may have it where the source brings
    its own."""
    try:
        _, foundation = _place(mixture.foundation, base_model)
        elsewhere = foundation is None  # from where an export downloads it
    except InputError:
        foundation, elsewhere = None, False
    places = [*mixture.folders, *([foundation] if foundation else [])]
    found = next((folder for folder in places if has_tokenizer(folder)), None)
    if found is None and not elsewhere:
        missing.append(f"no tokenizer in {', '.join(map(str, places))}; pass one with --tokenizer")
    return None if found is None else str(found)


def _num_parameters(path: Path) -> int:
    file = TensorFile(path)
    count = 0
    for key in file.keys():  # noqa: SIM118
        size = 1
        for extent in file.shape(key):
            size *= extent
        count += size
    return count


def _gate_parameters(mixture: Mixture) -> int:
    return 0 if mixture.router is None else mixture.router.num_experts * (mixture.router.hidden_size + 1)


def _memory(mixture: Mixture, foundation: FoundationSummary) -> dict[str, dict[str, int | None]]:
    """Bytes of the loaded parameters by dtype; the gate is float32 in each. None where the foundation is not
    at hand."""
    experts, gate = sum(expert.num_parameters for expert in mixture.experts), 4 * _gate_parameters(mixture)
    memory: dict[str, dict[str, int | None]] = {}
    for dtype, size in BYTES_PER_PARAMETER.items():
        base = None if foundation.num_parameters is None else size * foundation.num_parameters
        total = None if base is None else base + size * experts + gate
        memory[dtype] = {"foundation": base, "experts": size * experts, "router": gate, "total": total}
    return memory
