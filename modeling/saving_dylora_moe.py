"""Saving a model: both layouts with the code beside the weights, the Hub, and experts as PEFT folders.

Layout `full` is transformers' own weight files. Layout `adapter` is

    experts/<name>/adapter_config.json, adapter_model.safetensors     one expert, as PEFT itself would save it
    router.safetensors                                                gate.weight [N, hidden], gate.bias [N],
                                                                      or <layer>.prototypes [N, in] (`arrow`)
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import get_relative_imports
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .arrow_dylora_moe import PROTOTYPES
from .configuration_dylora_moe import (
    REQUIRED_TRANSFORMERS,
    STACKED_PARAMETERS,
    WEIGHTS_LAYOUTS,
    DyloraMoeConfig,
)
from .experts_dylora_moe import refuse_offloaded
from .stacked_experts_dylora_moe import as_in_peft


logger = logging.get_logger(__name__)

CHECKSUMS = "SHA256SUMS"
AUTO_MAP = {
    "AutoConfig": "configuration_dylora_moe.DyloraMoeConfig",
    "AutoModel": "modeling_dylora_moe.DyloraMoeModel",
    "AutoModelForCausalLM": "modeling_dylora_moe.DyloraMoeForCausalLM",
}

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ROUTER_WEIGHTS = "router.safetensors"
PEFT_PREFIX = "base_model.model."

# Names of the matrices of a mixture-of-experts layer before transformers stacks them, and of its gate.
STACKED_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
GATE_NAMES = ("gate", "router")

REQUIREMENTS = ("torch>=2.7", f"transformers>={REQUIRED_TRANSFORMERS}")
GENERATED_REQUIREMENT = re.compile(r"(torch|transformers)>=[\d.]+")


class SavingMixin:
    """Saves a routed model to a folder or to the Hub."""

    _layout = "full"  # the default, and the layout of a `push_to_hub` in progress

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        layout: str | None = None,
        **kwargs,
    ) -> None:
        """Save a model as `PreTrainedModel.save_pretrained` does, with the code beside the weights.

        Args:
            layout: `"full"`, everything, or `"adapter"`, the experts and the router alone, with the
                base model taken from `config.base_model_name_or_path` on loading. The default is `"full"`,
                also for a model that was loaded from layout `adapter`, from which the Trainer could not
                resume.

        Raises:
            ValueError: layout `adapter` of a model whose embeddings were resized, whose base model an adapter
                was merged into, or whose config names no base model, or, with `push_to_hub`, one on this
                machine alone.
        """
        directory = Path(save_directory)
        self._check_ranks()
        names = ("repo_id", "commit_message", "create_pr", "private")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        self.config.auto_map = dict(AUTO_MAP)
        with self._in_layout(layout):
            self._check_foundation(on_hub=push_to_hub)
            directory.mkdir(parents=True, exist_ok=True)
            before = self._get_files_timestamps(directory) if push_to_hub and is_main_process else {}
            if is_main_process:
                save_code(directory)
                (directory / CHECKSUMS).unlink(missing_ok=True)  # of the files that are now replaced
            if self.config.weights_layout == "full":
                super().save_pretrained(directory, is_main_process, state_dict, False, *args, **kwargs)
                if is_main_process and not self.can_generate() and self.generation_config is not None:
                    self.generation_config.save_pretrained(directory)  # for the default strategy
            elif is_main_process:
                self._save_adapter_layout(directory, state_dict)
        if push_to_hub and is_main_process:
            self._upload_saved(directory, before, token=kwargs.get("token"), **hub_arguments)

    def push_to_hub(self, repo_id: str, *args, layout: str | None = None, **kwargs):
        """Upload as `PreTrainedModel.push_to_hub` does; `layout` and errors as in `save_pretrained`."""
        with self._in_layout(layout):
            self._check_foundation(on_hub=True)
            return super().push_to_hub(repo_id, *args, **kwargs)

    def save_adapters(self, save_directory: str | Path) -> list[Path]:
        """Save every expert as a plain PEFT folder `<save_directory>/<name>`, bit for bit."""
        return save_adapters(self, save_directory)

    @contextmanager
    def _in_layout(self, layout: str | None) -> Iterator[None]:
        """Save in a layout within the context."""
        layout = layout or self._layout
        if layout not in WEIGHTS_LAYOUTS:
            raise ValueError(f"There is no layout {layout!r}: choose 'full' or 'adapter'.")
        before = self.config.weights_layout, self._layout
        self.config.weights_layout = self._layout = layout
        try:
            yield
        finally:
            self.config.weights_layout, self._layout = before

    def _check_ranks(self) -> None:
        """Refuse to save a model that computes with other ranks than its config says."""
        layouts = self.config.rank_layouts()
        computed = {name: layer.layout for name, layer in self.expert_layers().items()}
        for name in {**computed, **layouts}:
            if computed.get(name) != layouts.get(name):
                raise ValueError(
                    f"`config.expert_configs` was changed on a live model: layer {name!r} computes with ranks and "
                    f"scales {computed.get(name, 'of no expert')}, and the config says {layouts.get(name, 'none')}."
                )

    def _check_foundation(self, on_hub: bool) -> None:
        """Refuse layout `adapter` where the foundation that it leaves out could not be loaded again."""
        foundation = self.config.base_model_name_or_path
        if self.config.weights_layout != "adapter":
            return
        if foundation is None:
            raise ValueError(
                "Layout `adapter` leaves the base model where it is, and `config.base_model_name_or_path` does not say "
                "where that is: set it, or choose layout='full'."
            )
        if self._is_resized:
            raise ValueError(
                f"The embeddings were resized, and the base model at {foundation!r} has others: choose layout='full'."
            )
        was_merged = any(layer.has_merged_adapter for layer in self.expert_layers().values())
        if was_merged or any(getattr(module, "merged", False) for module in self.modules()):
            raise ValueError(
                f"An adapter was merged into the base model, and the one at {foundation!r} is without it: choose "
                "layout='full'."
            )
        if on_hub and Path(foundation).exists():
            raise ValueError(
                f"`config.base_model_name_or_path` is {foundation!r}, a folder of this machine, which others cannot "
                "load: set it to the base model's id on the Hub, or choose layout='full'."
            )

    def _save_adapter_layout(self, directory: Path, state_dict: dict | None) -> None:
        of_foundation = [p for name, p in self.foundation.named_parameters() if ".lora_" not in name]
        if any(parameter.requires_grad for parameter in of_foundation):
            logger.warning(
                "Layout `adapter` does not save the base model, and some of its parameters are trainable."
            )
        save_adapters(self, directory / "experts", state_dict)
        save_router(self, directory, state_dict)
        config = deepcopy(self.config)
        config.architectures = [type(self).__name__]
        vars(config).pop("quantization_config", None)  # of the foundation, which is not saved here
        config.save_pretrained(directory)
        if getattr(self, "generation_config", None) is not None:
            self.generation_config.save_pretrained(directory)

    def _upload_saved(
        self, directory: Path, before: dict, repo_id=None, private=None, token=None, **of_commit
    ):
        repo = HfApi(token=token).create_repo(repo_id or directory.name, private=private, exist_ok=True)
        self._upload_modified_files(directory, repo.repo_id, before, token=token, **of_commit)

    # Those of transformers look one folder deep, and experts lie two deep.

    def _get_files_timestamps(self, working_dir: str | Path) -> dict[str, float]:
        files = (file for file in Path(working_dir).rglob("*") if file.is_file())
        return {file.relative_to(working_dir).as_posix(): file.stat().st_mtime for file in files}

    def _upload_modified_files(
        self, working_dir, repo_id, files_timestamps, commit_message=None, token=None, revision=None, **kwargs
    ):
        hub = HfApi(token=token)
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        times = self._get_files_timestamps(working_dir).items()
        modified = [file for file, time in times if time > files_timestamps.get(file, float("-inf"))]
        operations = [CommitOperationAdd(file, Path(working_dir) / file) for file in sorted(modified)]
        if CHECKSUMS not in modified and hub.file_exists(repo_id, CHECKSUMS, revision=revision):
            # They are an export's, of the files that are now replaced.
            operations.append(CommitOperationDelete(CHECKSUMS))
        message = commit_message or "Upload model"
        return hub.create_commit(repo_id, operations, commit_message=message, revision=revision, **kwargs)


def save_code(directory: str | Path) -> None:
    """Copy the code to a folder, with a `requirements.txt`, so that the folder loads anywhere."""
    source = Path(__file__).parent
    target = Path(directory)
    # transformers puts an empty `__init__.py` into its cache of code, and does not copy the repo's own there.
    files = [file for file in source.glob("*.py") if file.name != "__init__.py" or file.stat().st_size > 0]
    if target.resolve() != source.resolve():
        for file in files:
            shutil.copyfile(file, target / file.name)
            for name in set(get_relative_imports(file)) - {other.stem for other in files}:
                (target / f"{name}.py").write_text("")  # an optional file; the Hub's loader wants all imports
    write_requirements(target)


def write_requirements(directory: Path) -> None:
    """Write `requirements.txt`: what the code needs, then the lines that people added to such a file."""
    path = directory / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    added = [line for line in lines if not GENERATED_REQUIREMENT.fullmatch(line.strip())]
    path.write_text("\n".join([*REQUIREMENTS, *added]) + "\n", encoding="utf-8")


# PEFT's format


def peft_config(config: DyloraMoeConfig, expert: int, fan_in_fan_out: bool) -> dict:
    """Make the `adapter_config.json` of one expert.

    On a foundation whose experts of a layer are stacked into one parameter, PEFT (0.21) moves targets with
    the matrices' former names onto that parameter, and leaves out dense and shared layers of the same names.
    Such a layer is named by its weight instead, as a parameter, which PEFT takes unchanged. So is a gate, of
    which PEFT takes nothing else. An adapter of parameters needs a dropout of 0 there.
    """
    entry = dict(config.expert_configs[expert])
    del entry["name"], entry["mature"]
    if not entry["target_parameters"]:
        del entry["target_parameters"]
    names = [*GATE_NAMES]
    if has_stacked_experts(config.base_config):
        names += STACKED_NAMES
    entry.update(_targets_by_weight(entry, names))
    if entry.get("target_parameters"):
        entry["lora_dropout"] = 0.0
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.base_model_revision,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        **entry,
    }


def has_stacked_experts(base_config: PreTrainedConfig | None) -> bool:
    """Say whether transformers stacks a layer's experts when it loads a model of this type."""
    transforms = get_checkpoint_conversion_mapping(getattr(base_config, "model_type", "")) or ()
    targets = [name for transform in transforms for name in transform.target_patterns]
    return any(name.endswith("gate_up_proj") for name in targets)


