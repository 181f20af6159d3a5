"""Loading what no single file holds: a subset of the experts, or experts and foundation from two places.

`read_full` and `read_adapter` make the state dict for `DyloraMoePreTrainedModel.from_pretrained`; where
something cannot be loaded, the functions at the end say why and what to do. A repo of layout `full` that is
loaded whole needs none of this: transformers reads it.
"""

import json
import stat
from pathlib import Path

import torch
from huggingface_hub import constants, errors
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from .arrow_dylora_moe import PROTOTYPES
from .configuration_dylora_moe import DyloraMoeConfig, read_config
from .experts_dylora_moe import in_base_layer
from .saving_dylora_moe import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER_WEIGHTS, peft_keys
from .stacked_experts_dylora_moe import rows_of_stack


logger = logging.get_logger(__name__)

WEIGHTS = (".json", ".safetensors", ".bin")  # and what describes them
LARGEST_JSON = 64 * 1024**2  # bytes; a tokenizer.json may have half as many
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

# A subfolder that does not exist: transformers applies an adapter that lies in a foundation's folder, unless
# it is told to look for one elsewhere.
NO_FOLDER = "no-adapter-is-looked-for"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


# What is loaded


def subset_of(config: DyloraMoeConfig, experts: list[int | str] | None) -> tuple[DyloraMoeConfig, list[int]]:
    """Select experts of a config, in the order given, and return their numbers in the whole, too.

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
    """Renumber a default strategy `single:<number>`, so that it means the same expert as in the whole repo.

    Raises:
        ValueError: that expert was not loaded.
    """
    generation_config = getattr(model, "generation_config", None)
    strategy = str(getattr(generation_config, "routing_strategy", None))
    name, _, expert = strategy.partition(":")
    if name != "single":
        return
    expert_name = stored.expert_names[stored.expert_index(expert)]
    if expert_name not in model.config.expert_names:
        raise ValueError(
            f"The repo's default strategy is 'single:{expert_name}', and `experts` leaves that expert out: load it "
            "too, or make a variant of the repo with another default."
        )
    generation_config.routing_strategy = f"single:{model.config.expert_index(expert_name)}"


def set_default_strategy(model, strategy: str) -> None:
    """Name the strategy in the model's generation config; a model that does not generate gets one for it."""
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()
    model.generation_config.routing_strategy = strategy


def read_generation_config(location: str, where: dict) -> GenerationConfig | None:
    """Read `generation_config.json`; `None` without such a file, whose default strategy is another.

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
        why = why_unreadable(Path(found))
        if why is None:
            why = f"{found} is not a valid generation config: {_first_line(error)}"
        raise ValueError(why) from error


def warn_of_adapter(location: str, where: dict) -> None:
    """Warn of an adapter in a repo's own folder, which transformers applies over the experts."""
    path = Path(location, where.get("subfolder", ""), ADAPTER_CONFIG)
    if path.is_file():
        logger.warning(
            f"{path} describes an adapter, which transformers applies over this model: is that meant?"
        )


# Some experts of a repo of layout `full`


