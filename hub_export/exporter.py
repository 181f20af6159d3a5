"""Exports any source that a reader knows as a Hub repo that stock transformers loads.

The order: check everything that is cheap to check, write tensor by tensor to a hidden folder, compare it with
the source, and only then rename it into place.

Dtypes: the foundation is saved as it is stored and the gate in float32. The experts are saved in their own
stored dtype (the finest one, where they differ), because rounding float32 adapters to a bfloat16 foundation's
dtype would change what they compute; on loading, `dtype` decides for both, as for any model. An explicit
`dtype` converts foundation and experts.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DyloraMoeWarning, FailureError, InputError, one_line
from .preparation import prepare
from .readers.open_source import open_source
from .repo.checksums import write_checksums
from .repo.eval_results import FOLDER as EVAL_RESULTS
from .repo.eval_results import GENERATED as GENERATED_RESULTS
from .repo.eval_results import eval_results_in, write_eval_results
from .repo.model_card import foundation_licence, keep_edits, model_card, stored_licence
from .repo.options import ExportOptions, ExportResult
from .repo.plan import Plan
from .repo.repo_config import is_exported_repo
from .repo.repo_files import KEPT_FILES, is_replaceable
from .repo.results import Score, read_scores
from .repo.writer import (
    make_readable,
    size_of_weights,
    write_adapter,
    write_config_and_code,
    write_full,
    write_generation_config,
)
from .sources.source_folder import SourceFolder, open_folder
from .staging import check_output, check_room, staged_folder
from .tensors.mixture import Mixture, idle_experts
from .tokenizers.tokenizer import FoundTokenizer, warn_about_older_transformers, write_tokenizer


def export(
    sources: str | Path | list[str | Path] | Mixture,
    output_dir: str | Path,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> ExportResult:
    """Write one or several sources as one repo, then check it against them.

    Args:
        sources: a folder, a Hub id or `wandb:entity/project/name:version`; several PEFT adapters become
            several experts, in this order, and after an exported repo they are appended to its experts. A
            mixture that `open_source` gave is not read again.
        output_dir: the repo's folder. It must be missing or empty, or with `overwrite` an exported repo.
        progress: is told in a few words what happens next.
        base_model, base_revision: the base model, where the source names none or not the right one.
        layout: "full", or "adapter", which leaves the base model where it is.
        routing_strategy: the default strategy; otherwise `router`, `single:0` for one expert, `uniform`
            without router.
        router_mode, router_input, num_experts_per_tok, router_temperature: other router settings than the
            source's.
        router_prompts: a YAML file, expert -> example prompts, from which a router is made without training.
        router: "arrow": a router in every adapted layer, made of the experts' own weights.
        subtract: an adapter that is subtracted from every expert: s_i B_i A_i - s_g B_g A_g as appended ranks,
            exactly. PEFT's `use_gks` subtracts A and B each by itself, which is another thing.
        lora_alpha: alpha of all experts, for training checkpoints that do not store it.
        expert_names: other names for the experts, in order.
        tokenizer: folder or Hub id, where neither source nor base model has the right one.
        subfolder: which of several checkpoints in the source.
        revision: the source's revision on the Hub.
        dtype: "float32", "bfloat16" or "float16" converts base model and experts; otherwise they stay as
            stored.
        max_shard_size: weights beyond it are split over several files.
        results: `STRATEGY=FILE` for each file of EvalPlus's results, to be stated in the card.
        overwrite: replace an exported repo, atomically; what was written by hand in its card is kept.
        verify: check the written repo against the source before it appears.
        trust_remote_code: let a tokenizer run code of its own.

    Raises:
        InputError: what was given cannot be exported as it is.
        FailureError: writing failed, or the check found a difference beyond rounding. Nothing is left under
            `output_dir` then that was not there before.
    """
    chosen = ExportOptions.of(options)
    scores = read_scores(chosen.results)  # before anything else, since it may be wrong
    tell = progress or (lambda message: None)
    output = check_output(Path(output_dir), chosen.overwrite, is_replaceable)
    tell("reading the source")
    mixture = sources if isinstance(sources, Mixture) else open_source(sources, chosen)
    _check_apart(output, mixture)
    plan, tokenizer = prepare(mixture, chosen, tell)
    _refuse_inside(output, [Path(name) for name in (plan.foundation.name, chosen.tokenizer) if name])
    if tokenizer is not None:
        warn_about_older_transformers(tokenizer)
    _warn_about_idle_experts(mixture)
    strategy = _routing_strategy(chosen.routing_strategy or mixture.routing_strategy, plan.config)
    for score in scores:
        _routing_strategy(score.routing_strategy, plan.config)
    copied = plan.weights if chosen.layout == "full" else {}
    check_room(output, size_of_weights(mixture, plan.config, copied, chosen.torch_dtype))
    result = ExportResult(
        output_dir=output,
        format=mixture.format,
        reason=mixture.reason,
        layout=chosen.layout,
        foundation=plan.foundation.name,
        experts=list(plan.config.expert_names),
        router=plan.config.has_router,
        router_kind=plan.config.router_kind,
        routing_strategy=strategy,
        tokenizer=None if tokenizer is None else tokenizer.origin,
        notes=mixture.notes,
    )
    with staged_folder(output, chosen.overwrite, is_replaceable) as folder:
        tell("writing the repo")
        _write(folder, output, mixture, plan, tokenizer, strategy, scores, chosen)
        if chosen.verify:
            tell("checking the repo against the source")
            result.check = _check(folder, mixture, plan, chosen)
        tell("putting the repo in its place")
    return result


def _check_apart(output: Path, mixture: Mixture) -> None:
    """Raise InputError if one of sources and output lies in the other."""
    folders = [source.path for source in mixture.sources]
    _refuse_inside(output, folders)
    for folder in folders:
        if is_exported_repo(folder) and folder.resolve() in output.parents:
            raise InputError(
                f"{output} lies in the repo {folder}, which is the source; choose another folder"
            )


def _refuse_inside(output: Path, folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and output in folder.resolve().parents:
            raise InputError(f"{folder} lies in the output folder {output}, which would be replaced")


def _routing_strategy(strategy: str | None, config: Any) -> str:
    """Give the strategy in canonical form, or the default.

    Raises:
        InputError: the mixture cannot do it.
    """
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    try:
        return str(resolve_routing_strategy(strategy, config))
    except ValueError as error:
        raise InputError(one_line(error, 2000)) from error


def _warn_about_idle_experts(mixture: Mixture) -> None:
    note = idle_experts(mixture)
    if note is not None:
        warnings.warn(note, DyloraMoeWarning, stacklevel=3)


def _write(
    folder: Path,
    output: Path,
    mixture: Mixture,
    plan: Plan,
    tokenizer: FoundTokenizer | None,
    strategy: str,
    scores: list[Score],
    options: ExportOptions,
) -> None:
    """Write everything an exported repo holds.

    Raises:
        OSError: the disk is full, or the file system refuses.
    """
    old = open_folder(output) if output.is_dir() else None
    if old is not None:
        _copy_kept_files(old, folder)
    if options.layout == "full":
        write_full(folder, mixture, plan.config, plan.weights, options.torch_dtype, options.max_shard_size)
    else:
        write_adapter(folder, mixture, plan.config, options.torch_dtype, plan.transposed)
    write_config_and_code(folder, plan.config)
    write_generation_config(folder, plan.generation, strategy)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, plan.config)
    card = model_card(
        output.name,
        plan.config,
        strategy,
        mixture,
        num_foundation_parameters=plan.num_foundation_parameters,
        licence=foundation_licence(plan.foundation) or stored_licence(mixture),
        results=scores,
        checked=_what_is_checked(plan) if options.verify else None,
    )
    (folder / "README.md").write_text(
        keep_edits(card, None if old is None else old / "README.md"), encoding="utf-8"
    )
    write_eval_results(folder, scores)
    write_checksums(folder)
    make_readable(folder)


def _what_is_checked(plan: Plan) -> str:
    """Say what `check_export` compares: no logits where the foundation is not on this machine."""
    return "tensors" if plan.weights is None else "tensors and logits"


def _copy_kept_files(old: SourceFolder, folder: Path) -> None:
    """Copy what a person put into the repo that is replaced, or may have added lines to."""
    results = [name for name in eval_results_in(old) if not GENERATED_RESULTS.fullmatch(name)]
    if results:
        (folder / EVAL_RESULTS).mkdir()
    for name in (*KEPT_FILES, *results):
        if old.has(name):
            shutil.copyfile(old / name, folder / name)


def _check(folder: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> Any:
    from .checking.check import check_export

    report = check_export(folder, mixture, plan, options)
    if report.passed is False:
        raise FailureError(
            f"the exported repo does not compute what {mixture.sources[0]} does: {report.describe_failures()}"
        )
    if report.passed is None:
        warnings.warn(report.describe_unclear(), DyloraMoeWarning, stacklevel=3)
    return report


__all__ = ["ExportOptions", "ExportResult", "export", "write_generation_config"]
