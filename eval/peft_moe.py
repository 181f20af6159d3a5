"""The backend `peft_moe`: mixtures of LoRA experts in EvalPlus's own commands and functions.

    PeftMoEDecoder          EvalPlus's `hf` decoder on any source, under a routing strategy; one prompt at a time
    run_codegen, evaluate   as EvalPlus's functions of these names, in batches; evaluate returns the scores
    register                adds the backend to the EvalPlus in this process

Works with EvalPlus 0.3.1 and with its main branch, where `make_model` takes further arguments.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

from evalplus import codegen as evalplus_codegen
from evalplus import evaluate as evalplus_evaluate
from evalplus import provider
from evalplus.provider.base import DecoderBase

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.sources.hub_and_folders import ARTIFACT
from dylora_moe.hub_export.unknown_options import parameter_names, refuse_unknown

from .benchmark import benchmark, score_run
from .evalplus_bridge.data import canonical_benchmark, load_benchmark
from .evalplus_bridge.decoder import PromptDecoder, check_chat_template
from .options import DEFAULT_FOLDER, BenchmarkOptions, check_temperature
from .sampling.devices import check_device_map
from .sampling.loading import find_model
from .sampling.run_record import Run, find_run, read_runs
from .scoring.scoring import pass_at_k, score_samples


BACKEND = "peft_moe"


class PeftMoEDecoder(PromptDecoder):
    """EvalPlus's `HuggingFaceDecoder` on any source that this package reads.

    Args:
        name: the source: a folder, a Hub id or `wandb:entity/project/name:version`; the base model, with
            `adapter_path`.
        wandb_artifact: `entity/project/name:version`, in place of `name`.
        dataset: "humaneval" or "mbpp".
        routing_strategy: the repo's default unless given.
        base_model, adapter_path, lora_alpha, revision, subfolder: see `find_model`.
        dtype, attn_implementation, device_map: see `FoundModel.load`.
        arguments: of EvalPlus's `DecoderBase`.

    Raises:
        InputError: a source, a strategy or an argument that cannot be used.
    """

    def __init__(
        self,
        name: str | None,
        dataset: str,
        *,
        wandb_artifact: str | None = None,
        routing_strategy: str | None = None,
        base_model: str | None = None,
        adapter_path: str | Path | Sequence[str | Path] | None = None,
        lora_alpha: float | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: str = "bfloat16",
        attn_implementation: str = "eager",
        device_map: Any = None,
        trust_remote_code: bool = False,
        **arguments: Any,
    ):
        from accelerate import PartialState

        refuse_unknown(arguments, _decoder_parameters())
        check_temperature(arguments.get("temperature", 0.0))
        check_device_map(device_map)
        name = _source(name, wandb_artifact)
        found = find_model(
            name,
            base_model=base_model,
            adapter_path=adapter_path,
            backend=BACKEND,
            lora_alpha=lora_alpha,
            revision=revision,
            subfolder=subfolder,
            trust_remote_code=trust_remote_code,
        )
        strategy = found.strategies(None if routing_strategy is None else [routing_strategy])[0]
        found.check_base_model()
        if not arguments.get("force_base_prompt"):
            check_chat_template(found.load_tokenizer())
        loaded = found.load(
            dtype=dtype,
            device=PartialState().device,
            device_map=device_map,
            attn_implementation=attn_implementation,
        )
        if loaded.is_mixture:
            loaded.model.generation_config.routing_strategy = strategy
        # A generation config's stop strings need it, and EvalPlus 0.3.1 passes none.
        loaded.model.generate = partial(loaded.model.generate, tokenizer=loaded.tokenizer)
        super().__init__(
            name or found.source,
            dataset,
            loaded.model,
            loaded.tokenizer,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
        self.device = loaded.model.device
        self.routing_strategy = strategy


def run_codegen(
    model: str | Path | None = None,
    dataset: str = "humaneval",
    root: str | Path = DEFAULT_FOLDER,
    *,
    wandb_artifact: str | None = None,
    bs: int | None = None,
    routing_strategy: str | None = None,
    version: str = "default",
    resume: bool = True,
    jsonl_fmt: bool = True,
    base_url: str | None = None,
    tp: int = 1,
    evalperf_type: str | None = None,
    **options: Any,
) -> str:
    """Generate as EvalPlus's `run_codegen`, in batches; return the samples' path, which names the strategy.

    The model stays in memory for the next call, which may ask for another strategy; `forget_model` frees it.

    Args:
        model: any source, see `PeftMoEDecoder`; or `wandb_artifact`, `entity/project/name:version`.
        root: where EvalPlus's folders are made.
        bs: batch size, of tasks as well as of samples.
        options: see `BenchmarkOptions`.

    Raises:
        InputError: what cannot be used, EvalPlus's own options for other backends among it.
    """
    BenchmarkOptions.of(options, run_codegen)
    others = {
        "version": version != "default",
        "jsonl_fmt": not jsonl_fmt,
        "base_url": base_url is not None,
        "tp": tp != 1,
        "evalperf_type": evalperf_type is not None,
    }
    refused = [name for name, given in others.items() if given]
    if refused:
        raise InputError(f"{', '.join(refused)} cannot be used with backend {BACKEND}")
    result = benchmark(
        _source(model, wandb_artifact),
        benchmarks=dataset,
        strategies=routing_strategy,
        output_dir=root,
        score=False,
        keep_model=True,
        **{"overwrite": not resume, **({} if bs is None else {"batch_size": bs}), **options},
    )
    return str(result.runs[0].samples_path)


def evaluate(dataset: str, samples: str | Path, **options: Any) -> dict[str, float]:
    """Score samples as EvalPlus does. Results that these very samples already have are read, not made again.

    Args:
        samples: an EvalPlus samples file.
        options: `base_only`, `parallel`, `sandbox`, `progress`, `tell_expected`; for files that `benchmark` did not make,
            `task_ids` and `mini` as well, see `score_samples`.

    Returns:
        `{"pass@1": …, "plus_pass@1": …}` and so on for every k of 1, 10 and 100 with samples enough;
        fractions.

    Raises:
        InputError: no such file, samples of other tasks, or of a benchmark that is not this one or not this
            version of it; no such option.
    """
    refuse_unknown(options, parameter_names(evaluate, score_samples))
    recorded = _record_of(samples)
    if recorded is not None and recorded.has_samples:
        _check_record(recorded, canonical_benchmark(dataset), options)
        return score_run(recorded, **options).scores
    return pass_at_k(score_samples(samples, canonical_benchmark(dataset), **options))


def _record_of(samples: str | Path) -> Run | None:
    samples = Path(samples)
    return find_run(read_runs(samples.parent.parent), samples=f"{samples.parent.name}/{samples.name}")


def _check_record(run: Run, dataset: str, options: dict[str, Any]) -> None:
    if run.benchmark != dataset:
        raise InputError(f"{run.samples_path} holds samples of {run.benchmark}, not of {dataset}")
    if "task_ids" in options or options.pop("mini", run.mini) != run.mini:
        raise InputError(f"leave out task_ids and mini: the record of {run.samples_path} says them")
    if load_benchmark(dataset, mini=run.mini).dataset_hash != run.dataset_hash:
        raise InputError(
            f"{run.samples_path} was made for another version of {dataset} than is on this machine"
        )


def register() -> None:
    """Let the EvalPlus in this process take `backend="peft_moe"`.

    `evalplus.provider.make_model` and `evalplus.codegen.run_codegen` then accept `base_model`,
    `adapter_path`, `routing_strategy` and so on, and `evalplus.evaluate.evaluate` returns the scores of
    samples that `run_codegen` made with this backend. Other calls go where they went. Calling it again
    changes nothing.

    Modules that imported one of these functions before get the new one, scripts and notebooks among them.
    """
    for module, name, wrap in (
        (provider, "make_model", lambda stock: _with_backend(stock, _decoder_maker(stock))),
        (
            evalplus_codegen,
            "run_codegen",
            lambda stock: _with_backend(stock, partial(run_codegen, backend=BACKEND)),
        ),
        (evalplus_evaluate, "evaluate", _with_scores),
    ):
        stock = getattr(module, name)
        if not getattr(stock, "is_peft_moe", False):
            ours = wrap(stock)
            ours.is_peft_moe = True
            _replace(stock, ours)


def _replace(stock: Callable, ours: Callable) -> None:
    """Put `ours` in the place of EvalPlus's function in every module that has imported it, by whatever name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock:
                setattr(module, name, ours)


