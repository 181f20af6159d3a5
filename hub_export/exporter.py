"""Export: any source a reader knows becomes a Hub repo that stock transformers loads.

The order is: look at everything that is cheap to look at, load, write to a hidden folder, check, and only then let the
repo appear under its name. It knows nothing about the formats of sources.

Dtypes: the foundation is saved as it is stored and the gate in float32. The experts are saved in their own stored
dtype (the finest one, where they differ), because rounding float32 adapters to a bfloat16 foundation's dtype would
change what they compute; on loading, `dtype` decides for both, as for any model. An explicit `dtype` converts
foundation and experts.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import DyloraMoeWarning, FailureError, InputError, one_line
from .exported_repo import is_replaceable
from .formats import read_sources
from .foundation import (
    check_experts_fit,
    check_router_fits,
    is_local,
    load_foundation,
    load_foundation_config,
    resolve_foundation,
)
from .mixture import FoundationReference, Mixture, ReadOptions, check_expert_names
from .sources import Source, resolve_sources
from .staging import check_output, staged_folder
from .tokenizer import load_tokenizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPERT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class ExportOptions:
    """What a user may choose; None leaves what the source says, or the default. The fields are `export`'s arguments."""

    base_model: str | None = None
    base_revision: str | None = None
    routing_strategy: str | None = None
    router_mode: str | None = None
    router_input: str | None = None
    num_experts_per_tok: int | None = None
    router_temperature: float | None = None
    lora_alpha: float | None = None
    expert_names: list[str] | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    verify: bool = True
    trust_remote_code: bool = False

    @property
    def router_settings(self) -> dict[str, Any]:
        """The router's settings that were given, by the names of the config's fields."""
        names = ("router_mode", "router_input", "num_experts_per_tok", "router_temperature")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def torch_dtype(self) -> torch.dtype | None:
        if self.dtype in (None, "auto"):
            return None
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is not known; it can be auto, {', '.join(DTYPES)}")
        return DTYPES[self.dtype]


@dataclass
class ExportResult:
    """What was written. `check` is None where it was not asked for."""

    output_dir: Path
    format: str
    reason: str
    foundation: str | None
    experts: list[str]
    router: bool
    routing_strategy: str
    tokenizer: str
    check: Any = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        result = {**self.__dict__, "output_dir": str(self.output_dir)}
        result["check"] = None if self.check is None else self.check.to_dict()
        return result