def read_full(
    location: str,
    config: DyloraMoeConfig,
    numbers: list[int],
    where: dict,
    network: type,
    variant: str | None = None,
) -> dict:
    """Make the state dict of some experts of a repo of layout `full`.

    It holds rows of the stacks and the gate, and slices of the files for everything else, which are read when
    they are used.

    Args:
        location: a folder or a Hub id.
        config: the repo's config, with all experts.
        numbers: the experts wanted, in order.
        where: arguments for the Hub.
        network: the model class, to know the names that transformers saves under others.
        variant: which of several sets of weight files, as in `model.<variant>.safetensors`.

    Raises:
        ValueError: the weights were saved quantised, so that an expert's rows cannot be selected; or they are
            not those of the config.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{location} was saved quantised, so `experts` cannot pick some: load it whole, or from a repo "
            "that was saved without, with `quantization_config`."
        )
    rank_layouts = config.rank_layouts()
    layouts = {module: rank_layouts[place] for place, module in config.stack_modules().items()}
    wrapped = {f"foundation.{module}" for module in subset_of(config, numbers)[0].wrapped_modules()}
    files = [_open_safetensors(path) for path in _weight_files(location, variant, where)]
    keys = [(file, key) for file in files for key in file.keys()]  # noqa: SIM118  (not a dict)
    names = _names_in_model([key for _, key in keys], config, network)
    state = {}
    for file, key in keys:
        name = names.get(key, key)
        module, _, kind = name.removeprefix("foundation.").rpartition(".")
        if name.startswith("router.gate."):
            state[name] = file.get_tensor(key)[numbers]
        elif kind == PROTOTYPES and module in layouts:
            if any(layouts[module][number][0] > 0 for number in numbers):
                state[name] = file.get_tensor(key)[numbers]
        elif module in layouts and kind in ("lora_A", "lora_B"):
            layout = layouts[module]
            if any(layout[number][0] > 0 for number in numbers):
                stack = file.get_slice(key)
                _check_rows(stack, layout, f"{location}: {key}")
                state[name] = _rows(stack, layout, numbers)
        elif ".base_layer." in name:  # a wrapped layer, which is not wrapped if only other experts adapt it
            state[in_base_layer(name.replace(".base_layer.", "."), wrapped)] = file.get_slice(key)
        else:
            state[name] = file.get_slice(key)
    return state


def _weight_files(location: str, variant: str | None, where: dict) -> list[str]:
    """Find the weight files, as transformers does: the whole file, or else the shards of the index."""
    whole, index = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if variant is not None:
        whole = f"{Path(whole).stem}.{variant}{Path(whole).suffix}"
        index = f"{Path(index).stem}.{variant}{Path(index).suffix}"
    found = cached_file(location, whole, _raise_exceptions_for_missing_entries=False, **where)
    if found is not None:
        return [found]
    weight_map = json.loads(Path(cached_file(location, index, **where)).read_text())["weight_map"]
    return [cached_file(location, name, **where) for name in sorted(set(weight_map.values()))]


def _names_in_model(keys: list[str], config: DyloraMoeConfig, network: type) -> dict[str, str]:
    """Map the keys of expert layers to the model's names, if transformers saved them under older ones."""
    kinds = (".base_layer.", ".lora_", f".{PROTOTYPES}")
    of_experts = [key for key in keys if any(kind in key for kind in kinds)]
    with torch.device("meta"):
        model = network(config)
    expected = model.state_dict()
    if all(key in expected for key in of_experts):
        return {}
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {key: rename_source_key(key, renamings, [])[0] for key in of_experts}


def _check_rows(stack, layout, name: str) -> None:
    """Check that a stack in a file has the rows that the config describes."""
    num_rows = stack.get_shape()[0]
    total_rank = sum(rank for rank, _ in layout)
    if num_rows != total_rank:
        raise ValueError(f"{name} has {num_rows} rows, and the ranks in the config sum up to {total_rank}.")


def _rows(stack, layout, numbers: list[int]) -> torch.Tensor:
    """Read the rows of some experts, in order."""
    parts = []
    for number in numbers:
        start = sum(rank for rank, _ in layout[:number])
        parts.append(stack[start : start + layout[number][0]])
    return torch.cat(parts)


# A repo of layout `adapter`


def read_adapter(
    location: str, config: DyloraMoeConfig, numbers: list[int], where: dict, network: type
) -> dict:
    """Make the state dict of a repo of layout `adapter`, with the foundation from its own folder or Hub repo.

    Args:
        location: a folder or a Hub id.
        config: the config with the wanted experts, and the place of the foundation.
        numbers: their numbers in the repo.
        where: arguments for the Hub.
        network: the model class, to know the names and shapes that are needed.

    Raises:
        FoundationError: the foundation cannot be loaded.
        ValueError: no foundation is named, or it is one of other shapes; names the tensor and both shapes.
    """
    foundation_name, hub = _foundation_place(config, where)
    foundation = _load_foundation(foundation_name, hub)
    with torch.device("meta"):
        needed = network(config).state_dict()
    wrapped = config.wrapped_modules()
    state = {}
    for key, value in foundation.state_dict().items():
        state[f"foundation.{in_base_layer(key, wrapped)}"] = value
    for key, expected in needed.items():
        if ".lora_" in key or key.startswith("router.") or key.endswith(f".{PROTOTYPES}"):
            continue
        found = tuple(state[key].shape) if key in state else "missing"
        if found != tuple(expected.shape):
            raise ValueError(
                f"The base model {foundation_name!r} does not fit the experts of {location}: "
                f"{key.removeprefix('foundation.')} is {found}, and they were trained on {tuple(expected.shape)}. "
                "Pass the right one as `base_model=`."
            )
    num_stacked = {}
    for name, module in config.stack_modules().items():
        stack = needed[f"foundation.{module}.lora_A"]
        num_stacked[name] = stack.shape[1] if stack.dim() == 3 else 0
    state.update(expert_stacks(location, config, num_stacked, where))
    if config.has_router:
        router = _open_safetensors(cached_file(location, ROUTER_WEIGHTS, **where))
        for key in router.keys():  # noqa: SIM118  (not a dict)
            tensor = router.get_tensor(key)
            is_prototypes = key.endswith(f".{PROTOTYPES}")
            name = f"foundation.{key}" if is_prototypes else f"router.{key}"
            if name in needed:
                state[name] = tensor[numbers]
            elif not (is_prototypes and len(tensor) > len(numbers)):  # of a layer that other experts adapt
                state[name] = tensor
    return state


