"""Fits a repo's gate to texts, with base model and experts frozen, and writes a repo that differs in the gate alone.

In this order: options and folders are checked, texts read, the model loaded and given a gate, the gate's input read
once and kept, the gate trained, held-out texts measured, the repo written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError
from dylora_moe.hub_export.repo.gate_files import size_with_gate
from dylora_moe.hub_export.repo.repo_config import load_config
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.hub_export.sources.hub_and_folders import open_source_folder
from dylora_moe.hub_export.staging import check_room
from dylora_moe.hub_export.variant import check_output_of_variant, write_with_gate

from ..progress import Progress, told
from ..sampling.loading import FoundModel, LoadedModel
from ..texts.encoding import part_length
from ..texts.reading import Text
from .gate_training import Epoch, train_gate, usage
from .held_out import mean_losses
from .objectives import LanguageModelingObjective, Objective, OracleObjective, named_experts
from .options import FitRouterOptions
from .processes import Processes
from .router_states import RouterStates
from .training_texts import (
    PART_LENGTH,
    FittingTexts,
    describe_texts,
    encode_texts,
    read_texts,
    split_texts,
)


ROUTER_FIELDS = (
    "router_kind",
    "router_input",
    "router_mode",
    "num_experts_per_tok",
    "router_temperature",
    "router_aux_loss_coef",
)
MOST, LEAST = 0.95, 0.01  # shares of tokens beyond which a gate has collapsed


@dataclass
class FitRouterResult:
    """What `fit_router` wrote, and what came of it.

    Attributes:
        loss_before, loss_after: of the held-out texts in nats a token, under `router` as the repo is served; before
            by the repo's own gate, under `uniform` where it had none. None where nothing is held out.
        losses: the same under other strategies: `uniform`, each expert alone, and the token-level oracle.
        shares: by expert, the share of held-out tokens (of all, where none are held out) at which it comes first.
        entropy: of the dense weights there, mean over tokens, in nats.
        steps: that were taken; `best_step` is the one whose gate was kept, 0 the gate that there was before.
        num_texts, num_held_out: parts that the gate was fitted to, and that were held out.
    """

    output_dir: Path
    repo: Path
    objective: str
    steps: int
    best_step: int
    learning_rate: float
    num_texts: int
    num_held_out: int
    loss_before: float | None
    loss_after: float | None
    losses: dict[str, float]
    shares: dict[str, float]
    entropy: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "output_dir": str(self.output_dir), "repo": str(self.repo)}


def fit_router(
    repo: str | Path,
    texts: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path,
    progress: Progress | None = None,
    tell_epoch: Callable[[Epoch], None] | None = None,
    **options: Any,
) -> FitRouterResult:
    """Fit a gate to texts, and write a repo with it; base model and experts stay bit for bit.

    A repo without a gate gets one, in place of a router of kind `arrow` if that is what it has, and the written
    repo's default strategy is `router`. Under `accelerate launch` the processes share the texts and take the steps
    that one process would take. What the gate reads is kept in a temporary file (`TMPDIR` says where):
    `hidden_size` numbers a token, in the dtype that the model computes them in. The gate starts from the repo's,
    or from zeros, where all experts weigh the same.

    `loss` is that of dense routing, over all experts at every token; the written repo routes as its
    `router_mode` says. Under `oracle` a token counts by how far its best expert's loss lies below the mean one of
    all experts: where all predict alike, the best is so by chance, and unweighted such tokens would decide.

    transformers' `Trainer` fits a gate, too, by a pass of its own for every step:

    ```python
    model.requires_grad_(False)
    model.router.requires_grad_(True)
    model.config.router_mode = "dense"  # "auto" is dense while training
    Trainer(model, arguments, train_dataset=rows_with_labels).train()
    ```

    Args:
        repo: an exported repo, a folder or a Hub id.
        texts: files or folders, see `texts.reading`.
        output_dir: missing or empty, or with `overwrite` an exported repo, which is replaced atomically.
        progress: is told what is being done, and how much of it.
        tell_epoch: is told what each pass over the texts came to.
        options: see `FitRouterOptions`.

    Raises:
        InputError: no exported repo of several experts, texts or options that cannot be used, or an output folder
            that is not empty. Nothing was written.
        FailureError: the disk is full, or the file system refuses.
    """
    chosen = FitRouterOptions.of(options)
    paths = [texts] if isinstance(texts, str | Path) else list(texts)
    source = open_source_folder(repo)
    config = load_config(source)
    _check_experts(config, source.path)
    _check_input(config, chosen)
    repo_files(source, follow_links=True)
    check_output_of_variant(source, Path(output_dir), chosen.overwrite)
    check_room(Path(output_dir), size_with_gate(source, config.weights_layout))
    model = FoundModel(str(repo), source.path.name, source.path, "exported repo", "hf")
    check_base_model(model)
    found = read_texts(paths, config, all_name_experts=chosen.targets == "texts")
    described = describe_texts(paths)
    processes = Processes(chosen.mixed_precision)
    tell = progress or (lambda what, done, total: None)
    with told(tell, "loading the model"):
        loaded = model.load(dtype=chosen.dtype, device=processes.device)
    result = _fit(loaded, found, chosen, processes, tell, tell_epoch)
    result.repo, result.output_dir = source.path, Path(output_dir).resolve()
    if processes.is_main:
        warn_of_collapse(result, chosen)
        warn_of_loss(result, chosen)
        with told(tell, "writing the repo"):
            _write(source, loaded.model, result, chosen, described)
    processes.wait()
    return result


def _fit(
    loaded: LoadedModel,
    texts: Sequence[Text],
    options: FitRouterOptions,
    processes: Processes,
    tell: Progress,
    tell_epoch: Callable[[Epoch], None] | None,
) -> FitRouterResult:
    """Fit the gate of a model in place, and measure what came of it. Folders are left open in the result."""
    model, config = loaded.model, loaded.model.config
    options = replace(options, max_length=part_length(config, options.max_length, PART_LENGTH))
    split = _encoded(split_texts(texts, options.validation, options.seed), loaded, options)

    def measured(*strategies: str) -> dict[str, float]:
        if not split.held_out:
            return {}
        with told(tell, "measuring held-out texts"):
            return mean_losses(model, loaded.tokenizer, split.held_out, strategies, options, processes)

    before = measured("router") if config.has_router else {}
    add_gate(model, options)
    objective, states = _objective(model, split, processes, options, tell)
    fit = train_gate(
        model.router,
        objective,
        states,
        options,
        processes,
        stops_early=bool(split.held_out),
        tell_step=partial(tell, "fitting the gate"),
        tell_epoch=tell_epoch,
    )
    after = measured("router", "uniform", *(f"single:{index}" for index in range(config.num_experts)))
    used = usage(model.router, states, processes)
    labels = {f"single:{index}": f"single:{name}" for index, name in enumerate(config.expert_names)}
    return FitRouterResult(
        output_dir=Path(),
        repo=Path(),
        objective=options.objective,
        steps=fit.steps,
        best_step=fit.best_step,
        learning_rate=fit.learning_rate,
        num_texts=len(split.train),
        num_held_out=len(split.held_out),
        loss_before=before.get("router", after.get("uniform")),
        loss_after=after.pop("router", None),
        losses={labels.get(name, name): loss for name, loss in after.items()},
        shares=dict(zip(config.expert_names, used.shares, strict=True)),
        entropy=used.entropy,
    )


def check_base_model(model: FoundModel) -> None:
    """Check that the base model of a repo that does not hold it can be had.

    Raises:
        InputError: it cannot; says how to write the repo with another.
    """
    try:
        model.check_base_model()
    except InputError as error:
        raise InputError(f"{error} of `dylora-moe export {model.source}`, and use what it writes") from error


def _check_input(config: Any, options: FitRouterOptions) -> None:
    """Raise InputError if `router_input` is another one than that of the gate which is to be kept."""
    if keeps_gate(config, options) and options.router_input not in (None, config.router_input):
        raise InputError(
            f"the repo's gate reads {config.router_input}; for --router_input {options.router_input} start with --init zeros"
        )


def keeps_gate(config: Any, options: FitRouterOptions) -> bool:
    """Say whether the fit starts from the repo's own gate."""
    return config.has_gate and options.init == "existing"


