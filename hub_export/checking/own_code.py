"""Runs a repo's weights under this package's code: loads them, or puts them beside it for another process.

What else lies in a repo's folder could make transformers run code or compute something else: Python files,
`auto_map`, `custom_generate/`, an adapter, other weights. `load_with_own_code` refuses what would reach it of that,
`link_with_own_code` leaves it behind.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError, few
from ..repo.repo_files import needed_weights, other_files
from ..sources.source_folder import SourceFolder, open_folder


# What transformers reads beside or instead of a repo's weights, its own class of the model notwithstanding.
TAKEN_FOR_WEIGHTS = re.compile(r"adapter_config\.json|model\.safetensors|shard-\d{5}-model-.*\.safetensors")
# Fields of a config that name files to read instead.
OTHER_FILES = ("configuration_files", "transformers_weights")


def load_with_own_code(folder: Path | SourceFolder, **arguments: Any) -> Any:
    """Load an exported repo's model by this package's code, with the repo's weights, whole, and nothing else.

    Args:
        arguments: of `DyloraMoeForCausalLM.from_pretrained`.

    Raises:
        InputError: something else in the folder would be loaded, or tensors are missing, unknown, or of other shapes.
        ValueError, OSError, RuntimeError: what the model's own loading raises.
    """
    from dylora_moe.modeling import DyloraMoeForCausalLM

    source = open_folder(folder)
    refuse_other_weights(source)
    model, report = DyloraMoeForCausalLM.from_pretrained(
        source.path, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    # A quantised model is stored with tensors that are part of others.
    is_quantised = source.read_json("config.json").get("quantization_config") is not None
    check_all_weights(str(source), report, may_hold_more=is_quantised)
    return model


def refuse_other_weights(folder: SourceFolder) -> None:
    """Refuse a repo beside whose weights others lie that transformers would load, too, or instead.

    Raises:
        InputError: names them.
    """
    config = folder.read_json("config.json")
    found = [f"{config[field]} (which config.json names)" for field in OTHER_FILES if config.get(field)]
    if config.get("weights_layout", "full") == "full":  # else transformers reads no weight file itself
        found += [name for name in other_files(folder, config) if TAKEN_FOR_WEIGHTS.fullmatch(name)]
    if found:
        raise InputError(
            f"{folder} is a repo with {few(found)}, which is not its own and which transformers would load over or "
            "instead of its weights; move it elsewhere"
        )


def check_all_weights(source: str, report: dict[str, Any], *, may_hold_more: bool) -> None:
    """Refuse a model whose missing weights transformers filled in: an expert's with zeros, others at random.

    Args:
        report: what `from_pretrained` gives with `output_loading_info`.
        may_hold_more: whether tensors that the model does not have are nothing wrong.

    Raises:
        InputError: weights are missing, unknown, or of another shape than the config's.
    """
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise InputError(f"{name} of {source} is {list(stored)}, and its config asks for {list(expected)}")
    missing, unknown = (sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        raise InputError(f"{source} lacks weights that its config asks for: {few(missing, 3)}")
    if unknown and not may_hold_more:
        raise InputError(f"{source} holds weights that its config does not speak of: {few(unknown, 3)}")


def link_with_own_code(repo: Path | SourceFolder, folder: Path) -> None:
    """Fill an empty folder with links to a repo's weights, its config cleared of other code and files, and our code.

    Raises:
        InputError: a file of the repo lies elsewhere.
    """
    from dylora_moe.modeling.configuration_dylora_moe import without_code_elsewhere
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP, save_code

    source = open_folder(repo)
    config = source.read_json("config.json")
    for name in ("generation_config.json", *sorted(needed_weights(source, config))):
        if source.has(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((source / name).resolve())
    config = {
        name: value for name, value in without_code_elsewhere(config).items() if name not in OTHER_FILES
    }
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    save_code(folder)