def _targets_by_weight(entry: dict, names: list[str]) -> dict:
    """Name modules whose last name is one of `names` by their weight; returns the fields that change."""
    moved = [name for name in entry["target_modules"] if name.rpartition(".")[2] in names]
    if not moved:
        return {}

    def by_weight(pattern: dict) -> dict:
        return {f"{name}.weight" if name in moved else name: value for name, value in pattern.items()}

    weights = [f"{name}.weight" for name in moved]
    return {
        "target_modules": [name for name in entry["target_modules"] if name not in moved],
        "target_parameters": [*weights, *entry.get("target_parameters", ())],
        "rank_pattern": by_weight(entry["rank_pattern"]),
        "alpha_pattern": by_weight(entry["alpha_pattern"]),
    }


def peft_keys(entry: dict) -> dict[str, str]:
    """Map what an expert adapts to PEFT's keys in a file, without `lora_A.weight` and `lora_B.weight`.

    PEFT wraps a module once for each of its adapted parameters; the first parameter's layer is the innermost.
    """
    keys = {name: f"{PEFT_PREFIX}{name}" for name in entry["target_modules"]}
    for name in entry["target_parameters"]:
        module, _, parameter = name.rpartition(".")
        later = STACKED_PARAMETERS[STACKED_PARAMETERS.index(parameter) + 1 :]
        depth = sum(f"{module}.{other}" in entry["target_parameters"] for other in later)
        keys[name] = f"{PEFT_PREFIX}{module}{'.base_layer' * depth}"
    return keys