def expert_stacks(
    location: str, config: DyloraMoeConfig, num_stacked: dict[str, int], where: dict
) -> dict[str, torch.Tensor]:
    """Read the stacks of all experts from their PEFT folders.

    What else their files hold is there by the file's own names, so that loading reports it as unexpected.

    Args:
        num_stacked: the number of stacked experts of every adapted place, 0 for a linear layer.

    Raises:
        ValueError: an expert's matrices are missing, or not of the rank that the config gives it.
    """
    stacks = {}
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in num_stacked}
    for entry in config.expert_configs:
        path = cached_file(location, f"experts/{entry['name']}/{ADAPTER_WEIGHTS}", **where)
        file = _open_safetensors(path)
        unread = set(file.keys())
        for name, key in peft_keys(entry).items():
            matrices = [f"{key}.lora_A.weight", f"{key}.lora_B.weight"]
            missing = [matrix for matrix in matrices if matrix not in unread]
            if missing:
                raise ValueError(
                    f"{path} lacks {missing[0]}, and config.json says that the expert adapts {name}."
                )
            unread.difference_update(matrices)
            lora_a, lora_b = (file.get_tensor(matrix) for matrix in matrices)
            rank = entry["rank_pattern"].get(name, entry["r"])
            num_rows = rank * (num_stacked[name] or 1)
            if lora_a.shape[0] != num_rows or lora_b.shape[-1] != num_rows:
                raise ValueError(
                    f"{location}: expert {entry['name']!r} has lora_A {list(lora_a.shape)} and lora_B "
                    f"{list(lora_b.shape)} on {name}, and config.json gives it rank {rank} there."
                )
            rows[name].append(rows_of_stack(lora_a, lora_b, num_stacked[name]))
        stacks.update({f"experts.{entry['name']}.{key}": file.get_tensor(key) for key in sorted(unread)})
    modules = config.stack_modules()
    for name, pairs in rows.items():
        stacks[f"foundation.{modules[name]}.lora_A"] = torch.cat([rows_a for rows_a, _ in pairs])
        stacks[f"foundation.{modules[name]}.lora_B"] = torch.cat([rows_b for _, rows_b in pairs])
    return stacks


def foundation_config(config: DyloraMoeConfig, where: dict) -> PreTrainedConfig:
    """Read the config of the foundation of a repo of layout `adapter` that does not hold it.

    Raises:
        FoundationError: it cannot be loaded.
    """
    return _read_foundation_config(*_foundation_place(config, where))


def _foundation_place(config: DyloraMoeConfig, where: dict) -> tuple[str, dict]:
    """Return the foundation's folder or Hub id, and arguments for the Hub."""
    if config.base_model_name_or_path is None:
        raise ValueError("The repo holds experts alone and names no base model: pass it as `base_model=`.")
    hub = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
    return config.base_model_name_or_path, {**hub, "revision": config.base_model_revision}


