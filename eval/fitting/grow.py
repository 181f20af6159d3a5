"""Grows a mixture by one expert: are the texts new, train it with the others frozen, fit the gate, what was forgotten.

In this order: options and folders are checked, texts read and shared out, new texts compared with old ones, the
expert trained alone, appended to a copy of the repo, the gate fitted on texts of all groups, and the loss of every
group's held-out texts measured before and after. Old experts stay bit for bit.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError
from dylora_moe.hub_export.exporter import export
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.readers.open_source import open_source
from dylora_moe.hub_export.repo.repo_config import load_config
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.hub_export.repo.writer import finest_dtype
from dylora_moe.hub_export.sources.hub_and_folders import open_source_folder
from dylora_moe.hub_export.sources.source_folder import SourceFolder
from dylora_moe.hub_export.staging import check_room
from dylora_moe.hub_export.tensors.mixture import Router, is_expert_name
from dylora_moe.hub_export.variant import check_output_of_variant

from ..progress import Progress, told
from ..sampling.loading import FoundModel
from ..texts.encoding import part_length
from ..texts.loss import measure_loss
from ..texts.reading import Text, Texts
from ..texts.text_losses import text_losses
from .expert_training import gate_confidence, train_new_expert
from .fit_router import check_base_model, fit_router
from .grow_options import GrowOptions
from .novelty import Novelty, novelty_of
from .reservoir import check_reservoir, keep_some, write_texts
from .training_texts import PART_LENGTH, split_texts


@dataclass(frozen=True)
class Forgetting:
    """The loss of one group's held-out texts, nats a token.

    Attributes:
        is_new: whether it is a group of the new texts.
        before, after: under `router`, of the old repo (`uniform` where it had none) and of the new one.
        best_old, new: under the best old expert alone, and under the new expert alone.
    """

    group: str
    is_new: bool
    before: float
    after: float
    best_old: float
    new: float

    @property
    def change(self) -> float:
        """The change of the loss, as a share of the loss before."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class GrowResult:
    """What `grow` wrote, and what came of it.

    Attributes:
        expert: the new expert's name.
        groups: of every group, old ones first, what its held-out texts cost.
    """

    output_dir: Path
    repo: Path
    expert: str
    novelty: Novelty
    groups: list[Forgetting]

    def to_dict(self) -> dict[str, Any]:
        groups = [{**asdict(group), "change": group.change} for group in self.groups]
        return {**asdict(self), "output_dir": str(self.output_dir), "repo": str(self.repo), "groups": groups}


@dataclass(frozen=True)
class _Shares:
    """Old and new texts, to learn from and held out."""

    old: list[Text]
    old_held_out: list[Text]
    new: list[Text]
    new_held_out: list[Text]