def save_adapters(model, directory: str | Path, state_dict: dict | None = None) -> list[Path]:
    """Save every expert as a plain PEFT folder under its own name; PEFT reads them back bit for bit.

    Args:
        model: the routed model.
        directory: where the folders are made.
        state_dict: the model's weights, where they are not in the model itself (gathered from several
            processes).

    Raises:
        ValueError: an expert's name cannot be a folder's, or its weights are offloaded.
    """
    if state_dict is None:
        refuse_offloaded(model)
        state_dict = model.state_dict()
    layers = model.expert_layers()
    folders = []
    for index, entry in enumerate(model.config.expert_configs):
        name = entry["name"]
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"Expert {name!r} cannot be saved under its name, which is not a folder's; rename it."
            )
        folder = Path(directory) / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = _peft_weights(model, index, state_dict)
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        transposed = any(isinstance(layers[module].base_layer, Conv1D) for module in entry["target_modules"])
        text = json.dumps(peft_config(model.config, index, transposed), indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n")
        folders.append(folder)
    return folders


def _peft_weights(model, expert: int, state_dict: dict) -> dict[str, torch.Tensor]:
    """Copy one expert's rows out of the stacks, by PEFT's names."""
    layers = model.expert_layers()
    modules = model.config.stack_modules()
    weights = {}
    for place, key in peft_keys(model.config.expert_configs[expert]).items():
        rows = layers[place].rows(expert)
        rows_a = state_dict[f"foundation.{modules[place]}.lora_A"].detach()[rows].cpu()
        rows_b = state_dict[f"foundation.{modules[place]}.lora_B"].detach()[rows].cpu()
        lora_a, lora_b = as_in_peft(rows_a, rows_b)
        weights[f"{key}.lora_A.weight"] = lora_a.clone(memory_format=torch.contiguous_format)
        weights[f"{key}.lora_B.weight"] = lora_b.clone(memory_format=torch.contiguous_format)
    return weights


def save_router(model, directory: str | Path, state_dict: dict | None = None) -> None:
    """Save the gate or the prototypes, if the model has a router."""
    if not model.config.has_router:
        return
    if state_dict is None:
        state_dict = model.state_dict()
    weights = {}
    for name, tensor in state_dict.items():
        if name.startswith("router.") or name.endswith(f".{PROTOTYPES}"):
            name = name.removeprefix("router.").removeprefix("foundation.")
            weights[name] = tensor.detach().cpu().contiguous()
    save_file(weights, Path(directory) / ROUTER_WEIGHTS, metadata={"format": "pt"})


__all__ = [
    "AUTO_MAP",
    "REQUIREMENTS",
    "SavingMixin",
    "peft_config",
    "peft_keys",
    "save_adapters",
    "save_code",
    "save_router",
]
