"""Weights on disk beyond one plain file: PEFT folders of single experts, the layout `adapter`, subsets of
experts.

    experts/<name>/adapter_config.json, adapter_model.safetensors     one expert, as PEFT itself would have saved it
    router.safetensors                                                gate.weight [N, hidden], gate.bias [N]

Knows file names and tensor names. Knows nothing about how a model computes.
"""

import json
import stat
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import constants, errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from .configuration_dylora_moe import STACKED_PARAMETERS, DyloraMoeConfig, read_config
from .experts_dylora_moe import in_base_layer, refuse_offloaded
from .stacked_experts_dylora_moe import as_in_peft, rows_of_stack


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUTER_WEIGHTS = "router.safetensors"
PEFT_PREFIX = "base_model.model."
# what the matrices of a mixture-of-experts layer were called before they were stacked
STACKED_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
GATE_NAMES = ("gate", "router")
WEIGHTS = (".json", ".safetensors", ".bin")  # and what describes them
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# Where transformers is told to look for an adapter of the foundation's: it would apply one that lies in its
# folder.
NO_FOLDER = "no-adapter-is-looked-for"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def peft_config(config: DyloraMoeConfig, expert: int, fan_in_fan_out: bool) -> dict:
    """The `adapter_config.json` of one expert.

    On a foundation whose experts of a layer are stacked into one parameter, PEFT (0.21) moves targets that
    are called as these matrices were before onto that parameter, and leaves dense and shared layers of the
    same names out. There such a layer is named by its weight, as a parameter, which PEFT takes as it stands;
    so is a gate, of which it takes nothing else. Of an adapter of parameters, it wants a dropout of 0.
    """
    left_out = (
        "name",
        "mature",
        *(() if config.expert_configs[expert]["target_parameters"] else ("target_parameters",)),
    )
    entry = {name: value for name, value in config.expert_configs[expert].items() if name not in left_out}
    names = (*GATE_NAMES, *(STACKED_NAMES if has_stacked_experts(config.base_config) else ()))
    entry |= _targets_by_weight(entry, names)
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
    """Whether transformers stacks the matrices of a layer's experts when it loads a model of this type."""
    transforms = get_checkpoint_conversion_mapping(getattr(base_config, "model_type", "")) or ()
    return any(
        name.endswith("gate_up_proj") for transform in transforms for name in transform.target_patterns
    )


def _targets_by_weight(entry: dict, names: tuple[str, ...]) -> dict:
    moved = {name for name in entry["target_modules"] if name.rpartition(".")[2] in names}
    if not moved:
        return {}

    def by_weight(pattern: dict) -> dict:
        return {f"{name}.weight" if name in moved else name: value for name, value in pattern.items()}

    return {
        "target_modules": [name for name in entry["target_modules"] if name not in moved],
        "target_parameters": [
            *(f"{name}.weight" for name in entry["target_modules"] if name in moved),
            *entry.get("target_parameters", ()),
        ],
        "rank_pattern": by_weight(entry["rank_pattern"]),
        "alpha_pattern": by_weight(entry["alpha_pattern"]),
    }


def peft_keys(entry: dict) -> dict[str, str]:
    """What an expert adapts -> what PEFT calls it in a file, without `lora_A.weight` and `lora_B.weight`.

    The layers that it puts around a module, one for each parameter, lie in each other, the first parameter's
    inmost.
    """
    keys = {name: f"{PEFT_PREFIX}{name}" for name in entry["target_modules"]}
    for name in entry["target_parameters"]:
        module, _, parameter = name.rpartition(".")
        later = [
            other
            for other in STACKED_PARAMETERS[STACKED_PARAMETERS.index(parameter) + 1 :]
            if f"{module}.{other}" in entry["target_parameters"]
        ]
        keys[name] = f"{PEFT_PREFIX}{module}{'.base_layer' * len(later)}"
    return keys