def grow(
    repo: str | Path,
    texts: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path,
    progress: Progress | None = None,
    **options: Any,
) -> GrowResult:
    """Add an expert for new texts to a mixture, and write a repo with it; the old experts stay bit for bit.

    Texts are new if the experts predict them worse than what the mixture knows: see `Novelty`. Other texts are
    refused, unless `force` says otherwise. A gate is fitted again, on old and new texts; a router of every layer
    (`router_kind` 'arrow') gets the new expert's prototypes.

    Args:
        repo: an exported repo, a folder or a Hub id.
        texts: files or folders with the new texts, see `texts.reading`.
        output_dir: missing or empty, or with `overwrite` an exported repo, which is replaced atomically.
        progress: is told what is being done, and how much of it.
        options: see `GrowOptions`. Old texts come from `old_texts` and `reservoir`.

    Raises:
        InputError: no exported repo, texts that are not new (with the figure that says so), no old texts, a name that
            an expert has, or an option or folder that cannot be used. Nothing was written.
        FailureError: the work failed, or the disk is full.
    """
    chosen = GrowOptions.of(options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a mixture grows in one process; start `grow` without `accelerate launch`")
    check_packages("scipy")
    tell = progress or (lambda what, done, total: None)
    source = open_source_folder(repo)
    config = load_config(source)
    if not config.num_experts:
        raise InputError(f"{source.path} has no experts yet; export the first one")
    check_output_of_variant(source, Path(output_dir), chosen.overwrite)
    _check_room(source, config, Path(output_dir))
    model = FoundModel(str(repo), source.path.name, source.path, "exported repo", "hf")
    check_base_model(model)
    if chosen.reservoir is not None:
        check_reservoir(Path(chosen.reservoir), [source.path, Path(output_dir)])
    chosen = replace(chosen, max_length=part_length(config, chosen.max_length, PART_LENGTH))
    shares = _read(texts, chosen)
    name = _expert_name(shares, chosen, config)
    with told(tell, "loading the model"):
        loaded = model.load(dtype=chosen.dtype)
    with told(tell, "comparing new texts with old ones"):
        novelty = _compare(loaded, shares, chosen)
    if not novelty.is_new and not chosen.force:
        raise InputError(
            f"the texts are not new to {source.path}: {novelty.sentence()}. No expert is warranted; --force adds one, and "
            f"--novelty sets the probability ({novelty.threshold})"
        )
    with tempfile.TemporaryDirectory(prefix="dylora-moe-grow-") as work:
        folder = Path(work)
        stored_dtype = finest_dtype(open_source(str(source.path)))
        train_new_expert(
            loaded,
            name,
            shares.new,
            chosen,
            folder / "experts",
            stored_dtype,
            partial(tell, f"training expert {name}"),
        )
        del loaded
        sources = [str(source.path), str(folder / "experts" / name)]
        _write(sources, folder, Path(output_dir), shares, chosen, config, tell)
        with told(tell, "measuring what was forgotten"):
            groups = _forgetting(source.path, Path(output_dir), folder, shares, config.num_experts, chosen)
    if chosen.reservoir is not None:
        everything = [*shares.old, *shares.old_held_out, *shares.new, *shares.new_held_out]
        write_texts(Path(chosen.reservoir), keep_some(everything, chosen.reservoir_size, chosen.seed))
    return GrowResult(Path(output_dir).resolve(), source.path, name, novelty, groups)


def _check_room(source: SourceFolder, config: Any, output_dir: Path) -> None:
    """Check that there is room for copies of the repo's weights: with a gate, there is one before it is fitted."""
    names = repo_files(source, follow_links=True).weights()
    weights = sum((source / name).stat().st_size for name in names)
    check_room(output_dir, weights)
    if not config.routes_by_layer:
        temporary = Path(tempfile.gettempdir())
        check_room(temporary, weights, "name another folder in TMPDIR", "a copy of the weights takes")


def _read(texts: str | Path | Sequence[str | Path], options: GrowOptions) -> _Shares:
    paths = [texts] if isinstance(texts, str | Path) else list(texts)
    new = list(Texts(paths))
    old_paths = list(options.old_texts or ())
    if options.reservoir is not None and Path(options.reservoir).exists():
        old_paths.append(options.reservoir)
    if not old_paths:
        hint = f"; {options.reservoir} is not there yet" if options.reservoir else ""
        raise InputError(
            "give texts that the mixture knows as --old_texts (or a --reservoir with some): without them it cannot be said "
            f"what is new or forgotten{hint}"
        )
    old = list(Texts(old_paths))
    known = {text.group for text in old}
    for text in new:
        if text.group in known:
            raise InputError(
                f"{text.source} is of group {text.group!r}, which old texts are of, too; give new texts a `group` of their own"
            )
    parts = [
        *split_texts(old, options.validation, options.seed),
        *split_texts(new, options.validation, options.seed),
    ]
    for part, what in zip(parts, ("old", "old", "new", "new"), strict=True):
        if not part:
            raise InputError(
                f"there are too few {what} texts to hold out {options.validation:.0%} of them; give more"
            )
    return _Shares(*parts)


def _expert_name(shares: _Shares, options: GrowOptions, config: Any) -> str:
    groups = list(dict.fromkeys(text.group for text in shares.new))
    if options.expert_name is None and len(groups) > 1:
        raise InputError(
            f"the new texts are of groups {', '.join(groups)}: name the new expert (--expert_name)"
        )
    name = options.expert_name or groups[0]
    if not is_expert_name(name):
        raise InputError(
            f"{name!r} cannot be an expert's name: letters, digits, '_', '.', '+' and '-', not digits alone; name the new "
            "expert with --expert_name"
        )
    if name.casefold() in map(str.casefold, config.expert_names):
        raise InputError(f"there is an expert {name!r} already; give the new one another --expert_name")
    return name


def _compare(loaded: Any, shares: _Shares, options: GrowOptions) -> Novelty:
    """Measure the loss of held-out new and old texts under the best expert of each, and the gate's confidence."""
    strategies = [f"single:{expert}" for expert in range(loaded.model.config.num_experts)]
    costs, confidence = [], []
    for part in (shares.new_held_out, shares.old_held_out):
        losses = text_losses(loaded.model, loaded.tokenizer, part, strategies, max_length=options.max_length)
        costs.append((losses.nats.min(axis=1) / losses.num_tokens).tolist())
        confidence.append(gate_confidence(loaded, part, options.max_length))
    return novelty_of(*costs, tuple(confidence), options.novelty)


def _write(
    sources: list[str],
    folder: Path,
    output_dir: Path,
    shares: _Shares,
    options: GrowOptions,
    config: Any,
    tell: Progress,
) -> None:
    """Write the repo with the new expert, and with a gate that is fitted to texts of all groups."""
    layout = config.weights_layout
    if config.routes_by_layer:
        with told(tell, "appending the expert"):
            export(sources, output_dir, layout=layout, overwrite=options.overwrite)
        return
    mixture, grown = open_source(sources), folder / "grown"
    if mixture.router is not None:
        mixture.router = _with_new_row(mixture.router)
    with told(tell, "appending the expert"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DyloraMoeWarning)  # of a router that is yet to come
        export(mixture, grown, layout=layout, routing_strategy="uniform")
    texts = folder / "texts.jsonl"
    write_texts(texts, [*shares.old, *shares.new])
    fit_router(
        grown,
        texts,
        output_dir=output_dir,
        objective=options.objective,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        seed=options.seed,
        dtype=options.dtype,
        overwrite=options.overwrite,
        progress=tell,
    )


def _with_new_row(router: Router) -> Router:
    """Give a gate a row of zeros for one more expert, to start from."""

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = router.read()
        return torch.cat([weight, torch.zeros_like(weight[:1])]), torch.cat(
            [bias, torch.zeros_like(bias[:1])]
        )

    return replace(router, read=read, num_experts=router.num_experts + 1)


def _forgetting(
    repo: Path, output_dir: Path, folder: Path, shares: _Shares, num_old: int, options: GrowOptions
) -> list[Forgetting]:
    held_out = folder / "held_out.jsonl"
    write_texts(held_out, [*shares.old_held_out, *shares.new_held_out])
    measured = partial(measure_loss, texts=held_out, max_length=options.max_length, dtype=options.dtype)
    served = "router" if load_config(open_source_folder(repo)).has_router else "uniform"
    before = measured(repo, strategies=[served]).losses
    singles = [f"single:{expert}" for expert in range(num_old + 1)]
    after = measured(output_dir, strategies=["router", *singles]).losses
    new_groups = {text.group for text in shares.new}
    groups = sorted(set(before.groups), key=lambda group: (group in new_groups, group))

    def mean(losses: Any, column: int, group: str) -> float:
        rows = np.array(losses.groups) == group
        return float(losses.nats[rows, column].sum() / losses.num_tokens[rows].sum())

    return [
        Forgetting(
            group=group,
            is_new=group in new_groups,
            before=mean(before, 0, group),
            after=mean(after, 0, group),
            best_old=min(mean(after, 1 + expert, group) for expert in range(num_old)),
            new=mean(after, 1 + num_old, group),
        )
        for group in groups
    ]


__all__ = ["Forgetting", "GrowResult", "grow"]