def export(
    sources: str | Path | list[str | Path],
    output_dir: str | Path,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> ExportResult:
    """Write one or several sources as one repo, then check it against them.

    Args:
        sources: a folder or a Hub id; several PEFT adapters become several experts, in this order.
        output_dir: the repo's folder. It must be missing or empty, or with `overwrite` an exported repo.
        progress: is told in a few words what happens next.
        base_model, base_revision: the foundation, where the source names none or not the right one.
        routing_strategy: the default strategy; otherwise `router`, `single:0` for one expert, `uniform` without router.
        router_mode, router_input, num_experts_per_tok, router_temperature: other router settings than the source's.
        lora_alpha: alpha of all experts, for training checkpoints that do not store it.
        expert_names: other names for the experts, in order.
        tokenizer: folder or Hub id, where neither source nor foundation has the right one.
        dtype: "float32", "bfloat16" or "float16" converts foundation and experts; otherwise they stay as stored.
        max_shard_size: weights beyond it are split over several files.
        overwrite: replace an exported repo, at one stroke.
        verify: check the written repo against the source before it appears.
        trust_remote_code: let a tokenizer run code of its own.

    Raises:
        InputError: what was given cannot be exported as it is.
        FailureError: writing failed, or the check found a difference. Nothing is left under `output_dir` then that was
            not there before.
    """
    try:
        chosen = ExportOptions(**options)
    except TypeError as error:
        raise InputError(one_line(error)) from None
    chosen.torch_dtype  # noqa: B018 (raises for an unknown one, before anything is read)
    tell = progress or (lambda message: None)
    output = check_output(Path(output_dir), chosen.overwrite, is_replaceable)
    tell("reading the source")
    resolved = resolve_sources(sources)
    _refuse_inside(output, [source.folder for source in resolved])
    mixture = _read(resolved, chosen)
    foundation, config = _plan(mixture, chosen)
    _refuse_inside(output, [Path(name) for name in (foundation and foundation.name, chosen.tokenizer) if name])
    strategy = _routing_strategy(mixture, chosen, config)
    tokenizer, tokenizer_origin = load_tokenizer(chosen.tokenizer, mixture, foundation, chosen.trust_remote_code)
    tell("loading the foundation and the experts")
    model = _build_model(mixture, foundation, config, chosen)
    _warn_about_vocabulary(tokenizer, model, mixture)
    result = ExportResult(
        output_dir=output,
        format=mixture.format,
        reason=mixture.reason,
        foundation=foundation.name if foundation else mixture.foundation.name,
        experts=list(config.expert_names),
        router=config.router_input is not None,
        routing_strategy=strategy,
        tokenizer=tokenizer_origin,
        notes=mixture.notes,
    )
    with staged_folder(output, chosen.overwrite, is_replaceable) as folder:
        tell("writing the repo")
        _write(folder, output.name, model, tokenizer, mixture, strategy, chosen.max_shard_size)
        del model
        gc.collect()
        if chosen.verify:
            tell("checking the repo against the source")
            result.check = _check(folder, mixture, resolved, foundation, chosen)
        tell("putting the repo in its place")
    return result


def _refuse_inside(output: Path, folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and output in folder.resolve().parents:
            raise InputError(f"{folder} lies in the output folder {output}, which would be replaced")


def _read(sources: list[Source], options: ExportOptions) -> Mixture:
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
    check_expert_names([expert.name for expert in mixture.experts], [expert.origin for expert in mixture.experts])
    if options.router_settings and mixture.router is None:
        raise InputError(
            f"--{next(iter(options.router_settings))} needs a router, which {mixture.folders[0]} does not have"
        )
    if mixture.router is not None:
        mixture.router = replace(mixture.router, **options.router_settings)
    for note in mixture.notes:
        warnings.warn(note, DyloraMoeWarning, stacklevel=3)
    return mixture


def _plan(mixture: Mixture, options: ExportOptions) -> tuple[FoundationReference | None, Any]:
    """Where the foundation is (None: the source carries it), and the repo's config."""
    if mixture.load_model is not None:
        from .exported_repo import load_config

        foundation, base_config = None, load_config(mixture.folders[0]).base_config
        name, revision = mixture.foundation.name, mixture.foundation.revision
    else:
        foundation = resolve_foundation(mixture.foundation, options.base_model, options.base_revision)
        base_config = load_foundation_config(foundation)
        name, revision = foundation.name, foundation.revision
        if mixture.router is not None:
            check_router_fits(mixture.router, base_config, name)
    return foundation, _config(mixture, base_config, name, revision)


def _config(mixture: Mixture, base_config: Any, name: str | None, revision: str | None) -> Any:
    from dylora_moe.modeling import DyloraMoeConfig

    base_config = copy.deepcopy(base_config)
    base_config._name_or_path = ""  # the folder it happened to be loaded from means nothing elsewhere
    router: dict[str, Any] = {"router_input": None}
    if mixture.router is not None:
        names = ("router_input", "router_mode", "num_experts_per_tok", "router_temperature", "router_aux_loss_coef")
        values = {name: getattr(mixture.router, name) for name in names}
        router = {name: value for name, value in values.items() if value is not None}
    try:
        return DyloraMoeConfig(
            base_config=base_config,
            expert_configs=[expert.config() for expert in mixture.experts],
            base_model_name_or_path=name,
            base_model_revision=revision,
            **router,
        )
    except ValueError as error:
        raise InputError(one_line(error, 500)) from error


def _routing_strategy(mixture: Mixture, options: ExportOptions, config: Any) -> str:
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    try:
        return str(resolve_routing_strategy(options.routing_strategy or mixture.routing_strategy, config))
    except ValueError as error:
        raise InputError(one_line(error, 2000)) from error


def _build_model(mixture: Mixture, foundation: FoundationReference | None, config: Any, options: ExportOptions) -> Any:
    if mixture.load_model is not None:
        model = mixture.load_model(options.torch_dtype)
        model.config = config
        if model.router is not None:
            model.router.config = config
        return model
    from dylora_moe.modeling import DyloraMoeForCausalLM

    loaded = load_foundation(foundation, options.torch_dtype or "auto")
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise InputError(
            f"{foundation.name} is quantised; pass the original model in full precision with --base_model"
        )
    check_experts_fit(mixture.experts, loaded, foundation.name)
    try:
        model = DyloraMoeForCausalLM.from_foundation(loaded, config)
    except ValueError as error:
        raise InputError(one_line(error, 500)) from error
    dtype = options.torch_dtype or _finest_dtype(mixture)
    for layer in model.expert_layers().values():
        for stack in (layer.lora_A, layer.lora_B):
            stack.data = torch.zeros_like(stack, dtype=dtype)
    for index, expert in enumerate(mixture.experts):
        weights = {name: expert.read(name) for name in expert.layers}
        for name, matrices in weights.items():
            if not all(bool(matrix.isfinite().all()) for matrix in matrices):
                raise InputError(f"expert {expert.name} ({expert.origin}) holds NaN or infinite numbers on {name}")
        model.set_expert_weights(index, weights)
    if mixture.router is not None:
        weight, bias = mixture.router.read()
        if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
            raise InputError(f"the router's gate ({mixture.folders[0]}) holds NaN or infinite numbers")
        with torch.no_grad():
            model.router.gate.weight.copy_(weight)
            model.router.gate.bias.copy_(bias)
    return model


def _finest_dtype(mixture: Mixture) -> torch.dtype:
    """One dtype for all stacks, in which every expert's numbers are exact."""
    for expert in mixture.experts:
        for name, layer in expert.layers.items():
            if layer.dtype not in EXPERT_DTYPES:
                raise InputError(
                    f"expert {expert.name} ({expert.origin}) is stored as {layer.dtype} on {name}, not as floats"
                )
    return reduce(torch.promote_types, (layer.dtype for expert in mixture.experts for layer in expert.layers.values()))


def _warn_about_vocabulary(tokenizer: Any, model: Any, mixture: Mixture) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    stored = mixture.foundation.vocab_size
    if stored is not None and stored != model.config.get_text_config().vocab_size:
        raise InputError(
            f"{mixture.foundation.named_in} has vocab_size {stored}, the foundation has "
            f"{model.config.get_text_config().vocab_size}; pass the model it was trained on with --base_model"
        )
    if len(tokenizer) > rows:
        warnings.warn(
            f"the tokenizer has {len(tokenizer)} tokens, the foundation embeds {rows}: the rest cannot be read by the model",
            DyloraMoeWarning,
            stacklevel=3,
        )


def _write(
    folder: Path, name: str, model: Any, tokenizer: Any, mixture: Mixture, strategy: str, max_shard_size: str
) -> None:
    """Everything an exported repo holds.

    Raises:
        OSError: the disk is full, or the file system refuses.
    """
    from transformers import GenerationConfig

    from .model_card import model_card

    generation_config = model.generation_config
    # transformers refuses to save a changed generation config that has harmless contradictions (a temperature without
    # sampling), as some foundations have; so a plain one is saved, and the foundation's own written over it
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(one_line(error)) from error
    except ValueError as error:
        raise InputError(f"the model cannot be saved: {one_line(error)}") from error
    write_generation_config(folder, generation_config.to_diff_dict(), strategy)
    tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    card.write_text(model_card(name, model.config, strategy, mixture), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(card.stat().st_mode)  # safetensors files are made readable for their owner alone


def write_generation_config(folder: Path, fields: dict[str, Any], strategy: str) -> None:
    """`generation_config.json`: what the foundation's held, and the routing strategy.

    The mark that it was derived from a model config must go: with it, transformers drops unknown fields on reading.
    """
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    text = json.dumps({**fields, "routing_strategy": strategy}, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def _check(
    folder: Path,
    mixture: Mixture,
    sources: list[Source],
    foundation: FoundationReference | None,
    options: ExportOptions,
) -> Any:
    from .check import check_against_source

    report = check_against_source(
        folder,
        mixture.format,
        mixture.folders,
        base_model=foundation.name if foundation else None,
        base_revision=foundation.revision if foundation else None,
        lora_alpha=options.lora_alpha,
        router_settings=options.router_settings,
        dtype=options.torch_dtype,
    )
    if not report.passed:
        raise FailureError(
            f"the exported repo does not compute what {sources[0].folder} does: {report.describe_failures()}"
        )
    return report


__all__ = ["ExportOptions", "ExportResult", "export", "is_local", "write_generation_config"]