def save_adapters(model, directory: str | Path, state_dict: dict | None = None) -> list[Path]:
    """Every expert as a plain PEFT folder under its own name; PEFT reads them back bit for bit.

    Args:
        state_dict: the model's weights, where they are not in the model itself (gathered from several
            processes).

    Raises:
        ValueError: an expert's name cannot be a folder's, or its weights are offloaded.
    """
    if state_dict is None:
        refuse_offloaded(model)
        state_dict = model.state_dict()
    folders = []
    layers, modules = model.expert_layers(), model.config.stack_modules()
    for index, entry in enumerate(model.config.expert_configs):
        name = entry["name"]
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"Expert {name!r} cannot be saved under its name, which is not a folder's; rename it."
            )
        folder = Path(directory) / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for place, key in peft_keys(entry).items():
            rows = [
                state_dict[f"foundation.{modules[place]}.{kind}"].detach()[layers[place].rows(index)].cpu()
                for kind in ("lora_A", "lora_B")
            ]
            for kind, matrix in zip(("lora_A", "lora_B"), as_in_peft(*rows), strict=True):
                weights[f"{key}.{kind}.weight"] = matrix.clone(memory_format=torch.contiguous_format)
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        transposed = any(isinstance(layers[module].base_layer, Conv1D) for module in entry["target_modules"])
        text = json.dumps(peft_config(model.config, index, transposed), indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n")
        folders.append(folder)
    return folders


def save_router(model, directory: str | Path, state_dict: dict | None = None) -> None:
    if model.router is not None:
        state = model.state_dict() if state_dict is None else state_dict
        weights = {
            name.removeprefix("router."): tensor.detach().cpu().contiguous()
            for name, tensor in state.items()
            if name.startswith("router.")
        }
        save_file(weights, Path(directory) / ROUTER_WEIGHTS, metadata={"format": "pt"})


def subset_of(config: DyloraMoeConfig, experts: list[int | str] | None) -> tuple[DyloraMoeConfig, list[int]]:
    """The config with some of the experts, in the order given, and their numbers before.

    Raises:
        ValueError: no such expert, or one named twice.
    """
    if experts is None:
        return config, list(range(config.num_experts))
    if isinstance(experts, str):
        raise ValueError(f"`experts` must be a list of names or numbers, not the text {experts!r}.")
    numbers = [config.expert_index(expert) for expert in experts]
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"`experts` must name some of {config.expert_names}, each once; got {experts}.")
    fields = config.to_dict()
    fields["expert_configs"] = [config.expert_configs[number] for number in numbers]
    fields["num_experts_per_tok"] = min(config.num_experts_per_tok, len(numbers))
    return type(config)(**fields), numbers


def keep_single_expert(model, stored: DyloraMoeConfig) -> None:
    """Let a default strategy `single:<number>` go on meaning the expert it meant in the whole repo.

    Raises:
        ValueError: that expert was not loaded.
    """
    name, _, expert = str(
        getattr(getattr(model, "generation_config", None), "routing_strategy", None)
    ).partition(":")
    if name != "single":
        return
    meant = stored.expert_names[stored.expert_index(expert)]
    if meant not in model.config.expert_names:
        raise ValueError(
            f"The repo's default strategy is 'single:{meant}', and `experts` leaves that expert out: load it too, or "
            "make a variant of the repo with another default."
        )
    model.generation_config.routing_strategy = f"single:{model.config.expert_index(meant)}"


def set_default_strategy(model, strategy: str) -> None:
    """Let the model's generation config name the strategy; a model that does not generate gets one for it
    alone."""
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()
    model.generation_config.routing_strategy = strategy


