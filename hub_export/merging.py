"""Merge: one expert folded into the foundation, W + s B A. What comes out is an ordinary model that any server loads.

It knows how a merged folder is written, and nothing about how experts are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import FailureError, InputError, one_line
from .exported_repo import foundation_of, load_config
from .foundation import is_hub_id, is_local, not_loaded, resolve_foundation
from .licence import foundation_licence
from .mixture import FoundationReference
from .options import DTYPES
from .quantised import check_needs_no_kernels
from .side_files import make_readable, write_generation_config
from .sources import resolve_sources
from .staging import check_output, staged_folder
from .tokenizer import has_tokenizer, load_tokenizer


TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5


@dataclass
class MergeResult:
    """What was written. `difference` is the largest one between the logits of the sum, in float32, and those of
    `single:`; `rounding` that of the files as they lie there, which a dtype of 16 bits makes larger."""

    output_dir: Path
    expert: str
    foundation: str | None
    dtype: str
    difference: float
    rounding: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "output_dir": str(self.output_dir)}


def merge(
    repo: str | Path,
    *,
    expert: str | int,
    output_dir: str | Path,
    base_model: str | None = None,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> MergeResult:
    """Write a repo's foundation with one expert in it, and compare it with the strategy `single:` of that expert.

    Args:
        repo: an exported repo, a folder or a Hub id.
        expert: its name or number.
        base_model: the foundation of a repo of layout `adapter`, where it is not at the place that the config names.
        dtype: what the model is saved in; the foundation's own, if left out. The sum is formed in float32.

    Raises:
        InputError: no such expert, a foundation that cannot be had, or an output folder that is not empty.
        FailureError: the merged model does not compute what the expert does.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from dylora_moe.modeling import DyloraMoeForCausalLM
    from dylora_moe.modeling.layouts_dylora_moe import FoundationError

    tell = progress or (lambda message: None)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is not known; it can be {', '.join(DTYPES)}")
    check_output(Path(output_dir), False, _is_replaceable)
    folder = resolve_sources(repo)[0].folder
    config = load_config(folder)
    if folder.resolve() in Path(output_dir).resolve().parents:
        raise InputError(f"{output_dir} lies in the repo {folder}; choose another output folder")
    try:
        index = config.expert_index(expert)
    except ValueError as error:
        raise InputError(one_line(error, 500)) from error
    check_needs_no_kernels(config, str(folder))
    foundation = _foundation(folder, config, base_model)
    tell("loading the repo")
    stored = DTYPES.get(dtype) or config.dtype or torch.float32
    try:
        where = {"base_model": foundation.name} if config.weights_layout == "adapter" and is_local(foundation) else {}
        model = DyloraMoeForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        merged = model.merge_expert(index)
    except FoundationError as error:
        raise InputError(not_loaded(foundation, error)) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error
    tell("comparing the merged model with the expert")
    rows = _random_rows(model)
    expected = _logits(model, rows, routing_strategy=f"single:{index}")
    difference = _check(_logits(merged, rows), expected)
    del model
    merged.to(stored)
    merged.config.dtype = stored
    merged.config.name_or_path = ""
    with staged_folder(Path(output_dir), False, _is_replaceable) as place:
        tell("writing the model")
        fields = merged.generation_config.to_diff_dict()
        merged.generation_config = GenerationConfig()
        merged.save_pretrained(place)
        write_generation_config(place, fields, None)
        if has_tokenizer(folder):
            load_tokenizer(str(folder), None, False).save_pretrained(place)
        name = config.expert_names[index]
        (place / "README.md").write_text(
            _card(Path(output_dir).resolve().name, name, config, foundation), encoding="utf-8"
        )
        make_readable(place)
        tell("loading what was written")
        again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        found = _logits(again, rows)
        rounding = _check(found, expected) if stored == torch.float32 else float((found - expected).abs().max())
    return MergeResult(
        output_dir=Path(output_dir).resolve(),
        expert=name,
        foundation=foundation.name,
        dtype=str(stored).removeprefix("torch."),
        difference=difference,
        rounding=rounding,
    )


def _is_replaceable(folder: Path) -> bool:
    return False


def _random_rows(model: Any) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, rows: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model(rows, **arguments).logits


def _check(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits in float32.

    Raises:
        FailureError: it is more than rounding.
    """
    difference = float((found - expected).abs().max())
    if not difference <= max(TOLERANCE, RELATIVE_TOLERANCE * float(expected.abs().max())):
        raise FailureError(f"the merged model's logits differ from those of the expert by {difference:.2g}")
    return difference


def _foundation(folder: Path, config: Any, base_model: str | None) -> FoundationReference:
    """Where the foundation is; of a repo that holds it, what it is called.

    Raises:
        InputError: it is not there, or `base_model` would do nothing.
    """
    named = foundation_of(folder, config)
    if config.weights_layout == "adapter":
        return resolve_foundation(named, base_model, None)
    if base_model is not None:
        raise InputError(f"{folder} holds its own foundation, so that --base_model would do nothing; leave it out")
    return named


def _card(name: str, expert: str, config: Any, foundation: FoundationReference) -> str:
    from huggingface_hub import ModelCardData

    base_model = foundation.name if is_hub_id(foundation.name) else None
    licence = foundation_licence(foundation)
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=None if licence is None else licence.license,
        license_name=None if licence is None else licence.license_name,
        license_link=None if licence is None else licence.license_link,
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"The {config.base_config.model_type} model `{Path(foundation.name or 'unnamed').name}` with the LoRA expert `{expert}` "
        "of a mixture folded into its weights: an ordinary model that needs no code of its own. The foundation's licence "
        "applies to it.\n"
    )
