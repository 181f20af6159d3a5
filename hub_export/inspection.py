"""Inspect: what a source holds, and what it lacks to be exported. It loads no model and knows nothing about formats."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .formats import open_sources, read_sources
from .foundation import in_hub_cache, is_local, resolve_foundation
from .mixture import Expert, Mixture, ReadOptions, Router
from .tensor_files import TensorFile
from .tokenizer import has_tokenizer


BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class ExpertSummary:
    """Ranks and alphas are (smallest, largest) over the layers; `num_bytes` is the size of the tensors as stored."""

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
    """`folder` is where it lies on this machine, None where it does not; then `num_parameters` is unknown, too."""

    name: str | None
    revision: str | None
    folder: str | None
    num_parameters: int | None


@dataclass
class Inspection:
    """What `inspect` found. `memory` is bytes by dtype when loaded; `missing` what stands in the way of an export."""

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
) -> Inspection:
    """Look at one or several sources without loading a model.

    Args:
        sources: a folder or a Hub id; several only for PEFT adapters.
        base_model, lora_alpha, revision, subfolder: as for `export`, to see whether an export would still lack something.

    Raises:
        InputError: of no known format, or damaged. What is merely missing is listed.
    """
    resolved = open_sources(sources, revision=revision, subfolder=subfolder)
    mixture = read_sources(resolved, ReadOptions(lora_alpha=lora_alpha, base_model=base_model))
    missing = list(mixture.problems)
    foundation = _foundation(mixture, base_model, missing)
    tokenizer = _tokenizer(mixture, foundation, missing)
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
        notes=mixture.notes,
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
        found = resolve_foundation(reference, base_model, None)
    except InputError as error:
        missing.append(str(error))
        return FoundationSummary(base_model or reference.name, reference.revision, None, None)
    folder = Path(found.name) if is_local(found) else in_hub_cache(found)
    if folder is None:
        missing.append(
            f"the foundation {found.name} is not on this machine; an export downloads it, or takes --base_model"
        )
        return FoundationSummary(found.name, found.revision, None, None)
    files = sorted(folder.glob("*.safetensors"))
    count = sum(_num_parameters(path) for path in files) if files else None
    return FoundationSummary(found.name, found.revision, str(folder), count)


def _tokenizer(mixture: Mixture, foundation: FoundationSummary, missing: list[str]) -> str | None:
    places = [*mixture.folders, *([Path(foundation.folder)] if foundation.folder else [])]
    found = next((folder for folder in places if has_tokenizer(folder)), None)
    if found is None and foundation.folder is not None:
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
    """Bytes of the loaded parameters by dtype; the gate is float32 in each. None where the foundation is not at hand."""
    experts, gate = sum(expert.num_parameters for expert in mixture.experts), 4 * _gate_parameters(mixture)
    memory: dict[str, dict[str, int | None]] = {}
    for dtype, size in BYTES_PER_PARAMETER.items():
        base = None if foundation.num_parameters is None else size * foundation.num_parameters
        total = None if base is None else base + size * experts + gate
        memory[dtype] = {"foundation": base, "experts": size * experts, "router": gate, "total": total}
    return memory