def read_full(
    location: str,
    config: DyloraMoeConfig,
    numbers: list[int],
    where: dict,
    network: type,
    variant: str | None = None,
) -> dict:
    """The state dict of some experts of a repo of layout `full`: rows of the stacks and the gate, and slices
    of the files for everything else, which are read when they are used.

    Args:
        location: a folder or a Hub id.
        config: the repo's config, with all experts.
        numbers: the experts wanted, in order.
        where: arguments for the Hub.
        network: the model class, to know the names that transformers saves under others.
        variant: which of several sets of weight files, as in `model.<variant>.safetensors`.

    Raises:
        ValueError: the weights were saved quantised, where an expert's rows cannot be told apart; or they are
            not those of the config.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{location} was saved quantised, so `experts` cannot pick some: load it whole, or from a repo "
            "that was saved without, with `quantization_config`."
        )
    of_places = config.rank_layouts()
    layouts = {module: of_places[place] for place, module in config.stack_modules().items()}
    wrapped = {f"foundation.{module}" for module in subset_of(config, numbers)[0].wrapped_modules()}
    state = {}
    files = [_opened(path) for path in _weight_files(location, variant, where)]
    names = _as_in_model([name for file in files for name in file.keys()], config, network)  # noqa: SIM118
    for file in files:
        for stored in file.keys():  # noqa: SIM118  (not a dict)
            name = names.get(stored, stored)
            module, _, kind = name.removeprefix("foundation.").rpartition(".")
            layout = layouts.get(module)
            if name.startswith("router.gate."):
                state[name] = file.get_tensor(stored)[numbers]
            elif layout is not None and kind in ("lora_A", "lora_B"):
                if any(layout[number][0] for number in numbers):
                    _check_rows(file.get_slice(stored), layout, f"{location}: {stored}")
                    state[name] = _rows(file.get_slice(stored), layout, numbers)
            elif ".base_layer." in name:  # which those that these experts leave alone do not have
                state[in_base_layer(name.replace(".base_layer.", "."), wrapped)] = file.get_slice(stored)
            else:
                state[name] = file.get_slice(stored)
    return state


def _as_in_model(stored: list[str], config: DyloraMoeConfig, network: type) -> dict[str, str]:
    """The names in the model of tensors of expert layers that transformers saved under the foundation's older
    names."""
    own = [name for name in stored if ".base_layer." in name or ".lora_" in name]
    with torch.device("meta"):
        model = network(config)
    expected = model.state_dict()
    if all(name in expected for name in own):
        return {}
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in own}


def _check_rows(stack, layout, called: str) -> None:
    rows, ranks = stack.get_shape()[0], sum(rank for rank, _ in layout)
    if rows != ranks:
        raise ValueError(f"{called} has {rows} rows, and the ranks in the config sum up to {ranks}.")


def _rows(stack, layout, numbers: list[int]) -> torch.Tensor:
    starts = [sum(rank for rank, _ in layout[:number]) for number in numbers]
    return torch.cat([stack[start : start + layout[n][0]] for start, n in zip(starts, numbers, strict=True)])


def _weight_files(location: str, variant: str | None, where: dict) -> list[str]:
    whole, index = (
        name if variant is None else f"{Path(name).stem}.{variant}{Path(name).suffix}"
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    found = cached_file(location, whole, _raise_exceptions_for_missing_entries=False, **where)
    if found is not None:  # as transformers chooses where both are there
        return [found]
    names = sorted(
        set(json.loads(Path(cached_file(location, index, **where)).read_text())["weight_map"].values())
    )
    return [cached_file(location, name, **where) for name in names]


def read_generation_config(location: str, where: dict) -> GenerationConfig | None:
    """What `generation_config.json` says; None where there is none. Without it, the default strategy is
    another.

    Raises:
        ValueError: it is damaged; names the file.
    """
    found = cached_file(
        location,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    if found is None:
        return None
    try:
        return GenerationConfig.from_pretrained(location, **where)
    except Exception as error:  # any wrong field may make the class fail in its own way
        raise ValueError(
            why_unreadable(Path(found)) or f"{found} is not a valid generation config: {_first_line(error)}"
        ) from error


def read_adapter(
    location: str, config: DyloraMoeConfig, numbers: list[int], where: dict, network: type
) -> dict:
    """The state dict of a repo of layout `adapter`: the foundation from where it lies, experts and gate from
    the repo.

    Args:
        location: a folder or a Hub id.
        config: the config with the wanted experts, and the place of the foundation.
        numbers: their numbers in the repo.
        where: arguments for the Hub.
        network: the model class, to know the names and shapes that are needed.

    Raises:
        FoundationError: the foundation cannot be had.
        ValueError: no foundation is named, or it is one of other shapes; names the tensor and both shapes.
    """
    name, hub = _foundation_place(config, where)
    foundation = _load_foundation(name, hub)
    with torch.device("meta"):
        needed = network(config).state_dict()
    wrapped = config.wrapped_modules()
    state = {
        f"foundation.{in_base_layer(key, wrapped)}": value for key, value in foundation.state_dict().items()
    }
    for key, expected in needed.items():
        if ".lora_" in key or key.startswith("router."):
            continue
        found = tuple(state[key].shape) if key in state else "missing"
        if found != tuple(expected.shape):
            raise ValueError(
                f"The foundation {name!r} does not fit the experts of {location}: {key.removeprefix('foundation.')} is "
                f"{found}, and they were trained on {tuple(expected.shape)}. Pass the right one as `base_model=`."
            )
    stacks = {name: needed[f"foundation.{module}.lora_A"] for name, module in config.stack_modules().items()}
    counts = {name: stack.shape[1] if stack.dim() == 3 else 0 for name, stack in stacks.items()}
    state.update(_expert_stacks(location, config, counts, where))
    if config.has_router:
        router = _opened(cached_file(location, ROUTER_WEIGHTS, **where))
        state.update({f"router.{key}": router.get_tensor(key)[numbers] for key in router.keys()})  # noqa: SIM118
    return state


def _load_foundation(name: str, hub: dict) -> PreTrainedModel:
    """The foundation as its own files have it, whatever else lies beside them.

    Raises:
        FoundationError: it cannot be had.
        ValueError: it is quantised, so that its tensors are not the numbers that the experts add to.
    """
    config = _foundation_config(name, hub)
    if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config())):
        raise ValueError(
            f"The foundation {name!r} is quantised: pass the original model in full precision as `base_model=`, and "
            "`quantization_config=` to quantise what is loaded."
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            adapter_kwargs={"subfolder": NO_FOLDER},
            **hub,
        )
    except Exception as error:  # damaged files make transformers fail in many ways
        raise FoundationError(name, why_not_loaded(name, error)) from error


def foundation_config(config: DyloraMoeConfig, where: dict) -> PreTrainedConfig:
    """The config of the foundation of a repo of layout `adapter` that does not hold it.

    Raises:
        FoundationError: it cannot be had.
    """
    return _foundation_config(*_foundation_place(config, where))


def _foundation_config(name: str, hub: dict) -> PreTrainedConfig:
    try:
        return read_config(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise FoundationError(name, why_not_loaded(name, error)) from error


class FoundationError(OSError, ValueError):
    """The foundation that a repo of layout `adapter` names cannot be had; `why` in a few words.

    An `OSError`, as transformers raises for a model that is not there.
    """

    def __init__(self, name: str, why: str):
        super().__init__(
            f"The foundation {name!r}, which the repo's config names, cannot be loaded: {why}. Pass the folder or Hub "
            "id where it is as `base_model=`."
        )
        self.name, self.why = name, why


def why_not_loaded(name: str, error: Exception, suffixes: tuple[str, ...] = WEIGHTS) -> str:
    """What keeps a model or its tokenizer from being loaded from a folder or the Hub, and the remedy, if
    there is one.

    Args:
        name: a folder or a Hub id.
        error: what transformers or huggingface_hub raised; they often say only that something is not there.
        suffixes: of the files that were to be read.
    """
    folder = Path(name)
    try:
        files = sorted(folder.iterdir())
    except PermissionError:
        return f"{folder} may not be read by this user (permission denied)"
    except OSError:
        files = None
    if files is not None:
        if ADAPTER_CONFIG in str(error):  # older versions look for it whatever they are told
            return f"{folder} holds an adapter too, which this transformers does not leave out; move {ADAPTER_CONFIG} away"
        read = [file for file in files if file.suffix in suffixes]
        reasons = [*map(why_unreadable, read), *map(_why_no_json, read), _first_line(error)]
        return next(reason for reason in reasons if reason is not None)
    if folder.is_absolute() or name.startswith((".", "~")):
        return "there is no such folder on this machine"
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def is_one(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_one(errors.HFValidationError):
        return "it is neither a folder of this machine nor a Hub id"
    if is_one(errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return f"it is gated on the Hub: accept its licence at {page}, and log in with `hf auth login` as the user who did"
    if is_one(errors.RevisionNotFoundError):
        return "the Hub's repo of that name has no such revision"
    if is_one(errors.RepositoryNotFoundError):
        return (
            "there is no folder of that name here, and no repo on the Hub that this machine may see; if it is private, "
            "log in with `hf auth login`"
        )
    if is_one(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        if constants.HF_HUB_OFFLINE:
            return (
                "it is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it once, to fetch the model"
            )
        return (
            f"it is not in the Hub's cache, and {constants.ENDPOINT} cannot be reached (is there a network?)"
        )
    return _first_line(error)


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be what it should be: not there, not allowed, or left with Git LFS. None where it is
    none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except PermissionError:
        return f"{path} may not be read by this user (permission denied)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} does not exist"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if start == LFS_POINTER:
        return f"{path} is a Git LFS pointer, and not the file itself; run `git lfs pull` in its folder"
    return None


def _why_no_json(path: Path) -> str | None:
    """Why a file of that kind is damaged, which those who read it often say without its name."""
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} is not valid JSON: {_first_line(error)}"
    if path.name in (CONFIG_NAME, GENERATION_CONFIG_NAME) and not isinstance(content, dict):
        return f"{path} holds a JSON {type(content).__name__}, expected an object"
    return None


def _opened(path: str) -> safe_open:
    """A safetensors file; safetensors says that one is missing whatever keeps it from being opened."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        damaged = f"{path} is not a whole safetensors file ({_first_line(error)}); copy it again"
        raise ValueError(why_unreadable(Path(path)) or damaged) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def _foundation_place(config: DyloraMoeConfig, where: dict) -> tuple[str, dict]:
    if config.base_model_name_or_path is None:
        raise ValueError("The repo holds experts alone and names no foundation: pass it as `base_model=`.")
    hub = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
    return config.base_model_name_or_path, {**hub, "revision": config.base_model_revision}