def _with_backend(stock: Callable, ours: Callable) -> Callable:
    """Wrap EvalPlus's function, so that calls with `backend="peft_moe"` go to `ours`."""
    names = parameter_names(stock)

    @wraps(stock)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("backend") != BACKEND:
            return stock(*args, **kwargs)
        return ours(**{name: value for name, value in given.items() if name != "backend"})

    return either


def _with_scores(stock: Callable) -> Callable:
    """Wrap EvalPlus's `evaluate`, so that it scores and returns the scores of what `run_codegen` made.

    Like EvalPlus's it makes the samples first where it gets the arguments of `run_codegen`.
    """
    stocks, own = parameter_names(stock), parameter_names(evaluate, score_samples)

    @wraps(stock)
    def either(*args: Any, **kwargs: Any) -> dict[str, float] | None:
        given = {**dict(zip(stocks, args, strict=False)), **kwargs}
        of_codegen = {name: given.pop(name) for name in list(given) if name not in (*stocks, *own)}
        if of_codegen.get("backend") != BACKEND and (of_codegen or not _is_ours(given.get("samples"))):
            return stock(*args, **kwargs)
        for name in set(stocks).difference(own).intersection(given):
            if given.pop(name) != inspect.signature(stock).parameters[name].default:
                raise InputError(f"{name} cannot be used with backend {BACKEND}; leave it out")
        if of_codegen:
            mini = given.get("mini", False)
            given["samples"] = evalplus_codegen.run_codegen(dataset=given["dataset"], mini=mini, **of_codegen)
        return evaluate(**given)

    return either


