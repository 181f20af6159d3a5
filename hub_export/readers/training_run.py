"""What checkpoints of one training run share: where alpha, the gate, its settings and other copies lie.

<run>/best_model/config.json               _dylora_lora_alpha, base_model_name_or_path
<run>/[<checkpoint>/]dylo_moe_state/router.pt   gate_state_dict (weight, bias), top_k, temperature, expert_maturity
<run>/checkpoint-<step>/                   earlier and later states of the same experts
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..shown_text import shortened
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import MOST_EXPERTS, AdaptedLayer, FoundationReference, Router, natural_order
from ..tensors.stored_tensors import StoredTensor, of_tensor
from ..tensors.tensor_files import TensorFile, load_torch_file


PARAMETER = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])\.(?P<expert>[^.]+)\.weight"
)

STATE = "dylo_moe_state/router.pt"
STEP = re.compile(r"checkpoint-\d+")
# of training runs that do not store theirs, as its documentation gives them
DEFAULT_TOP_K, DEFAULT_TEMPERATURE = 1, 2.0


def only_folder(folders: list[SourceFolder], format: str) -> SourceFolder:
    """Return the folder of a source that holds all its experts.

    Raises:
        InputError: several are given.
    """
    if len(folders) > 1:
        raise InputError(f"{folders[0]} is a {format}, which holds all its experts; export one at a time")
    return folders[0]


def number(value: Any, what: str) -> float:
    """Check that a value of a JSON file is a finite number, and give it back.

    Raises:
        InputError: it is something else; `what` says where it stands.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{what} is {_shown(value)}, expected a number")
    if not abs(value) <= sys.float_info.max:  # a whole number may be larger, too; NaN is not less
        raise InputError(f"{what} is {_shown(value)}, expected a finite number")
    return value


def _shown(value: Any) -> str:
    return shortened(repr(value), 100)


def count_of_experts(config: dict[str, Any], fields: tuple[str, ...], path: Path) -> tuple[int, str] | None:
    """Give how many experts a config speaks of, and in which field; None where it does not."""
    for field in fields:
        if config.get(field) is not None:
            value = config[field]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_EXPERTS:
                raise InputError(f"{path}: {field} is {_shown(value)}, expected a positive number")
            return value, field
    return None


def best_model_config(folder: SourceFolder) -> tuple[Path, dict[str, Any]]:
    """Read `config.json` of the run's best model, which lies beside `folder`; empty where there is none."""
    run, name = folder.parent(), "best_model/config.json"
    return run / name, run.read_json(name, required=False)


def lora_alpha(
    folder: SourceFolder, config: dict[str, Any], options: ReadOptions, problems: list[str]
) -> float | None:
    """Give alpha as the user, the checkpoint or the run's `best_model` has it. It is never guessed."""
    if options.lora_alpha is not None:
        return options.lora_alpha
    for path, stored in ((folder / "config.json", config), best_model_config(folder)):
        if stored.get("_dylora_lora_alpha") is not None:
            return number(stored["_dylora_lora_alpha"], f"{path}: _dylora_lora_alpha")
    problems.append(
        f"{folder}/config.json has no _dylora_lora_alpha, so the experts' strength is unknown; "
        "pass the alpha of the training run with --lora_alpha"
    )
    return None


def foundation_reference(folder: SourceFolder, config: dict[str, Any]) -> FoundationReference:
    """Give the foundation that the checkpoint's config names, else the one of the run's best model."""
    path, name = folder / "config.json", config.get("base_model_name_or_path")
    if not name:
        best, stored = best_model_config(folder)
        if stored.get("base_model_name_or_path"):
            path, name = best, stored["base_model_name_or_path"]
    return FoundationReference(name=name or None, named_in=path, vocab_size=config.get("vocab_size"))


