"""What held-out texts say of experts and router, without generating anything.

    loss.json    every figure, by group of texts and over all, and the verdict in words
    loss.csv     the losses, a line for each group and strategy

`text_losses` computes sums, `loss_figures` what follows from them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.staging import staged_file, write_atomically

from ..analysis.files import LOSS_FILE, LOSS_TABLE_FILE, LOSS_VERSION
from ..options import LossOptions
from ..progress import Progress, told
from ..report.loss_tables import losses_of_groups
from ..sampling.devices import check_device_map
from ..sampling.loading import FoundModel, find_model
from ..sampling.run_record import check_results_folder
from .loss_figures import figures
from .reading import Text, Texts
from .text_losses import TextLosses, refuse_turns, text_losses


@dataclass(frozen=True)
class LossMeasurement:
    """What was measured; `summary` is the content of `loss.json`.

    Attributes:
        losses: the sums of every text.
        output_dir: where the files are, if any were written.
    """

    summary: dict[str, Any]
    losses: TextLosses
    output_dir: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.summary


def measure_loss(
    model: str | Path | None,
    texts: str | Path | Sequence[str | Path],
    *,
    strategies: str | Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> LossMeasurement:
    """Measure the loss of held-out texts under every strategy, and what the router makes of the experts.

    By group of texts and over all: nats a token, bits a byte and perplexity under every strategy; the same with
    the best expert for every text and for every token (the oracles, if all of several experts are measured);
    the router against the best single expert, and its share of the way from `uniform` to the oracle of tokens:
    (L_uniform - L_router) / (L_uniform - L_oracle). Intervals are the bootstrap's over texts.

    Args:
        model: a source, as for `benchmark`; None where `adapter_path` says it all.
        texts: files and folders; see `Texts`.
        strategies: unless given, `base`, every single expert, `uniform`, and with a router `best` and `router`.
            `best` is told what to read in `text_losses`.
        output_dir: where `loss.json` and `loss.csv` are written; nowhere unless given.
        options: see `LossOptions`.

    Raises:
        InputError: texts, an option, a source or a strategy that cannot be used; nothing is written.
        FailureError: the work failed.
    """
    chosen = LossOptions.of(options, measure_loss)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the loss is measured in one process; pass --device_map auto to use several GPUs")
    check_packages("scipy")
    check_device_map(chosen.device_map)
    source = Texts(texts)
    found = find_model(model, **chosen.of_source)
    measured = _strategies(found, strategies)
    refuse_turns(measured)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        _check_folder(folder, found)
    found.check_base_model()
    # All lines are read once before the model is, so that a bad one costs no time.
    num_texts = sum(1 for _ in _first(source, chosen.max_texts))
    with told(progress, f"loading {found.label}"):
        loaded = found.load(dtype=chosen.dtype, device=PartialState().device, device_map=chosen.device_map)
    what = f"loss of {num_texts} texts under {len(measured)} strategies"
    if progress is not None:
        progress(what, 0, num_texts)
    losses = text_losses(
        loaded.model,
        loaded.tokenizer,
        _first(source, chosen.max_texts),
        measured,
        max_length=chosen.max_length,
        batch_tokens=chosen.batch_tokens,
        progress=None if progress is None else lambda done: progress(what, done, num_texts),
    )
    summary = {
        "format_version": LOSS_VERSION,
        "model": found.source,
        "model_label": found.label,
        "model_revision": found.revision,
        "model_format": found.format,
        "model_sha256": found.sha256,
        "base_model": found.base_model,
        "expert_names": found.expert_names,
        "has_router": found.is_mixture and found.config.has_router,
        "texts": [str(path) for path in source.paths],
        "max_texts": chosen.max_texts,
        "max_length": chosen.max_length,
        "dtype": chosen.dtype,
        **figures(losses, found.expert_names),
    }
    if folder is not None:
        _write(folder, summary)
    return LossMeasurement(summary, losses, folder)


def _strategies(found: FoundModel, wanted: str | Sequence[str] | None) -> list[str]:
    """Return the strategies to measure in canonical form."""
    if wanted:
        return found.strategies([wanted] if isinstance(wanted, str) else wanted)
    if not found.is_mixture:
        return ["base"]
    num_experts = len(found.expert_names)
    strategies = ["base", *(f"single:{expert}" for expert in range(num_experts))]
    if num_experts > 1:
        strategies += ["uniform", *(("best", "router") if found.config.has_router else ())]
    return strategies


def _first(texts: Iterable[Text], most: int | None) -> Iterator[Text]:
    """Yield the first `most` texts of every group."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts[text.group] += 1
        if most is None or counts[text.group] <= most:
            yield text


def _check_folder(folder: Path, model: FoundModel) -> None:
    if folder.resolve() in (model.folder.resolve(), Path(model.source).resolve()):
        raise InputError(f"-o {folder} is the model's own folder; choose another, it may lie in it")
    check_results_folder(folder)


def _write(folder: Path, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / LOSS_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with staged_file(folder / LOSS_TABLE_FILE) as work:
        losses_of_groups(summary).write_csv(work)


__all__ = ["LossMeasurement", "measure_loss"]