def _check_experts(config: Any, repo: Path) -> None:
    if config.num_experts < 2:
        names = ", ".join(config.expert_names) or "none"
        raise InputError(
            f"{repo} has {config.num_experts} expert{'s' if config.num_experts != 1 else ''} ({names}), so there is nothing "
            "to route; export it with others"
        )


def _encoded(split: tuple[list, list], loaded: Any, options: FitRouterOptions) -> FittingTexts:
    embeddings = loaded.model.get_input_embeddings().weight.shape[0]
    train, held_out = (
        encode_texts(part, loaded.tokenizer, max_length=options.max_length, vocab_size=embeddings)
        for part in split
    )
    if not train:
        raise InputError("the texts are too short: each has one token, and none to predict; give longer ones")
    if not held_out and options.validation > 0:
        raise InputError(
            f"there are too few texts to hold out {options.validation:.0%} of them; give more, or pass --validation 0"
        )
    return FittingTexts(train, held_out)


def add_gate(model: Any, options: FitRouterOptions) -> None:
    """Give the model a gate to start from, and leave that alone trainable."""
    from dylora_moe.modeling.routing_dylora_moe import DyloraMoeRouter

    config = model.config
    keeps = keeps_gate(config, options)
    config.router_kind = "hidden"
    config.router_input = options.router_input or config.router_input or "base"
    if options.router_aux_loss_coef is not None:
        config.router_aux_loss_coef = options.router_aux_loss_coef
    if not keeps:
        model.router = DyloraMoeRouter(config).to(model.device)
        with torch.no_grad():
            for parameter in model.router.parameters():
                parameter.zero_()
    model.requires_grad_(False)
    model.router.requires_grad_(True)