def pair_shapes(where: str, matrices: dict[str, StoredTensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes [rank, in] of "A" and [out, rank] of "B".

    Raises:
        InputError: one is missing, or they are not matrices of one rank.
    """
    if set(matrices) != {"A", "B"}:
        raise InputError(f"{where} has lora_{'/'.join(matrices)} but not both matrices")
    shape_a, shape_b = matrices["A"].shape, matrices["B"].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or not shape_a[0]:
        raise InputError(
            f"{where} has lora_A {list(shape_a)} and lora_B {list(shape_b)}, "
            "expected [rank, in] and [out, rank] of one rank"
        )
    return shape_a, shape_b


def low_rank_layer(
    where: Path,
    name: str,
    module: str,
    matrices: dict[str, StoredTensor],
    alpha: float | None,
    config_rank: Any,
) -> AdaptedLayer:
    """Describe one expert on one layer by its matrices "A" and "B".

    Raises:
        InputError: one is missing, they do not fit, or the config gives another rank.
    """
    shape_a, shape_b = pair_shapes(f"{where}: {name} on {module}", matrices)
    if module.endswith(".base_layer") or module.rpartition(".")[2] == "experts":
        raise InputError(
            f"{where}: {name} adapts parameters of {module.removesuffix('.base_layer')}, stacked experts, and such a checkpoint "
            "does not say which, nor with what alpha; export the folder that PEFT's save_pretrained makes of the adapter"
        )
    if config_rank is not None and shape_a[0] != config_rank:
        raise InputError(
            f"{where}: {name} on {module} has rank {shape_a[0]}, config.json's _dylora_lora_r is {config_rank}; "
            "alpha / rank would be wrong, so one of them has to be corrected"
        )
    return AdaptedLayer(
        rank=shape_a[0],
        lora_alpha=alpha,
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(matrices["A"].dtype, matrices["B"].dtype),
    )


def hint_other_checkpoint(folder: SourceFolder, name: str) -> str:
    """End a sentence about an expert that a checkpoint lacks: say which other checkpoint of the run has it."""
    for other in _other_checkpoints(folder):
        if _holds(other, name):
            return f"{other} has {name}: export that folder instead"
    return f"no checkpoint-* folder or best_model beside {folder} has {name}, so it cannot be exported"


def _other_checkpoints(folder: SourceFolder) -> list[SourceFolder]:
    """List the run's `checkpoint-<step>` folders beside or inside this one, the latest first, then `best_model`.

    Links are left out.
    """
    run = folder.parent()
    own = run.folder(folder.path.resolve().name)
    steps = sorted({*run.names("checkpoint-*"), *own.names("checkpoint-*")}, key=natural_order, reverse=True)
    places = [(parent, name) for name in (*steps, "best_model") for parent in (run, own)]
    found = [parent.folder(name) for parent, name in places if not parent.is_link(name)]
    return [place for place in found if place.path != own.path]


def _holds(checkpoint: SourceFolder, name: str) -> bool:
    for file in (
        f"{name}.pt",
        f"{name}/{name}/adapter_model.safetensors",
        f"{name}/adapter_model.safetensors",
    ):
        path = checkpoint / f"peft_adapters/{file}"
        if not path.is_file():
            continue
        try:
            file = TensorFile(path)
        except InputError:
            continue
        if path.suffix == ".safetensors":
            return len(file) > 0
        matches = [PARAMETER.fullmatch(key) for key in file.keys()]  # noqa: SIM118
        return any(match is not None and match["expert"] == name for match in matches)
    return False


def read_state(path: Path) -> dict[str, Any]:
    """Read the dict in a `router.pt`.

    Raises:
        InputError: it is damaged, or no dict.
    """
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a dict with gate_state_dict")
    return content


def gate_of_state(path: Path, state: dict[str, Any]) -> dict[str, StoredTensor]:
    """Read weight and bias under `gate_state_dict`."""
    gate = state.get("gate_state_dict")
    if (
        not isinstance(gate, dict)
        or not isinstance(gate.get("weight"), torch.Tensor)
        or gate["weight"].dim() != 2
    ):
        raise InputError(f"{path} has no gate_state_dict with a weight of shape [num_experts, hidden_size]")
    if not isinstance(gate.get("bias"), torch.Tensor):
        raise InputError(
            f"{path}: gate_state_dict has no bias; the gate of a final checkpoint always has one"
        )
    return {key: of_tensor(gate[key]) for key in ("weight", "bias")}


def make_router(
    where: Path,
    gate: dict[str, StoredTensor],
    num_experts: int,
    top_k: int | None,
    temperature: float | None,
    state: dict[str, Any] | None = None,
) -> Router:
    """Make the router around a gate's `weight` and `bias`, as training used it.

    Args:
        state: what else the gate's file says of it.

    Raises:
        InputError: their shapes do not fit each other, the number of experts, or what the file says.
    """
    weight, bias = gate["weight"], gate["bias"]
    if len(weight.shape) != 2 or weight.shape[0] != num_experts or bias.shape != (weight.shape[0],):
        raise InputError(
            f"{where}: the gate's weight is {list(weight.shape)} and its bias {list(bias.shape)}, "
            f"but there are {num_experts} experts"
        )
    for key, value in (("num_experts", weight.shape[0]), ("input_size", weight.shape[1])):
        stored = (state or {}).get(key, value)
        if isinstance(stored, torch.Tensor) or stored != value:
            raise InputError(f"{where}: {key} is {stored!r}, the gate's weight is {list(weight.shape)}")
    if not (weight.dtype.is_floating_point and bias.dtype.is_floating_point):
        raise InputError(f"{where}: the gate is stored as {weight.dtype} and {bias.dtype}, not as floats")
    return Router(
        read=lambda: (weight.read(), bias.read()),
        num_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        # what the training code has fed its router: all experts on, each with weight 1
        router_input="experts_sum",
        num_experts_per_tok=top_k,
        router_temperature=temperature,
    )


def stored_setting(state: dict[str, Any], key: str, path: Path) -> float | None:
    """Give `top_k` or `temperature` of a router's state; None where it is not there.

    Raises:
        InputError: it is no positive number.
    """
    kind = {"top_k": int, "temperature": float}[key]
    value = state.get(key)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= sys.float_info.max
        or kind(value) != value
    ):
        raise InputError(f"{path}: {key} is {_shown(value)}, expected a positive number")
    return kind(value)


def settings_or_defaults(
    folder: SourceFolder, own: tuple[Path, dict[str, Any]] | None, options: ReadOptions, notes: list[str]
) -> tuple[int, float]:
    """Give top_k and temperature: the user's, the router's, the run's, or training's defaults with a note.

    Args:
        own: the file of the router itself and its content, where that can hold more than the gate.
    """
    states = [own] if own is not None else []
    states += [(path, read_state(path)) for path in state_files(folder) if own is None or path != own[0]]
    assumed = []

    def find(key: str, given: float | None, default: float) -> float:
        if given is not None:
            return given
        for path, state in states:
            value = stored_setting(state, key, path)
            if value is not None:
                return value
        assumed.append(f"{key} {default}")
        return default

    found = (
        find("top_k", options.num_experts_per_tok, DEFAULT_TOP_K),
        find("temperature", options.router_temperature, DEFAULT_TEMPERATURE),
    )
    if assumed:
        notes.append(
            f"{folder} does not store the router's {' and '.join(name.split()[0] for name in assumed)}, nor does a "
            f"{STATE} of its run; training's defaults are taken ({', '.join(assumed)}), others are given with "
            "--num_experts_per_tok and --router_temperature"
        )
    return found


def state_files(folder: SourceFolder) -> list[Path]:
    """List `dylo_moe_state/router.pt` of the checkpoint, of the folder it lies in, and of the run's best model."""
    run = folder.parent()
    paths = [folder / STATE, run / STATE, run / f"best_model/{STATE}"]
    return [path for path in paths if path.is_file()]


def own_state(folder: SourceFolder, problems: list[str], notes: list[str], needed: str) -> Path | None:
    """Find the `dylo_moe_state/router.pt` with the checkpoint's own gate.

    It is in the checkpoint's folder, or beside it, where older runs left the last one.

    Args:
        problems, notes: get what there is to say: that there is none, where `needed` says what else was
            looked for, or that it was taken from beside the folder.
    """
    own, beside = folder / STATE, folder.parent() / STATE
    if own.is_file():
        return own
    if not beside.is_file():
        problems.append(f"{needed}, so there is no router; copy it from the training run's output")
        return None
    if STEP.fullmatch(folder.path.resolve().name):
        problems.append(
            f"{needed}; {beside} is that of the run's end, not of this step. Export the run's best_model or last checkpoint, "
            f"or copy the file to {own} if it belongs to this one"
        )
        return None
    notes.append(f"the router is that of {beside}, since {folder} has none of its own")
    return beside


def maturity_note(path: Path, state: dict[str, Any]) -> list[str]:
    """Say what expert maturities are stored; nothing where there are none."""
    maturity = state.get("expert_maturity")
    if maturity is None:
        return []
    stored = maturity.tolist() if isinstance(maturity, torch.Tensor) else maturity
    return [
        f"{path.name} stores expert_maturity {stored}; all experts are exported as mature, as training's own loader does"
    ]
