"""Finds any source that can be scored: where it is, what it is, and, once it is needed, the model itself.

Exported repos and ordinary models are loaded as they are. Anything else that `export` reads (training
checkpoints, adapters) is exported to a cache first, so that what is scored is what would be published.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock

from dylora_moe.hub_export.checking.model_size import check_mixture_size, check_model_size
from dylora_moe.hub_export.checking.own_code import (
    check_all_weights,
    load_with_own_code,
    refuse_other_weights,
)
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError, few, one_line
from dylora_moe.hub_export.foundation.quantised import check_needs_no_kernels
from dylora_moe.hub_export.foundation.reference import check_can_be_had, not_loaded, resolve_foundation
from dylora_moe.hub_export.readers import exported_repo, merged_model, training_run
from dylora_moe.hub_export.readers.choice import FoundSource
from dylora_moe.hub_export.readers.open_source import find_sources, read_sources
from dylora_moe.hub_export.repo import repo_config
from dylora_moe.hub_export.repo.checksums import differing_files, sha256
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.sources.source_options import ReadOptions, SourceOptions
from dylora_moe.hub_export.tensors.mixture import Mixture
from dylora_moe.hub_export.tokenizers import tokenizer_files
from dylora_moe.version import __version__

from ..options import NO_MODEL, check_backend, known_dtype
from .devices import warn_of_slow_dtype
from .model_identity import WEIGHTS, commit_in, digest, file_hashes, foundation_hashes, mixture_hashes
from .model_in_memory import forget_model, kept_model


CACHE_VARIABLE = "DYLORA_MOE_CACHE"
LONGEST_LABEL = 120  # bytes


@dataclass
class LoadedModel:
    """A model in evaluation mode with its tokenizer. `expert_names` is empty for an ordinary model."""

    model: Any
    tokenizer: Any
    label: str
    expert_names: list[str]

    @property
    def is_mixture(self) -> bool:
        return bool(self.expert_names)


@dataclass
class FoundModel:
    """A source that was found, read or exported; nothing large is loaded.

    Attributes:
        source: as the user gave it; `label` is what tables and files call it.
        folder: what is loaded.
        format: what the source was, as `inspect` calls it.
        backend: "hf" where it is loaded as it is, "peft_moe" where it was exported first, "vllm" where vLLM is asked.
        revision: the commit, of a repo on the Hub.
    """

    source: str
    label: str
    folder: Path
    format: str
    backend: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_mixture(self) -> bool:
        return repo_config.is_exported_repo(self.folder)

    @cached_property
    def config(self) -> Any:
        """The mixture's config; only for a mixture."""
        return repo_config.load_config(self.folder)

    @property
    def expert_names(self) -> list[str]:
        return self.config.expert_names if self.is_mixture else []

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 by file of what decides what the model computes, its foundation's files included."""
        return mixture_hashes(self.folder, self.config) if self.is_mixture else file_hashes(self.folder)

    @property
    def sha256(self) -> str:
        """Of all `files` together."""
        return digest(self.files)

    @property
    def base_model(self) -> str | None:
        """Where the foundation is taken from, of a mixture that does not hold it."""
        if not self.is_mixture or self.config.weights_layout != "adapter":
            return None
        revision = f"@{self.config.base_model_revision}" if self.config.base_model_revision else ""
        return f"{self.config.base_model_name_or_path}{revision}"

    def strategies(self, wanted: Sequence[str] | None) -> list[str]:
        """Give routing strategies in canonical form, each once; without a wish the repo's default.

        An ordinary model has one, `base`.

        Raises:
            InputError: one that this model cannot do; lists those that it can.
        """
        if not self.is_mixture:
            others = [strategy for strategy in wanted or () if strategy != "base"]
            if others:
                raise InputError(
                    f"{self.source} is an ordinary model without experts: routing strategy {others[0]!r} is for mixtures"
                )
            return ["base"]
        from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

        if not wanted:
            wanted = [repo_config.stored_routing_strategy(self.folder, self.config)]
        try:
            found = list(
                dict.fromkeys(str(resolve_routing_strategy(strategy, self.config)) for strategy in wanted)
            )
        except ValueError as error:
            raise InputError(one_line(error, 2000)) from error
        if self.backend == "vllm" and "ensemble" in found:
            raise InputError(
                "routing strategy 'ensemble' mixes the next-token distributions of all experts, and vLLM samples each "
                "request from one; use --backend hf, or leave it out"
            )
        return found

    def generation_settings(self) -> dict[str, Any]:
        """Read `generation_config.json`, by field; empty where there is none.

        Raises:
            InputError: it is damaged, or larger than honest ones are.
        """
        from dylora_moe.modeling.loading_dylora_moe import read_generation_config

        open_folder(self.folder, may_link_out=True).read_json("generation_config.json", required=False)
        try:
            found = read_generation_config(str(self.folder), {})
        except ValueError as error:
            raise InputError(f"{self.source} cannot be loaded: {one_line(error, 600)}") from error
        return {} if found is None else vars(found)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer."""
        name = None if self.is_mixture else self.source
        loaded = tokenizer_files.load_tokenizer(self.folder, None, self.trust_remote_code, name)
        tokenizer_files.warn_about_missed_arguments(open_folder(self.folder), loaded)
        return loaded

    def _check_size(self, config: Any) -> None:
        """Raise InputError if the model's config asks for more than its files hold."""
        folder = open_folder(self.folder, may_link_out=True)
        if not self.is_mixture:
            check_model_size(folder, config)
            return
        foundation = repo_config.foundation_of(self.folder, config)
        if config.weights_layout == "adapter":
            foundation = resolve_foundation(foundation, None, None)
        check_mixture_size(folder, config, foundation)

    def check_base_model(self) -> None:
        """Check that the foundation of a mixture that does not hold it can be had; nothing large is fetched.

        Raises:
            InputError: it cannot; names it, and says what to do.
        """
        if self.is_mixture and self.config.weights_layout == "adapter":
            named = repo_config.foundation_of(self.folder, self.config)
            check_can_be_had(resolve_foundation(named, None, None))

    def check_files(self) -> None:
        """Check what can be without loading: a trusted repo's own code may do anything with its files.

        Raises:
            InputError: the config asks for more than the files hold, or for kernels that are not installed.
        """
        from dylora_moe.modeling.configuration_dylora_moe import read_config

        if not self.trust_remote_code:
            config = self.config if self.is_mixture else read_config(str(self.folder))
            check_needs_no_kernels(config, self.source)
            self._check_size(config)

    def load(
        self,
        *,
        dtype: str = "bfloat16",
        device: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
    ) -> LoadedModel:
        """Load the model with its weights, in the place of one that `load_once` keeps.

        Args:
            dtype: one of `options.DTYPES`.
            device: where it goes; not with `device_map`, which is transformers' own.

        Raises:
            InputError: an unknown dtype, or a model that transformers cannot load.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from dylora_moe.modeling.configuration_dylora_moe import read_config
        from dylora_moe.modeling.loading_dylora_moe import FoundationError, read_generation_config

        dtype = known_dtype(dtype)
        warn_of_slow_dtype(dtype)
        # A mixture runs this package's own code, and a repo's only for those who say so.
        ours = self.is_mixture and not self.trust_remote_code
        arguments: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        for name, value in (("device_map", device_map), ("attn_implementation", attn_implementation)):
            if value is not None:
                arguments[name] = value
        try:
            forget_model()
            self.check_files()
            if not self.trust_remote_code and not self.is_mixture:
                arguments["config"] = read_config(str(self.folder))
            if ours:
                model = load_with_own_code(self.folder, **arguments)
            else:
                if self.is_mixture:
                    refuse_other_weights(open_folder(self.folder))
                read_generation_config(str(self.folder), {})  # transformers takes a damaged one for none
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=self.trust_remote_code,
                    **arguments,
                )
                check_all_weights(self.source, report, may_hold_more=not self.is_mixture)
        except InputError:
            raise
        except FoundationError as error:
            raise InputError(
                not_loaded(repo_config.foundation_of(self.folder, self.config), error)
            ) from error
        except (ValueError, OSError, ImportError) as error:
            raise InputError(f"{self.source} cannot be loaded: {one_line(error, 600)}") from error
        if device is not None and device_map is None:
            model = model.to(device)
        return LoadedModel(model.eval(), self.load_tokenizer(), self.label, self.expert_names)

    def load_once(self, **options: Any) -> LoadedModel:
        """Load the model as `load` does and keep it; return it if the same files with the same options are kept."""
        given = tuple(f"{name}={value!r}" for name, value in sorted(options.items()))
        key = (self.folder.resolve(), self.sha256, self.trust_remote_code, given)
        return kept_model(key, lambda: self.load(**options))


def find_model(
    source: str | Path | None = None,
    *,
    adapter_path: str | Path | Sequence[str | Path] | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> FoundModel:
    """Find a source, and export it to the cache if it is not yet what transformers loads.

    Args:
        source: a folder, a Hub id or `wandb:entity/project/name:version`.
        adapter_path: adapter folders, one expert each; `source` is then the foundation unless `base_model`
            is.
        backend: "hf" refuses what needs an export, "peft_moe" an ordinary model; None and "vllm" take both.
        options: `base_model`, `lora_alpha`, `revision` and `subfolder`; see `SourceOptions`.

    Raises:
        InputError: there is no such source, or it cannot be exported as it is.
    """
    check_backend(backend)
    chosen = SourceOptions.of(options)
    if adapter_path is not None:
        adapters = [adapter_path] if isinstance(adapter_path, str | Path) else list(adapter_path)
        sources = [str(adapter) for adapter in adapters]
        given = "+".join(sources)
        if not chosen.base_model and source is not None:
            chosen.base_model = str(source)
    elif source is not None:
        sources, given = [str(source)], str(source)
    else:
        raise InputError(NO_MODEL)
    found = find_sources(sources, chosen)
    reader = found[0].detection.reader
    model = FoundModel(
        source=given,
        label=_label(sources, [each.folder.name for each in found]),
        folder=found[0].folder.path,
        format=reader.FORMAT,
        backend=backend or "hf",
        revision=commit_in(found[0].folder.path),
        trust_remote_code=trust_remote_code,
    )
    if len(found) == 1 and reader is merged_model:
        if backend == "peft_moe":
            raise InputError(f"{given} is an ordinary model without experts; leave out --backend, or use hf")
        return model
    if len(found) == 1 and reader is exported_repo and not chosen.base_model:
        return model
    if backend == "hf":
        raise InputError(
            f"{given} is a {reader.FORMAT}, which transformers cannot load; use --backend peft_moe"
        )
    model.folder, model.backend = _exported(found, chosen, trust_remote_code), backend or "peft_moe"
    return model


def load_model(
    source: str | Path | None = None,
    *,
    dtype: str = "bfloat16",
    device: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **where: Any,
) -> LoadedModel:
    """Find a model and load it: `find_model` and `FoundModel.load` in one."""
    found = find_model(source, **where)
    return found.load(
        dtype=dtype, device=device, device_map=device_map, attn_implementation=attn_implementation
    )


def distinct_labels(models: list[FoundModel]) -> list[FoundModel]:
    """Keep each model once, with labels that differ: `run_a--best_model` and `run_b--best_model`.

    Raises:
        InputError: two models have paths that no label distinguishes.
    """
    once: dict[Path | str, FoundModel] = {}
    for model in models:  # by where they are: two checkpoints may well hold the same
        once.setdefault(Path(model.source).resolve() if Path(model.source).exists() else model.source, model)
    models = list(once.values())
    for label in sorted({model.label for model in models}):
        with_label = [model for model in models if model.label == label]
        if len(with_label) == 1:
            continue
        for model in with_label:
            parent = Path(model.source).resolve().parent.name if Path(model.source).exists() else ""
            model.label = f"{_plain(parent)}--{label}"
    first: dict[str, FoundModel] = {}
    for model in models:
        other = first.setdefault(model.label, model)
        if other is not model:
            raise InputError(
                f"{other.source} and {model.source} have the same name; give each a run of its own"
            )
    return models


def _label(sources: list[str], names: list[str]) -> str:
    """Make what tables and files call a source: a Hub id or artifact whole, a folder by its own name."""
    parts = []
    for text, name in zip(sources, names, strict=True):
        whole = text.removeprefix("wandb:") if not Path(text).exists() else name
        parts.append(_plain(whole.replace("/", "--")))
    label = "+".join(parts)
    if len(label.encode()) > LONGEST_LABEL:  # file names end at 255 bytes
        label = f"{parts[0][:40]}+{len(parts) - 1}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return label


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


def _exported(found: list[FoundSource], options: SourceOptions, trust_remote_code: bool) -> Path:
    """Give the cached export of a source; made now if source, options or this package's version are new."""
    from dylora_moe import hub_export

    mixture = read_sources(found, ReadOptions(**vars(options)))
    # What a checkpoint does not say itself may be in its run's best model and state, beside it.
    content = [
        (
            file_hashes(source.folder),
            training_run.best_model_config(source.folder)[1],
            [sha256(path) for path in training_run.state_files(source.folder)],
        )
        for source in found
    ]
    export_options = {
        "base_model": options.base_model,
        "lora_alpha": options.lora_alpha,
        "trust_remote_code": trust_remote_code,
    }
    made_from = [
        __version__,
        transformers.__version__,
        content,
        _foundation(mixture, options.base_model),
        export_options,
    ]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache_folder() / key[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        damage = _damage(folder)
        if damage is not None:
            # A foundation that lies in the source may be one that training changed.
            layout = "adapter" if mixture.foundation_weights is None else "full"
            if folder.exists():
                message = f"the export in the cache, {folder}, is damaged ({damage}) and is made again"
                warnings.warn(message, DyloraMoeWarning, stacklevel=4)
                shutil.rmtree(folder)
            hub_export.export(mixture, folder, layout=layout, **export_options)
    return folder


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a cached export by its own checksums; None where nothing is."""
    if not repo_config.is_exported_repo(folder):
        return "there is no repo"
    try:
        differing = differing_files(open_folder(folder))
    except (InputError, OSError) as error:
        return one_line(error)
    if differing is None:
        return "there are no checksums"
    return few(differing, 3, "; ") or None


def _foundation(mixture: Mixture, base_model: str | None) -> Any:
    """Give the foundation that an export takes config and tokenizer from, and what lies there now.

    Weights count by size and date: an export of layout `adapter` holds none of them, and reading them all
    would take minutes each time.
    """
    try:
        reference = resolve_foundation(mixture.foundation, base_model, None)
    except InputError:
        return None  # the export says so, or does without
    return (
        reference.name,
        reference.revision,
        foundation_hashes(reference.name, reference.revision, by_date=WEIGHTS),
    )


def cache_folder() -> Path:
    """Give where exports are kept: `$DYLORA_MOE_CACHE`, else `dylora_moe/exports` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "dylora_moe" / "exports")


__all__ = ["FoundModel", "LoadedModel", "cache_folder", "distinct_labels", "find_model", "load_model"]
