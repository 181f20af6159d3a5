"""Merges one expert into the base model, W + s B A: an ordinary model that any server loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checking import rounding
from .checking.comparison import Comparison, compared
from .checking.model_size import check_mixture_size
from .checking.own_code import load_with_own_code
from .errors import DyloraMoeWarning, FailureError, InputError, one_line
from .foundation.quantised import check_needs_no_kernels
from .foundation.reference import is_local, not_loaded, resolve_foundation
from .repo.choices import long_dtype
from .repo.model_card import foundation_licence
from .repo.options import DTYPES, torch_dtype
from .repo.repo_config import foundation_of, load_config
from .repo.repo_files import repo_files
from .repo.writer import make_readable, write_generation_config
from .shown_text import as_markdown, as_markdown_code
from .sources.hub_and_folders import is_on_hub, open_source_folder
from .sources.source_folder import SourceFolder
from .staging import check_output, staged_folder
from .tensors.mixture import FoundationReference
from .tokenizers.tokenizer import open_tokenizer, write_tokenizer
from .tokenizers.tokenizer_files import has_tokenizer


@dataclass
class MergeResult:
    """What `merge` wrote, and how far its logits are from those of `single:`.

    Attributes:
        difference: the largest one of the sum, in float32; `allowed` is what rounding in float32 allows.
        passed: None where so much is allowed that the comparison says nothing.
        rounding: the largest difference of the written files, larger where they are in 16 bits.
    """

    output_dir: Path
    expert: str
    foundation: str | None
    dtype: str
    difference: float
    allowed: float
    passed: bool | None
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
    """Write a repo's base model with one expert in it, and compare it with that expert's strategy `single:`.

    Args:
        repo: an exported repo, a folder or a Hub id.
        expert: its name or number.
        base_model: the base model of a repo of layout `adapter`, where it is not at the place that the config
            names.
        dtype: what the model is saved in; the base model's own, if left out. The sum is formed in float32.

    Raises:
        InputError: no complete repo, no such expert, a base model that cannot be had, or an output folder that
            is not empty.
        FailureError: the merged model, or what was written of it, does not compute what the expert does.
    """
    from transformers import AutoModelForCausalLM

    tell = progress or (lambda message: None)
    dtype = long_dtype(dtype)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is not known; it can be {', '.join(DTYPES)}")
    check_output(Path(output_dir), False, _is_replaceable)
    folder = open_source_folder(repo)
    config = load_config(folder)
    repo_files(folder, follow_links=True)  # transformers would follow links and index entries that lead out
    if folder.path.resolve() in Path(output_dir).resolve().parents:
        raise InputError(f"{output_dir} lies in the repo {folder}; choose another output folder")
    try:
        index = config.expert_index(expert)
    except ValueError as error:
        raise InputError(one_line(error, 500)) from error
    check_needs_no_kernels(config, str(folder))
    foundation = _foundation(folder, config, base_model)
    check_mixture_size(folder, config, foundation)
    tell("loading the repo")
    model, merged = _load(folder, config, foundation, index)
    tell("comparing the merged model with the expert")
    rows, name = _random_rows(model), config.expert_names[index]
    values, moved = _measure(model, rows, index)
    del model
    expected, effect = values["expert"], float((values["expert"] - values["base"]).abs().max())
    sum_of_both = compared(
        "the merged model's logits", expected, _logits(merged, rows), moved["expert"], effect
    )
    _judge(sum_of_both, name)
    stored = torch_dtype(dtype) or config.dtype or torch.float32
    merged.to(stored)
    merged.config.dtype = stored
    merged.config.name_or_path = ""
    card = _card(Path(output_dir).resolve().name, name, merged.config.model_type, foundation)
    with staged_folder(Path(output_dir), False, _is_replaceable) as place:
        tell("writing the model")
        _write(place, merged, card)
        if has_tokenizer(folder):
            found = open_tokenizer(str(folder), folder, merged.config, foundation.name)
            write_tokenizer(found, place, merged.config)
        make_readable(place)
        tell("loading what was written")
        again = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, trust_remote_code=False
        ).eval()
        _check_same(again, merged)
        difference_of_files = float((_logits(again, rows) - expected).abs().max())
        if not math.isfinite(difference_of_files):
            raise FailureError(
                f"in {str(stored).removeprefix('torch.')}, the merged model's logits are no numbers, as some of its weights "
                "are too large for it; choose another --dtype"
            )
    return MergeResult(
        output_dir=Path(output_dir).resolve(),
        expert=name,
        foundation=foundation.name,
        dtype=str(stored).removeprefix("torch."),
        difference=sum_of_both.difference,
        allowed=sum_of_both.allowed,
        passed=sum_of_both.passed,
        rounding=difference_of_files,
    )


def _load(
    folder: SourceFolder, config: Any, foundation: FoundationReference, index: int
) -> tuple[Any, torch.nn.Module]:
    """Load the mixture in float32, and the foundation with one expert in it.

    Raises:
        InputError: the repo or its foundation cannot be loaded.
    """
    from dylora_moe.modeling.loading_dylora_moe import FoundationError

    where = {}
    if config.weights_layout == "adapter" and is_local(foundation):
        where["base_model"] = foundation.name
    try:
        model = load_with_own_code(folder, dtype=torch.float32, **where)
        return model, model.merge_expert(index)
    except InputError:
        raise
    except FoundationError as error:
        raise InputError(not_loaded(foundation, error)) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _write(place: Path, merged: Any, card: str) -> None:
    """Write the merged model with its generation config, and its card."""
    from transformers import GenerationConfig

    fields = merged.generation_config.to_diff_dict()
    merged.generation_config = GenerationConfig()
    merged.save_pretrained(place)
    write_generation_config(place, fields, None)
    (place / "README.md").write_text(card, encoding="utf-8")


def _is_replaceable(folder: Path) -> bool:
    return False


def _random_rows(model: Any) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, rows: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model(rows, **arguments).logits


def _measure(model: Any, rows: torch.Tensor, index: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute logits of the foundation and of one expert, and how far rounding moves them.

    The model is moved by it, too.
    """

    def compute(choice: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        yield "base", _logits(model, rows, routing_strategy="base")
        yield "expert", _logits(model, rows, routing_strategy=f"single:{index}")

    return rounding.measure(compute, list(model.parameters()))


def _judge(comparison: Comparison, expert: str) -> None:
    """Warn where it cannot be said whether the sum is right.

    Raises:
        FailureError: logits differ by more than rounding in float32 allows.
    """
    if comparison.passed is False:
        raise FailureError(
            f"the merged model's logits differ from those of the expert {expert} by {comparison.difference:.2g} "
            f"(rounding in float32 allows {comparison.allowed:.2g})"
        )
    if comparison.passed is None:
        message = (
            f"the merged model's logits cannot be told from wrong ones: rounding in float32 allows a difference of "
            f"{comparison.allowed:.2g}, and the expert {expert} makes no more than {comparison.effect:.2g}"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def _check_same(written: torch.nn.Module, merged: torch.nn.Module) -> None:
    """Compare the tensors of the files with the merged model's, bit for bit.

    Raises:
        FailureError: names the first tensor of the files that is not the merged model's, bit for bit.
    """
    expected = merged.state_dict()
    for name, tensor in written.state_dict().items():
        if name not in expected or not torch.equal(tensor, expected[name].to(tensor.dtype)):
            raise FailureError(f"{name} was not written as the merged model has it")


def _foundation(folder: SourceFolder, config: Any, base_model: str | None) -> FoundationReference:
    """Find the foundation; of a repo that holds it, give its name.

    Raises:
        InputError: it is not there, or `base_model` would do nothing.
    """
    named = foundation_of(folder, config)
    if config.weights_layout == "adapter":
        return resolve_foundation(named, base_model, None)
    if base_model is not None:
        raise InputError(
            f"{folder} holds its own base model, so that --base_model would do nothing; leave it out"
        )
    return named


def _card(name: str, expert: str, model_type: str, foundation: FoundationReference) -> str:
    from huggingface_hub import ModelCardData

    base_model = foundation.name if is_on_hub(foundation.name) else None
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
        f"---\n{data.to_yaml()}\n---\n\n# {as_markdown(name)}\n\n"
        f"The {as_markdown(model_type)} model {as_markdown_code(Path(foundation.name or 'unnamed').name)} with the LoRA "
        f"expert {as_markdown_code(expert)} of a mixture merged into its weights: an ordinary model that needs no code of "
        "its own. The base model's licence applies to it.\n"
    )