def _expert_stacks(
    location: str, config: DyloraMoeConfig, counts: dict[str, int], where: dict
) -> dict[str, torch.Tensor]:
    """The stacks of all experts from their files. `counts` are those of `rows_of_stack`, by the names of what
    is adapted.

    Raises:
        ValueError: an expert's matrices are not of the rank that the config gives it.
    """
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in counts}
    for entry in config.expert_configs:
        file = _opened(cached_file(location, f"experts/{entry['name']}/{ADAPTER_WEIGHTS}", **where))
        for name, key in peft_keys(entry).items():
            pair = [file.get_tensor(f"{key}.lora_{matrix}.weight") for matrix in "AB"]
            rank = entry["rank_pattern"].get(name, entry["r"])
            if (pair[0].shape[0], pair[1].shape[-1]) != (rank * (counts[name] or 1),) * 2:
                raise ValueError(
                    f"{location}: expert {entry['name']!r} has lora_A {list(pair[0].shape)} and lora_B "
                    f"{list(pair[1].shape)} on {name}, and config.json gives it rank {rank} there."
                )
            rows[name].append(rows_of_stack(*pair, counts[name]))
    modules = config.stack_modules()
    return {
        f"foundation.{modules[name]}.lora_{matrix}": torch.cat([pair[position] for pair in pairs])
        for name, pairs in rows.items()
        for position, matrix in enumerate("AB")
    }