def _read_foundation_config(name: str, hub: dict) -> PreTrainedConfig:
    try:
        return read_config(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise FoundationError(name, why_not_loaded(name, error)) from error


def _load_foundation(name: str, hub: dict) -> PreTrainedModel:
    """Load the foundation, without any adapter in its folder.

    Raises:
        FoundationError: it cannot be loaded.
        ValueError: it is quantised, so that its tensors are not the numbers that the experts add to.
    """
    config = _read_foundation_config(name, hub)
    if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config())):
        raise ValueError(
            f"The base model {name!r} is quantised: pass the original model in full precision as `base_model=`, and "
            "`quantization_config=` to quantise what is loaded."
        )
    try:
        foundation, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            adapter_kwargs={"subfolder": NO_FOLDER},
            output_loading_info=True,
            **hub,
        )
    except Exception as error:  # damaged files make transformers fail in many ways
        raise FoundationError(name, why_not_loaded(name, error)) from error
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise FoundationError(
            name, f"it lacks weights: {', '.join(sorted(map(str, report['missing_keys']))[:3])}"
        )
    return foundation


# Why something cannot be loaded


class FoundationError(OSError, ValueError):
    """The base model that a repo of layout `adapter` names cannot be loaded.

    An `OSError`, as transformers raises for a model that does not exist.

    Attributes:
        name: its folder or Hub id.
        why: what went wrong, in a few words.
    """

    def __init__(self, name: str, why: str):
        super().__init__(
            f"The base model {name!r}, which the repo's config names, cannot be loaded: {why}. Pass the folder or Hub "
            "id where it is as `base_model=`."
        )
        self.name = name
        self.why = why


def why_not_loaded(name: str, error: Exception, suffixes: tuple[str, ...] = WEIGHTS) -> str:
    """Say what keeps a model or its tokenizer from being loaded, and the remedy, if there is one.

    Args:
        name: a folder or a Hub id.
        error: what transformers or huggingface_hub raised; it often says only that something is missing.
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
        return _why_not_in_folder(folder, [file for file in files if file.suffix in suffixes], error)
    if folder.is_absolute() or name.startswith((".", "~")):
        return "there is no such folder on this machine"
    return _why_not_on_hub(name, error)


def _why_not_in_folder(folder: Path, files: list[Path], error: Exception) -> str:
    if ADAPTER_CONFIG in str(error):  # older versions look for it whatever they are told
        return f"{folder} holds an adapter too, which this transformers does not leave out; move {ADAPTER_CONFIG} away"
    for why in (why_unreadable, _why_no_json):
        for file in files:
            reason = why(file)
            if reason is not None:
                return reason
    return _first_line(error)


def _why_not_on_hub(name: str, error: Exception) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def is_caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_caused_by(errors.HFValidationError):
        return "it is neither a folder of this machine nor a Hub id"
    if is_caused_by(errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return (
            f"it is gated on the Hub: accept its licence at {page}, and log in with `hf auth login` as the user who "
            "did"
        )
    if is_caused_by(errors.RevisionNotFoundError):
        return "the Hub's repo of that name has no such revision"
    if is_caused_by(errors.RepositoryNotFoundError):
        return (
            "there is no folder of that name here, and no repo on the Hub that this machine may see; if it is private, "
            "log in with `hf auth login`"
        )
    if is_caused_by(
        errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError
    ):
        if constants.HF_HUB_OFFLINE:
            return (
                "it is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it once, to fetch the model"
            )
        return (
            f"it is not in the Hub's cache, and {constants.ENDPOINT} cannot be reached (is there a network?)"
        )
    return _first_line(error)


def why_unreadable(path: Path) -> str | None:
    """Say why a file cannot be read: missing, not allowed, or a Git LFS pointer; `None` if it can."""
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
    """Say why a JSON file is damaged, which its readers often do without naming it; `None` if it is not."""
    if path.suffix != ".json":
        return None
    try:
        if path.stat().st_size > LARGEST_JSON:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} is not valid JSON: {_first_line(error)}"
    if path.name in (CONFIG_NAME, GENERATION_CONFIG_NAME) and not isinstance(content, dict):
        return f"{path} holds a JSON {type(content).__name__}, expected an object"
    return None


def _open_safetensors(path: str) -> safe_open:
    """Open a safetensors file; safetensors calls a file missing whatever keeps it from being opened."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        why = why_unreadable(Path(path))
        if why is None:
            why = f"{path} is not a whole safetensors file ({_first_line(error)}); copy it again"
        raise ValueError(why) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


__all__ = [
    "HUB_OPTIONS",
    "FoundationError",
    "expert_stacks",
    "foundation_config",
    "keep_single_expert",
    "read_adapter",
    "read_full",
    "read_generation_config",
    "set_default_strategy",
    "subset_of",
    "warn_of_adapter",
    "why_not_loaded",
    "why_unreadable",
]