def _objective(
    model: Any, split: FittingTexts, processes: Processes, options: FitRouterOptions, tell: Progress
) -> tuple[Objective, RouterStates]:
    """Read what the gate reads, and make the objective. Returns the states of held-out texts, too, or of all."""
    by_token = options.objective == "oracle" and options.targets == "tokens"

    def read(texts: list, what: str) -> RouterStates:
        return RouterStates(
            model,
            texts,
            processes,
            options.batch_tokens,
            with_best=by_token,
            progress=partial(tell, what),
        )

    states, held_out = read(split.train, "reading texts"), read(split.held_out, "reading held-out texts")
    common = (model, processes, states, held_out, options.batch_tokens)
    if options.objective == "loss":
        objective = LanguageModelingObjective(*common)
    elif by_token:
        objective = OracleObjective(*common, (states.best, held_out.best), (states.worth, held_out.worth))
    else:
        targets = named_experts(states, model.config), named_experts(held_out, model.config)
        objective = OracleObjective(*common, targets)
    return objective, held_out if split.held_out else states


def warn_of_collapse(result: FitRouterResult, options: FitRouterOptions) -> None:
    """Warn of a gate that leaves nearly everything to one expert, or nearly nothing to another."""
    said = [
        f"{name} comes first at {share:.1%} of the tokens"
        for name, share in result.shares.items()
        if share > MOST or share < LEAST
    ]
    if not said:
        return
    ways = [
        f"more texts that {' or '.join(name for name, share in result.shares.items() if share < LEAST)} is for"
    ]
    if not any(share < LEAST for share in result.shares.values()):
        ways = ["more texts of other kinds"]
    if options.objective == "loss":
        ways = ["a higher --router_aux_loss_coef", "--objective oracle", *ways]
    message = f"the gate has collapsed: {', '.join(said)}; try {', '.join(ways[:-1])}{' or ' if ways[1:] else ''}{ways[-1]}"
    warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def warn_of_loss(result: FitRouterResult, options: FitRouterOptions) -> None:
    """Warn of a gate under which held-out texts cost more than before, as the repo is served."""
    if result.loss_after is None or result.loss_before is None or result.loss_after <= result.loss_before:
        return
    other = "loss" if options.objective == "oracle" else "oracle"
    message = (
        f"held-out texts cost {result.loss_after:.4f} nats a token under the fitted gate, and {result.loss_before:.4f} "
        f"before; try --objective {other}, more texts, or keep the repo as it was"
    )
    warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def _write(
    source: Any, model: Any, result: FitRouterResult, options: FitRouterOptions, texts: list[dict[str, str]]
) -> None:
    """Write the repo, with a record of the fit in its config."""
    record = {
        "texts": texts,
        "objective": options.objective,
        "steps": result.steps,
        "best_step": result.best_step,
        "learning_rate": result.learning_rate,
        "seed": options.seed,
        "num_texts": result.num_texts,
        "num_held_out": result.num_held_out,
        "held_out_loss_before": result.loss_before,
        "held_out_loss": result.loss_after,
    }
    if options.objective == "oracle":
        record["targets"] = options.targets
    config = model.config
    fields = {name: getattr(config, name) for name in ROUTER_FIELDS}
    gate = model.router.gate
    write_with_gate(
        source,
        result.output_dir,
        (gate.weight.detach().cpu(), gate.bias.detach().cpu()),
        {**fields, "router_fitting": record},
        overwrite=options.overwrite,
    )


__all__ = ["FitRouterResult", "fit_router"]