@torch.no_grad()
def merge_expert(model, expert: int | str):
    """One expert folded into a copy of the foundation: W + s B A, an ordinary model of transformers.

    Raises:
        ValueError: no such expert, or the foundation is quantised or offloaded, so that W cannot be added to.
    """
    index = model.config.expert_index(expert)
    refuse_offloaded(model, everything=True)
    for name in model.expert_layers():
        weight, _ = _frozen_weight(model, model.foundation, name)
        # torchao's weights say that they are numbers of floating point; only their class tells.
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
            raise ValueError(
                f"Layer {name!r} is quantised, so an expert cannot be merged into it; load without that."
            )
    merged = deepcopy(model.foundation)
    _tie_as_before(
        merged, keep_tied=not any(_adapts(model, index, name) for name in merged.all_tied_weights_keys)
    )
    for name, layer in model.expert_layers().items():
        rank, scale = layer.layout[index]
        if rank > 0:
            (weight, transposed), rows = _frozen_weight(model, merged, name), layer.rows(index)
            lora_a, lora_b = layer.lora_A[rows].float(), layer.lora_B[rows].float()
            update = scale * torch.einsum("r...i, r...o -> ...oi", lora_a, lora_b)
            update = update.mT if transposed else update
            weight.copy_(weight.float() + update.to(weight.device))
    for name in model.config.wrapped_modules():
        parent_name, _, child_name = name.rpartition(".")
        setattr(merged.get_submodule(parent_name), child_name, merged.get_submodule(name).base_layer)
    if getattr(model, "generation_config", None) is not None and merged.can_generate():
        merged.generation_config = deepcopy(
            model.generation_config
        )  # further tokens that end a text are only there
        vars(merged.generation_config).pop("routing_strategy", None)
    merged.requires_grad_(True)
    return merged.eval()