def _is_ours(samples: Any) -> bool:
    """Whether this backend made the samples: their name has it, and the record beside them."""
    if not isinstance(samples, str | Path) or f"_{BACKEND}_" not in Path(samples).name:
        return False
    record = _record_of(samples)
    return record is not None and record.backend == BACKEND


def _decoder_maker(make_model: Callable) -> Callable[..., PeftMoEDecoder]:
    """Make `make_model` for our backend.

    EvalPlus's own passes every backend's arguments: those of the others are left out, and what EvalPlus does
    not know either reaches the decoder, which refuses it.
    """
    of_others = set(parameter_names(make_model)) - set(_decoder_parameters())

    def make_decoder(
        model: str | None = None, dataset: str = "humaneval", **arguments: Any
    ) -> PeftMoEDecoder:
        kept = {name: value for name, value in arguments.items() if name not in of_others}
        return PeftMoEDecoder(model, dataset, **kept)

    return make_decoder


def _decoder_parameters() -> list[str]:
    """List what `PeftMoEDecoder` takes by name, EvalPlus's own parameters of a decoder among it."""
    given = ("name", "dataset", "model", "tokenizer")
    names = parameter_names(PeftMoEDecoder.__init__, PromptDecoder.__init__, DecoderBase.__init__)
    return [name for name in names if name not in given]


def _source(model: str | Path | None, wandb_artifact: str | None) -> str | Path | None:
    """Return the source; raise InputError if model and W&B artifact are both given."""
    if wandb_artifact is None:
        return model
    if model is not None:
        raise InputError(f"model {model} and wandb_artifact {wandb_artifact} are both given; leave one out")
    return f"{ARTIFACT}{wandb_artifact.removeprefix(ARTIFACT)}"


__all__ = ["PeftMoEDecoder", "evaluate", "register", "run_codegen"]
