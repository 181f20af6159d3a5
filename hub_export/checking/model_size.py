"""Whether a model is as large as the files that hold it, found out before memory is taken for it.

transformers makes room for every parameter that a config asks for and then looks which of them the files have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..foundation.reference import load_foundation_config, local_folder
from ..foundation.weights import limited_modules, skeleton
from ..repo.repo_files import needed_weights
from ..sources.source_folder import SourceFolder
from ..tensors.mixture import FoundationReference
from ..tensors.weight_files import weight_files


# Parameters by byte of the files, which a model of 1 bit has; and how many numbers there may be besides, for tables
# that no file holds, such as the masks of GPT-Neo.
MOST_BY_BYTE = 8
SMALL = 64 * 1024**2


def check_model_size(folder: SourceFolder, config: Any) -> None:
    """Check an ordinary model by its config and its files.

    Raises:
        InputError: the config asks for more than the files hold.
    """
    files = weight_files(folder)
    if files:  # else transformers says what is missing
        _check(skeleton(config), files, folder)


def check_mixture_size(folder: SourceFolder, config: Any, foundation: FoundationReference) -> None:
    """Check an exported repo, and its base model where that lies elsewhere on this machine.

    Raises:
        InputError: a config asks for more than the files hold.
    """
    from dylora_moe.modeling import DyloraMoeForCausalLM

    files = [folder / name for name in needed_weights(folder, folder.read_json("config.json"))]
    if config.weights_layout == "adapter":
        place = local_folder(foundation)
        if place is None:  # it is yet to be fetched
            return
        check_model_size(place, load_foundation_config(foundation))
        files += weight_files(place)
    if config.base_config is None:
        return
    try:
        with torch.device("meta"), limited_modules():
            model = DyloraMoeForCausalLM(copy.deepcopy(config))
    except ValueError as error:
        raise InputError(f"no model can be made of {folder}/config.json: {error}") from error
    _check(model, files, folder)


def _check(model: nn.Module, files: Iterable[Path], folder: SourceFolder) -> None:
    asked = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    stored = sum(path.stat().st_size for path in files if path.is_file())
    if asked > MOST_BY_BYTE * stored + SMALL:
        raise InputError(
            f"{folder}/config.json asks for a model of {asked:,} numbers, and its weight files have {stored:,} bytes; the two "
            "do not belong together"
        )