def _frozen_weight(model, foundation: PreTrainedModel, place: str) -> tuple[torch.Tensor, bool]:
    """The foundation's own weight where experts adapt it, and whether it is stored as `[.., in, out]`."""
    if place in model.config.adapted_parameters():
        module, _, parameter = place.rpartition(".")
        experts = foundation.get_submodule(module).base_layer
        return getattr(experts, parameter), experts.is_transposed
    layer = foundation.get_submodule(place).base_layer
    return layer.weight, isinstance(layer, Conv1D)


def _adapts(model, expert: int, parameter: str) -> bool:
    module = parameter.rpartition(".")[0].removesuffix(".base_layer")
    return module in model.config.expert_configs[expert]["target_modules"]


def _tie_as_before(foundation: PreTrainedModel, keep_tied: bool) -> None:
    """Give tied weights the names that they have without experts, or make each a parameter of its own: folded
    into a tied head, an expert would change the embeddings, too."""
    tied = foundation.all_tied_weights_keys
    vars(foundation).pop("_tied_weights_keys", None)  # the class's own hold again
    if keep_tied:
        names = {target.replace(".base_layer.", "."): source for target, source in tied.items()}
        foundation.all_tied_weights_keys = names
        return
    for target in tied:
        module, _, kind = target.rpartition(".")
        parameter = foundation.get_parameter(target)
        setattr(foundation.get_submodule(module), kind, torch.nn.Parameter(parameter.detach().clone()))
    foundation.all_tied_weights_keys = {}
    for config in (foundation.config, foundation.config.get_text_config()):
        config.tie_word_embeddings = False


__all__ = [
    "HUB_OPTIONS",
    "FoundationError",
    "foundation_config",
    "keep_single_expert",
    "merge_expert",
    "peft_config",
    "peft_keys",
    "read_adapter",
    "read_full",
    "read_generation_config",
    "save_adapters",
    "save_router",
    "set_default_strategy",
    "subset_of",
    "why_not_loaded",
    "why_unreadable",
]
